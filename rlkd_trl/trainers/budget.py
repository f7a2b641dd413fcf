"""What a run has spent, and its end when its budget is."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now, spent = (time.process_time(), time.perf_counter()), self._trainer.rollout_state
        spent.cpu_seconds += now[0] - self._last[0]
        spent.wall_seconds += now[1] - self._last[1]
        self._last = now
        if self._trainer.budget_is_spent():
            control.should_training_stop = True
