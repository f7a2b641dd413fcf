"""The settings that all trainers share: `transformers.TrainingArguments` with other defaults and checked ranges."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from transformers.training_args import TrainingArguments

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.directions import greater_is_better
from rlkd_trl.settings.ranges import (
    LARGEST_COUNT,
    Count,
    LearningRate,
    Range,
    Seed,
    ShareBelowOne,
    check_ranges,
)
from rlkd_trl.trainers.inherited_settings import (
    REFUSED,
    check_inherited,
    check_optimizer,
    refusals_are_input_errors,
)
from rlkd_trl.trainers.processes import check_timeout

_Steps = Annotated[float, Range(0, LARGEST_COUNT, above=True)]  # below 1: a share of all steps

# The numbers among the fields of TrainingArguments.
INHERITED_RANGES = {
    "per_device_train_batch_size": Count,
    "num_train_epochs": Annotated[float, Range(0, 1e6, above=True)],
    "max_steps": Annotated[int, Range(1, LARGEST_COUNT, also=-1)],
    "learning_rate": LearningRate,
    "warmup_steps": Annotated[float, Range(0, LARGEST_COUNT)],
    "weight_decay": Annotated[float, Range(0, 100)],
    "adam_beta1": ShareBelowOne,
    "adam_beta2": ShareBelowOne,
    "adam_epsilon": Annotated[float, Range(1e-20, 1)],  # in float32 a square of less is 0, and so is a division by it
    "gradient_accumulation_steps": Count,
    "max_grad_norm": Annotated[float, Range(0, 1e6)],
    "label_smoothing_factor": ShareBelowOne,
    "neftune_noise_alpha": Annotated[float, Range(0, 1e3)] | None,
    "torch_empty_cache_steps": Count | None,
    "logging_steps": _Steps,
    "eval_steps": _Steps | None,
    "eval_delay": Annotated[float, Range(0, LARGEST_COUNT)],
    "per_device_eval_batch_size": Count,
    "eval_accumulation_steps": Count | None,
    "save_steps": _Steps,
    "save_total_limit": Count | None,
    "seed": Seed,
    "data_seed": Seed | None,
    "dataloader_num_workers": Annotated[int, Range(0, 1024)],
    "dataloader_prefetch_factor": Count | None,
    "ddp_bucket_cap_mb": Count | None,
    "ddp_timeout": Count,
    "local_rank": Annotated[int, Range(0, LARGEST_COUNT, also=-1)],
}


@dataclass
class BaseConfig(TrainingArguments):
    """`TrainingArguments` with defaults that suit language models on texts; every number is checked first of all.

    When it is made in a launched process, transformers' class connects the processes with each other; on a CPU see
    `processes.connect_processes`.

    Raises:
        InputError: A number is out of its range, NaN or infinite; a field of the base class is set that is not
            supported (see `inherited_settings`), or that transformers refuses.
    """

    # Fields of the base class that must keep their defaults, each with the reason.
    refused: ClassVar[dict[str, str]] = REFUSED

    # As transformers' own, which it computes; a sketch of the class has to know it.
    output_dir: str = field(
        default="trainer_output", metadata={"help": "Where the student, its checkpoints and results are written."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the data's columns are read as they are."}
    )
    # None must come first: HfArgumentParser cannot read the other order.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Where to log: none, wandb, ..."}
    )

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay False: it would show a loss of NaN as 0."}
    )
    max_skipped_steps: Count = field(
        default=5,
        metadata={
            "help": "Stop, with a checkpoint, after so many optimizer steps in a row whose loss or gradients were not "
            "finite; each such step is skipped."
        },
    )

    def __post_init__(self):
        if self.logging_nan_inf_filter:
            raise InputError("logging_nan_inf_filter must stay False: it would show a loss of NaN as 0.")
        check_ranges(self, prefix="", inherited=INHERITED_RANGES)
        check_inherited(self, self.refused)
        # Without it several processes on a machine without accelerators would not synchronise.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        check_timeout(self)
        with refusals_are_input_errors():
            super().__post_init__()
        check_optimizer(self)

    def _choose_metric(self, usual: str) -> None:
        """Sets the metric for the best checkpoint, or a schedule that watches one: `usual`, unless it is named.

        Trainers that evaluate call it first. Raises `InputError`.
        """
        keeps_the_best = self.load_best_model_at_end or self.save_strategy == "best"
        if keeps_the_best and self.eval_strategy == "no":
            raise InputError("The best checkpoint is found by evaluating: set eval_strategy to steps or epoch.")
        if keeps_the_best or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            # Trainer's own default, the loss, is not evaluated here.
            self.metric_for_best_model = self.metric_for_best_model or usual
        if self.metric_for_best_model is not None:
            self.greater_is_better = greater_is_better(self.metric_for_best_model, self.greater_is_better)

    def __getstate__(self) -> dict[str, object]:
        """The settings without the account's token, as Trainer pickles them into checkpoints, which may be pushed."""
        return {**vars(self), "hub_token": None}
