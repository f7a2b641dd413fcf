"""What a run has spent, and its end when its budget is."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from rlkd_trl.trainers.rollout_trainer import RolloutTrainer


@dataclass(frozen=True)
class Cost:
    """What training has taken so far, over all processes; evaluations before and after it are not in it.

    generated_tokens: completion tokens of all rollouts, sampled from a model or, in distillation on data, read from
    the data. cpu_seconds: of the processes, all threads. wall_seconds: of the first process.
    """

    optimizer_steps: int
    generated_tokens: int
    cpu_seconds: float
    wall_seconds: float


class BudgetMeter(TrainerCallback):
    """Adds up time between optimizer steps, and stops the run when its budget is spent."""

    def __init__(self, trainer: "RolloutTrainer"):
        self._trainer = trainer

    def cost(self) -> Cost:
        """See `RolloutTrainer.cost`; all processes call it together."""
        trainer, spent = self._trainer, self._trainer.rollout_state
        cpu_seconds = torch.tensor(spent.cpu_seconds, device=trainer.accelerator.device)
        return Cost(
            optimizer_steps=trainer.state.global_step,
            generated_tokens=spent.generated_tokens,
            cpu_seconds=float(trainer.accelerator.reduce(cpu_seconds, reduction="sum")),
            wall_seconds=spent.wall_seconds,
        )

    def is_spent(self) -> bool:
        """Whether `max_generated_tokens` or `max_cpu_seconds` are used up; every process gets the same answer."""
        args, spent = self._trainer.args, False
        if args.max_generated_tokens is not None:
            spent = self._trainer.rollout_state.generated_tokens >= args.max_generated_tokens
        if args.max_cpu_seconds is not None:
            spent |= self.cost().cpu_seconds >= args.max_cpu_seconds
        return spent

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now, spent = (time.process_time(), time.perf_counter()), self._trainer.rollout_state
        spent.cpu_seconds += now[0] - self._last[0]
        spent.wall_seconds += now[1] - self._last[1]
        self._last = now
        if self.is_spent():
            control.should_training_stop = True
