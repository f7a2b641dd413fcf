"""Which prompts each rollout gets, and in what order."""

from datasets import Dataset
from torch.utils.data import DataLoader
from trl.trainer.utils import RepeatSampler

from rlkd_trl.data.streams import RepeatedRows, RowStream
from rlkd_trl.trainers.config import RolloutConfig


class EpochSeededSampler(RepeatSampler):
    """TRL's sampler with a different order in each epoch, also after a resume, where TRL's starts with the first."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


def rollout_loader(
    dataset: Dataset | RowStream, args: RolloutConfig, *, repeats: int, num_processes: int
) -> DataLoader:
    """A loader of each rollout's prompts, `repeats` times, once for every micro-batch; those of all processes."""
    prompts = args.prompts_per_rollout
    together = prompts * num_processes
    if isinstance(dataset, RowStream):
        rows = RepeatedRows(dataset, at_a_time=together, repeats=repeats)
        return DataLoader(rows, batch_size=prompts, collate_fn=list, drop_last=True)
    sampler = EpochSeededSampler(
        dataset,
        mini_repeat_count=1,
        batch_size=together,
        repeat_count=repeats,
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )
    return DataLoader(dataset, batch_size=prompts, sampler=sampler, collate_fn=list, drop_last=True)
