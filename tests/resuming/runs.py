"""What is killed and resumed: small runs of every trainer, of encoder_kd.py and of compare.py, and their ends."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch

from rlkd_trl.commands.comparison import cells, results
from rlkd_trl.trainers.checkpoint_files import MANIFEST, newest_whole
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.models.encoders import encoder_tokenizer, make
from tests.recipes.command_lines import COLUMNS, run, word_rows, write_csv
from tests.recipes.conftest import CLASSES, labelled_rows
from tests.recipes.forks import Fork
from tests.tiny_models import tiny_t5, word_tokenizer
from tests.trainers.tiny_runs import build, pairs, prompts

# Rollouts of several optimizer steps with accumulation, so that most checkpoints lie inside of one; logs and saves at
# other intervals than these.
INSIDE_ROLLOUTS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 3,
    "lr_scheduler_type": "linear",
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_data": prompts(4, seed=3),
    "data": prompts(24),
}
ADAPTIVE_KL = {"beta": 0.2, "kl_target": 1.0, "kl_horizon": 100.0}
TRAINERS = {
    "ppo": ("ppo", {**ADAPTIVE_KL, "early_stop_kl": 0.05}),
    "rloo": ("rloo-token", ADAPTIVE_KL),
    "reinforce": ("reinforce", {"behaviour_sync_steps": 8, "baseline": "min_variance"}),
    "kd": ("kd", {"lmbda": 0.5, "sequences": "data", "data": pairs(24)}),
    "all-actions": ("all-actions", {"teacher_mix": 0.3}),
    "sft": ("sft", {}),
}
_ENCODER_FLAGS = (
    "--teacher ../inputs/general --task_teacher ../inputs/task --dataset ../inputs/train.csv "
    "--task_dataset ../inputs/train.csv --label_column label --max_length 32 --learning_rate 1e-2 --max_steps 4 "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --save_strategy steps --save_steps 1 "
    "--logging_steps 3 --eval_strategy steps --eval_steps 2 --disable_tqdm True"
)
_COMPARED = "per_device_train_batch_size=8 num_iterations=2 save_strategy=steps save_steps=1 logging_steps=1"
COMMANDS = {
    "encoder": f"encoder_kd --config distilbert {_ENCODER_FLAGS}",
    "encoder-stages": f"encoder_kd --config tinybert {_ENCODER_FLAGS} --max_steps 3",
    "compare": (
        f"compare --teacher ../inputs/teacher --student ../inputs/student --dataset ../inputs/data.csv {COLUMNS} "
        "--test_dataset ../inputs/test.csv --methods ppo gkd --seeds 0 --max_steps 3 --max_completion_length 6 "
        f"--num_samples 2 --num_resamples 100 --common {_COMPARED}"
    ),
}
# Seconds and what is computed from them differ between any two runs; and a resumed run was given --resume.
TIMES = ("seconds", "runtime", "per_second", "flos", "RunArguments")


def trainer_of(method: str, output_dir: Path):
    name, settings = TRAINERS[method]
    if name != "sft":
        return build(name, output_dir, **{**INSIDE_ROLLOUTS, **settings})
    ignored = ("steps_per_generation", "num_iterations", "eval_data", "data", "eval_strategy", "eval_steps")
    settings = {k: v for k, v in INSIDE_ROLLOUTS.items() if k not in ignored}
    data = prompts(30).map(lambda row: {"target": row["prompt"]})
    args = SupervisedConfig(str(output_dir), learning_rate=1e-2, disable_tqdm=True, **settings)
    return SupervisedTrainer(tiny_t5(tied=True, dropout=0.1), args, data, word_tokenizer())


def make_inputs(method: str, place: Path) -> None:
    """Writes the models and data that the command of `COMMANDS` reads."""
    if method == "compare":
        for seed, role in enumerate(("teacher", "student")):
            tiny_t5(tied=True, seed=seed).save_pretrained(place / role)
            word_tokenizer().save_pretrained(place / role)
        write_csv(place / "data.csv", word_rows(16))
        write_csv(place / "test.csv", word_rows(6, seed=1))
    elif method in COMMANDS:
        classes = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
        for role, model in (
            ("general", make(layers=4, head="tokens")),
            ("task", make(layers=4, head="classes", seed=1, **classes)),
        ):
            model.save_pretrained(place / role)
            encoder_tokenizer().save_pretrained(place / role)
        write_csv(place / "train.csv", labelled_rows(30))


def finish(method: str, output_dir: Path, begin: Callable[[], None]) -> dict:
    """Runs a method until its end, from its newest whole checkpoint if there is one; what it has come to.

    begin: called when the part begins that is to be killed.
    """
    if method in TRAINERS:
        return _finish_trainer(method, output_dir, begin)
    os.chdir(output_dir.parent)
    begin()
    if method == "compare":
        cells.subprocess = SimpleNamespace(Popen=Fork)
        results.write_figures = lambda *_: []  # a third of the time, after all that is compared here
        line = COMMANDS[method]
    else:
        has_begun = any(newest_whole(place)[0] for place in (output_dir, *output_dir.glob("stage*")))
        line = f"{COMMANDS[method]} {'--resume' if has_begun else '--overwrite_output_dir'}"
    code = run(f"{line} --output_dir {output_dir.name}")
    if code != 0:
        raise RuntimeError(f"exit code {code}")
    # The first process writes it, while the others are at their end.
    return _content(output_dir) if os.environ.get("RANK", "0") == "0" else {}


def _finish_trainer(method: str, output_dir: Path, begin: Callable[[], None]) -> dict:
    trainer = trainer_of(method, output_dir)
    checkpoint, _ = newest_whole(output_dir) if output_dir.is_dir() else (None, {})
    begin()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = getattr(trainer, "rollout_state", None)
    return {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "logs": without_times(trainer.state.log_history),
        "generated_tokens": getattr(state, "generated_tokens", 0),
        "beta": getattr(state, "beta", 0),
    }


def _content(output_dir: Path) -> dict[str, object]:
    """All that a command has left but times, pictures and text: by path, of checkpoints the newest of each run."""
    newest = {str(file.parent): newest_whole(file.parent)[0] for file in output_dir.rglob("finished.json")}
    found = {}
    for file in sorted(output_dir.rglob("*")):
        checkpoint = next((place for place in file.parents if re.fullmatch(r"checkpoint-\d+", place.name)), None)
        is_older = checkpoint is not None and checkpoint != newest.get(str(checkpoint.parent))
        if is_older or file.name in (MANIFEST, "training_args.bin"):
            continue
        if file.suffix in (".pt", ".pth", ".bin"):
            found[str(file.relative_to(output_dir))] = without_times(torch.load(file, weights_only=False))
        elif file.suffix == ".json":
            found[str(file.relative_to(output_dir))] = without_times(json.loads(file.read_text()))
        elif file.suffix == ".safetensors":
            found[str(file.relative_to(output_dir))] = file.read_bytes()
    return found


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(time in str(k) for time in TIMES)}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def same(one, other) -> bool:
    """Equal to the last bit, in tensors and in plain values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, numpy.ndarray):
        return numpy.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
