"""A tokenizer without EOS: one clear sentence wherever a text would have to end."""

import pytest
from datasets import Dataset

from rlkd_trl.errors import InputError
from rlkd_trl.models.answers import answer_prompts
from rlkd_trl.rewards import TeacherForcingReward
from rlkd_trl.students import Policy
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.tiny_models import MODELS, word_tokenizer
from tests.trainers import tiny_runs

MESSAGE = "The tokenizer.* has no EOS token, so no text would end: set `eos_token`"


@pytest.fixture
def without_eos(monkeypatch):
    tokenizer = word_tokenizer(append_eos=False)
    tokenizer.eos_token = None
    monkeypatch.setattr(tiny_runs, "word_tokenizer", lambda: tokenizer)
    return tokenizer


@pytest.mark.parametrize("family", ["t5-tied", "llama"])
@pytest.mark.parametrize("method", [*tiny_runs.METHODS, *tiny_runs.FULL_VOCABULARY_METHODS])
def test_trainers(method, family, without_eos, tmp_path):
    """Although the generation config has one, with which samples would end."""
    with pytest.raises(InputError, match=MESSAGE):
        tiny_runs.build(method, tmp_path, family=family, reward=tiny_runs.teacher_reward(family))


def test_supervised_training(without_eos, tmp_path):
    pair = Dataset.from_list([{"prompt": "w3", "target": "w4"}])
    with pytest.raises(InputError, match=MESSAGE):
        SupervisedTrainer(MODELS["t5-tied"](), SupervisedConfig(output_dir=str(tmp_path)), pair, without_eos)


def test_sampling_answering_and_scoring(without_eos):
    model = MODELS["t5-tied"]()
    with pytest.raises(InputError, match=MESSAGE):
        Policy(model, without_eos)
    with pytest.raises(InputError, match=MESSAGE):
        list(answer_prompts(model, without_eos, ["w3"], max_completion_length=4))
    with pytest.raises(InputError, match=MESSAGE):
        TeacherForcingReward(model, without_eos).score_tokens(["w3"], [[4, 5]])
