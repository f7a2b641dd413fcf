"""Inputs that a teacher writes or that are put together from slots: distinct, and those that it finds likeliest."""

import itertools
import json
import math
import re

import pytest

from rlkd_trl.errors import InputError, TrainingError
from rlkd_trl.teachers import Teacher
from rlkd_trl.teachers.generated_inputs import Schema, generate_inputs, start_text, write_inputs
from tests.rewards.reference import log_probability, logits_of
from tests.tiny_models import EOS, MODELS, word_tokenizer

SLOTS = {"food": ["w3", "w4"], "area": ["w5 w6", "w7"], "name": ["w8"]}


@pytest.fixture(scope="module", params=["t5-untied", "llama"])
def teacher(request):
    return Teacher(MODELS[request.param](seed=5), word_tokenizer())


def logp_per_token(teacher: Teacher, question: str, text: str) -> float:
    ids = [int(word[1:]) for word in text.split()] + [EOS]
    logits = logits_of(teacher.model, teacher.processing_class, question, ids)
    return sum(log_probability(z, token) for z, token in zip(logits, ids, strict=False)) / len(ids)


def test_samples_are_distinct_whole_and_the_likeliest_ones(teacher):
    settings = {"temperature": 1.5, "max_input_length": 8, "batch_size": 16, "seed": 3}
    candidates = generate_inputs(teacher, ["w3", "w4 w5"], num_inputs=20, keep_share=1.0, **settings)
    kept = generate_inputs(teacher, ["w3", "w4 w5"], num_inputs=5, keep_share=0.25, **settings)
    sources = [item.source for item in candidates]
    assert len(set(sources)) == 20 and all(re.fullmatch(r"w\d+( w\d+){0,6}", text) for text in sources)
    for item in candidates[:6]:
        found = [logp_per_token(teacher, question, item.source) for question in ("w3", "w4 w5")]
        assert any(item.logp_per_token == pytest.approx(value, rel=1e-4) for value in found)
    best = sorted(candidates, key=lambda item: -item.logp_per_token)[:5]
    assert kept == [item for item in candidates if item in best]


def test_recombinations_are_weighed_by_the_teacher(teacher):
    schema = Schema(SLOTS, required=("name",), slot_format="{value}", separator=" ")
    everything = {
        " ".join(part for part in (food, area, "w8") if part)
        for food, area in itertools.product(("", "w3", "w4"), ("", "w5 w6", "w7"))
    }
    inputs = generate_inputs(teacher, ["w9"], num_inputs=9, keep_share=1.0, schema=schema, batch_size=4)
    assert {item.source for item in inputs} == everything
    assert inputs[0].logp_per_token == pytest.approx(logp_per_token(teacher, "w9", inputs[0].source), rel=1e-4)
    three = generate_inputs(teacher, ["w9"], num_inputs=3, keep_share=1 / 3, schema=schema)
    best = sorted(everything, key=lambda text: -logp_per_token(teacher, "w9", text))[:3]
    assert {item.source for item in three} == set(best)
    assert generate_inputs(teacher, [], num_inputs=9, keep_share=1.0, schema=schema)[0].logp_per_token is None


def test_too_few_distinct_ones_are_refused(teacher):
    schema = Schema({"name": ["w8"], "food": ["w3"]})
    with pytest.raises(InputError, match=r"3 distinct inputs came of 100 candidates, and 10 are needed.*more values"):
        generate_inputs(teacher, [], num_inputs=10, keep_share=1.0, schema=schema)


def test_empty_values_make_no_input_and_names_are_no_formats(teacher):
    schema = Schema({"a": ["", " "], "{value}": ["w3"]}, required=("a",), slot_format="{value}", separator="")
    inputs = generate_inputs(teacher, [], num_inputs=2, keep_share=1.0, schema=schema)
    assert {item.source for item in inputs} == {"w3", " w3"}
    assert set(itertools.islice(Schema({"{value}": ["w3"]}).recombinations(0), 5)) == {"{value}[w3]"}


def test_what_a_teacher_says_that_is_not_finite_orders_nothing():
    broken = Teacher(MODELS["t5-untied"](seed=5), word_tokenizer())
    broken.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"log-probability of '.*' is nan"):
        generate_inputs(broken, ["w9"], num_inputs=2, keep_share=0.5, schema=Schema(SLOTS), batch_size=4)


def test_a_decoder_only_teacher_begins_with_its_bos():
    teacher = Teacher(MODELS["llama"](seed=5), word_tokenizer(append_eos=False))
    assert start_text(teacher) == "</s>"  # of a tokenizer without BOS its EOS
    item = generate_inputs(teacher, [start_text(teacher)], num_inputs=1, keep_share=1.0, max_input_length=12)[0]
    assert item.logp_per_token == pytest.approx(logp_per_token(teacher, "</s>", item.source), rel=1e-4)
    with pytest.raises(InputError, match="An encoder-decoder does not write without a question"):
        start_text(Teacher(MODELS["t5-tied"](), word_tokenizer()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "could not be read as JSON"),
        ("[]", "needs {"),
        ('{"slots": {"a": []}}', "slot 'a' needs a list of texts; it has []"),
        ('{"slots": {"a": ["x"]}, "need": 1}', "'need' is none of slots, required"),
        ('{"slots": {"a": ["x"]}, "required": ["b"]}', "required slot 'b' is none of a"),
        ('{"slots": {"a": ["x"]}, "slot_format": "-"}', "needs {slot}, {value} or both"),
        ('{"slots": {"a": ["x"]}, "slot_format": 5}', "'slot_format' needs text; it has 5"),
        ('{"slots": {"a": ["x"]}, "separator": null}', "'separator' needs text; it has None"),
        ('{"slots": {"a": ["x"]}, "required": 5}', "required needs a list of slots; it has 5"),
        (r'{"slots": {"a": ["\ud83d"]}}', r"'a' needs text; it has '\ud83d'"),
    ],
)
def test_bad_schemas_are_refused(text, message, tmp_path):
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        Schema.load(str(tmp_path / "schema.json"))


def test_what_is_written(teacher, tmp_path):
    inputs = generate_inputs(teacher, [], num_inputs=2, keep_share=1.0, schema=Schema(SLOTS))
    write_inputs(inputs, str(tmp_path / "new" / "inputs.jsonl"))
    other = tmp_path / "new" / "inputs.jsonl.part"  # of another command, or of the user
    other.touch()
    write_inputs(inputs, str(tmp_path / "new" / "inputs.jsonl"))
    assert other.exists()
    lines = [json.loads(line) for line in (tmp_path / "new" / "inputs.jsonl").read_text().splitlines()]
    assert lines == [{"source": item.source} for item in inputs]
    assert re.fullmatch(r"(\w+\[[w\d ]+\](, )?)+", lines[0]["source"])
