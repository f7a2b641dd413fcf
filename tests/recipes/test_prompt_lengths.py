"""Prompts longer than their caps, in the recipes: the template's words stay, and one line says how many rows."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from rlkd_trl.models import loading
from tests.recipes.command_lines import COLUMNS, TWO_STEPS, read_jsonl, run, write_csv, write_templates
from tests.tiny_models import MODELS, VOCAB, word_tokenizer


def words(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last + 1))


# 1, 2, … 20 words: with w3 before, w4 and w5 behind, and EOS, 5 to 24 tokens.
ROWS = [{"mr": words(6, 6 + n), "ref": "w7 w8"} for n in range(20)]
TEMPLATE = "w3 {{ mr }} w4 w5"


@pytest.fixture(scope="module")
def long_csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("long") / "long.csv", ROWS)


def shortened(row: dict, tokens: int) -> str:
    """By hand: the template's three words and EOS, and as many words of the row as are left."""
    return f"w3 {' '.join(row['mr'].split()[: tokens - 4])} w4 w5"


def test_the_students_prompts(checkpoints, long_csv, tmp_path, capsys):
    student = checkpoints["t5-tied"].student
    flags = f"--student_template '{TEMPLATE}' --max_prompt_length 10 --max_completion_length 3 --output_dir {tmp_path}"
    assert run(f"evaluate --student {student} --dataset {long_csv} {COLUMNS} {flags}") == 0
    assert [line["prompt"] for line in read_jsonl(tmp_path / "outputs.jsonl")] == [shortened(row, 10) for row in ROWS]
    # 14 rows have 11 to 24 tokens: 1 to 14 too many, 7.5 on average
    line = "Data: 14 of 20 prompts are longer than --max_prompt_length 10 and lose 8 tokens on average, 14 at most"
    assert capsys.readouterr().out.count(line) == 1


def test_nothing_is_said_where_nothing_is_too_long(checkpoints, long_csv, tmp_path, capsys):
    flags = f"--student {checkpoints['t5-tied'].student} --max_prompt_length 21 --max_completion_length 3"
    assert run(f"evaluate --dataset {long_csv} {COLUMNS} {flags}") == 0
    assert "longer than" not in capsys.readouterr().out


def test_supervised_pairs(long_csv, tmp_path, monkeypatch):
    """A teacher in training sees whole questions too."""
    from rlkd_trl.trainers import supervised

    seen = []
    monkeypatch.setattr(
        supervised.SupervisedTrainer, "train", lambda self, **kwargs: seen.extend(self.train_dataset["prompt"])
    )
    monkeypatch.setattr(supervised.SupervisedTrainer, "save_model", lambda self, **_: None)
    templates = write_templates(tmp_path / "t.yaml", one=TEMPLATE)
    flags = f"--templates {templates} --d_model 16 --num_heads 2 --max_prompt_length 9 --output_dir {tmp_path / 'out'}"
    assert run(f"sft --dataset {long_csv} {COLUMNS} {TWO_STEPS} {flags} --vocab_size 400") == 0
    assert len(seen) == 20 and all(prompt.startswith("w3 w6") and prompt.endswith(" w4 w5") for prompt in seen)
    assert len(set(seen)) < 20  # some are cut to the same beginning


@pytest.mark.slow(0.7)
@pytest.mark.parametrize("recipe", ["ppo_kd", "kd"])
def test_questions_to_the_teacher(recipe, checkpoints, long_csv, tmp_path, capsys):
    pair, templates = checkpoints["t5-tied"], write_templates(tmp_path / "t.yaml", one=TEMPLATE)
    asked = []
    from rlkd_trl.teachers import teacher

    read = teacher.prompt_token_ids

    def reading(tokenizer, prompts, **kwargs):
        asked.extend(read(tokenizer, prompts, **kwargs))
        return read(tokenizer, prompts, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "prompt_token_ids", reading)
        flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {long_csv} --eval_dataset {long_csv}"
        caps = "--teacher_max_prompt_length 10 --max_prompt_length 12 --max_completion_length 3 --num_generations 2"
        command = f"{recipe} {flags} {COLUMNS} --templates {templates} {caps} {TWO_STEPS} --output_dir {tmp_path}"
        assert run(command) == 0
    assert asked and all(ids[0] == 3 and ids[-3:] == [4, 5, 1] and len(ids) <= 10 for ids in asked)
    out = capsys.readouterr().out
    for data in ("Training data", "Held-out data"):
        assert out.count(f"{data}: 14 of 20 rows' questions to the teacher are longer than") == 1
        # bare sources of 1 to 20 words and EOS: 12 to 21 tokens in 10 rows, 9 of them more than 12
        assert out.count(f"{data}: 9 of 20 prompts are longer than --max_prompt_length 12") == 1


def test_pseudo_labels(checkpoints, long_csv, tmp_path, capsys):
    templates = write_templates(tmp_path / "t.yaml", one=TEMPLATE)
    flags = f"--templates {templates} --teacher_max_prompt_length 10 --max_completion_length 3"
    command = f"pseudo_label --teacher {checkpoints['llama'].teacher} --dataset {long_csv} {COLUMNS} {flags}"
    assert run(f"{command} --output {tmp_path / 'whole.jsonl'}") == 0
    assert "Data: 14 of 20 rows' questions to the teacher" in capsys.readouterr().out
    # the same questions, made short by hand
    rows = [{"mr": " ".join(row["mr"].split()[:6]), "ref": "w7 w8"} for row in ROWS]
    short = write_csv(tmp_path / "short.csv", [row | {"mr": f"{row['mr']}"} for row in rows])
    expected = {line["source"]: line["pseudo_label"] for line in read_jsonl(tmp_path / "whole.jsonl")}
    assert run(f"{command.replace(str(long_csv), str(short))} --output {tmp_path / 'short.jsonl'}") == 0
    for line in read_jsonl(tmp_path / "short.jsonl"):
        assert expected[line["source"]] == line["pseudo_label"]
    assert len({expected[row["mr"]] for row in ROWS[5:]}) == 1


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --student {student} --student_template '{template}' --max_prompt_length 4",
        "evaluate --student {student} --teacher {teacher} --templates {templates} --teacher_max_prompt_length 4",
        "pseudo_label --teacher {teacher} --templates {templates} --teacher_max_prompt_length 4 --output {out}",
        "sft --student {student} --templates {templates} --max_prompt_length 4 --output_dir {out}",
        "kd --student {student} --teacher {teacher} --templates {templates} --teacher_max_prompt_length 4 "
        "--output_dir {out} --num_generations 2 --per_device_train_batch_size 8",
    ],
    ids=lambda command: command.split(" --student_template")[0].split()[0],
)
def test_too_many_words_end_in_one_line_that_names_the_row(command, checkpoints, long_csv, tmp_path, capsys):
    pair, templates = checkpoints["t5-tied"], write_templates(tmp_path / "t.yaml", one=TEMPLATE)
    names = {"student": pair.student, "teacher": pair.teacher, "templates": templates, "template": TEMPLATE}
    assert run(f"{command.format(**names, out=tmp_path / 'out')} --dataset {long_csv} {COLUMNS}") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "row " in last
    assert "cannot be cut to 4: with one token of each of its variables (mr) it still has 5 tokens" in last


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A checkpoint with 30 positions: the longest row, of 21 tokens, leaves 9 for a completion."""
    directory = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=30, **sizes)).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


DISTIL = "--num_generations 2 --per_device_train_batch_size 8 --max_steps 1 --disable_tqdm True"


@pytest.mark.parametrize(
    "command, message",
    [
        (
            "ppo_kd --max_completion_length 10 --output_dir {out} " + DISTIL,
            "Training data: The student has positions for 30 tokens, too few for row 20: its prompt of 21 tokens + "
            "max_completion_length 10. Cut prompts with --max_prompt_length 20, or lower max_completion_length.",
        ),
        (
            "kd --max_completion_length 10 --max_prompt_length 20 --output_dir {out} " + DISTIL,
            "Training data: The teacher has positions for 30 tokens, too few for row 20: its prompt of 21 tokens + "
            "max_completion_length 10. Cut prompts with --teacher_max_prompt_length 20, or lower",
        ),
        (
            "evaluate --max_completion_length 30",
            "Data: The student has positions for completions of 29 tokens, and max_completion_length is 30: lower it.",
        ),
        (
            "sft --max_completion_length 3 --output_dir {out} --student_template 'w3 w3 w3 w3 w3 w3 w3 w3 {{{{mr}}}}'",
            # 8 words, 19 of the source and EOS, and of the target 2 words and EOS: 31
            "The model has positions for 30 tokens, too few for row 19: its prompt of 28 tokens + "
            "max_completion_length 3. Cut prompts with max_prompt_length 27, or lower",
        ),
    ],
)
def test_more_tokens_than_positions(command, message, gpt2, long_csv, tmp_path, capsys, monkeypatch):
    models = f"--student {gpt2} --teacher {gpt2}"
    if command.startswith("sft"):
        models = f"--student {gpt2}"
    else:  # before any weights are read
        monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: pytest.fail("read weights"))
    if "_kd" in command or "kd " in command:
        models += f" --eval_dataset {long_csv}"
    assert run(f"{command.format(out=tmp_path / 'out')} {models} --dataset {long_csv} {COLUMNS}") == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_as_many_tokens_as_positions(gpt2, long_csv, tmp_path):
    """Rows of up to 21 tokens and completions of 9 are just the model's 30."""
    flags = f"--student {gpt2} --teacher {gpt2} --dataset {long_csv} --eval_dataset {long_csv} {COLUMNS}"
    assert run(f"ppo_kd {flags} --max_completion_length 9 {DISTIL} --output_dir {tmp_path}") == 0


def test_a_pseudo_labellers_positions(gpt2, long_csv, tmp_path, capsys):
    command = f"pseudo_label --teacher {gpt2} --dataset {long_csv} {COLUMNS} --output {tmp_path / 'p.jsonl'}"
    assert run(f"{command} --max_completion_length 10") == 2
    assert "Data: The teacher has positions for 30 tokens, too few for row 20" in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_more_tokens_than_embeddings(role, checkpoints, long_csv, tmp_path, capsys):
    """The other model has rows enough for the same tokenizer, so that the two agree."""
    tokenizer, names = word_tokenizer(), {}
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    for name in ("student", "teacher"):
        directory = tmp_path / name
        model = MODELS["t5-tied"](seed=1)
        if name != role:
            model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        names[name] = directory
    flags = f"--student {names['student']} --teacher {names['teacher']} --dataset {long_csv} {COLUMNS}"
    assert run(f"evaluate {flags} --max_completion_length 3") == 2
    assert f"error: The {role}'s tokenizer has" in capsys.readouterr().err
