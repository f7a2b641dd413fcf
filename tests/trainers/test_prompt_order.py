"""Which prompts a run trains on, and in what order."""

from itertools import chain

import pytest
from trl.trainer.utils import RepeatSampler

from rlkd_trl.trainers.prompt_sampler import EpochSeededSampler
from tests.trainers.tiny_runs import build, prompts

ROWS, PROMPTS_PER_ROLLOUT = 12, 4  # three rollouts an epoch


def orders(sampler, epochs: list[int]) -> list[list[int]]:
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


@pytest.mark.parametrize("seed", [0, 42])
def test_an_epochs_order_depends_on_seed_and_epoch_alone(seed):
    """Not on how many epochs were drawn before in this process: that is what differs in a resumed run."""
    first = EpochSeededSampler(range(ROWS), mini_repeat_count=1, batch_size=PROMPTS_PER_ROLLOUT, seed=seed)
    resumed = EpochSeededSampler(range(ROWS), mini_repeat_count=1, batch_size=PROMPTS_PER_ROLLOUT, seed=seed)
    uninterrupted = orders(first, [0, 1, 2, 3])
    assert all(sorted(order) == list(range(ROWS)) for order in uninterrupted)
    assert len({tuple(order) for order in uninterrupted}) == 4, "every epoch has an order of its own"
    assert orders(resumed, [2, 3]) == uninterrupted[2:]
    assert orders(resumed, [2, 0]) == [uninterrupted[2], uninterrupted[0]], "back and again"
    # TRL's sampler gives a resumed run's first epoch the order of epoch 0, whichever it is.
    trl = RepeatSampler(range(ROWS), mini_repeat_count=1, batch_size=PROMPTS_PER_ROLLOUT, seed=seed)
    assert list(trl) == uninterrupted[0] != uninterrupted[2]


def test_other_seeds_give_other_orders():
    samplers = [EpochSeededSampler(range(ROWS), mini_repeat_count=1, batch_size=1, seed=seed) for seed in (0, 7)]
    one, other = (orders(sampler, [0, 1]) for sampler in samplers)
    assert one[0] != other[0] and one[1] != other[1]


def prompts_seen(trainer) -> list[list[str]]:
    """Fills up while `trainer` trains: the prompts of each rollout, in order."""
    seen, make_rollout = [], trainer.make_rollout

    def recorded(rows):
        seen.append([row["prompt"] for row in rows])
        return make_rollout(rows)

    trainer.make_rollout = recorded
    return seen


@pytest.mark.parametrize("num_iterations", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_every_epoch_goes_once_through_all_prompts_in_an_order_of_its_own(num_iterations, tmp_path):
    data = prompts(ROWS)
    trainer = build("rloo-token", tmp_path, data=data, max_steps=9 * num_iterations, num_iterations=num_iterations)
    seen = prompts_seen(trainer)
    trainer.train()
    assert [len(rollout) for rollout in seen] == [PROMPTS_PER_ROLLOUT] * 9
    epochs = [list(chain(*seen[3 * e : 3 * e + 3])) for e in range(3)]
    assert all(sorted(epoch) == sorted(data["prompt"]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Where nine rollouts, of three epochs, left a checkpoint each, and the prompts of each."""
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    trainer = build("rloo-sequence", output_dir, data=prompts(ROWS), max_steps=9, save_strategy="steps", save_steps=1)
    seen = prompts_seen(trainer)
    trainer.train()
    return output_dir, seen


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow(0.5)) for step in (4, 6, 7))])
def test_a_resumed_run_sees_the_prompts_that_the_uninterrupted_one_saw(step, uninterrupted, tmp_path):
    """From the end of an epoch (after 3 or 6 rollouts) and from within the second and the third (after 4 or 7)."""
    output_dir, expected = uninterrupted
    resumed = build("rloo-sequence", tmp_path, data=prompts(ROWS), max_steps=9)
    seen = prompts_seen(resumed)
    resumed.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{step}"))
    assert seen == expected[step:]
    assert len(seen) == 9 - step


def test_data_seed_changes_the_order_alone(tmp_path):
    """It stands in for `seed`, which then only draws the completions."""
    seen = []
    for settings in ({"seed": 3}, {"seed": 3, "data_seed": 3}, {"seed": 3, "data_seed": 4}):
        trainer = build("ppo", tmp_path, data=prompts(ROWS), max_steps=3, **settings)
        seen.append(prompts_seen(trainer))
        trainer.train()
    default, same, other = seen
    assert default == same != other
    assert sorted(chain(*default)) == sorted(chain(*other))
