"""recipes/evaluate.py against loops in float64, one row at a time: eight rows of different lengths, three a batch."""

import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sacrebleu.metrics import BLEU
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.recipes.command_lines import metrics_of, read_jsonl, run, write_csv, write_templates
from tests.rewards.reference import log_probability, teacher_forcing
from tests.students.plain_forward import ALLOWED, allowed_log_softmax, plain_forward
from tests.tiny_models import EOS, MODELS, word_tokenizer

CAP = 6
FLAGS = f"--source_column mr --target_column ref --max_completion_length {CAP} --batch_size 3"
# The teacher reads more than the student, and through two templates; it answers through the first.
TEMPLATES = {"first": "w9 {{ mr }} w10 w11", "second": "{{ mr }} w12"}
STUDENT_TEMPLATE = "w13 {{ mr }}"


class Model(NamedTuple):
    """A checkpoint, and what it answers to texts by plain forward passes of one row."""

    model: torch.nn.Module

    @torch.no_grad()
    def logits(self, prompt: str, completion: list[int]) -> torch.Tensor:
        """z_1 .. z_{T+1}, float64."""
        return plain_forward(self.model, word_tokenizer()(prompt)["input_ids"], completion)[0].double()

    def greedy(self, prompt: str) -> list[int]:
        completion: list[int] = []
        while len(completion) < CAP and EOS not in completion:
            last_V = self.logits(prompt, completion)[-1]
            completion.append(max(ALLOWED, key=lambda v: float(last_V[v])))
        return completion

    def teacher_nll(self, prompt: str, completion: list[int]) -> float:
        """Over the whole vocabulary, as the teacher is."""
        z_TV = self.logits(prompt, completion).tolist()
        return -sum(log_probability(z, token) for z, token in zip(z_TV, completion, strict=False))

    def student_nll(self, prompt: str, completion: list[int]) -> float:
        """Over the ids that may be sampled, as the student is trained."""
        logps_TV = allowed_log_softmax(self.logits(prompt, completion)[:-1])
        return -float(logps_TV[range(len(completion)), completion].sum())


class Pair(NamedTuple):
    """Checkpoint directories."""

    teacher: Path
    student: Path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    """Models whose answers end at many lengths: the EOS token's row of the head is three times as long."""
    made = {}
    for family in ("t5-untied", "llama"):
        made[family] = Pair(*(tmp_path_factory.mktemp(family) / role for role in Pair._fields))
        for seed, directory in enumerate(made[family]):
            model = MODELS[family](seed)
            with torch.no_grad():
                model.get_output_embeddings().weight[EOS] *= 3
            model.save_pretrained(directory)
            word_tokenizer().save_pretrained(directory)
    return made


def loaded(directory, family: str) -> Model:
    auto_class = AutoModelForSeq2SeqLM if family.startswith("t5") else AutoModelForCausalLM
    return Model(auto_class.from_pretrained(directory).eval())


def rows_of_many_lengths() -> list[dict[str, str]]:
    generator = random.Random(8)
    lengths = [1, 6, 2, 8, 3, 1, 7, 4]
    texts = [" ".join(f"w{generator.randint(3, 26)}" for _ in range(length)) for length in lengths]
    return [{"mr": text, "ref": " ".join(reversed(f"{text} w3".split()))} for text in texts]


def text_of(completion: list[int]) -> str:
    return word_tokenizer().decode(completion, skip_special_tokens=True)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return rows_of_many_lengths()


@pytest.fixture(scope="module", params=["t5-untied", "llama"])
def evaluated(request, pairs, rows, tmp_path_factory):
    """(metrics, outputs, student, teacher) of one command with everything in it."""
    directory, pair = tmp_path_factory.mktemp("evaluated"), pairs[request.param]
    data = write_csv(directory / "test.csv", rows)
    templates = write_templates(directory / "templates.yaml", **TEMPLATES)
    asked = f"--templates {templates} --student_template '{STUDENT_TEMPLATE}'"
    reward = "--reward teacher_forcing --value expected --gamma 0.8 --reward_weights 0.5 --ibleu"
    models = f"--teacher {pair.teacher} --student {pair.student}"
    command = f"evaluate {models} --dataset {data} {FLAGS} {asked} {reward} --output_dir {directory / 'out'}"
    assert run(command) == 0
    outputs = read_jsonl(directory / "out" / "outputs.jsonl")
    teacher, student = loaded(pair.teacher, request.param), loaded(pair.student, request.param)
    return metrics_of(directory / "out"), outputs, student, teacher


def student_prompt(row: dict) -> str:
    return STUDENT_TEMPLATE.replace("{{ mr }}", row["mr"])


def questions(row: dict) -> list[str]:
    return [template.replace("{{ mr }}", row["mr"]) for template in TEMPLATES.values()]


def completions_of(who: str, evaluated, rows) -> list[list[int]]:
    _, _, student, teacher = evaluated
    if who == "student":
        return [student.greedy(student_prompt(row)) for row in rows]
    return [teacher.greedy(questions(row)[0]) for row in rows]


def test_the_test_can_fail(evaluated, rows):
    """Batches whose outputs differ in length, so that padding and the wrong batch would show; some that never end."""
    for who in ("student", "teacher"):
        completions = completions_of(who, evaluated, rows)
        assert len(set(map(tuple, completions))) >= 5
        assert len({len(completion) for completion in completions}) >= 3
        assert {completion[-1] == EOS for completion in completions} == {True, False}


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_outputs_are_each_rows_own_greedy_answer(who, evaluated, rows):
    _, outputs, *_ = evaluated
    expected = [text_of(completion) for completion in completions_of(who, evaluated, rows)]
    assert [line[who] for line in outputs] == expected


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_what_the_teacher_thinks_of_them(who, evaluated, rows):
    metrics, _, _, teacher = evaluated
    completions = completions_of(who, evaluated, rows)
    nll = reward = 0.0
    for row, completion in zip(rows, completions, strict=True):
        for question in questions(row):
            nll += teacher.teacher_nll(question, completion) / 2
            z_TV = teacher.logits(question, completion).tolist()
            ended = completion[-1] == EOS
            reward += 0.5 * sum(teacher_forcing(z_TV, completion, ended=ended, kind="expected", gamma=0.8)) / 2
    tokens = sum(map(len, completions))
    found = metrics[who]
    assert found["teacher_nll_per_sequence"] == pytest.approx(nll / len(rows), rel=1e-5)
    assert found["teacher_nll_per_token"] == pytest.approx(nll / tokens, rel=1e-5)
    assert found["reward"] == pytest.approx(reward / len(rows), rel=1e-5)
    assert found["tokens"] == pytest.approx(tokens / len(rows))
    assert found["eos_rate"] == pytest.approx(sum(c[-1] == EOS for c in completions) / len(rows))


def test_coverage_risk_is_the_students_nll_of_the_teachers_answers(evaluated, rows):
    """Over the answers' own tokens, to the student's own prompts."""
    metrics, _, student, _ = evaluated
    answers = completions_of("teacher", evaluated, rows)
    nll = sum(student.student_nll(student_prompt(row), answer) for row, answer in zip(rows, answers, strict=True))
    found = metrics["student"]["student_nll_of_teacher_per_token"]
    assert found == pytest.approx(nll / sum(map(len, answers)), rel=1e-5)
    assert "student_nll_of_teacher_per_token" not in metrics["teacher"]


def test_text_metrics_are_of_all_rows(evaluated, rows):
    metrics, outputs, *_ = evaluated
    for who in ("student", "teacher"):
        texts = [line[who] for line in outputs]
        bleu = BLEU().corpus_score(texts, [[row["ref"] for row in rows]]).score
        of_source = BLEU().corpus_score(texts, [[row["mr"] for row in rows]]).score
        assert metrics[who]["bleu"] == pytest.approx(bleu)
        assert metrics[who]["ibleu"] == pytest.approx(0.8 * bleu - 0.2 * of_source)


@pytest.mark.parametrize("family", [pytest.param("t5-untied", marks=pytest.mark.slow(0.8)), "llama"])
def test_the_batch_size_changes_nothing(family, pairs, rows, tmp_path):
    pair, found = pairs[family], {}
    data = write_csv(tmp_path / "test.csv", rows)
    for size in (1, 5, 64):
        out = tmp_path / f"out{size}"
        flags = f"{FLAGS.replace('--batch_size 3', f'--batch_size {size}')} --reward log_ratio --output_dir {out}"
        assert run(f"evaluate --teacher {pair.teacher} --student {pair.student} --dataset {data} {flags}") == 0
        found[size] = metrics_of(out)
    for who in ("teacher", "student"):
        assert found[5][who] == pytest.approx(found[1][who], rel=1e-5, abs=1e-6)
        assert found[64][who] == pytest.approx(found[1][who], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("family", ["t5-untied", "llama"])
def test_the_log_ratio_is_of_each_rows_own_log_probabilities(family, pairs, rows, tmp_path):
    """log p_teacher − log π of the student's outputs; the student's own prompt on one side, the question on the other.

    Both over what may be sampled. The teacher's own row is of the teacher under its own question: 0 with one template.
    """
    pair = pairs[family]
    data = write_csv(tmp_path / "test.csv", rows)
    templates = write_templates(tmp_path / "templates.yaml", first=TEMPLATES["first"])
    flags = f"{FLAGS} --templates {templates} --reward log_ratio --output_dir {tmp_path / 'out'}"
    assert run(f"evaluate --teacher {pair.teacher} --student {pair.student} --dataset {data} {flags}") == 0
    teacher, student = loaded(pair.teacher, family), loaded(pair.student, family)
    total = 0.0
    for row in rows:
        completion = student.greedy(row["mr"])
        total += student.student_nll(row["mr"], completion) - teacher.student_nll(questions(row)[0], completion)
    metrics = metrics_of(tmp_path / "out")
    assert metrics["student"]["reward"] == pytest.approx(total / len(rows), rel=1e-4)
    assert metrics["teacher"]["reward"] == pytest.approx(0.0, abs=1e-4)
