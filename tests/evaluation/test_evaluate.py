"""Evaluation of student and teacher against loops over single rows, with more rows than a batch."""

import pytest
import torch

from rlkd_trl import ChatFormat, PromptTemplates, TeacherForcingReward
from rlkd_trl.evaluation.evaluate import evaluate_student, evaluate_teacher
from rlkd_trl.evaluation.samples import completion_log_probs, sampled_inputs
from rlkd_trl.models.generation import Completions
from rlkd_trl.prompts import PromptTemplate
from rlkd_trl.rewards import LogRatioReward, RewardModel
from rlkd_trl.students import Policy
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.rewards.reference import log_probability, logits_of, teacher_forcing
from tests.students.plain_forward import ALLOWED, chosen_log_probs, plain_forward
from tests.tiny_models import EOS, MODELS, chat_tokenizer, word_tokenizer
from tests.trainers.tiny_runs import prompts

ROWS = [dict(row) for row in prompts(7, seed=3)]
LENGTH = 6
# Rows in one batch; 3 leaves a batch of one row at the end.
BATCH_SIZES = (1, 3, 64)
# Seeds of student and teacher, by family: of some, greedy outputs end before the cap, and not all at the same length.
FAMILIES = {"t5-untied": (0, 3), "llama": (12, 6)}


def student_of(family: str):
    return MODELS[family](seed=FAMILIES[family][0])


def teacher_of(family: str):
    return MODELS[family](seed=FAMILIES[family][1])


def question(text: str) -> str:
    return f"w9 {text} w10"


def reward_model(family, kind=TeacherForcingReward):
    """A teacher that is not asked with the student's prompt."""
    templates = PromptTemplates([PromptTemplate("around", question("{{ source }}"))])
    return RewardModel([kind(teacher_of(family), word_tokenizer(), templates=templates)])


@torch.no_grad()
def greedy(model, prompt: str) -> list[int]:
    ids, completion = word_tokenizer()(prompt)["input_ids"], []
    while len(completion) < LENGTH and (not completion or completion[-1] != EOS):
        logits_V = plain_forward(model, ids, completion)[0][-1]
        completion.append(max(ALLOWED, key=lambda v: float(logits_V[v])))
    return completion


def teachers_view(family, text: str, completion: list[int]) -> tuple[float, float]:
    """The sum of rewards r_t = q_t − max f_{t+1}, and −log p."""
    z_TV = logits_of(teacher_of(family), word_tokenizer(), question(text), completion)
    reward = sum(teacher_forcing(z_TV, completion, ended=completion[-1] == EOS))
    return reward, -sum(log_probability(z_TV[t], y) for t, y in enumerate(completion))


def own_log_probability(model, prompt: str, completion: list[int]) -> float:
    return float(chosen_log_probs(model, word_tokenizer()(prompt)["input_ids"], completion).sum().detach())


def mean(numbers) -> float:
    return sum(numbers) / len(numbers)


def rows_of(completions: Completions) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(completions.ids_BT, completions.mask_BT, strict=True)]


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_measured_as_if_it_were_alone(family, who, batch_size):
    student, rewards = student_of(family), reward_model(family)
    settings = {"max_completion_length": LENGTH, "batch_size": batch_size}
    of_teacher = evaluate_teacher(ROWS, rewards, **settings)
    answers = [greedy(teacher_of(family), question(row["prompt"])) for row in ROWS]
    result = of_teacher
    if who == "student":
        result = evaluate_student(
            Policy(student, word_tokenizer()),
            word_tokenizer(),
            ROWS,
            rewards,
            max_prompt_length=None,
            teacher_completions=of_teacher.completions,
            **settings,
        )
        # The student's NLL of the teacher's answers, on its own prompts, per token of all of them.
        nll = -sum(own_log_probability(student, row["prompt"], y) for row, y in zip(ROWS, answers, strict=True))
        coverage = nll / sum(map(len, answers))
        assert result.metrics["student_nll_of_teacher_per_token"] == pytest.approx(coverage, rel=1e-4)
        answers = [greedy(student, row["prompt"]) for row in ROWS]

    assert rows_of(result.completions) == answers
    assert len({tuple(y) for y in answers}) > 2 and len({len(y) for y in answers}) > 1, "the rows must differ"
    texts = word_tokenizer().batch_decode(answers, skip_special_tokens=True)
    assert result.outputs == texts
    views = [teachers_view(family, row["prompt"], y) for row, y in zip(ROWS, answers, strict=True)]
    rewards_B, nll_B = [reward for reward, _ in views], [nll for _, nll in views]
    lengths = [len(y) for y in answers]
    expected = {
        "reward": mean(rewards_B),
        "teacher_nll_per_token": sum(nll_B) / sum(lengths),
        "teacher_nll_per_sequence": mean(nll_B),
        "tokens": mean(lengths),
        "eos_rate": mean([y[-1] == EOS for y in answers]),
    }
    found = {name: result.metrics[name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    per_input = {"tokens": lengths, "reward": rewards_B, "teacher_nll": nll_B}
    for name, values in per_input.items():
        assert result.per_input[name] == pytest.approx(values, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_log_ratio_compares_each_row_with_its_own_log_probs(family, batch_size):
    student = student_of(family)
    result = evaluate_student(
        Policy(student, word_tokenizer()),
        word_tokenizer(),
        ROWS,
        reward_model(family, LogRatioReward),
        max_prompt_length=None,
        max_completion_length=LENGTH,
        batch_size=batch_size,
    )
    teacher, expected = teacher_of(family), []
    for row, completion in zip(ROWS, rows_of(result.completions), strict=True):
        teacher_logp = own_log_probability(teacher, question(row["prompt"]), completion)
        expected.append(teacher_logp - own_log_probability(student, row["prompt"], completion))
    assert result.per_input["reward"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_reward_function_reads_each_rows_own_output():
    seen = []

    def noting(prompts, completions, completion_ids):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return [0.0] * len(prompts)

    policy = Policy(student_of("t5-untied"), word_tokenizer())
    lengths = {"max_prompt_length": None, "max_completion_length": LENGTH, "batch_size": 3}
    result = evaluate_student(policy, word_tokenizer(), ROWS, RewardModel([noting]), **lengths)
    texts = [row["prompt"] for row in ROWS]
    assert seen == list(zip(texts, result.outputs, rows_of(result.completions), strict=True))
    assert len(set(result.outputs)) > 2, "the rows must differ"


def test_a_teacher_asked_without_its_chat_is_measured_without_it():
    """Beside a student with the same tokenizer, which is spoken to through its chat template."""

    def outputs(tokenizer, chat=None) -> list[str]:
        rewards = RewardModel([TeacherForcingReward(teacher_of("llama"), tokenizer, chat=chat)])
        return evaluate_teacher(ROWS, rewards, max_completion_length=LENGTH).outputs

    plain = outputs(chat_tokenizer(None))
    assert outputs(chat_tokenizer(), ChatFormat("none")) == plain != outputs(chat_tokenizer())


def test_a_teacher_is_asked_through_its_first_template_within_its_own_length():
    def outputs(*texts: str, max_prompt_length: int | None = None) -> list[str]:
        templates = PromptTemplates([PromptTemplate(f"t{i}", text) for i, text in enumerate(texts)])
        teacher = Teacher(teacher_of("llama"), word_tokenizer(), max_prompt_length=max_prompt_length)
        panel = TeacherPanel([teacher], templates)
        rewards = RewardModel([TeacherForcingReward(panel)])
        return evaluate_teacher(ROWS, rewards, max_completion_length=LENGTH).outputs

    first, second, short = "w9 {{ source }} w10", "w11 w12 w13 {{ source }}", "w9 {{ source.split()[0] }} w10"
    of_first = outputs(first)
    assert outputs(first, second) == of_first != outputs(second)
    # Words around the document stay: of the source one token is left.
    assert outputs(first, max_prompt_length=4) == outputs(short) != of_first


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_samples_depend_on_the_seed_and_not_on_the_batch(who):
    rewards = reward_model("llama")

    def sampled(seed, batch_size):
        settings = {"max_completion_length": LENGTH, "batch_size": batch_size, "seed": seed}
        if who == "teacher":
            result = evaluate_teacher(ROWS, rewards, **settings)
        else:
            policy = Policy(MODELS["llama"](), word_tokenizer())
            result = evaluate_student(policy, word_tokenizer(), ROWS, rewards, max_prompt_length=None, **settings)
        return result.outputs, result.metrics

    outputs, metrics = sampled(1, 64)
    in_parts, same_metrics = sampled(1, 3)
    assert in_parts == outputs and same_metrics == pytest.approx(metrics, rel=1e-5)
    assert sampled(2, 64)[0] != outputs


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_several_samples_per_prompt(family, batch_size):
    """Of each prompt's samples, in parts of so many prompts, as `sampled_inputs` has them too."""
    model = student_of(family)
    policy, K = Policy(model, word_tokenizer()), 2
    settings = {"num_generations": K, "max_prompt_length": None, "batch_size": batch_size}
    inputs = sampled_inputs(policy, word_tokenizer(), ROWS, max_completion_length=LENGTH, seed=0, **settings)
    mask_BT = inputs.completion_mask_BT
    completions = Completions(inputs.completion_ids_BT, mask_BT, inputs.ended_B)
    texts = [row["prompt"] for row in ROWS]
    logps_BT = completion_log_probs(policy, word_tokenizer(), texts, completions, **settings)
    torch.testing.assert_close(inputs.student_logps_BT, logps_BT)
    assert inputs.prompt_index_B.tolist() == [p for p in range(len(ROWS)) for _ in range(K)]
    assert (logps_BT[~mask_BT] == 0).all()
    expected = [own_log_probability(model, texts[b // K], y) for b, y in enumerate(rows_of(completions))]
    assert logps_BT.sum(dim=1).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
