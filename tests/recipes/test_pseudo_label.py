"""recipes/pseudo_label.py: the teacher's answers as JSON lines."""

import pytest
import torch

from rlkd_trl.models.loading import load_model
from tests.models.bart_like import LANGUAGE, bart_like, tokenizer
from tests.models.plain_generate import NEVER_SAMPLED, plain_texts
from tests.recipes.command_lines import COLUMNS, TWO_STEPS, read_jsonl, run, word_rows, write_csv, write_templates
from tests.tiny_models import EOS

FAMILIES = ["t5-tied", "llama", "glm"]


def labels(path) -> list[str]:
    return [line["pseudo_label"] for line in read_jsonl(path)]


def generated(checkpoint, prompts: list[str], **generation) -> list[str]:
    """transformers' own `generate`, one prompt at a time."""
    model = load_model(str(checkpoint)).eval()
    return [plain_texts(model, prompt, max_new_tokens=6, **generation)[0] for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "strategy, generation", [("greedy", {}), ("beam --num_beams 3", {"num_beams": 3})], ids=["greedy", "beam"]
)
def test_answers_are_those_of_plain_generate(strategy, generation, family, checkpoints, test_csv, tmp_path):
    teacher, output = checkpoints[family].teacher, tmp_path / "labels.jsonl"
    flags = f"--strategy {strategy} --max_completion_length 6 --batch_size 3 --output {output}"
    assert run(f"pseudo_label --teacher {teacher} --dataset {test_csv} {COLUMNS} {flags}") == 0
    expected = generated(teacher, [row["mr"] for row in word_rows(8, seed=1)], **generation)
    assert labels(output) == expected
    assert all("candidate" not in line for line in read_jsonl(output))
    assert len(set(expected)) > 1, "the test needs answers that tell prompts apart"


@pytest.mark.parametrize("family", ["t5-tied", "llama"])
def test_interpolation_labels_an_input_with_the_beam_that_its_references_name(family, checkpoints, tmp_path):
    """One of an input's two references is a beam of the teacher's, word for word, the other is like none."""
    teacher, output = checkpoints[family].teacher, tmp_path / "labels.jsonl"
    inputs = [row["mr"] for row in word_rows(8, seed=1)]
    model, beams = load_model(str(teacher)).eval(), {"num_beams": 3, "num_return_sequences": 3}
    candidates = [plain_texts(model, text, max_new_tokens=6, **beams) for text in inputs]
    named = [texts[i % 3] for i, texts in enumerate(candidates)]
    rows = [{"mr": mr, "ref": "nothing like it"} for mr in inputs]
    rows += [{"mr": mr, "ref": ref} for mr, ref in zip(inputs, named, strict=True)]
    data = write_csv(tmp_path / "data.csv", rows)
    flags = f"--strategy beam --num_beams 3 --interpolate --max_completion_length 6 --output {output}"
    assert run(f"pseudo_label --teacher {teacher} --dataset {data} {COLUMNS} {flags}") == 0
    assert labels(output) == named
    ranks = [line["candidate"] for line in read_jsonl(output)]
    assert ranks == [texts.index(text) for texts, text in zip(candidates, named, strict=True)]
    assert set(ranks) == {0, 1, 2}
    assert all("ref" not in line and "references" not in line for line in read_jsonl(output))


def test_each_row_is_answered_by_the_teacher_and_through_the_template_that_it_names(checkpoints, tmp_path):
    pair = checkpoints["t5-tied"]
    rows = [
        {"mr": row["mr"], "expert": ("student", "teacher")[i % 3 > 0], "ask": ("two", "one")[i % 2]}
        for i, row in enumerate(word_rows(8, seed=1))
    ]
    data, output = write_csv(tmp_path / "data.csv", rows), tmp_path / "labels.jsonl"
    write_templates(tmp_path / "t.yaml", one="w9 {{ mr }}", two="{{ mr }} w4")
    flags = f"--source_column mr --templates {tmp_path / 't.yaml'} --max_completion_length 6 --output {output}"
    flags += " --teacher_column expert --template_column ask"
    assert run(f"pseudo_label --teacher {pair.teacher} {pair.student} --dataset {data} {flags}") == 0
    lines = {line["mr"]: line for line in read_jsonl(output)}
    assert len(lines) == len(rows)
    for row in rows:
        asked = f"w9 {row['mr']}" if row["ask"] == "one" else f"{row['mr']} w4"
        [answer] = generated(getattr(pair, row["expert"]), [asked])
        assert lines[row["mr"]]["pseudo_label"] == answer
        assert lines[row["mr"]]["template"] == row["ask"]
    assert run(f"pseudo_label --teacher {pair.teacher} {pair.student} --dataset {data} --source_column mr "
               f"--output {tmp_path / 'none.jsonl'}") == 2  # fmt: skip


def test_sampling_depends_on_its_seed_and_temperature(checkpoints, test_csv, tmp_path):
    teacher = checkpoints["t5-tied"].teacher

    def sampled(name: str, flags: str) -> list[str]:
        flags += f" --strategy sample --max_completion_length 6 --output {tmp_path / name}"
        assert run(f"pseudo_label --teacher {teacher} --dataset {test_csv} {COLUMNS} {flags}") == 0
        return labels(tmp_path / name)

    first = sampled("first", "--seed 1")
    assert sampled("again", "--seed 1") == first
    assert sampled("other", "--seed 2") != first
    # As the temperature goes to 0, the most likely token is all that is left.
    assert sampled("cold", "--temperature 1e-4") == generated(teacher, [row["mr"] for row in word_rows(8, seed=1)])


def test_one_line_for_each_distinct_input_and_template(checkpoints, tmp_path):
    rows = [
        {"mr": "w3 w4", "id": "w21", "ref": "w5"},
        {"mr": "w3 w4", "id": "w22", "ref": "w6"},
        {"mr": "w7", "id": "w23", "ref": "w8"},
    ]
    data = write_csv(tmp_path / "data.csv", rows)
    templates = write_templates(tmp_path / "t.yaml", first="w9 {{ mr }}", second="{{ mr }} w10 ||| {{ ref }}")
    teacher, output = checkpoints["t5-tied"].teacher, tmp_path / "new" / "directory" / "labels.jsonl"
    flags = f"--templates {templates} --max_completion_length 6 --output {output}"
    assert run(f"pseudo_label --teacher {teacher} --dataset {data} {COLUMNS} {flags}") == 0

    lines = read_jsonl(output)
    assert [(line["template"], line["mr"], line["id"]) for line in lines] == [
        ("first", "w3 w4", "w21"),
        ("first", "w7", "w23"),
        ("second", "w3 w4", "w21"),
        ("second", "w7", "w23"),
    ]
    assert labels(output) == generated(teacher, ["w9 w3 w4", "w9 w7", "w3 w4 w10", "w7 w10"])
    assert all("ref" not in line and "references" not in line for line in lines), "the human reference is not copied"
    assert [path.name for path in output.parent.iterdir()] == ["labels.jsonl"], "the unfinished file is gone"


def test_a_student_is_warm_started_on_them(checkpoints, test_csv, tmp_path, capsys):
    pair, output = checkpoints["t5-tied"], tmp_path / "labels.jsonl"
    flags = f"--max_completion_length 6 --output {output}"
    assert run(f"pseudo_label --teacher {pair.teacher} --dataset {test_csv} --source_column mr {flags}") == 0
    assert f"8 pseudo-labels are in {output}." in capsys.readouterr().out
    columns = "--source_column mr --target_column pseudo_label"
    flags = f"--tokenizer {pair.teacher} --d_model 16 --num_heads 2 --output_dir {tmp_path / 'warm'}"
    assert run(f"sft --dataset {output} {columns} {flags} {TWO_STEPS}") == 0
    first = {"prompt": word_rows(8, seed=1)[0]["mr"], "target": labels(output)[0]}
    assert f"8 pairs of prompt and target, e.g. {first}" in capsys.readouterr().out


def test_the_source_is_the_source_column_whatever_else_is_called_source(checkpoints, tmp_path):
    """A template of one variable gets the source text, also where another column is called `source`."""
    rows = [{"source": "w21", "text": row["mr"]} for row in word_rows(8, seed=1)]
    data = write_csv(tmp_path / "data.csv", rows)
    templates = write_templates(tmp_path / "t.yaml", one="w9 {{ document }}")
    teacher, output = checkpoints["t5-tied"].teacher, tmp_path / "labels.jsonl"
    flags = f"--templates {templates} --max_completion_length 6 --output {output}"
    assert run(f"pseudo_label --teacher {teacher} --dataset {data} --source_column text {flags}") == 0
    assert labels(output) == generated(teacher, [f"w9 {row['text']}" for row in rows])


GETS_THE_SOURCE = "The templates read `{}`, which is no column of the data: it gets the source text."


@pytest.mark.parametrize("recipe", ["pseudo_label", pytest.param("sft", marks=pytest.mark.slow(0.6))])
def test_a_variable_that_gets_the_source_is_named(recipe, checkpoints, test_csv, tmp_path, capsys):
    """It may be a column's name misspelt. Names that are a column's, or renamed, get what they name without a word."""
    pair = checkpoints["t5-tied"]
    for number, (template, more, is_named) in enumerate(
        [
            ("w9 {{ reff }}", "", True),
            ("w9 {{ mr }}", "", False),
            ("w9 {{ source }}", "", False),
            ("w9 {{ reff }}", "--rename_columns mr=reff", False),
        ]
    ):
        output = tmp_path / f"{number}"
        command = f"pseudo_label --teacher {pair.teacher} --source_column mr --output {output}.jsonl"
        if recipe == "sft":
            command = f"sft --student {pair.student} {COLUMNS} {TWO_STEPS} --output_dir {output}"
        assert run(f"{command} --dataset {test_csv} --template '{template}' {more}") == 0
        assert (GETS_THE_SOURCE.format("reff") in capsys.readouterr().out) is is_named


@pytest.mark.parametrize("recipe", ["pseudo_label", "sft", "ppo_kd"])
def test_a_template_that_reads_the_target_is_refused(recipe, checkpoints, test_csv, tmp_path, capsys):
    """It would get the source text in place of what it names, or show what is to be learnt."""
    pair = checkpoints["t5-tied"]
    places = {"pseudo_label": f"--output {tmp_path / 'out.jsonl'}"}
    models = f"--student {pair.student}" if recipe == "sft" else f"--teacher {pair.teacher}"
    models += f" --student {pair.student}" if recipe == "ppo_kd" else ""
    command = f"{recipe} {models} {COLUMNS} {places.get(recipe, f'--output_dir {tmp_path}/out')}"
    assert run(f"{command} --dataset {test_csv} --template 'w9 {{{{ ref }}}}'") == 2
    assert "The templates read `ref`, which is the --target_column" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("strategy, generation", [("greedy", {}), ("beam --num_beams 3", {"num_beams": 3})])
def test_forced_tokens_are_given_and_allowed_special_tokens_are_written(strategy, generation, test_csv, tmp_path):
    """Of a model that is forced to begin with a language's code, and that likes special tokens best."""
    model, words = bart_like("M2M100", start=EOS, forced=LANGUAGE).eval(), tokenizer()
    marks = [words.get_vocab()[mark] for mark in ("<triplet>", "<subj>")]
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for answers to differ
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        head = model.get_output_embeddings().weight
        head[marks[0]], head[marks[1]] = 1.5 * head[8], 1.5 * head[3]
    model.save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    model.generation_config.forced_eos_token_id = None  # which would replace the last token of a text without an end
    prompts = [row["mr"] for row in word_rows(8, seed=1)]
    found = {}
    for flag, banned in {"": marks, "--allowed_special_tokens '<triplet>'": marks[1:]}.items():
        output = tmp_path / f"{len(banned)}.jsonl"
        flags = f"--strategy {strategy} --max_completion_length 6 --output {output} {flag}"
        assert run(f"pseudo_label --teacher {tmp_path / 'teacher'} --dataset {test_csv} {COLUMNS} {flags}") == 0
        expected = []
        for prompt in prompts:
            ids = words(prompt, return_tensors="pt")
            bad_words = [[token] for token in [*NEVER_SAMPLED[:4], LANGUAGE, *banned]]
            [answer] = model.generate(**ids, max_new_tokens=7, bad_words_ids=bad_words, **generation).tolist()
            assert answer[:2] == [EOS, LANGUAGE]
            rest = answer[2:]
            expected.append(words.decode(rest[: rest.index(EOS)] if EOS in rest else rest))
        found[flag] = labels(output)
        assert found[flag] == expected
    without, with_marks = found.values()
    assert not any("<" in text for text in without) and any("<triplet>" in text for text in with_marks)
