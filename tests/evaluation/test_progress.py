"""A bar while a model is evaluated, over all batches, on request."""

import pytest

from rlkd_trl.evaluation import evaluate
from rlkd_trl.rewards import LogLikelihoodReward, RewardModel
from rlkd_trl.students import Policy
from tests.tiny_models import MODELS, word_tokenizer

ROWS = [{"prompt": f"w{3 + i} w{4 + i}"} for i in range(7)]  # three batches of 3, 3 and 1


@pytest.fixture
def bars(monkeypatch):
    """The bars that are made: (description, total, counts that they were advanced by, whether it is shown)."""
    made = []

    class Bar:
        def __init__(self, total, desc, disable, **kwargs):
            self.record = {"desc": desc, "total": total, "updates": [], "shown": not disable, "closed": False}
            made.append(self.record)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.record["closed"] = True

        def update(self, count):
            self.record["updates"].append(count)

    monkeypatch.setattr(evaluate, "tqdm", Bar)
    return made


@pytest.mark.parametrize("progress", ["Evaluating", None])
@pytest.mark.parametrize("with_rewards", [True, False])
def test_a_student(with_rewards, progress, bars):
    rewards = RewardModel([LogLikelihoodReward(MODELS["llama"](seed=5), word_tokenizer())]) if with_rewards else None
    policy, settings = Policy(MODELS["llama"](), word_tokenizer()), {"max_completion_length": 4, "batch_size": 3}
    evaluate.evaluate_student(
        policy, word_tokenizer(), ROWS, rewards, max_prompt_length=None, progress=progress, **settings
    )
    passes = 3 if with_rewards else 2
    assert bars == [
        {"desc": progress, "total": passes * 7, "updates": [3, 3, 1] * passes, "shown": bool(progress), "closed": True}
    ]


def test_a_teacher(bars):
    rewards = RewardModel([LogLikelihoodReward(MODELS["t5-tied"](seed=5), word_tokenizer())])
    evaluate.evaluate_teacher(ROWS, rewards, max_completion_length=4, batch_size=3, progress="The teacher")
    assert [(bar["desc"], sum(bar["updates"])) for bar in bars] == [("The teacher", 21)]


def test_other_processes_show_none(bars, monkeypatch):
    monkeypatch.setattr(evaluate, "is_first_process", lambda: False)
    policy = Policy(MODELS["llama"](), word_tokenizer())
    evaluate.evaluate_student(
        policy, word_tokenizer(), ROWS, None, max_prompt_length=None, max_completion_length=4, progress="Evaluating"
    )
    assert [bar["shown"] for bar in bars] == [False]
