"""Code of the user's own that fails in the middle of a run: a reward, or the code of a checkpoint."""

import json
from pathlib import Path

import pytest

from rlkd_trl.settings import trusted_code
from rlkd_trl.trainers.checkpoint_files import newest_whole
from tests.recipes.command_lines import COLUMNS, SAMPLING, TWO_STEPS, metrics_of, run
from tests.tiny_models import MODELS, word_tokenizer

# What fails reads a file that is there until the first checkpoint is.
READS = """
from pathlib import Path

def read_words():
    if Path({checkpoint!r}).is_dir():
        return Path({words!r}).read_text()
"""
REWARD = """
def with_words(completions):
    read_words()
    return [1.0 + len(text) for text in completions]
"""
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaModel):
    def forward(self, *args, **kwargs):
        read_words()
        return super().forward(*args, **kwargs)

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A function that fails, as Python text, and the file that it misses."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    words = tmp_path / "words.txt"
    yield READS.format(checkpoint=str(tmp_path / "out" / "checkpoint-1"), words=str(words)), words
    trusted_code.trust_code_of([])


def with_code(directory: Path, code: str) -> Path:
    """A checkpoint with an architecture of its own."""
    MODELS["llama"](seed=3).save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    (directory / "own.py").write_text(code)
    config = json.loads((directory / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def line_of(code: str) -> int:
    return code.splitlines().index("        return Path({words!r}).read_text()") + 1


def check_one_message(error: str, *parts: str) -> None:
    messages = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and "Traceback" not in error, error
    for part in (*parts, "FileNotFoundError: [Errno 2] No such file or directory", f"(line {line_of(READS)} of "):
        assert part in messages[0]


def check_it_goes_on(command: str, words: Path, output_dir: Path) -> None:
    """From its last checkpoint, which is whole, once the file is there."""
    whole, defects = newest_whole(output_dir)
    assert (whole.name, defects) == ("checkpoint-1", {})
    assert not (output_dir / "finished.json").exists() and not (output_dir / "model.safetensors").exists()
    words.write_text("w3 w4")
    assert run(f"{command} --resume") == 0
    assert newest_whole(output_dir)[0].name == "checkpoint-2"


@pytest.mark.parametrize("recipe", ["rloo_kd", pytest.param("ppo_kd", marks=pytest.mark.slow)])
def test_a_reward(recipe, code, checkpoints, train_csv, tmp_path, capsys):
    text, words = code
    pair, file = checkpoints["t5-tied"], tmp_path / "mine.py"
    file.write_text(text + REWARD)
    models = f"--teacher {pair.teacher} --student {pair.student} --reward {file}:with_words"
    data = f"--dataset {train_csv} {COLUMNS} {TWO_STEPS} {SAMPLING} --save_steps 1"
    command = f"{recipe} {models} {data} --output_dir {tmp_path / 'out'}"
    assert run(command) == 2
    check_one_message(capsys.readouterr().err, "The reward 'with_words' raised", f"of {file})", "on the prompt 'w")
    check_it_goes_on(command, words, tmp_path / "out")
    assert metrics_of(tmp_path / "out")["after"]["reward"] > 1


@pytest.mark.parametrize(
    ("recipe", "who"),
    [
        ("sft", "student"),
        ("kd", "teacher"),
        pytest.param("kd", "student", marks=pytest.mark.slow),
        pytest.param("all_actions_kd", "teacher", marks=pytest.mark.slow),
    ],
)
def test_the_code_of_a_checkpoint(recipe, who, code, checkpoints, train_csv, tmp_path, capsys):
    text, words = code
    models = {name: getattr(checkpoints["llama"], name) for name in ("teacher", "student")}
    models[who] = with_code(tmp_path / who, text + MODEL)
    flags = f"--student {models['student']}"
    if recipe != "sft":
        flags += f" --teacher {models['teacher']} {SAMPLING}"
    data = f"--dataset {train_csv} {COLUMNS} {TWO_STEPS} --save_steps 1 --trust_remote_code True"
    command = f"{recipe} {flags} {data} --output_dir {tmp_path / 'out'}"
    assert run(command) == 2
    check_one_message(capsys.readouterr().err, "The code of a checkpoint raised", "own.py)")
    check_it_goes_on(command, words, tmp_path / "out")
