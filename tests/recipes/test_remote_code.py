"""Python code in a checkpoint runs with --trust_remote_code only, and of the checkpoints only that flags name."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from rlkd_trl.settings import trusted_code
from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, run
from tests.tiny_models import MODELS, word_tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open({marker!r}, "a").write("run\\n")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """Where transformers copies such code to, and whom a test has trusted."""
    place = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place))
    yield
    trusted_code.trust_code_of([])


def with_code(directory: Path, *, prefix: str = "", seed: int = 0) -> Path:
    """A checkpoint whose architecture is in `own_NAME.py` beside it, which notes that it has run."""
    module = f"own_{directory.name}"
    MODELS["llama"](seed).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    (directory / f"{module}.py").write_text(CODE.format(marker=str(marker(directory))))
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{prefix}{module}.OwnConfig",
            "AutoModelForCausalLM": f"{prefix}{module}.OwnForCausalLM",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def marker(directory: Path) -> Path:
    return directory.with_suffix(".ran")


@pytest.fixture
def commands(tmp_path, train_csv, checkpoints):
    """Commands in which teacher or student bring code along, by the checkpoint that does."""
    plain = checkpoints["llama"]
    teacher, student = with_code(tmp_path / "teacher"), with_code(tmp_path / "student", seed=1)
    data = f"--dataset {train_csv} {COLUMNS}"
    distil = f"rloo_kd {data} {TWO_STEPS} {SAMPLING} --output_dir {tmp_path}/out"
    return {
        "teacher": [
            f"pseudo_label --teacher {teacher} {data} --output {tmp_path}/labels.jsonl",
            f"{distil} --teacher {teacher} --student {plain.student}",
        ],
        "student": [
            f"sft --student {student} {data} {TWO_STEPS} --output_dir {tmp_path}/out",
            f"{distil} --teacher {plain.teacher} --student {student}",
            f"evaluate --student {student} {data} --max_completion_length 4",
            f"plan --teacher {plain.teacher} --student {student} --max_prompt_length 8 --max_completion_length 4",
        ],
    }


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_it_is_refused_with_the_remedy(who, commands, tmp_path, capsys):
    capsys.readouterr()  # of what the checkpoints were written with
    for command in commands[who]:
        assert run(command) == 2, command
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Python code" in error
        assert "give --trust_remote_code if you want it to run" in error
    assert not list(tmp_path.glob("*.ran")) and not (tmp_path / "out").exists()


@pytest.mark.slow(1.5)
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_it_runs_where_it_is_trusted(who, commands, tmp_path):
    for command in commands[who]:
        flag = "--trust_remote_code" if command.startswith("plan") else "--trust_remote_code True"
        overwrite = "" if command.startswith(("plan", "evaluate")) else "--overwrite_output_dir"
        assert run(f"{command} {overwrite} {flag}") == 0, command
        assert marker(tmp_path / who).exists() and run(f"{command} {overwrite}") == 2, "and not in the next command"


@pytest.mark.slow(0.7)
def test_a_distilled_student_brings_its_code_along(commands, tmp_path, train_csv):
    command = commands["student"][1]
    assert run(f"{command} --trust_remote_code True") == 0
    assert (tmp_path / "out" / "own_student.py").is_file()
    evaluation = f"evaluate --student {tmp_path}/out --dataset {train_csv} {COLUMNS} --max_completion_length 4"
    assert run(evaluation) == 2 and run(f"{evaluation} --trust_remote_code True") == 0
    more = command.replace("--max_steps 2", "--max_steps 3")
    assert run(f"{more} --resume --trust_remote_code True") == 0


def test_code_of_a_checkpoint_that_is_not_named_never_runs(tmp_path, train_csv, capsys):
    """By a reference of the named one's config, or as what its adapters belong to."""
    other = with_code(tmp_path / "other")
    refers = with_code(tmp_path / "refers", prefix=f"{other}--")
    adapters = tmp_path / "adapters"
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(MODELS["llama"](), lora).save_pretrained(adapters)
    MODELS["llama"]().config.save_pretrained(adapters)
    word_tokenizer().save_pretrained(adapters)
    config = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    capsys.readouterr()
    for student in (refers, adapters):
        evaluation = f"evaluate --student {student} --dataset {train_csv} {COLUMNS} --max_completion_length 4"
        for flag in ("", " --trust_remote_code True"):
            assert run(evaluation + flag) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert not flag or (f"{str(other)!r}" in error and "and --trust_remote_code is for checkpoints" in error)
    assert not list(tmp_path.glob("*.ran"))
