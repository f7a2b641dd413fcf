"""Our trainers, with the phases of their steps metered."""

from collections.abc import Iterator
from contextlib import contextmanager

from step_phases import PhaseMeter, StepEnd
from workload import EOS, UNK, Shape

from rlkd_trl.trainers.on_policy import OnPolicyTrainer
from rlkd_trl.trainers.rollout_metrics import PhaseTimer

PHASES = {"sample": "generate", "score": "score"}  # the trainer's names of the phases that are not the update


class MeteredTimer(PhaseTimer):
    """The trainer's timer, which also tells a meter of the phases in `PHASES`."""

    def __init__(self, meter: PhaseMeter):
        super().__init__()
        self._meter = meter

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name), self._meter.phase(PHASES.get(name, "update")):
            yield


def settings(shape: Shape, steps: int, update_batch_size: int, beta: float) -> dict[str, object]:
    """What the configs of all trainers that are measured have, for `steps` rollouts."""
    updates = shape.completions // update_batch_size
    return {
        "num_generations": shape.samples,
        "max_completion_length": shape.completion_tokens,
        "per_device_train_batch_size": update_batch_size,
        "steps_per_generation": updates,
        "beta": beta,
        "learning_rate": 1e-5,
        "max_steps": steps * updates,
        "save_strategy": "no",
        "logging_steps": steps * updates,
        "disable_tqdm": True,
        "use_cpu": True,
    }


def metered(trainer: OnPolicyTrainer, updates: int) -> PhaseMeter:
    """The trainer's completions never end early, and its phases are counted by the meter that is returned.

    updates: optimizer steps in a step.
    """
    for policy in (trainer.policy, trainer.reference):
        if policy is not None:
            policy.forbidden_V[[EOS, UNK]] = True
    meter = PhaseMeter()
    trainer._timer = MeteredTimer(meter)
    trainer.add_callback(StepEnd(meter, updates))
    return meter
