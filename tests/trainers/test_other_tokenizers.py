"""A teacher that reads characters, and a student that writes words: what is learnt is what the text is worth."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from rlkd_trl import KDConfig, TeacherForcingReward
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.evaluate import evaluate_student, evaluate_teacher
from rlkd_trl.models.generation import Completions
from rlkd_trl.rewards import LogLikelihoodReward, LogRatioReward, RewardModel
from rlkd_trl.students import Policy
from tests.models.tokenizers_of_all_kinds import CHARACTERS, character_tokenizer
from tests.rewards.reference import log_probability, logits_of, teacher_forcing, teacher_forcing_sum
from tests.students.plain_forward import allowed_log_softmax, plain_forward
from tests.tiny_models import EOS, MODELS, word_tokenizer
from tests.trainers.tiny_runs import (
    METHODS,
    assert_same_weights,
    build,
    largest_difference,
    pairs,
    run,
    samples_instead,
    snapshot,
)

PROMPTS = ["w3 w4 w5", "w6", "w7 w8"]
COMPLETIONS = [[4, 15, 6, 1], [7, 18], [1]]  # "w4 w15 w6", ended; "w7 w18", cut off; nothing, ended
FLOAT32 = {"rtol": 1e-5, "atol": 5e-5}


def in_characters(ids: list[int]) -> tuple[list[int], list[int]]:
    """A completion's ids for the teacher, and the student's token that each of them belongs to."""
    teacher_ids, owner = [], []
    for t, index in enumerate(ids):
        text = "" if index == EOS else f"{' ' if t else ''}w{index}"
        new = [EOS] if index == EOS else [3 + CHARACTERS.index(c) for c in text]
        teacher_ids += new
        owner += [t] * len(new)
    return teacher_ids, owner


def summed(values: list[float], owner: list[int], length: int) -> list[float]:
    return [sum(v for v, o in zip(values, owner, strict=True) if o == t) for t in range(length)]


@pytest.fixture(scope="module", params=["t5-untied", "llama"])
def model(request):
    return MODELS[request.param](seed=5)


@pytest.mark.parametrize("kind", ["max", "expected", "soft"])
def test_rewards_are_those_of_the_characters_summed_over_words(model, kind):
    teacher_tokenizer = character_tokenizer()
    reward = TeacherForcingReward(model, teacher_tokenizer, value=kind, student_tokenizer=word_tokenizer())
    by_token = reward.score_tokens(PROMPTS, COMPLETIONS)
    sums = reward(PROMPTS, completion_ids=COMPLETIONS)
    for prompt, ids, rewards_T, total in zip(PROMPTS, COMPLETIONS, by_token, sums, strict=True):
        teacher_ids, owner = in_characters(ids)
        logits = logits_of(model, teacher_tokenizer, prompt, teacher_ids)
        ended = ids[-1] == EOS
        of_characters = teacher_forcing(logits, teacher_ids, ended=ended, kind=kind)
        expected = torch.tensor(summed(of_characters, owner, len(ids)))
        torch.testing.assert_close(rewards_T, expected, **FLOAT32)
        whole = teacher_forcing_sum(logits, teacher_ids, ended=ended, kind=kind)
        assert total == pytest.approx(whole, rel=1e-5, abs=1e-4)


def test_a_teacher_of_words_pays_a_student_of_characters_at_each_words_end(model):
    reward = LogLikelihoodReward(model, word_tokenizer(append_eos=False), student_tokenizer=character_tokenizer())
    ids, _ = in_characters([4, 15, 1])
    logits = logits_of(model, word_tokenizer(append_eos=False), "w6", [4, 15, 1])
    expected = [0.0] * len(ids)
    # "w4 w15" and EOS: the words end with characters 1 and 5.
    for position, z, token in zip((1, 5, 6), logits, (4, 15, 1), strict=False):
        expected[position] = log_probability(z, token)
    torch.testing.assert_close(reward.score_tokens(["w6"], [ids])[0], torch.tensor(expected), **FLOAT32)


def teacher(reward_class=TeacherForcingReward, characters: str = CHARACTERS):
    return reward_class(MODELS["t5-untied"](seed=5), character_tokenizer(characters))


@pytest.mark.parametrize("method", METHODS)
def test_trainers_learn_from_it(method, tmp_path):
    recorder = run(method, tmp_path, reward=teacher(LogLikelihoodReward), align_tokenizers=True)
    rollout, rows = recorder.rollouts[-1], recorder.trainer.train_dataset
    assert all(math.isfinite(entry["loss"]) and entry["completions/unreadable"] == 0 for entry in recorder.logs)
    model, tokenizer = recorder.trainer.reward_model.panels[0].scorers[0].teacher.model, character_tokenizer()
    student = word_tokenizer()
    for b in range(len(rollout.completion_ids_BT)):
        prompt_ids = rollout.prompt_ids_PS[rollout.prompt_index_B[b]]
        prompt = student.decode(prompt_ids[rollout.prompt_mask_PS[rollout.prompt_index_B[b]].bool()][:-1])
        assert prompt in rows["prompt"]
        ids = rollout.completion_ids_BT[b][rollout.completion_mask_BT[b]].tolist()
        teacher_ids, owner = in_characters(ids)
        of_characters = [
            log_probability(z, token)
            for z, token in zip(logits_of(model, tokenizer, prompt, teacher_ids), teacher_ids, strict=False)
        ]
        expected = torch.tensor(summed(of_characters, owner, len(ids)))
        torch.testing.assert_close(rollout.rewards_BT[b][: len(ids)], expected, **FLOAT32)


def test_log_ratio_takes_each_models_own_tokens(tmp_path):
    recorder = run("rloo-token", tmp_path, reward=teacher(LogRatioReward), align_tokenizers=True, max_steps=1)
    rollout = recorder.rollouts[0]
    likelihood = LogLikelihoodReward(recorder.trainer.reward_model.panels[0])
    assert likelihood.panel is recorder.trainer.reward_model.panels[0]
    ids = rollout.completion_ids_BT[0][rollout.completion_mask_BT[0]].tolist()
    prompt = word_tokenizer().decode(rollout.prompt_ids_PS[0][rollout.prompt_mask_PS[0].bool()][:-1])
    teacher_ids, owner = in_characters(ids)
    model = MODELS["t5-untied"](seed=5)
    allowed = [1, *range(3, 3 + len(CHARACTERS))]  # what the teacher may write
    of_characters = [
        log_probability([z[v] for v in allowed], allowed.index(token))
        for z, token in zip(logits_of(model, character_tokenizer(), prompt, teacher_ids), teacher_ids, strict=False)
    ]
    of_words = torch.tensor(summed(of_characters, owner, len(ids)))
    expected = of_words - rollout.old_logps_BT[0][: len(ids)]
    torch.testing.assert_close(rollout.rewards_BT[0][: len(ids)], expected, **FLOAT32)


def test_a_sample_that_the_teacher_cannot_read_is_dropped_and_counted(tmp_path, caplog):
    trainer = build(
        "rloo-token", tmp_path, reward=teacher(characters=CHARACTERS.replace("9", "")), align_tokenizers=True
    )
    samples_instead(trainer, [3, 1], [9, 1], [4, 19], [4, 1], [5, 1], [6, 1], [7, 1], [8, 1])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/unreadable"] == 0.25 and log["samples_dropped"] == 2
    assert trainer.rollout_state.rollout.kept_B.tolist() == [True, False, False] + 5 * [True]
    assert "A sample is dropped, its text not in both vocabularies" in caplog.text


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"different tokenizers.*, or set align_tokenizers"):
        build("ppo", tmp_path, reward=teacher())
    with pytest.raises(InputError, match="align_tokenizers has no effect"):
        build("ppo", tmp_path, align_tokenizers=True)
    with pytest.raises(InputError, match=r"span_temperature = 2.0 has no effect with teachers of the student's"):
        build("kd", tmp_path, span_temperature=2.0)
    for setting in ({"sequences": "teacher", "lmbda": 0.5}, {"temperature": 0.7}, {"distillation_temperature": 2.0}):
        with pytest.raises(InputError, match="does not go with align_tokenizers"):
            build("kd", tmp_path, reward=teacher(), align_tokenizers=True, **setting)
    with pytest.raises(InputError, match="align_tokenizers does not go with this method"):
        build("all-actions", tmp_path, reward=teacher(), align_tokenizers=True)
    with pytest.raises(InputError) as refused:
        build("all-actions", tmp_path, reward=teacher())
    assert "align_tokenizers" not in str(refused.value)


def test_evaluation_reads_every_text_in_each_models_own_tokens():
    """The NLL of the teacher is per token of the teacher, that of the student per token of the student."""
    rows = [{"prompt": prompt, "references": []} for prompt in PROMPTS]
    rewards = RewardModel([teacher(LogLikelihoodReward)])
    teacher_model = rewards.panels[0].scorers[0].teacher.model
    of_teacher = evaluate_teacher(rows, rewards, max_completion_length=7)
    policy = Policy(MODELS["t5-tied"](), word_tokenizer())
    of_student = evaluate_student(
        policy,
        word_tokenizer(),
        rows,
        rewards,
        max_prompt_length=None,
        max_completion_length=4,
        teacher_completions=of_teacher.completions,
        teacher_tokenizer=character_tokenizer(),
    )
    nll, tokens = [], 0
    for row, ids, mask in zip(PROMPTS, of_student.completions.ids_BT, of_student.completions.mask_BT, strict=True):
        teacher_ids, _ = in_characters(ids[mask].tolist())
        logits = logits_of(teacher_model, character_tokenizer(), row, teacher_ids)
        nll.append(-sum(log_probability(z, token) for z, token in zip(logits, teacher_ids, strict=False)))
        tokens += len(teacher_ids)
    assert of_student.per_input["teacher_nll"] == pytest.approx(nll, rel=1e-5)
    assert of_student.metrics["teacher_nll_per_token"] == pytest.approx(sum(nll) / tokens, rel=1e-5)
    assert of_student.metrics["teacher_nll_per_sequence"] == pytest.approx(sum(nll) / 3, rel=1e-5)
    assert of_student.metrics["unreadable"] == 0
    # An untrained teacher's texts are words by chance only.
    assert 0 <= of_student.metrics["unreadable_of_teacher"] <= 3
    assert "unreadable" not in of_teacher.metrics


def test_a_teachers_text_beyond_the_students_positions_is_unreadable():
    """24 positions: two words are eight tokens there, eight words 32."""
    tokenizer = character_tokenizer()
    size = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}
    student = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=EOS, eos_token_id=EOS, **size))
    ids = torch.tensor([[10, 11, EOS] + 6 * [0], [*range(10, 18), EOS]])
    evaluation = evaluate_student(
        Policy(student, tokenizer),
        tokenizer,
        [{"prompt": "w3", "references": []}] * 2,
        None,
        max_prompt_length=None,
        max_completion_length=4,
        teacher_completions=Completions(ids, ids != 0, torch.tensor([True, True])),
        teacher_tokenizer=word_tokenizer(),
    )
    assert evaluation.metrics["unreadable_of_teacher"] == 1
    assert evaluation.per_input["teacher_tokens"] == [8, 0]


@pytest.mark.parametrize(("unknown", "unreadable"), [("9", 1), ("w", 4)])
def test_what_cannot_be_read_is_never_the_best(tmp_path, monkeypatch, unknown, unreadable):
    settings = {"align_tokenizers": True, "metric_for_best_model": "reward", "eval_strategy": "no"}
    trainer = build("rloo-token", tmp_path, reward=teacher(characters=CHARACTERS.replace(unknown, "")), **settings)
    outputs = torch.tensor([[3, 1], [9, 1], [4, 1], [5, 1]])
    answers = [Completions(outputs, torch.ones(4, 2, dtype=torch.bool), torch.ones(4, dtype=torch.bool))]
    monkeypatch.setattr("rlkd_trl.evaluation.evaluate.answer_prompts", lambda *args, **kwargs: iter(answers))
    metrics = trainer.evaluate(Dataset.from_list([{"prompt": "w3", "references": []}] * 4))
    assert metrics["eval_unreadable"] == unreadable and math.isnan(metrics["eval_reward"])
    # Means over those that are read stand beside it, unless there are none; then the evaluation is not sound.
    assert math.isnan(metrics["eval_teacher_nll_per_token"]) is (unreadable == 4)
    assert metrics["eval_samples_not_finite"] == (4 if unreadable == 4 else 0)


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_kd_compares_the_probabilities_of_words(temperature, tmp_path):
    """The loss of the first step against loops over both models' own logits, of what they may write."""
    settings = {"divergence": "forward_kl", "lmbda": 1.0, "max_steps": 1, "align_tokenizers": True}
    if temperature != KDConfig.span_temperature:
        settings["span_temperature"] = temperature
    recorder = run("kd", tmp_path, reward=teacher(), **settings)
    rollout, student, tokenizer = recorder.rollouts[0], MODELS["t5-tied"](), word_tokenizer()
    teacher_model, allowed = MODELS["t5-untied"](seed=5), [1, *range(3, 3 + len(CHARACTERS))]
    total, count = 0.0, 0
    for b, mask_T in enumerate(rollout.completion_mask_BT):
        p = rollout.prompt_index_B[b]
        prompt = tokenizer.decode(rollout.prompt_ids_PS[p][rollout.prompt_mask_PS[p].bool()][:-1])
        ids = rollout.completion_ids_BT[b][mask_T].tolist()
        teacher_ids, owner = in_characters(ids)
        of_characters = [
            log_probability([z[v] for v in allowed], allowed.index(token))
            for z, token in zip(
                logits_of(teacher_model, character_tokenizer(), prompt, teacher_ids), teacher_ids, strict=False
            )
        ]
        logits = plain_forward(student, tokenizer(prompt)["input_ids"], ids)[0]
        own = allowed_log_softmax(logits.double()[:-1])[range(len(ids)), ids].tolist()
        for of_teacher, of_student in zip(summed(of_characters, owner, len(ids)), own, strict=True):
            total += temperature * bernoulli_kl(math.exp(of_teacher / temperature), math.exp(of_student / temperature))
        count += len(ids)
    assert recorder.logs[0]["divergence"] == pytest.approx(total / count, rel=1e-4)
    assert recorder.logs[0]["loss"] == pytest.approx(total / count, rel=1e-3)


def test_kd_learns_from_data_and_leaves_out_what_cannot_be_read(tmp_path, caplog):
    logging.getLogger("rlkd_trl").propagate = True
    data = pairs(32)  # every tenth word of the references is unknown to the student
    settings = {"divergence": "jsd", "lmbda": 0.0, "alpha": 0.5, "align_tokenizers": True, "max_steps": 12}
    recorder = run("kd", tmp_path, reward=teacher(), data=data, **settings)
    assert "least near the student that agrees with the teacher, not at it" in caplog.text
    assert 0 < sum(entry["completions/unreadable"] for entry in recorder.logs) < 12
    # 3.29 nats to 3.06.
    assert recorder.logs[-1]["cross_entropy"] < recorder.logs[0]["cross_entropy"] - 0.1
    # 0.96 to 0.46 in between.
    assert all(0 < entry["divergence"] < 1.5 for entry in recorder.logs)


@pytest.mark.parametrize("method", ["kd", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(method, tmp_path):
    """The checkpoint lies between the two passes over a rollout, whose spans it holds."""
    settings = {
        "max_steps": 4,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "align_tokenizers": True,
    }
    whole = build(method, tmp_path / "whole", reward=teacher(), **settings)
    whole.train()
    resumed = build(method, tmp_path / "resumed", reward=teacher(), **{**settings, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_weights(snapshot(resumed.model), snapshot(whole.model), rtol=1e-4, atol=1e-5)
    assert largest_difference(snapshot(build(method, tmp_path / "new").model), snapshot(whole.model)) > 1e-3
