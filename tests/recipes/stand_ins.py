"""recipes/compare.py among stand-ins for the recipes that it calls: scripts that copy a checkpoint."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlkd_trl import errors
from rlkd_trl.commands.comparison import cells, examiner, outcome, results
from tests.recipes.command_lines import COLUMNS, main_of, read_jsonl

# Stands for a training recipe: notes its call, then fails as FAIL asks ("ppo/seed1"), or leaves a copy of a checkpoint
# and validation scores that are best at a learning rate of 5e-4 for PPO, 1e-3 for RLOO.
STAND_IN = """
import json, os, shutil, sys
from pathlib import Path

argv, environ, stderr = globals().get("given", (sys.argv, os.environ, sys.stderr))
values = dict(word.split("=", 1) for word in argv[1:] if "=" in word)
words = [word for word in argv[1:] if "=" not in word]
values |= {name: value for name, value in zip(words, words[1:]) if name.startswith("--")}
here, recipe = Path(values["--output_dir"]), Path(argv[0]).stem
call = {"recipe": recipe, "place": str(here), "values": values, "threads": environ.get("OMP_NUM_THREADS")}
with open(environ["CALLS"], "a") as file:
    file.write(json.dumps(call) + "\\n")
if environ.get("FAIL", "nothing") in str(here):
    print("first line\\nout of paper", file=stderr)
    sys.exit(3)
shutil.copytree(environ["TRAINED"], here, dirs_exist_ok=True)
score = abs(float(values["--learning_rate"]) - {"ppo_kd": 5e-4, "rloo_kd": 1e-3}[recipe])
after = {"teacher_nll_per_sequence": score, "bleu": 1000 * score}
(here / "metrics.json").write_text(json.dumps({"after": after}))
cost = {"optimizer_steps": 4, "generated_tokens": 100, "cpu_seconds": 2.5, "wall_seconds": 3.5}
(here / "cost.json").write_text(json.dumps(cost))
(here / "finished.json").write_text("{}")
"""
MODELS = "--teacher teacher --student student"
DATA = f"--dataset data.csv {COLUMNS} --validation_dataset data.csv --test_dataset test.csv"
SIZES = "--max_completion_length 6 --num_samples 2 --num_resamples 100 --templates good.yaml"
TWO = "--methods ppo rloo_sequence --seeds 0 1"
GOOD = f"{MODELS} {DATA} {SIZES} {TWO} --max_steps 3 --output_dir out"


class Here:
    """Stands in for `subprocess.Popen`: runs a stand-in at once, in this process, whose start would take longer."""

    def __init__(self, words: list[str], *, stdout, stderr, env: dict[str, str]):
        self.code = 0
        script = Path(words[1])
        try:
            exec(compile(script.read_text(), script, "exec"), {"given": (words[1:], env, stderr)})
        except SystemExit as exit:
            self.code = exit.code

    def wait(self) -> int:
        return self.code

    def terminate(self) -> None:
        """It has ended."""


class MeasuredOnce:
    """What models do on test inputs, computed once for all comparisons of a module: most runs leave the same model.

    The comparison decides what is measured as it always does, loads it, and keeps and reads its files; only what
    `measure` would compute anew is remembered, by the settings that are written beside it.
    """

    def __init__(self):
        self.outcomes: dict[str, outcome.Outcome] = {}
        self.settings = ""

    def kept(self, directory: Path, test: str, settings: dict, make: Callable) -> outcome.Outcome:
        self.settings = json.dumps(settings, sort_keys=True)
        return outcome.kept_outcome(directory, test, settings, make)

    def measure(self, *arguments: object) -> outcome.Outcome:
        if self.settings not in self.outcomes:
            self.outcomes[self.settings] = outcome.measure(*arguments)
        return copy.deepcopy(self.outcomes[self.settings])

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """From here on, with stand-ins that run in this process."""
        patch.setattr(examiner, "kept_outcome", self.kept)
        patch.setattr(examiner, "measure", self.measure)
        patch.setattr(cells, "subprocess", SimpleNamespace(Popen=Here))


def compare(flags: str, workplace: Path, *, figures: bool = False) -> int:
    """The exit code of the real recipe among the stand-ins. Drawing takes seconds."""
    main = main_of("compare")
    main.__globals__["RECIPES"] = workplace / "recipes"
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(results, "write_figures", lambda *args: [])
        patch.setattr(sys, "argv", ["compare.py", *flags.split()])
        try:
            errors.run(main)
        except SystemExit as exit:
            return exit.code
    return 0


def calls(workplace: Path) -> list[dict]:
    log = workplace / "calls.jsonl"
    return read_jsonl(log) if log.exists() else []


def places(workplace: Path) -> list[str]:
    return [str(Path(call["place"]).relative_to("out")) for call in calls(workplace)]


def results_of(workplace: Path) -> dict:
    return json.loads((workplace / "out" / "comparison.json").read_text())
