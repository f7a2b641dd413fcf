"""recipes/generate_data.py: from a teacher alone to a dataset that the other recipes read."""

import json

import pytest

from tests.recipes.command_lines import read_jsonl, run

FEW = "--num_rows 6 --max_input_length 8 --batch_size 16"


def test_its_data_are_data_for_the_other_recipes(checkpoints, tmp_path):
    teacher, output = checkpoints["t5-untied"].teacher, tmp_path / "sources.jsonl"
    ask = "--template 'w3 w4' --temperature 1.5"
    assert run(f"generate_data --teacher {teacher} {ask} {FEW} --output {output}") == 0
    rows = read_jsonl(output)
    assert len({row["source"] for row in rows}) == 6 and all(row["logp_per_token"] < 0 for row in rows)
    labels = tmp_path / "labels.jsonl"
    assert run(f"pseudo_label --teacher {teacher} --dataset {output} --output {labels}") == 0
    assert [row["source"] for row in read_jsonl(labels)] == [row["source"] for row in rows]


def test_other_ways_to_make_them(checkpoints, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"slots": {"food": ["w3", "w4", "w5"], "area": ["w6", "w7"]}}))
    of_slots, of_bos = tmp_path / "slots.jsonl", tmp_path / "bos.jsonl"
    llama = checkpoints["llama"].teacher
    assert run(f"generate_data --teacher {llama} --schema {schema} --keep_share 1 {FEW} --output {of_slots}") == 0
    assert all("[" in row["source"] and "logp_per_token" not in row for row in read_jsonl(of_slots))
    assert run(f"generate_data --teacher {llama} --temperature 1.5 {FEW} --output {of_bos}") == 0
    assert len(read_jsonl(of_bos)) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "An encoder-decoder does not write without a question"),
        ("--template 'w3 {{ mr }}'", "reads mr, and there are no data to read"),
        ("--template w3 --student_template '{{ mr }}'", "--student_template {{ mr }} has no effect without data"),
        ("--schema slots.json", "so with --schema it needs a --template"),
        ("--schema slots.json --template w3 --temperature 0.5", "--temperature 0.5 has no effect without sampling"),
        ("--schema nowhere.json --keep_share 1", "nowhere.json could not be read as JSON"),
        ("--template w3 --keep_share 0", "--keep_share 0.0 is out of range"),
        ("--template w3 --teacher a b", "a"),
        ("--template w3 --output .", "--output . is a directory"),
        ("--template w3 --output slots.json", "slots.json exists: name another file"),
    ],
)
def test_refused_before_models_load(flags, message, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlkd_trl.models.loading.load_model", None)
    (tmp_path / "slots.json").write_text('{"slots": {"a": ["w3"]}}')
    output = "" if "--output" in flags else "--output out.jsonl"
    teacher = checkpoints["t5-untied"].teacher
    assert run(f"generate_data --teacher {teacher} {output} {flags}") == 2
    assert message in capsys.readouterr().err


def test_the_name_teacher_generated_says_what_to_do(checkpoints, tmp_path, capsys):
    pair = checkpoints["t5-untied"]
    models = f"--teacher {pair.teacher} --student {pair.student}"
    assert run(f"ppo_kd {models} --dataset teacher-generated --output_dir {tmp_path}/out") == 2
    assert "generate_data" in capsys.readouterr().err
