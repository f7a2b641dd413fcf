"""A teacher's answers as training data: which question each one answers, and what is written down."""

import json

import pytest
import sacrebleu

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.teachers import Teacher, TeacherPanel
from rlkd_trl.teachers.pseudo_labels import nearest_candidate, pseudo_labels, write_pseudo_labels
from tests.models.plain_generate import plain_texts
from tests.tiny_models import MODELS, word_tokenizer

LENGTH = 6
ROWS = [
    {"prompt": "w3 w4", "source": "w3 w4", "references": ["w26 w26"], "id": 0},
    {"prompt": "w9", "source": "w9", "references": ["w25", "w24"], "id": 1},
    {"prompt": "w10 w11 w12 w13", "source": "w10 w11 w12 w13", "references": [], "id": 2},
    {"prompt": "w16 w17", "source": "w16 w17", "references": ["w23"], "id": 3},
    {"prompt": "w20", "source": "w20", "references": ["w22"], "id": 4},
]
BEFORE = PromptTemplate("before", "w5 w6 {{ source }} ||| {{ target }}")
AFTER = PromptTemplate("after", "{{ source }} w7 w8 w19 ||| {{ target }}")
BATCH_SIZES = [pytest.param(1, marks=pytest.mark.slow(0.3)), 2, pytest.param(64, marks=pytest.mark.slow(0.3))]
QUESTIONS = {"before": "w5 w6 {}".format, "after": "{} w7 w8 w19".format}  # what these two come to


def teacher_of(family="t5-untied", seed=14, **kwargs) -> Teacher:
    return Teacher(MODELS[family](seed=seed), word_tokenizer(), **kwargs)


def answer(model, question: str) -> str:
    """What transformers' own greedy search answers."""
    return plain_texts(model, question, max_new_tokens=LENGTH)[0]


def without_references(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "references"}


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize(("family", "seed"), [("t5-untied", 14), ("llama", 22)])
def test_every_row_is_labelled_once_per_template_with_the_answer_to_that_question(family, seed, batch_size):
    teacher = teacher_of(family, seed)
    panel = TeacherPanel([teacher], PromptTemplates([BEFORE, AFTER]))
    expected = [
        {**without_references(row), "template": name, "pseudo_label": answer(teacher.model, question(row["source"]))}
        for name, question in QUESTIONS.items()
        for row in ROWS
    ]
    labels = list(pseudo_labels(panel, ROWS, max_completion_length=LENGTH, batch_size=batch_size))
    assert labels == expected
    assert [list(label) for label in labels] == [["prompt", "source", "id", "template", "pseudo_label"]] * 10
    answers = [label["pseudo_label"] for label in labels]
    assert len(set(answers)) >= 6 and answers[:5] != answers[5:], "one must tell rows and templates apart"


def test_without_templates_the_teacher_is_asked_the_students_prompt():
    teacher = teacher_of()
    labels = list(pseudo_labels(TeacherPanel([teacher]), ROWS, max_completion_length=LENGTH))
    assert labels == [
        {**without_references(row), "template": None, "pseudo_label": answer(teacher.model, row["prompt"])}
        for row in ROWS
    ]


def test_the_first_of_several_teachers_answers():
    first, second = teacher_of(), teacher_of(seed=3)
    panel = TeacherPanel([first, second], PromptTemplates([AFTER]), teacher_weights=[0.1, 0.9])
    labels = [label["pseudo_label"] for label in pseudo_labels(panel, ROWS, max_completion_length=LENGTH)]
    questions = [QUESTIONS["after"](row["source"]) for row in ROWS]
    assert labels == [answer(first.model, question) for question in questions]
    assert labels != [answer(second.model, question) for question in questions]


def test_the_teachers_questions_are_cut_where_the_teacher_cuts_them():
    """At four tokens, EOS included: the same as asking with the first three words."""
    teacher = teacher_of(max_prompt_length=4)
    labels = list(pseudo_labels(TeacherPanel([teacher]), ROWS, max_completion_length=LENGTH))
    assert labels[2]["pseudo_label"] == answer(teacher.model, "w10 w11 w12")
    assert labels[2]["pseudo_label"] != answer(teacher.model, "w10 w11 w12 w13")
    assert labels[0]["pseudo_label"] == answer(teacher.model, "w3 w4")


def test_other_strategies_are_passed_on():
    panel = TeacherPanel([teacher_of()], PromptTemplates([BEFORE]))
    by_strategy = {
        (strategy, seed): [
            label["pseudo_label"]
            for label in pseudo_labels(panel, ROWS, max_completion_length=LENGTH, strategy=strategy, seed=seed)
        ]
        for strategy, seed in (("greedy", 0), ("beam", 0), ("sample", 0), ("sample", 1))
    }
    assert len(set(map(tuple, by_strategy.values()))) == 4
    with pytest.raises(InputError, match="Unknown strategy"):
        list(pseudo_labels(panel, ROWS, max_completion_length=LENGTH, strategy="best"))


def test_the_reference_never_reaches_the_teacher():
    """Rows that differ in their references alone get the same labels, and a template that asks for them fails."""
    panel = TeacherPanel([teacher_of()], PromptTemplates([BEFORE, AFTER]))
    hidden = [{**row, "references": ["w13 w13 w13"]} for row in ROWS]
    labels = [list(pseudo_labels(panel, rows, max_completion_length=LENGTH)) for rows in (ROWS, hidden)]
    assert labels[0] == labels[1]
    leak = PromptTemplate("leak", "{{ references[0] }} {{ source }} ||| {{ target }}")
    with pytest.raises(InputError, match="references"):
        list(pseudo_labels(TeacherPanel([teacher_of()], PromptTemplates([leak])), ROWS, max_completion_length=2))


# ---- sequence interpolation

# The reference is A B C D E. By hand, 1- to 4-grams (an order without a match counts half a match):
#   A B C X Y    3/5 · 2/4 · 1/3 · ½/2 = 1/40    A B C D X    4/5 · 3/4 · 2/3 · 1/2 = 1/5
#   A B C D E F  5/6 · 4/5 · 3/4 · 2/3 = 1/3     A B C        1, in 3 words of 5: exp(1 − 5/3) = 0.51 = 0.069^¼
#   W            no word in common: 0
CANDIDATES_BY_HAND = [
    (["A B C X Y", "A B C D X", "A B C D E F"], 2),
    (["A B C D E F", "A B C D X", "A B C X Y"], 0),
    (["A B C X Y", "A B C D X", "A B C"], 1),
    (["A B C X Y", "A B C"], 1),
    (["W", "A B C X Y", "A B C D X", "A B C D X"], 2),  # of the equals, the earlier
    (["W", "", "W W"], 0),
    (["", "W", "A"], 2),
    (["W"], 0),
]


@pytest.mark.parametrize(("candidates", "nearest"), CANDIDATES_BY_HAND)
def test_the_nearest_candidate_by_hand(candidates, nearest):
    assert nearest_candidate(candidates, ["A B C D E"]) == nearest


def test_the_nearest_candidate_is_near_any_of_the_references():
    assert nearest_candidate(["A B C D X", "P Q R S T"], ["A B C D E", "P Q R S T"]) == 1
    assert nearest_candidate(["A B C D X", "P Q R S T"], ["A B C D E"]) == 0


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize(("family", "seed"), [("t5-untied", 14), ("llama", 22)])
def test_interpolation_takes_the_beam_nearest_to_the_references(family, seed, batch_size):
    """Among the beams of transformers' own search, by sacrebleu's own score. Some rows have two references."""
    teacher = teacher_of(family, seed)
    panel = TeacherPanel([teacher], PromptTemplates([BEFORE, AFTER]))
    beams = {"num_beams": 4, "num_return_sequences": 4}
    candidates = {
        (name, row["id"]): plain_texts(teacher.model, question(row["source"]), max_new_tokens=LENGTH, **beams)
        for name, question in QUESTIONS.items()
        for row in ROWS
    }
    references = [[candidates["before", i][-1 - i % 3], "w23 w24"][: 1 + i % 2] for i in range(len(ROWS))]
    rows = [{**row, "references": texts} for row, texts in zip(ROWS, references, strict=True)]
    expected = []
    for name in QUESTIONS:
        for row in rows:
            texts = candidates[name, row["id"]]
            scores = [sacrebleu.sentence_bleu(text, row["references"]).score for text in texts]
            rank = max(range(4), key=lambda k, scores=scores: (scores[k], -k))
            label = {"template": name, "pseudo_label": texts[rank], "candidate": rank}
            expected.append({**without_references(row), **label})
    assert len({label["candidate"] for label in expected}) >= 3, "one must tell the beams apart"
    generation = {"strategy": "beam", "num_beams": 4, "max_completion_length": LENGTH, "batch_size": batch_size}
    labels = list(pseudo_labels(panel, rows, interpolate=True, **generation))
    assert labels == expected
    assert list(labels[0]) == ["prompt", "source", "id", "template", "pseudo_label", "candidate"]


def test_interpolation_needs_references_and_beams():
    """And says so before the teacher is asked."""
    teacher = teacher_of()
    teacher.model.get_encoder().register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    panel, generation = TeacherPanel([teacher]), {"interpolate": True, "max_completion_length": LENGTH}
    with pytest.raises(InputError, match="Row 3 has no references"):
        list(pseudo_labels(panel, ROWS, strategy="beam", **generation))
    with pytest.raises(InputError, match="Row 1 has no references"):
        list(pseudo_labels(panel, [{"prompt": "w3"}], strategy="beam", **generation))
    with pytest.raises(InputError, match="'greedy' has no beams to give"):
        list(pseudo_labels(panel, ROWS[:2], **generation))


# ---- the file


def test_the_file_holds_one_line_of_json_per_label(tmp_path):
    panel = TeacherPanel([teacher_of()], PromptTemplates([BEFORE, AFTER]))
    rows = [{**row, "title": "Café “Zum Bären”\n2"} for row in ROWS]
    path = tmp_path / "new" / "folder" / "labels.jsonl"
    assert write_pseudo_labels(panel, rows, path, max_completion_length=LENGTH, batch_size=2) == 10
    text = path.read_text(encoding="utf-8")
    assert "Café “Zum Bären”\\n2" in text, "legible, and one line each"
    model = panel.scorers[0].teacher.model
    assert [json.loads(line) for line in text.splitlines()] == [
        {**without_references(row), "template": name, "pseudo_label": answer(model, question(row["source"]))}
        for name, question in QUESTIONS.items()
        for row in rows
    ]
    assert [file.name for file in path.parent.iterdir()] == ["labels.jsonl"]


def test_an_interrupted_run_keeps_the_old_file_and_what_it_had_written(tmp_path):
    """The second batch fails: the complete file of an earlier run stays, the new one is there in part."""
    path = tmp_path / "labels.jsonl"
    path.write_text("earlier\n")
    teacher = teacher_of()
    panel = TeacherPanel([teacher])
    reads = []

    def fail_at_the_second(*_):
        reads.append(1)
        if len(reads) == 2:
            raise KeyboardInterrupt

    teacher.model.get_encoder().register_forward_pre_hook(fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_pseudo_labels(panel, ROWS, path, max_completion_length=LENGTH, batch_size=2)
    assert path.read_text() == "earlier\n"
    part = (tmp_path / "labels.jsonl.part").read_text().splitlines()
    assert [json.loads(line)["id"] for line in part] == [0, 1]


def test_a_finished_run_replaces_the_old_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("earlier\n")
    assert write_pseudo_labels(TeacherPanel([teacher_of()]), ROWS[:2], path, max_completion_length=2) == 2
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [0, 1]
