"""Rewards that users write: what they see of the teacher, and one sentence for whatever they do wrong."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
import torch

from rlkd_trl.errors import InputError
from rlkd_trl.rewards import LogLikelihoodReward, RewardInputs, RewardModel, TeacherReward, load_reward
from rlkd_trl.rewards.own_rewards import construct
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.recipes.command_lines import ROOT
from tests.rewards.reference import log_probability, logits_of
from tests.rewards.test_teacher_rewards import templates_of
from tests.tiny_models import EOS, MODELS, word_tokenizer

MARGIN = ROOT / "recipes" / "rewards" / "margin.py"
PROMPTS = ["w3 w4", "w5"]
COMPLETIONS = [[5, 9, EOS], [4, 4, 7, 20], [EOS], [11, 12]]  # two of each prompt


def inputs(**others) -> RewardInputs:
    width = max(map(len, COMPLETIONS))
    ids_BT = torch.tensor([ids + [13] * (width - len(ids)) for ids in COMPLETIONS])
    return RewardInputs(
        rows=[{"prompt": prompt, "kind": f"k{i}"} for i, prompt in enumerate(PROMPTS)],
        prompt_index_B=torch.tensor([0, 0, 1, 1]),
        completion_ids_BT=ids_BT,
        completion_mask_BT=torch.tensor([[t < len(ids) for t in range(width)] for ids in COMPLETIONS]),
        ended_B=torch.tensor([ids[-1] == EOS for ids in COMPLETIONS]),
        completions=["a", "b", "", "d"],
        **others,
    )


def panel(*templates: str, seeds=(5,), family="t5-tied") -> TeacherPanel:
    teachers = [Teacher(MODELS[family](seed=seed), word_tokenizer()) for seed in seeds]
    return TeacherPanel(teachers, templates_of(*templates) if templates else None)


def rewards_of(term, teachers: TeacherPanel | None = None) -> torch.Tensor:
    model = RewardModel([term], panel=teachers)
    return model.rewards(inputs(), model.score(inputs())).rewards_BT


def by_hand(of_token, *, seed=5, family="t5-tied", template="{}") -> list[list[float]]:
    """`of_token(z, y)` for every token, from the teacher's own logits, one completion at a time."""
    model, rows = MODELS[family](seed=seed), []
    for b, ids in enumerate(COMPLETIONS):
        z_TV = logits_of(model, word_tokenizer(), template.format(PROMPTS[b // 2]), ids)
        rows.append([of_token(z, y) for z, y in zip(z_TV, ids, strict=False)])
    return [row + [0.0] * (4 - len(row)) for row in rows]


def margin_by_hand(z: list[float], y: int) -> float:
    return z[y] - max(z)


@pytest.mark.parametrize("family", ["t5-tied", "llama"])
@pytest.mark.parametrize("name", ["margin", "MarginReward"])
def test_the_shipped_example(name, family):
    """As the function is, and as the class with its floor."""
    reward, teachers = load_reward(f"{MARGIN}:{name}"), panel(family=family)
    reward = reward(teachers) if isinstance(reward, type) else reward
    expected = torch.tensor(by_hand(margin_by_hand, family=family))
    assert (expected < 0).sum() > 5
    if name == "MarginReward":
        reward.lowest = -0.4
        expected = expected.clamp(min=-0.4)
    torch.testing.assert_close(rewards_of(reward, teachers), expected, rtol=1e-5, atol=1e-5)


STATISTICS = {
    "chosen": (lambda s: s.chosen, lambda z, y: z[y]),
    "mean": (lambda s: s.mean[:, :-1], lambda z, y: sum(z) / len(z)),
    "max": (lambda s: s.max[:, :-1], lambda z, y: max(z)),
    "log_p": (lambda s: s.chosen - s.logsumexp[:, :-1], log_probability),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_each_statistic_is_the_teachers(name):
    read, of_token = STATISTICS[name]
    rewards_BT = rewards_of(lambda inputs: read(inputs.scores), panel())
    torch.testing.assert_close(rewards_BT, torch.tensor(by_hand(of_token)), rtol=1e-4, atol=1e-4)


def test_the_state_after_a_completion_that_was_cut_off_is_there():
    seen = []
    rewards_of(lambda inputs: seen.append(inputs.scores) or torch.zeros(4), panel())
    z = logits_of(MODELS["t5-tied"](seed=5), word_tokenizer(), PROMPTS[0], COMPLETIONS[1])[4]
    assert float(seen[0].max[1, 4]) == pytest.approx(max(z), abs=1e-4)
    assert seen[0].expected is None, "nobody has asked for it"


def test_of_several_teachers_and_templates_the_means():
    rewards_BT = rewards_of(
        lambda inputs: inputs.scores.chosen, panel("w9 {{ kind }} {{ prompt }}", "{{ prompt }}", seeds=(5, 6))
    )
    rewards_2BT = rewards_of(load_reward(f"{MARGIN}:margin"), panel("{{ prompt }}", seeds=(5, 6)))
    one, other = (torch.tensor(by_hand(margin_by_hand, seed=seed)) for seed in (5, 6))
    torch.testing.assert_close(rewards_2BT, (one + other) / 2, rtol=1e-4, atol=1e-4)
    assert rewards_BT.shape == (4, 4)


def test_without_a_teacher_there_are_no_scores():
    assert rewards_of(lambda inputs: torch.full((4,), float(inputs.scores is None))).sum() == 4


def test_trl_functions_are_called_as_before():
    def mine(completions, kind, **others):
        assert "scores" not in others
        return [float(len(text)) for text in completions]

    assert rewards_of(mine, panel()).sum(dim=1).tolist() == [1.0, 1.0, 0.0, 1.0]


# What users do wrong


async def never(completions):
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda inputs: None, "'<lambda>' returned None; it must return one number per completion, 4 here, in a list"),
        (lambda completions: None, "returned None; it must return one number per completion, 4 here"),
        (never, "'never' returned None; it must return one number per completion"),
        (lambda inputs: 1.0, "returned 1.0; it must return one number per completion"),
        (lambda completions: 3, "returned 3; it must return one number per completion"),
        (lambda inputs: "good", "returned 'good'; it must return one number per completion"),
        (lambda completions: {"a": 1.0}, "returned {'a': 1.0}; it must return one number per completion"),
        (lambda completions: ["good"] * 4, r"returned \['good', .*; it must return one number .*could not convert"),
        (lambda completions: [[1.0]] * 4, r"returned \[\[1.0\], .*; it must return one number per completion"),
        (lambda completions: [1.0] * 3, r"returned shape \(3,\); expected \(4, 4\) \(one per token\) or \(4,\)"),
        (lambda completions: [], r"returned shape \(0,\)"),
        (lambda inputs: torch.tensor(1.0), r"returned shape \(\); expected \(4, 4\)"),
        (lambda inputs: torch.zeros(4, 5), r"returned shape \(4, 5\); expected \(4, 4\)"),
        (
            lambda completions, answer: [1.0] * 4,
            "needs the argument 'answer'; what it gets by name here is: kind, prom",
        ),
    ],
)
def test_what_is_no_reward(function, message):
    with pytest.raises(InputError, match=message) as caught:
        rewards_of(function)
    assert str(caught.value).endswith("It is in " + __file__ + ".")


@pytest.mark.parametrize("function", [lambda: 1.0, lambda a, b: 1.0, lambda *, a: 1.0, lambda a, b, c=1: 1.0])
def test_a_function_that_takes_something_else(function):
    with pytest.raises(InputError, match=r"'<lambda>' takes \(.*\): a reward takes one argument, its `RewardInputs`"):
        RewardModel([function])


@pytest.mark.parametrize(
    "function", [lambda i, scale=2.0: torch.ones(4), lambda *args: torch.ones(4), torch.nn.Identity().forward]
)
def test_one_argument_of_any_name_is_enough(function):
    RewardModel([function])


OWN_FILE = """
import sys
from rlkd_trl.rewards import TeacherReward

def helper(text):
    return 1 / len(text)                        # line 5

def divides(completions):
    return [helper(text) for text in completions]

def leaves(inputs):
    if "" in inputs.completions:
        sys.exit(3)                             # line 12

def always(completions):
    raise KeyError("colour")                    # line 15

class Fails(TeacherReward):
    def rewards(self, scores, inputs):
        return scores.chosen["w3"]              # line 19

class Text(TeacherReward):
    def rewards(self, scores, inputs):
        return "good"

class Wants(TeacherReward):
    def __init__(self, panel, scale):
        super().__init__(panel)

class Potential(TeacherReward):
    def rewards(self, scores, inputs):
        return scores.chosen

    def potentials(self, scores):
        return scores.mean / None               # line 34

class Narrow(Potential):
    def potentials(self, scores):
        return scores.chosen

def cancelled(completions):
    import asyncio
    raise asyncio.CancelledError                # line 42, no Exception either

def ends(completions):
    import os
    os._exit(0)                                 # line 46

def forks(completions):
    import os
    child = os.fork()
    if not child:
        os._exit(7)
    return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))] * len(completions)

nothing = 3
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN_FILE.lstrip("\n"))
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # The third completion, "", of the second prompt.
        (
            "divides",
            r"'divides' raised ZeroDivisionError: .* \(line 5 of FILE\), on the prompt 'w5' with the compl.* ''",
        ),
        ("leaves", r"'leaves' raised SystemExit: 3 \(line 12 of FILE\), on the prompt 'w5'"),
        (
            "always",
            r"'always' raised KeyError: 'colour' \(line 15 of FILE\), on the prompt 'w3 w4' with the compl.* 'a'",
        ),
        (
            "Fails",
            r"'Fails' raised \w+Error: .* \(line 19 of FILE\), on a batch of 4 completions that begins .* 'w3 w4'",
        ),
        ("Text", r"'Text' returned 'good'; expected \(4, 4\)"),
        ("Potential", r"'Potential' raised TypeError: .* \(line 34 of FILE\), on a batch of 4 completions"),
        ("Narrow", r"'Narrow' has potentials of shape \(4, 4\); expected \(4, 5\), one per token and one more"),
        ("cancelled", r"'cancelled' raised CancelledError: .*\(line 42 of FILE\), on the prompt 'w3 w4'"),
        ("ends", r"'ends' raised SystemExit: os._exit\(0\) \(line 46 of FILE\), on the prompt 'w3 w4'"),
        ("Wants", r"'Wants' cannot be made of the teachers: TypeError: .*scale"),
    ],
)
def test_an_error_in_a_users_file_names_file_line_and_prompt(name, message, own_file):
    from rlkd_trl.rewards.own_rewards import construct

    reward, teachers = load_reward(f"{own_file}:{name}"), panel()
    with pytest.raises(InputError, match=message.replace("FILE", str(own_file))) as caught:
        rewards_of(construct(reward, teachers) if isinstance(reward, type) else reward, teachers)
    assert str(own_file) in str(caught.value)


def test_a_process_that_a_reward_forks_may_end_so(own_file):
    assert rewards_of(load_reward(f"{own_file}:forks"), panel()).sum() == 4 * 7


def test_a_class_by_name(own_file):
    assert issubclass(load_reward(f"{own_file}:Fails"), TeacherReward)
    with pytest.raises(InputError, match=r"no function 'nothing'; it has: helper, .*always, Fails"):
        load_reward(f"{own_file}:nothing")


def test_a_file_that_leaves(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(InputError, match=r"mine.py failed: SystemExit: 0"):
        load_reward(f"{tmp_path / 'mine.py'}:f")


def test_a_file_is_run_as_it_is_written(tmp_path, monkeypatch):
    """Rewritten within a second in as many bytes, which is the same to Python's compiled files; there are none."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "mine.py"
    for value in (1, 2):
        file.write_text(f"def f(completions):\n    return [{value}.0] * len(completions)\n")
        os.utime(file, (10**9, 10**9))
        assert load_reward(f"{file}:f")(["a"]) == [value]
    assert list(tmp_path.iterdir()) == [file]


def test_a_reward_may_change_the_directory_for_itself(tmp_path, monkeypatch):
    """What a run reads and writes later may be named relative to the directory that it was started in."""
    (tmp_path / "data").mkdir()
    moves = "def moves(inputs):\n    os.chdir('/')\n    return [1.0] * len(inputs.completions)\n"
    (tmp_path / "mine.py").write_text(f"import os\nos.chdir('data')\n{moves}")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("mine.py:moves")
    assert Path.cwd() == tmp_path
    rewards_of(reward)
    assert Path.cwd() == tmp_path

    class Moves(LogLikelihoodReward):
        def __init__(self, panel):
            os.chdir("/")
            super().__init__(panel)

    construct(Moves, panel())
    assert Path.cwd() == tmp_path


def test_the_packages_own_rewards_are_not_wrapped():
    """A fault of theirs is a fault of the program: it keeps its traceback."""
    reward = LogLikelihoodReward(panel())
    reward.rewards = lambda scores, inputs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        rewards_of(reward)


def test_interrupting_is_no_error_of_a_reward():
    def mine(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards_of(mine)
