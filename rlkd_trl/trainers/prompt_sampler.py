"""The order in which prompts are drawn."""

from trl.trainer.utils import RepeatSampler


class EpochSeededSampler(RepeatSampler):
    """TRL's sampler with a different order in each epoch, also after a resume, where TRL's starts with the first."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
