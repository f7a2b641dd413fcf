"""What a run has spent, and the end of the run when its budget is used up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import Trainer, TrainerCallback


@dataclass(frozen=True)
class Cost:
    """The cost of training so far, over all processes, without the evaluations before and after it.

    generated_tokens: completion tokens of all rollouts, sampled from a model or, in distillation on data, taken from
    the data. cpu_seconds: CPU time of all processes and their threads. wall_seconds: elapsed in the first process.
    """

    optimizer_steps: int
    generated_tokens: int
    cpu_seconds: float
    wall_seconds: float


@dataclass
class Spent:
    """What one process has spent on a run without rollouts."""

    generated_tokens: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0


class Clock(TrainerCallback):
    """Adds up the time between optimizer steps in the trainer's attribute `spent`, which has the fields of `Spent`."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def cost(self) -> Cost:
        """The cost of training so far. All processes call it together."""
        trainer, spent = self._trainer, self._trainer.spent
        cpu_seconds = torch.tensor(spent.cpu_seconds, device=trainer.accelerator.device)
        return Cost(
            optimizer_steps=trainer.state.global_step,
            generated_tokens=spent.generated_tokens,
            cpu_seconds=float(trainer.accelerator.reduce(cpu_seconds, reduction="sum")),
            wall_seconds=spent.wall_seconds,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.process_time(), time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done within takes no time of the run's."""
        began = time.process_time(), time.perf_counter()
        yield
        passed = time.process_time() - began[0], time.perf_counter() - began[1]
        self._last = self._last[0] + passed[0], self._last[1] + passed[1]

    def on_step_end(self, args, state, control, **kwargs):
        now, spent = (time.process_time(), time.perf_counter()), self._trainer.spent
        spent.cpu_seconds += now[0] - self._last[0]
        spent.wall_seconds += now[1] - self._last[1]
        self._last = now


class BudgetMeter(Clock):
    """A clock that also stops the run when its budget is spent."""

    def is_spent(self) -> bool:
        """Whether `max_generated_tokens` or `max_cpu_seconds` are used up; every process gets the same answer."""
        args, is_spent = self._trainer.args, False
        if args.max_generated_tokens is not None:
            is_spent = self._trainer.spent.generated_tokens >= args.max_generated_tokens
        if args.max_cpu_seconds is not None:
            is_spent |= self.cost().cpu_seconds >= args.max_cpu_seconds
        return is_spent

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.is_spent():
            control.should_training_stop = True
