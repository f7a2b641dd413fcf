"""Sums of terms, a user's own functions, and loading them by name."""

import asyncio
import sys
import textwrap

import pytest
import torch

from rlkd_trl.errors import InputError
from rlkd_trl.rewards import (
    REWARDS,
    LogLikelihoodReward,
    LogRatioReward,
    RewardInputs,
    RewardModel,
    TeacherForcingReward,
    load_reward,
    sequence_rewards,
)
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.models.reference import pad_completions
from tests.rewards.reference import log_probability, logits_of, teacher_forcing
from tests.rewards.test_teacher_rewards import templates_of
from tests.tiny_models import EOS, tiny_llama, tiny_t5

PROMPTS = ["w3 w4 w5", "w6"]
INDEX = [1, 0, 1, 0]
COMPLETIONS = [[4, 5, 1], [6], [7, 8, 9, 10], [1]]
MASK_BT = pad_completions(COMPLETIONS)[1]


def inputs_of(filler=0, rows=None, logps=None) -> RewardInputs:
    ids_BT, mask_BT = pad_completions(COMPLETIONS, filler)
    return RewardInputs(
        rows=rows or [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)],
        prompt_index_B=torch.tensor(INDEX),
        completion_ids_BT=ids_BT,
        completion_mask_BT=mask_BT,
        ended_B=torch.tensor([ids[-1] == EOS for ids in COMPLETIONS]),
        completions=["a b", "c", "d e f g", ""],
        student_logps_BT=logps,
    )


def result_of(reward_model: RewardModel, inputs: RewardInputs | None = None):
    inputs = inputs or inputs_of()
    return reward_model.rewards(inputs, reward_model.score(inputs))


def padded(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([row + [0.0] * (4 - len(row)) for row in rows])


def on_last(scores: list[float]) -> torch.Tensor:
    return padded([[0.0] * (len(ids) - 1) + [score] for ids, score in zip(COMPLETIONS, scores, strict=True)])


def teacher_forcing_BT(model, tokenizer, **kwargs) -> torch.Tensor:
    return padded(
        [
            teacher_forcing(logits_of(model, tokenizer, PROMPTS[p], ids), ids, ended=ids[-1] == EOS, **kwargs)
            for p, ids in zip(INDEX, COMPLETIONS, strict=True)
        ]
    )


def log_likelihood_BT(model, tokenizer) -> torch.Tensor:
    return padded(
        [
            [
                log_probability(z, token)
                for z, token in zip(logits_of(model, tokenizer, PROMPTS[p], ids), ids, strict=False)
            ]
            for p, ids in zip(INDEX, COMPLETIONS, strict=True)
        ]
    )


def count_scorings(monkeypatch) -> list[Teacher]:
    """The teachers that were asked, one entry a call."""
    asked, score = [], Teacher.score
    monkeypatch.setattr(
        Teacher, "score", lambda self, *args, **kwargs: asked.append(self) or score(self, *args, **kwargs)
    )
    return asked


FLOAT32 = {"rtol": 1e-5, "atol": 3e-5}


def test_a_weighted_sum_of_teacher_and_sequence_terms(tokenizer):
    model = tiny_t5(tied=True)
    panel = TeacherPanel([Teacher(model, tokenizer)])
    reward_model = RewardModel(
        [TeacherForcingReward(panel, gamma=0.9), LogLikelihoodReward(panel), sequence_rewards.length], [2.0, -0.5, 0.1]
    )
    result = result_of(reward_model)
    forcing_BT, likelihood_BT = teacher_forcing_BT(model, tokenizer, gamma=0.9), log_likelihood_BT(model, tokenizer)
    lengths_BT = on_last([3.0, 1.0, 4.0, 1.0])
    torch.testing.assert_close(result.rewards_BT, 2.0 * forcing_BT - 0.5 * likelihood_BT + 0.1 * lengths_BT, **FLOAT32)
    assert list(result.terms) == ["TeacherForcingReward", "LogLikelihoodReward", "length"]
    torch.testing.assert_close(result.terms["TeacherForcingReward"], forcing_BT, **FLOAT32)  # without its weight
    torch.testing.assert_close(result.terms["length"], lengths_BT)
    assert [scores.weight for scores in result.scores] == [1.0]


class OwnForcing(TeacherForcingReward):
    """As a user's class, which the package calls with care."""


@pytest.mark.parametrize("kind", [TeacherForcingReward, OwnForcing])
def test_potentials_are_the_weighted_values_of_the_terms_that_have_one(kind, tokenizer):
    models = [tiny_llama(seed=1), tiny_llama(seed=2)]
    panel = TeacherPanel([Teacher(model, tokenizer) for model in models], teacher_weights=[1.0, 3.0])
    result = result_of(RewardModel([kind(panel), LogLikelihoodReward(panel)], [3.0, 1.0]))
    assert result.potentials_BT1.shape == (4, 5)
    expected_BT = sum(w * teacher_forcing_BT(m, tokenizer) for w, m in zip((0.25, 0.75), models, strict=True))
    torch.testing.assert_close(result.terms[kind.__name__], expected_BT, rtol=1e-5, atol=1e-4)
    for b, (p, ids) in enumerate(zip(INDEX, COMPLETIONS, strict=True)):
        first_TV, second_TV = (logits_of(model, tokenizer, PROMPTS[p], ids) for model in models)
        for t in range(len(ids)):
            first, second = (max(z_TV[t]) - sum(z_TV[t]) / 32 for z_TV in (first_TV, second_TV))
            expected = 3 * (0.25 * first + 0.75 * second)
            assert float(result.potentials_BT1[b, t]) == pytest.approx(expected, abs=1e-4)


def test_a_panel_is_asked_once_whatever_reads_it(tokenizer, monkeypatch):
    model = tiny_t5(tied=True)
    panel = TeacherPanel([Teacher(model, tokenizer)])
    terms = [
        TeacherForcingReward(panel, value="max"),
        TeacherForcingReward(panel, value="expected"),
        TeacherForcingReward(panel, value="soft", tau=0.5),
        LogLikelihoodReward(panel),
    ]
    asked = count_scorings(monkeypatch)
    result = result_of(RewardModel(terms))
    assert asked == [panel.scorers[0].teacher]
    values = [{"kind": "max"}, {"kind": "expected"}, {"kind": "soft", "tau": 0.5}]
    expected_BT = sum(teacher_forcing_BT(model, tokenizer, **v) for v in values) + log_likelihood_BT(model, tokenizer)
    torch.testing.assert_close(result.rewards_BT, expected_BT, rtol=1e-5, atol=1e-4)
    assert len(result.terms) == 4, "terms of one kind need names of their own"


def test_every_panel_template_and_teacher_is_asked_once(tokenizer, monkeypatch):
    first, second, third = (Teacher(tiny_llama(seed=s), tokenizer) for s in range(3))
    two_by_two = TeacherPanel([first, second], templates_of("w3 {{ x }}", "w4 {{ x }}"))
    reward_model = RewardModel([TeacherForcingReward(two_by_two), LogLikelihoodReward(TeacherPanel([third]))])
    asked = count_scorings(monkeypatch)
    result_of(reward_model, inputs_of(rows=[{"prompt": p} for p in PROMPTS]))
    assert asked == [first, first, second, second, third]


def test_two_soft_values_at_different_temperatures_are_refused(tokenizer):
    panel = TeacherPanel([Teacher(tiny_llama(), tokenizer)])
    terms = [TeacherForcingReward(panel, value="soft", tau=tau) for tau in (0.5, 1.0)]
    with pytest.raises(InputError, match="tau"):
        result_of(RewardModel(terms))


def test_a_panel_is_asked_only_for_what_its_own_terms_read(tokenizer):
    """Two teachers may have different tau, and neither computes the other's statistics."""
    models = [tiny_llama(seed=1), tiny_llama(seed=2)]
    panels = [TeacherPanel([Teacher(model, tokenizer)]) for model in models]
    soft = [TeacherForcingReward(p, value="soft", tau=tau) for p, tau in zip(panels, (0.5, 2.0), strict=True)]
    reward_model = RewardModel(soft)
    inputs = inputs_of()
    expected_BT = sum(
        teacher_forcing_BT(m, tokenizer, kind="soft", tau=t) for m, t in zip(models, (0.5, 2.0), strict=True)
    )
    torch.testing.assert_close(result_of(reward_model, inputs).rewards_BT, expected_BT, **FLOAT32)
    greedy = TeacherForcingReward(panels[0], value="max")
    scores = RewardModel([greedy, soft[1]]).score(inputs)
    assert scores[id(panels[0])][0].soft is None and scores[id(panels[1])][0].soft is not None


def test_log_ratio_reads_the_students_log_probabilities(tokenizer):
    model = tiny_t5(tied=False)
    logps_BT = -torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    result = result_of(RewardModel([LogRatioReward(model, tokenizer)]), inputs_of(logps=logps_BT))
    expected_BT = log_likelihood_BT(model, tokenizer) - torch.where(MASK_BT, logps_BT, 0.0)
    torch.testing.assert_close(result.rewards_BT, expected_BT, **FLOAT32)


def test_what_stands_behind_the_mask_changes_nothing(tokenizer):
    """Garbage ids, and NaN for the student's log-probabilities and a user's rewards there."""
    panel = TeacherPanel([Teacher(tiny_t5(tied=True), tokenizer)])

    def per_token(inputs):
        return torch.where(inputs.completion_mask_BT, 1.0, float("nan"))

    reward_model = RewardModel(
        [TeacherForcingReward(panel, k=2), LogRatioReward(panel), sequence_rewards.repetition, per_token]
    )
    logps_BT = -torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    clean = result_of(reward_model, inputs_of(0, logps=torch.where(MASK_BT, logps_BT, 0.0)))
    dirty = result_of(reward_model, inputs_of(23, logps=torch.where(MASK_BT, logps_BT, float("nan"))))
    assert torch.equal(clean.rewards_BT, dirty.rewards_BT) and torch.equal(clean.potentials_BT1, dirty.potentials_BT1)
    assert clean.rewards_BT.isfinite().all() and (clean.rewards_BT[~MASK_BT] == 0).all()


def test_without_a_teacher():
    result = result_of(RewardModel([sequence_rewards.length]))
    torch.testing.assert_close(result.rewards_BT, on_last([3.0, 1.0, 4.0, 1.0]))
    assert result.scores is None and (result.potentials_BT1 == 0).all()


# A user's own functions.


def test_a_function_per_token():
    result = result_of(RewardModel([lambda inputs: inputs.completion_ids_BT.double() / 2], [10.0]))
    torch.testing.assert_close(result.rewards_BT, padded([[20.0, 25.0, 5.0], [30.0], [35.0, 40.0, 45.0, 50.0], [5.0]]))
    assert result.rewards_BT.dtype == torch.float32


def test_a_function_per_sequence():
    result = result_of(RewardModel([lambda inputs: torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)]))
    torch.testing.assert_close(result.rewards_BT, on_last([1.0, 2.0, 3.0, 4.0]))
    assert not result.rewards_BT.requires_grad


def test_a_function_with_trls_protocol():
    seen = {}

    def mine(prompts, completions, completion_ids, **kwargs):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        return [1, None, 2.5, 0]

    result = result_of(RewardModel([mine], [2.0]))
    torch.testing.assert_close(result.rewards_BT, on_last([2.0, 0.0, 5.0, 0.0]))
    assert seen == {
        "prompts": [PROMPTS[p] for p in INDEX],
        "completions": ["a b", "c", "d e f g", ""],
        "completion_ids": COMPLETIONS,
        "ended": [True, False, False, True],
        "id": INDEX,
    }
    assert list(result.terms) == ["mine"]


def test_a_function_with_trls_protocol_that_names_only_what_it_reads():
    def shortest(completions, **kwargs):
        return [-float(len(text)) for text in completions]

    torch.testing.assert_close(result_of(RewardModel([shortest])).rewards_BT, on_last([-3.0, -1.0, -7.0, 0.0]))


def test_a_function_with_trls_protocol_gets_only_what_it_accepts():
    def mine(completion_ids, id, ended):
        return [float(i + len(ids) + 10 * e) for ids, i, e in zip(completion_ids, id, ended, strict=True)]

    # Row ids 1, 0, 1, 0; 3, 1, 4, 1 tokens; the first and last have ended.
    torch.testing.assert_close(result_of(RewardModel([mine])).rewards_BT, on_last([14.0, 1.0, 5.0, 11.0]))


def test_data_columns_do_not_hide_what_trl_passes():
    columns = {"prompts": "x", "completions": "x", "completion_ids": "x", "ended": "x", "topic": "t"}
    seen = {}

    def mine(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [0.0] * 4

    result_of(RewardModel([mine]), inputs_of(rows=[{"prompt": prompt, **columns} for prompt in PROMPTS]))
    assert seen == {
        "prompts": [PROMPTS[p] for p in INDEX],
        "completions": ["a b", "c", "d e f g", ""],
        "completion_ids": COMPLETIONS,
        "ended": [True, False, False, True],
        "topic": ["t"] * 4,
    }


def test_an_asynchronous_trl_function_in_a_notebook():
    """Whose own event loop is running."""

    async def mine(completions, **kwargs):
        return [1.0 for _ in completions]

    async def cell():
        return result_of(RewardModel([mine])).rewards_BT

    torch.testing.assert_close(asyncio.run(cell()), on_last([1.0] * 4))


def test_an_asynchronous_trl_function():
    """TRL accepts them; "any function written for TRL works here"."""

    async def mine(prompts, completions, **kwargs):
        return [float(len(text)) for text in completions]

    torch.testing.assert_close(result_of(RewardModel([mine])).rewards_BT, on_last([3.0, 1.0, 7.0, 0.0]))


def test_an_object_with_trls_protocol():
    class Mine:
        def __call__(self, completions, **kwargs):
            return torch.arange(4)

    result = result_of(RewardModel([Mine()]))
    torch.testing.assert_close(result.rewards_BT, on_last([0.0, 1.0, 2.0, 3.0]))
    assert list(result.terms) == ["Mine"]


@pytest.mark.parametrize(
    "scores, shape",
    [
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(4, 3), r"\(4, 3\)"),
        ([1.0, 2.0], r"\(2,\)"),
        (torch.tensor(1.0), r"\(\)"),
    ],
)
def test_another_shape_is_refused(scores, shape):
    def mine(inputs):
        return scores

    with pytest.raises(InputError, match=f"'mine' returned shape {shape}"):
        result_of(RewardModel([mine]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(bad):
    def mine(completions, **kwargs):
        return [0.0, 1.0, bad, 0.0]

    with pytest.raises(InputError, match="'mine' returned NaN or infinity"):
        result_of(RewardModel([mine]))


def test_no_terms_and_wrong_numbers_of_weights():
    with pytest.raises(InputError, match="No reward"):
        RewardModel([])
    with pytest.raises(InputError, match="2 reward weights for 1"):
        RewardModel([sequence_rewards.length], [1.0, 2.0])


def test_no_term_is_lost_to_another_of_its_name():
    def x(inputs):
        return torch.ones(4)

    def x_2(inputs):
        return torch.ones(4)

    reward_model = RewardModel([x, x_2, x, x])
    torch.testing.assert_close(result_of(reward_model).rewards_BT, on_last([4.0] * 4))


# By name.


@pytest.mark.parametrize("name", list(REWARDS))
def test_recipes_by_name(name):
    assert load_reward(name) is REWARDS[name]


def test_every_recipe_can_be_used(tokenizer):
    panel = TeacherPanel([Teacher(tiny_llama(), tokenizer)])
    terms = [term(panel) if isinstance(term, type) else term for term in REWARDS.values()]
    rows = [{"prompt": prompt, "references": ["a b c"]} for prompt in PROMPTS]
    result = result_of(RewardModel(terms), inputs_of(rows=rows, logps=torch.zeros(4, 4)))
    assert len(result.terms) == len(REWARDS) and result.rewards_BT.isfinite().all()


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def test_a_function_in_a_file(tmp_path):
    file = write(tmp_path / "mine.py", "def shout(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    function = load_reward(f"{file}:shout")
    torch.testing.assert_close(result_of(RewardModel([function])).rewards_BT, on_last([1.0] * 4))


def test_a_file_with_a_dataclass(tmp_path):
    """dataclasses looks its class's module up by name."""
    file = write(
        tmp_path / "mine.py",
        """
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class Settings:
            scale: float = 2.0

        def shout(completions, **kwargs):
            return [Settings().scale] * len(completions)
        """,
    )
    assert load_reward(f"{file}:shout")(["a"]) == [2.0]


def test_a_file_named_as_a_module_of_python_does_not_replace_it(tmp_path):
    import json

    text = "def one(completions, **kwargs):\n    return [1.0]\n"
    function = load_reward(f"{write(tmp_path / 'json.py', text)}:one")
    assert sys.modules["json"] is json and sys.modules[function.__module__].one is function


@pytest.mark.parametrize(
    "spec, message",
    [
        ("teacher_forcin", r"Unknown reward 'teacher_forcin'.*teacher_forcing.*file\.py:function"),
        ("mine.py", "Unknown reward 'mine.py'"),
        ("mine.txt:shout", "Unknown reward"),
        ("/nowhere/mine.py:shout", r"no file /nowhere/mine\.py"),
    ],
)
def test_unknown_names_and_missing_files(spec, message):
    with pytest.raises(InputError, match=message):
        load_reward(spec)


def test_a_missing_function_is_answered_with_those_there_are(tmp_path):
    file = write(tmp_path / "mine.py", "def shout():\n    pass\nconstant = 3\n")
    for name in ("whisper", "constant"):
        with pytest.raises(InputError, match=rf"no function '{name}'; it has: shout"):
            load_reward(f"{file}:{name}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 / 0\n", "ZeroDivisionError"),
        ("def f(:\n", "SyntaxError"),
        ("import no_such_thing\n", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_fails(tmp_path, text, message):
    file = write(tmp_path / "mine.py", text)
    with pytest.raises(InputError, match=message) as caught:
        load_reward(f"{file}:f")
    assert str(file) in str(caught.value)


def test_the_column_of_each_completion():
    inputs = inputs_of()
    assert inputs.column("id") == INDEX
    assert inputs.token_lists() == COMPLETIONS
