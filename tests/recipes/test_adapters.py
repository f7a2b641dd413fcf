"""Students of adapters, from the command line: trained, saved, resumed, merged, evaluated; teachers of adapters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, AutoPeftModelForSequenceClassification, PeftModel, load_peft_weights
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from tests.recipes.command_lines import COLUMNS, METHODS, SAMPLING, TWO_STEPS, metrics_of, read_jsonl, run
from tests.recipes.forks import fork_recipes
from tests.tiny_models import word_tokenizer
from tests.trainers.tiny_runs import assert_same_weights

LORA = "--use_peft --lora_r 4"
ADAPTERS, WHOLE = "adapter_model.safetensors", "model.safetensors"


@pytest.fixture
def command(checkpoints, train_csv, test_csv, tmp_path):
    """A command line of a recipe with a teacher and a student, by the method and what is different."""

    def line(method: str, out: str, family: str = "t5-tied", **models) -> str:
        pair = checkpoints[family]
        named = {"teacher": pair.teacher, "student": pair.student, **models}
        return (
            f"{METHODS[method]} --teacher {named['teacher']} --student {named['student']} --dataset {train_csv} "
            f"--eval_dataset {test_csv} {COLUMNS} {TWO_STEPS} {SAMPLING} --output_dir {tmp_path / out}"
        )

    return line


def sft(checkpoints, train_csv, out: Path) -> str:
    student = checkpoints["t5-tied"].student
    return f"sft --student {student} --dataset {train_csv} {COLUMNS} {TWO_STEPS} --output_dir {out}"


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = {"input_ids": torch.tensor([[5, 9, 13, 1]])}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = torch.tensor([[0, 4, 8]])
    with torch.no_grad():
        return model.eval()(**ids).logits


@pytest.mark.parametrize(
    "method",
    [m if m == "kd" else pytest.param(m, marks=pytest.mark.slow(0.8)) for m in METHODS if m != "rloo-sequence"],
)
def test_every_recipe_trains_adapters_alone(method, command, tmp_path, capsys):
    adapters = f"{LORA} --use_dora --lora_target_modules q k v wi wo --lora_alpha 8"
    assert run(f"{command(method, 'out')} --max_steps 1 {adapters}") == 0
    assert "weights are trained (" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"], config["use_rslora"]) == (4, 8, True, False)
    assert config["task_type"] == "SEQ_2_SEQ_LM" and {*config["target_modules"]} == {"q", "k", "v", "wi", "wo"}
    saved = load_peft_weights(str(tmp_path / "out"))
    assert any(w.any() for name, w in saved.items() if "lora_B" in name), "they begin as zeros"
    assert not (tmp_path / "out" / WHOLE).exists()
    assert "AutoPeftModelForSeq2SeqLM.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow(1.0)
def test_adapters_of_a_warm_start_are_trained_further_and_evaluated(
    command, checkpoints, train_csv, test_csv, tmp_path
):
    """What evaluate.py finds is what plain PEFT writes with them."""
    assert run(f"{sft(checkpoints, train_csv, tmp_path / 'warm')} {LORA} --lora_dropout 0.3 --save_steps 1") == 0
    assert run(f"{command('rloo-token', 'out', student=tmp_path / 'warm')} --beta 0.1") == 0
    first, then = (load_peft_weights(str(tmp_path / name)) for name in ("warm", "out"))
    assert first.keys() == then.keys() and any((first[name] != then[name]).any() for name in first)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        checkpoints["t5-tied"].student
    )
    evaluation = f"evaluate --student {tmp_path / 'out'} --dataset {test_csv} {COLUMNS} --max_completion_length 6"
    assert run(f"{evaluation} --output_dir {tmp_path / 'scores'}") == 0
    model, tokenizer = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval(), word_tokenizer()
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    for line in read_jsonl(tmp_path / "scores" / "outputs.jsonl"):
        ids = model.generate(**tokenizer(line["prompt"], return_tensors="pt"), generation_config=settings)
        assert line["student"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert any(line["student"] for line in read_jsonl(tmp_path / "scores" / "outputs.jsonl"))


@pytest.mark.parametrize("family", ["llama", pytest.param("t5-tied", marks=pytest.mark.slow)])
def test_merged_adapters_are_a_plain_checkpoint(family, command, checkpoints, tmp_path):
    """That of the trained adapters, which the last checkpoint of the run holds."""
    line = f"{command('rloo-token', 'out', family)} {LORA} --lora_target_modules all-linear --merge_adapters"
    assert run(f"{line} --save_steps 2") == 0
    assert (tmp_path / "out" / WHOLE).is_file() and not (tmp_path / "out" / ADAPTERS).exists()
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForSeq2SeqLM
    base = auto.from_pretrained(checkpoints[family].student)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-2"))
    found = logits(auto.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3
    assert f"{auto.__name__}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow(1)
def test_a_resumed_run_of_adapters_ends_as_a_whole_one(command, tmp_path, capsys):
    """And is refused with adapters of another kind."""
    line = f"{command('ppo', 'out')} {LORA} --beta 0.1 --save_steps 1"
    assert run(line) == 0
    whole = load_peft_weights(str(tmp_path / "out"))
    for path in [tmp_path / "out" / "finished.json", tmp_path / "out" / "checkpoint-2"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(f"{line.replace('--lora_r 4', '--lora_r 2')} --resume") == 2
    assert "command.AdapterArguments.lora_r was 4 and is 2" in capsys.readouterr().err
    assert run(f"{line} --resume") == 0
    assert_same_weights(load_peft_weights(str(tmp_path / "out")), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_teacher_of_adapters_is_that_of_the_merged_model(command, checkpoints, train_csv, test_csv, tmp_path):
    assert run(f"{sft(checkpoints, train_csv, tmp_path / 'a')} {LORA}") == 0
    base = AutoModelForSeq2SeqLM.from_pretrained(checkpoints["t5-tied"].student)
    merged = PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload()
    merged.save_pretrained(tmp_path / "m")
    GenerationConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    for name in ("a", "m"):
        assert run(f"{command('kd', f'out-{name}', teacher=tmp_path / name)}") == 0
        labels = f"--dataset {test_csv} --source_column mr --output {tmp_path / name}.jsonl --max_completion_length 6"
        assert run(f"pseudo_label --teacher {tmp_path / name} {labels}") == 0
    found, expected = (metrics_of(tmp_path / f"out-{name}") for name in ("a", "m"))
    assert found["teacher"] == pytest.approx(expected["teacher"], rel=1e-4)
    assert found["after"] == pytest.approx(expected["after"], rel=1e-3)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "m.jsonl").read_text()
    quantised = "--teacher_quantization int8 --overwrite_output_dir"  # its adapters stay as they are
    assert run(f"{command('kd', 'out-a', teacher=tmp_path / 'a')} {quantised}") == 0


@pytest.mark.parametrize("method", ["rloo-token", *(pytest.param(m, marks=pytest.mark.slow) for m in ("ppo", "kd"))])
def test_a_quantised_student_trains_adapters(method, command, checkpoints, test_csv, tmp_path):
    beta = "" if method == "kd" else "--beta 0.1"
    assert run(f"{command(method, 'out')} {LORA} --load_in_4bit {beta}") == 0
    assert any(w.any() for name, w in load_peft_weights(str(tmp_path / "out")).items() if "lora_B" in name)
    evaluation = f"evaluate --student {tmp_path / 'out'} --load_in_4bit --dataset {test_csv} {COLUMNS}"
    assert run(f"{evaluation} --max_completion_length 6 --output_dir {tmp_path / 'scores'}") == 0
    found, expected = metrics_of(tmp_path / "scores")["student"], metrics_of(tmp_path / "out")["after"]
    assert found["bleu"] == pytest.approx(expected["bleu"]) and found["tokens"] == expected["tokens"]


def test_a_classifier_of_adapters(encoders, tmp_path):
    """Its new head is trained and saved with them; plain PEFT loads it."""
    out = tmp_path / "out"
    assert (
        run(
            f"encoder_kd --stages task --losses hard_ce --student {encoders.task} --task_dataset {encoders.train} "
            f"--label_column label --max_length 32 {TWO_STEPS} {LORA} --output_dir {out}"
        )
        == 0
    )
    assert not (out / WHOLE).exists()
    weights = load_peft_weights(str(out))
    assert any("classifier" in name for name in weights)
    assert any(w.any() for name, w in weights.items() if "lora_B" in name)
    model = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=3)
    assert model(torch.tensor([[2, 7, 8]])).logits.shape == (1, 3)


@pytest.mark.slow
def test_encoders_of_several_stages_have_merged_adapters(encoders, tmp_path):
    out = tmp_path / "out"
    assert (
        run(
            f"encoder_kd --stages general task --losses hidden_mse logits_kl+hard_ce --teacher {encoders.general} "
            f"--dataset {encoders.train} --task_teacher {encoders.task} --task_dataset {encoders.train} "
            f"--label_column label --max_length 32 {TWO_STEPS} {LORA} --merge_adapters --output_dir {out}"
        )
        == 0
    )
    for directory in (out, out / "stage1-general"):
        assert (directory / WHOLE).is_file() and not (directory / ADAPTERS).exists()


@pytest.mark.slow
def test_students_of_adapters_are_compared(checkpoints, train_csv, test_csv, tmp_path, monkeypatch):
    fork_recipes(monkeypatch)
    pair, out = checkpoints["t5-tied"], tmp_path / "out"
    assert (
        run(
            f"compare --teacher {pair.teacher} --student {pair.student} --dataset {train_csv} "
            f"--test_dataset {test_csv} {COLUMNS} --methods ppo gkd --seeds 0 --max_steps 2 --max_completion_length 6 "
            "--num_samples 2 "
            f"--common use_peft=True lora_r=2 per_device_train_batch_size=8 num_generations=2 --output_dir {out}"
        )
        == 0
    )
    assert len(list(out.rglob(ADAPTERS))) == 2


@pytest.mark.slow
def test_a_chain_whose_assistants_are_adapters(checkpoints, train_csv, test_csv, tmp_path, monkeypatch):
    fork_recipes(monkeypatch)
    pair, out = checkpoints["t5-tied"], tmp_path / "out"
    assert (
        run(
            f"assistant_kd --teacher {pair.teacher} --student {pair.student} --assistants {pair.other} "
            f"--dataset {train_csv} --eval_dataset {test_csv} {COLUMNS} --max_steps 2 --output_dir {out} "
            "--common use_peft=True lora_r=2 per_device_train_batch_size=8 max_completion_length=6"
        )
        == 0
    )
    assert {path.parent.name for path in out.glob(f"*/{ADAPTERS}")} == {"assistant1", "student"}
