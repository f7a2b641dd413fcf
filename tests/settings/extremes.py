"""Sets every float flag of a recipe to the ends of its range, and says which runs end neither sound nor refused.

    python -m tests.settings.extremes ppo_kd sft encoder_kd --precision "--bf16 True"

Sound is exit code 0 with finite weights and metrics, refused is exit code 2; a traceback is neither. Each run is a
fork of this process, of 3 optimizer steps. Prints one line of JSON per recipe.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlkd_trl.settings import ranges
from rlkd_trl.settings.ranges import Range
from rlkd_trl.trainers.base_config import INHERITED_RANGES
from rlkd_trl.trainers.config import PPOKDConfig, ReinforceKDConfig, RLOOKDConfig
from rlkd_trl.trainers.encoder_config import EncoderKDConfig
from rlkd_trl.trainers.full_vocabulary_config import AllActionsKDConfig, KDConfig
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.recipes.forks import Fork
from tests.resuming.kills import share_with_runs
from tests.resuming.runs import make_inputs

_STEPS = "--max_steps 3 --per_device_train_batch_size 8 --logging_steps 1 --disable_tqdm True --save_strategy no"
_PAIR = "--teacher teacher --student student --dataset data.csv --source_column mr --eval_dataset test.csv"
_SAMPLED = f"{_PAIR} --max_completion_length 6 --num_generations 2"
_ENCODER = "--dataset train.csv --task_teacher task --task_dataset train.csv --label_column label --max_length 32"
RECIPES = {
    "ppo_kd": (PPOKDConfig, f"ppo_kd {_SAMPLED}"),
    "rloo_kd": (RLOOKDConfig, f"rloo_kd {_SAMPLED} --level token"),
    "reinforce_kd": (ReinforceKDConfig, f"reinforce_kd {_SAMPLED}"),
    "kd": (KDConfig, f"kd {_SAMPLED} --lmbda 1"),
    "all_actions_kd": (AllActionsKDConfig, f"all_actions_kd {_SAMPLED}"),
    "sft": (SupervisedConfig, "sft --student student --dataset data.csv --source_column mr --target_column ref"),
    "encoder_kd": (EncoderKDConfig, f"encoder_kd --config distilbert --teacher general {_ENCODER}"),
    "encoder_kd (task)": (EncoderKDConfig, f"encoder_kd --config kd {_ENCODER}"),
    "encoder_kd (stages)": (EncoderKDConfig, f"encoder_kd --config tinybert --teacher general {_ENCODER}"),
}
# What a flag needs beside it to do something.
_WITH = {
    "kl_target": "--beta 0.3 --kl_horizon 20",
    "kl_horizon": "--beta 0.3 --kl_target 0.01",
    **dict.fromkeys(("epsilon", "cliprange_value", "early_stop_kl", "ratio_cap"), "--num_iterations 2"),
    **dict.fromkeys(("num_train_epochs", "stage_epochs"), "--max_steps -1"),
    "skew": "--divergence skew_kl",
    "adam_epsilon": "--learning_rate 0.01",
}
_ENDLESS = ("num_train_epochs", "stage_epochs")  # at the upper end


def ends(name: str, valid: Range) -> list[float]:
    """The smallest and largest values of a range."""
    low = [valid.low] if not valid.above else [1e-300, valid.low + 1e-12]
    high = [math.nextafter(valid.high, -math.inf), valid.high - 1e-7] if valid.below else [valid.high]
    return [*low, *(() if name in _ENDLESS else high), *(() if valid.also is None else (valid.also,))]


def float_flags(config: type) -> Iterator[tuple[str, Range]]:
    hints = {**INHERITED_RANGES, **ranges.ranges_of(config)}
    for name in [field.name for field in dataclasses.fields(config) if field.name in hints]:
        valid, kind = ranges._range_in(hints[name])
        if kind is float:
            yield name, valid


def what_is_wrong(line: str, output_dir: Path) -> str | None:
    """Runs a command; None if it ended sound or refused."""
    log = Path("log.txt")
    with log.open("w") as file:
        recipe, *flags = line.split()
        code = Fork(["", f"{recipe}.py", *flags], stdout=file, stderr=file, env={}).wait()
    text = log.read_text(errors="replace")
    if "Traceback" in text:
        return text.strip().splitlines()[-1]
    if code == 2:
        return "refused, but not before it wrote" if output_dir.exists() else None
    bad = [str(name) for name in _not_finite(output_dir)]
    return f"exit code {code}" if code else f"not finite: {', '.join(bad)}" if bad else None


def _not_finite(output_dir: Path) -> Iterator[str]:
    for file in output_dir.rglob("*.safetensors"):
        yield from (name for name, tensor in load_file(file).items() if not torch.isfinite(tensor.float()).all())
    for file in output_dir.rglob("metrics.json"):
        for name, metrics in json.loads(file.read_text()).items():
            yield from (f"{name} {metric}" for metric, value in metrics.items() if value is None)


def sweep(recipe: str, precision: str, only: Sequence[str] | None = None) -> dict:
    """What went wrong, by flag and value, and how many runs there were; in the current directory, with its inputs."""
    config, base = RECIPES[recipe]
    found, outcomes = {}, Counter()
    for name, valid in float_flags(config):
        for value in ends(name, valid) if only is None or name in only else ():
            line = f"{base} {_STEPS} {precision} {_WITH.get(name, '')} --{name} {value!r} --output_dir out"
            wrong = what_is_wrong(line, Path("out"))
            outcomes["wrong" if wrong else "sound" if Path("out").exists() else "refused"] += 1
            if wrong:
                found[f"{name} {value!r}"] = wrong
            shutil.rmtree("out", ignore_errors=True)
    return {"recipe": recipe, "precision": precision, **outcomes, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--precision", default="--bf16 True")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    share_with_runs()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for inputs in ("compare", "encoder"):
            make_inputs(inputs, Path("."))
        for recipe in flags.recipes:
            print(json.dumps(sweep(recipe, flags.precision)), flush=True)


if __name__ == "__main__":
    main()
