"""The order in which prompts are drawn."""

from trl.trainer.utils import RepeatSampler


class EpochSeededSampler(RepeatSampler):
    """Another order each epoch, the same in a resumed run: TRL's sampler would start again with the first epoch's."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
