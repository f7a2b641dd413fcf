"""Every flag of compare.py's own arrives: at the runs it starts, at the tests of their students, or in the tables.

A flag that is new must get a line in `ARRIVES`, or a test fails. Flags on data, prompts and models, which the recipes
share: test_flags_arrive.py.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset

from rlkd_trl.commands.comparison import arguments, statistics
from rlkd_trl.evaluation import evaluate
from tests.recipes.command_lines import read_jsonl, word_rows, write_csv
from tests.recipes.stand_ins import MODELS, calls, compare, results_of

HUB_ID, HUB_ROWS = "owner/name", word_rows(5, seed=9)


@dataclass
class Seen:
    """What a comparison of one method, one seed and one budget did."""

    workplace: Path
    evaluations: list[dict] = field(default_factory=list)  # settings, of the teacher's and the students' in turn
    splits: list[str] = field(default_factory=list)  # taken from the Hub
    num_resamples: int | None = None

    def of_runs(self, flag: str) -> list[str]:
        """The flag's value in every training run."""
        return [call["values"].get(flag) for call in calls(self.workplace)]

    def row(self, model: str) -> dict:
        ((rows,),) = (budgets.values() for budgets in results_of(self.workplace)["tests"].values())
        return next(row for row in rows if row["model"] == model)

    @property
    def inputs(self) -> list[dict]:
        (file,) = (self.workplace / "out/warm_start/tests").glob("*.jsonl")
        return read_jsonl(file)

    def of_evaluations(self, setting: str) -> set:
        return {settings[setting] for settings in self.evaluations if setting in settings}


BASE = (
    f"{MODELS} --dataset data.csv --source_column mr --target_column ref --validation_dataset dev.csv "
    "--test_dataset test.csv --methods ppo --seeds 0 --num_samples 2 --num_resamples 100 --max_completion_length 6 "
    "--output_dir out"
)

# One line shows two flags: the best method goes on with these seeds.
TOP = ("--top 1 --top_seeds 6 9", lambda seen: seen.row("ppo")["seeds"] == [0, 6, 9])
# Flag: (the command line with it, whether it is seen).
ARRIVES = {
    "ComparisonArguments.smoke": ("", None),  # test_compare: test_smoke
    "ComparisonArguments.methods": (
        "--methods rloo_sequence",
        lambda seen: {call["recipe"] for call in calls(seen.workplace)} == {"rloo_kd"},
    ),
    "ComparisonArguments.baseline": (
        "--baseline warm_start",
        lambda seen: seen.row("warm_start")["difference"] == {} != seen.row("ppo")["difference"],
    ),
    "ComparisonArguments.seeds": ("--seeds 4 5", lambda seen: seen.of_runs("--seed") == ["4", "5"]),
    "ComparisonArguments.max_steps": ("--max_steps 7", lambda seen: seen.of_runs("--max_steps") == ["7"]),
    "ComparisonArguments.max_generated_tokens": (
        "--max_generated_tokens 70",
        lambda seen: seen.of_runs("--max_generated_tokens") == ["70"],
    ),
    "ComparisonArguments.max_cpu_seconds": (
        "--max_cpu_seconds 7.5",
        lambda seen: seen.of_runs("--max_cpu_seconds") == ["7.5"],
    ),
    "ComparisonArguments.learning_rates": (
        "--learning_rates 2e-3",
        lambda seen: seen.of_runs("--learning_rate") == ["0.002"],
    ),
    "ComparisonArguments.select_on": (
        "--learning_rates 5e-4 2e-3 --select_on bleu",  # the stand-in's BLEU is best at the second, its NLL is not
        lambda seen: results_of(seen.workplace)["search"]["chosen"] == {"ppo": 2e-3},
    ),
    "ComparisonArguments.common": (
        "--common logging_steps=9 temperature=0.9",
        lambda seen: (seen.of_runs("--logging_steps"), seen.of_runs("--temperature")) == (["9"], ["0.9"]),
    ),
    "ComparisonArguments.jobs": (
        "--jobs 2",
        lambda seen: [call["threads"] for call in calls(seen.workplace)] == ["1"],
    ),
    "ComparisonArguments.top": TOP,
    "ComparisonArguments.top_seeds": TOP,
    "ComparisonArguments.stop_after_minutes": (
        "--stop_after_minutes 1e-9",
        lambda seen: not (seen.workplace / "calls.jsonl").exists() and seen.row("ppo")["missing_seeds"] == [0],
    ),
    "ComparisonArguments.output_dir": (
        "--output_dir elsewhere",
        lambda seen: (
            (seen.workplace / "elsewhere/comparison.md").is_file()
            and calls(seen.workplace)[0]["place"].startswith("elsewhere/")
            and not (seen.workplace / "out").exists()
        ),
    ),
    "MeasurementArguments.validation_dataset": (
        "--validation_dataset answers.csv --eval_target_column answer --test_dataset answers_test.csv",
        lambda seen: seen.of_runs("--eval_dataset") == ["answers.csv"],
    ),
    "MeasurementArguments.validation_split": (
        f"--validation_dataset {HUB_ID} --validation_split dev",
        lambda seen: seen.of_runs("--eval_split") == ["dev"] and set(seen.splits) == {"dev"},
    ),
    "MeasurementArguments.test_dataset": (
        f"--test_dataset {HUB_ID}",
        lambda seen: [row["prompt"] for row in seen.inputs] == [row["mr"] for row in HUB_ROWS],
    ),
    "MeasurementArguments.test_split": (
        f"--test_dataset {HUB_ID} --test_split dev",
        lambda seen: seen.splits == ["dev"] and seen.of_runs("--eval_split") == ["train"],
    ),
    "MeasurementArguments.eval_target_column": (
        "--eval_target_column better",
        lambda seen: (
            all(row["references"][0].endswith(" w3 w3") for row in seen.inputs)
            and (seen.of_runs("--eval_target_column"), seen.of_runs("--target_column")) == (["better"], ["ref"])
        ),
    ),
    "MeasurementArguments.num_samples": (
        "--num_samples 3",
        lambda seen: {len(r["samples"]) for r in seen.inputs} == {3},
    ),
    "MeasurementArguments.num_resamples": ("--num_resamples 150", lambda seen: seen.num_resamples == 150),
    "MeasurementArguments.max_prompt_length": (
        "--max_prompt_length 3",
        lambda seen: seen.of_runs("--max_prompt_length") == ["3"] and seen.of_evaluations("max_prompt_length") == {3},
    ),
    "MeasurementArguments.max_completion_length": (
        "--max_completion_length 2",
        lambda seen: (
            seen.of_runs("--max_completion_length") == ["2"]
            and {len(row["greedy"].split()) for row in seen.inputs} == {2}
            and seen.of_evaluations("max_completion_length") == {2}
        ),
    ),
    "MeasurementArguments.batch_size": ("--batch_size 4", lambda seen: seen.of_evaluations("batch_size") == {4}),
}
GROUPS = [arguments.ComparisonArguments, arguments.MeasurementArguments]


@pytest.mark.parametrize("kind", GROUPS, ids=lambda kind: kind.__name__)
def test_every_flag_has_its_line(kind):
    missing = {f"{kind.__name__}.{option.name}" for option in dataclasses.fields(kind)} - ARRIVES.keys()
    assert not missing, "say in ARRIVES where they are seen"


@pytest.fixture
def observe(workplace, monkeypatch):
    """Runs a comparison; what was seen of it."""
    for name, seed in (("dev.csv", 3), ("test.csv", 1)):
        rows = word_rows(8, seed=seed)
        write_csv(workplace / name, [{**row, "better": f"{row['ref']} w3 w3"} for row in rows])
    for name, seed in (("answers.csv", 5), ("answers_test.csv", 6)):
        write_csv(workplace / name, [{"mr": row["mr"], "answer": row["ref"]} for row in word_rows(6, seed=seed)])
    seen = Seen(workplace)
    load, resample_weights = datasets.load_dataset, statistics.resample_weights

    def load_dataset(path, name=None, *, split, **kwargs):
        if path != HUB_ID:
            return load(path, name, split=split, **kwargs)
        seen.splits.append(split)
        return Dataset.from_list(HUB_ROWS)

    def noted_evaluation(evaluation, *args, **settings):
        if "prompts" not in settings:  # with them, it is how the teacher's evaluation calls the student's
            seen.evaluations.append(settings)
        return evaluation(*args, **settings)

    def noted_weights(num_inputs, num_resamples):
        seen.num_resamples = num_resamples
        return resample_weights(num_inputs, num_resamples)

    for name in ("evaluate_student", "evaluate_teacher"):
        monkeypatch.setattr(evaluate, name, functools.partial(noted_evaluation, getattr(evaluate, name)))
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)  # the Hub is not asked for it
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(statistics, "resample_weights", noted_weights)

    def observed(flags: str) -> Seen:
        budget = "" if flags.startswith("--max_") else "--max_steps 3"
        assert compare(f"{BASE} {budget} {flags}", workplace) == 0
        return seen

    return observed


# Those of a run arrive as values of their own, which no other changes; any other flag has a run of its own.
TOGETHER = [
    [
        *(f"ComparisonArguments.{name}" for name in ("methods", "max_steps", "learning_rates", "common", "jobs")),
        *(f"MeasurementArguments.{name}" for name in ("num_samples", "num_resamples", "max_prompt_length")),
        *(f"MeasurementArguments.{name}" for name in ("max_completion_length", "batch_size")),
    ],
    ["ComparisonArguments.max_cpu_seconds", "MeasurementArguments.validation_split"],
    [
        *("ComparisonArguments.max_generated_tokens", "MeasurementArguments.test_dataset"),
        "MeasurementArguments.test_split",
    ],
    ["ComparisonArguments.baseline", "ComparisonArguments.seeds"],
    ["ComparisonArguments.top", "ComparisonArguments.top_seeds"],
    ["ComparisonArguments.output_dir", "MeasurementArguments.validation_dataset"],
]


def runs() -> list[list[str]]:
    shared = {name for names in TOGETHER for name in names}
    alone = [name for name, (_, is_seen) in ARRIVES.items() if is_seen is not None and name not in shared]
    return [*TOGETHER, *([name] for name in alone)]


@pytest.mark.slow(0.7)
@pytest.mark.parametrize("names", runs(), ids=lambda names: names[0])
def test_every_flag_arrives(names, observe):
    seen = observe(" ".join(ARRIVES[name][0] for name in names))
    assert [name for name in names if ARRIVES[name][1](seen)] == names


@pytest.mark.slow(0.6)
def test_no_flag_is_seen_without_it(observe):
    """Or the tests above could not fail."""
    seen = observe("")
    found = [
        name
        for name, (_, is_seen) in ARRIVES.items()
        if is_seen is not None and name not in ("ComparisonArguments.select_on", "ComparisonArguments.output_dir")
        if is_seen(seen)
    ]
    assert not found and results_of(seen.workplace)["search"]["chosen"] == {"ppo": 5e-4}
