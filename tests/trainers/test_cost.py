"""What a run takes, in tokens and seconds, and when it stops for it: by clocks that the tests set."""

import json
import time

import pytest
from transformers import TrainerCallback

from tests.trainers.tiny_runs import FULL_VOCABULARY_METHODS, METHODS, Recorder, build, pairs, run

EVERY_METHOD = [*METHODS, *FULL_VOCABULARY_METHODS]


class Clocks(TrainerCallback):
    """CPU and wall time that pass only where a test lets them: so much in each optimizer step."""

    def __init__(self, monkeypatch, *, cpu_per_step: float, wall_per_step: float):
        self.cpu, self.wall = 1000.0, 7000.0
        self.per_step = cpu_per_step, wall_per_step
        monkeypatch.setattr(time, "process_time", lambda: self.cpu)
        monkeypatch.setattr(time, "perf_counter", self._wall_time)

    def _wall_time(self) -> float:
        self.wall += 1e-9  # no phase of a rollout takes no time at all
        return self.wall

    def advance(self, cpu: float, wall: float) -> None:
        self.cpu, self.wall = self.cpu + cpu, self.wall + wall

    def on_step_begin(self, args, state, control, **kwargs):
        self.advance(*self.per_step)


def timed(method: str, output_dir, clocks: Clocks, **settings):
    trainer = build(method, output_dir, **settings)
    trainer.add_callback(clocks)
    return trainer


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_seconds_are_those_between_the_first_step_and_the_last(method, tmp_path, monkeypatch):
    """CPU seconds of the process, wall seconds of the clock; what comes before and after training does not count."""
    clocks = Clocks(monkeypatch, cpu_per_step=2.0, wall_per_step=3.5)
    trainer = timed(method, tmp_path, clocks, max_steps=3)
    clocks.advance(100, 100)
    trainer.train()
    clocks.advance(100, 100)
    cost = trainer.cost()
    assert cost.cpu_seconds == pytest.approx(3 * 2.0, rel=1e-6)
    assert cost.wall_seconds == pytest.approx(3 * 3.5, rel=1e-6)
    trainer.save_cost(tmp_path / "cost.json")
    assert json.loads((tmp_path / "cost.json").read_text()) == {
        "optimizer_steps": 3,
        "generated_tokens": cost.generated_tokens,
        "cpu_seconds": cost.cpu_seconds,
        "wall_seconds": cost.wall_seconds,
    }


def test_what_is_done_uncounted_costs_nothing(tmp_path, monkeypatch):
    """As the answers for the report, which are written between two steps."""
    clocks = Clocks(monkeypatch, cpu_per_step=2.0, wall_per_step=3.5)
    trainer = timed("kd", tmp_path, clocks, max_steps=3)

    class Aside(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with trainer.uncounted():
                clocks.advance(50.0, 70.0)

    trainer.add_callback(Aside())
    trainer.train()
    assert trainer.cost().cpu_seconds == pytest.approx(3 * 2.0, rel=1e-6)
    assert trainer.cost().wall_seconds == pytest.approx(3 * 3.5, rel=1e-6)


@pytest.mark.parametrize(("budget", "steps"), [(2.0, 1), (2.1, 2), (6.0, 3), (1e6, 5)])
def test_a_run_stops_when_its_cpu_seconds_are_spent(budget, steps, tmp_path, monkeypatch):
    """Two a step, while the clock on the wall runs a hundred times as fast: at the end of the step that spends all."""
    clocks = Clocks(monkeypatch, cpu_per_step=2.0, wall_per_step=200.0)
    trainer = timed("kd", tmp_path, clocks, max_steps=5, max_cpu_seconds=budget, max_generated_tokens=10**9)
    trainer.train()
    assert trainer.state.global_step == steps == trainer.cost().optimizer_steps
    assert trainer.cost().cpu_seconds == pytest.approx(2.0 * steps, rel=1e-6)


def test_wall_time_spends_no_cpu_budget(tmp_path, monkeypatch):
    """A process that waits, for a disk or for others, spends nothing."""
    trainer = timed("kd", tmp_path, Clocks(monkeypatch, cpu_per_step=0.0, wall_per_step=500.0), max_steps=3,
                    max_cpu_seconds=1.0)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3


MIXTURE = {"divergence": "forward_kl", "sequences": "data", "lmbda": 0.5, "data": pairs(32), "seed": 3}
SAVED = {"save_strategy": "steps", "save_steps": 2}


def test_what_a_run_costs_adds_up_and_survives_a_resume(tmp_path, monkeypatch):
    clocks = Clocks(monkeypatch, cpu_per_step=2.0, wall_per_step=3.5)
    trainer = timed("kd", tmp_path / "first", clocks, max_steps=2, **MIXTURE, **SAVED)
    first = Recorder(trainer)
    trainer.add_callback(first)
    trainer.train()
    spent = trainer.cost()
    assert spent.generated_tokens == sum(int(rollout.completion_mask_BT.sum()) for rollout in first.rollouts) > 0
    assert spent.optimizer_steps == 2

    clocks.advance(1000, 1000)  # between the runs
    resumed = timed("kd", tmp_path / "resumed", clocks, max_steps=4, **MIXTURE, **SAVED)
    later = Recorder(resumed)
    resumed.add_callback(later)
    assert resumed.cost().generated_tokens == 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert len(later.rollouts) == 2
    of_later = sum(int(rollout.completion_mask_BT.sum()) for rollout in later.rollouts)
    assert resumed.cost().generated_tokens == spent.generated_tokens + of_later
    assert resumed.cost().cpu_seconds == pytest.approx(4 * 2.0, rel=1e-6)
    assert resumed.cost().wall_seconds == pytest.approx(4 * 3.5, rel=1e-6)


@pytest.mark.parametrize("method", ["kd", pytest.param("all-actions", marks=pytest.mark.slow)])
def test_a_run_stops_when_its_tokens_are_spent(method, tmp_path):
    """At the end of the step in which they are: one token more than the first rollout takes is spent in the second.

    A budget of seconds that is not spent makes no difference.
    """
    free = run(method, tmp_path / "free", max_steps=3)
    tokens = [int(rollout.completion_mask_BT.sum()) for rollout in free.rollouts]
    for budget, steps, seconds in ((tokens[0], 1, 1e6), (tokens[0] + 1, 2, None)):
        trainer = build(method, tmp_path / "budget", max_steps=3, max_generated_tokens=budget, max_cpu_seconds=seconds)
        trainer.train()
        assert trainer.state.global_step == steps == trainer.cost().optimizer_steps
        assert trainer.cost().generated_tokens == sum(tokens[:steps])


def test_two_passes_over_a_rollout_cost_its_tokens_once(tmp_path):
    recorder = run("kd", tmp_path, num_iterations=2)
    assert recorder.trainer.cost().generated_tokens == int(recorder.rollouts[0].completion_mask_BT.sum())
