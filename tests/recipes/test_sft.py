"""recipes/sft.py: teachers on references, warm starts on pseudo-labels."""

import json

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    Trainer,
)

from rlkd_trl.trainers.supervised import SupervisedTrainer
from tests.hub_server import TOKEN, loopback_hub
from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, run, word_rows, write_csv, write_templates
from tests.tiny_models import MODELS, word_tokenizer
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

AUTO_CLASSES = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}
CLASSES = {"t5": T5ForConditionalGeneration, "llama": LlamaForCausalLM}


def weights(directory, family: str = "t5"):
    return AUTO_CLASSES[family].from_pretrained(directory).state_dict()


@pytest.mark.parametrize("family", ["t5-tied", "t5-untied", "llama"])
def test_fine_tuning_of_a_checkpoint(family, checkpoints, train_csv, tmp_path):
    student = checkpoints[family].student
    assert run(f"sft --student {student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} --output_dir {tmp_path}") == 0
    architecture = family.split("-")[0]
    trained, start = weights(tmp_path, architecture), weights(student, architecture)
    assert trained.keys() == start.keys()
    # Two steps of Adam: each moves a weight by at most about the learning rate, 0.01.
    assert 0.01 < largest_difference(trained, start) < 0.03
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == word_tokenizer().get_vocab()


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_a_new_model_over_a_new_tokenizer(architecture, train_csv, tmp_path):
    sizes = f"--architecture {architecture} --d_model 24 --num_layers 3 --num_heads 2 --d_ff 40 --dropout 0"
    assert run(f"sft --dataset {train_csv} {COLUMNS} {sizes} {TWO_STEPS} --output_dir {tmp_path}") == 0

    model = AUTO_CLASSES[architecture].from_pretrained(tmp_path)
    assert type(model) is CLASSES[architecture]
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 3, 2)
    assert (config.d_ff if architecture == "t5" else config.intermediate_size) == 40

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    text = word_rows(1)[0]["mr"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_new_model_over_the_teachers_tokenizer(checkpoints, train_csv, tmp_path):
    sizes = f"--tokenizer {checkpoints['t5-tied'].teacher} --d_model 16 --num_heads 2"
    assert run(f"sft --dataset {train_csv} {COLUMNS} {sizes} {TWO_STEPS} --output_dir {tmp_path}") == 0
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == word_tokenizer().get_vocab()


def test_the_seed_decides_the_new_model(train_csv, tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        flags = f"--d_model 16 --num_heads 2 --seed {seed} --output_dir {tmp_path / name}"
        assert run(f"sft --dataset {train_csv} {COLUMNS} {TWO_STEPS} {flags}") == 0
    first = weights(tmp_path / "first")
    assert_same_weights(weights(tmp_path / "again"), first)
    assert largest_difference(weights(tmp_path / "other"), first) > 0.1


def test_every_row_through_every_template(tmp_path, capsys):
    rows = [{"mr": "w3 w4", "ref": "w5"}, {"mr": "w3 w4", "ref": "w6"}, {"mr": "w7", "ref": "w8"}]
    data = write_csv(tmp_path / "data.csv", rows)
    templates = write_templates(tmp_path / "t.yaml", first="w9 {{ mr }}", second="w10 {{ mr }} ||| {{ ref }}")
    flags = f"--templates {templates} --d_model 16 --num_heads 2 --output_dir {tmp_path / 'out'}"
    assert run(f"sft --dataset {data} {COLUMNS} {TWO_STEPS} {flags}") == 0
    # 3 rows × 2 templates; the reference is the target and stays out of the prompt
    assert "6 pairs of prompt and target, e.g. {'prompt': 'w9 w3 w4', 'target': 'w5'}" in capsys.readouterr().out


def test_every_reference_of_a_row_is_learnt(checkpoints, tmp_path, monkeypatch):
    """A list of texts in the target column, as JSON lines can have: a pair for each."""
    data, seen = tmp_path / "data.jsonl", []
    rows = [{"mr": "w3 w4", "ref": ["w5", "w6 w7"]}, {"mr": "w8", "ref": ["w9"]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(SupervisedTrainer, "train", lambda trainer, **_: seen.extend(trainer.train_dataset.to_list()))
    flags = f"--student {checkpoints['t5-tied'].student} --output_dir {tmp_path / 'out'}"
    assert run(f"sft --dataset {data} {COLUMNS} {TWO_STEPS} {flags}") == 0
    assert [(pair["prompt"], pair["target"]) for pair in seen] == [("w3 w4", "w5"), ("w3 w4", "w6 w7"), ("w8", "w9")]


@pytest.mark.parametrize("recipe", ["sft", pytest.param("kd", marks=pytest.mark.slow(0.5))])
def test_the_card_has_the_templates_that_were_used(recipe, checkpoints, train_csv, tmp_path, monkeypatch):
    """Their file is gone when the card is written."""
    pair, file = checkpoints["t5-tied"], write_templates(tmp_path / "t.yaml", first="w9 {{ mr }} ||| {{ ref }}")
    train = Trainer.train

    def train_and_remove(self, *args, **kwargs):
        file.unlink()
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train_and_remove)
    models = f"--student {pair.student}" + f" --teacher {pair.teacher} {SAMPLING}" * (recipe == "kd")
    command = f"{recipe} {models} --dataset {train_csv} {COLUMNS} {TWO_STEPS} --templates {file}"
    assert run(f"{command} --output_dir {tmp_path / 'out'}") == 0
    assert "w9 {{ mr }}" in (tmp_path / "out" / "README.md").read_text()


def test_the_students_own_template(tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv", [{"mr": "w3 w4", "ref": "w5"}])
    flags = f"--student_template 'w11 {{{{ mr }}}}' --d_model 16 --num_heads 2 --output_dir {tmp_path / 'out'}"
    assert run(f"sft --dataset {data} {COLUMNS} {TWO_STEPS} {flags}") == 0
    assert "{'prompt': 'w11 w3 w4', 'target': 'w5'}" in capsys.readouterr().out


@pytest.mark.parametrize("rows_used", [3, 100])
def test_max_rows(rows_used, checkpoints, train_csv, tmp_path, capsys):
    flags = f"--student {checkpoints['t5-tied'].student} --max_rows {rows_used} --output_dir {tmp_path}"
    assert run(f"sft --dataset {train_csv} {COLUMNS} {TWO_STEPS} {flags}") == 0
    assert f"{min(rows_used, 30)} pairs of prompt and target" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_resuming_equals_not_stopping(family, checkpoints, train_csv, tmp_path):
    pair = checkpoints[family]
    common = f"sft --dataset {train_csv} {COLUMNS} {TWO_STEPS} --save_steps 2"
    assert run(f"{common} --student {pair.student} --max_steps 4 --output_dir {tmp_path / 'whole'}") == 0
    assert run(f"{common} --student {pair.student} --output_dir {tmp_path / 'halves'}") == 0
    half = weights(tmp_path / "halves", family.split("-")[0])
    assert run(f"{common} --student {pair.student} --max_steps 4 --output_dir {tmp_path / 'halves'} --resume") == 0
    resumed = weights(tmp_path / "halves", family.split("-")[0])
    assert_same_weights(resumed, weights(tmp_path / "whole", family.split("-")[0]))
    assert largest_difference(resumed, half) > 0.01


def test_without_data_and_an_output_directory(checkpoints, tmp_path, monkeypatch, capsys):
    """It trains on the demo, and writes where transformers does."""
    monkeypatch.chdir(tmp_path)
    assert run(f"sft {TWO_STEPS} --student {checkpoints['t5-tied'].student} --max_rows 5") == 0
    assert (tmp_path / "trainer_output" / "finished.json").is_file()
    assert "5 pairs of prompt and target, e.g. {'prompt': 'name[" in capsys.readouterr().out


def test_a_checkpoint_in_bfloat16_stays_so(checkpoints, train_csv, tmp_path):
    flags = f"--student {checkpoints['llama'].student} --student_dtype bfloat16 --output_dir {tmp_path}"
    assert run(f"sft --dataset {train_csv} {COLUMNS} {TWO_STEPS} {flags}") == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert str(saved.dtype) == "torch.bfloat16"
    assert type(saved) is type(MODELS["llama"]())


@pytest.mark.slow(1)
def test_the_accounts_token_is_in_no_file_of_a_run(checkpoints, train_csv, tmp_path, capfd):
    """Checkpoints are pushed while training goes on, each with the settings that Trainer pickles."""
    push = f"--push_to_hub True --hub_model_id owner/name --hub_token {TOKEN} --hub_strategy checkpoint"
    command = f"sft --student {checkpoints['t5-tied'].student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} {push}"
    with loopback_hub(tmp_path / "hub") as hub:
        assert run(f"{command} --save_strategy steps --save_steps 1 --output_dir {tmp_path / 'out'}") == 0
    assert TOKEN in hub.authorized, "the Hub is given it"
    sent = hub.repositories["model", "owner/name"].files()
    assert {"training_args.bin", "last-checkpoint/training_args.bin"} <= sent.keys()
    files = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert [1 for content in [*files, *sent.values()] if TOKEN.encode() in content] == []
    assert TOKEN not in "".join(capfd.readouterr())
