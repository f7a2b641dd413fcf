import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlkd_trl import TeacherForcingReward
from rlkd_trl.evaluation.token_details import completion_records, reward_values, token_texts
from rlkd_trl.models.generation import Completions
from rlkd_trl.rewards import LogLikelihoodReward, RewardInputs, RewardModel
from rlkd_trl.teachers.scores import TeacherScores
from tests.tiny_models import EOS, MODELS, word_tokenizer


def test_tokens_are_the_texts_pieces():
    tokenizer = word_tokenizer()
    assert token_texts(tokenizer, [5, 9, 5, EOS]) == ["w5", " w9", " w5", " </s>"]
    assert token_texts(tokenizer, []) == []


def test_a_character_of_several_tokens_stands_with_the_last_of_them():
    letters = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = fast("aß✓")["input_ids"]  # one, two and three bytes
    assert token_texts(fast, ids) == ["a", "", "ß", "", "", "✓"]
    assert token_texts(fast, ids[:2]) == ["a", "\ufffd"], "cut off within a character"


@pytest.mark.parametrize("ended", [True, False])
def test_rewards_are_made_of_q_and_v(ended):
    """q, V and log p from a plain forward pass, in float64, and r_t = q_t − γ V_{t+1} with V = 0 after EOS."""
    model, tokenizer, gamma = MODELS["t5-untied"](seed=5).eval(), word_tokenizer(), 0.9
    ids = [7, 12, 3, EOS] if ended else [7, 12, 3, 4]
    with torch.no_grad():
        inputs = tokenizer("w4 w5", return_tensors="pt")["input_ids"]
        logits = model(input_ids=inputs, decoder_input_ids=torch.tensor([[0, *ids]])).logits[0].double()
    centred = logits - logits.mean(dim=1, keepdim=True)
    q = [float(centred[t, token]) for t, token in enumerate(ids)]
    value = [float(centred[t].max()) for t in range(5)]
    after = [*value[1:4], 0.0 if ended else value[4]]
    expected = {
        "q": q,
        "V": value[:4],
        "reward": [q[t] - gamma * after[t] for t in range(4)],
        "teacher_logp": [float(logits[t].log_softmax(0)[token]) for t, token in enumerate(ids)],
    }
    reward_model = RewardModel([TeacherForcingReward(model, tokenizer, gamma=gamma)])
    batch = RewardInputs(
        rows=[{"prompt": "w4 w5"}],
        prompt_index_B=torch.tensor([0]),
        completion_ids_BT=torch.tensor([ids]),
        completion_mask_BT=torch.ones(1, 4, dtype=torch.bool),
        ended_B=torch.tensor([ended]),
    )
    scores = reward_model.score(batch)
    values = reward_values(reward_model, scores, reward_model.rewards(batch, scores), batch.completion_mask_BT)
    completions = Completions(batch.completion_ids_BT, batch.completion_mask_BT, batch.ended_B)
    [record] = completion_records(["w4 w5"], completions, tokenizer, values, step=3)
    for name, numbers in expected.items():
        assert record[name] == pytest.approx(numbers, rel=1e-4, abs=1e-4), name
    assert record["total"] == pytest.approx(math.fsum(expected["reward"]), rel=1e-4)
    assert (record["step"], record["prompt"], record["ended"]) == (3, "w4 w5", ended)
    assert record["text"] == ("w7 w12 w3" if ended else "w7 w12 w3 w4")


def test_q_and_v_of_a_teacher_that_tells_log_p_only():
    """As from a server: no mean logit, for which logsumexp, 0, then stands."""
    model, tokenizer = MODELS["t5-untied"](seed=5), word_tokenizer()
    batch = RewardInputs(
        rows=[{"prompt": "w4 w5"}],
        prompt_index_B=torch.tensor([0]),
        completion_ids_BT=torch.tensor([[7, EOS]]),
        completion_mask_BT=torch.ones(1, 2, dtype=torch.bool),
        ended_B=torch.tensor([True]),
    )
    chosen, best = torch.tensor([[-1.5, -0.25]]), torch.tensor([[-0.5, -0.125, 0.0]])
    told = TeacherScores(chosen=chosen, mean=None, max=best, logsumexp=torch.zeros(1, 3))
    for term, reward in (
        (LogLikelihoodReward(model, tokenizer), [[-1.5, -0.25]]),
        # q_t − V_{t+1}, with V = 0 after EOS: −1.5 + 0.125, −0.25 − 0.
        (TeacherForcingReward(model, tokenizer), [[-1.375, -0.25]]),
    ):
        reward_model = RewardModel([term])
        scores = {id(term.panel): [told]}
        values = reward_values(reward_model, scores, reward_model.rewards(batch, scores), batch.completion_mask_BT)
        assert values["reward"].tolist() == reward
        assert values["q"].tolist() == values["teacher_logp"].tolist() == [[-1.5, -0.25]]
        assert values["V"][:, :2].tolist() == [[-0.5, -0.125]]
