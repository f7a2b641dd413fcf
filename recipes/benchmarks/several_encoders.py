r"""Several encoders as teachers (MT-BERT), and a chain through an assistant, on a task of `encoders.py`.

    python recipes/benchmarks/several_encoders.py --e2e e2e/train.csv e2e/test.csv --work_dir runs/encoders

Material and measuring are those of `encoders.py`, whose work folder may be given: which food a restaurant has, from
the sentence; accuracy on 300 sentences of held-out inputs.

MT-BERT (Wu, Wu & Huang 2021). Two teachers: the encoder of 6 layers, and its lowest 4 layers. Both are fine-tuned
alone, or together under one pooler and head (`--train_along`). Students, three of the first teacher's layers, learn
by the preset `mt_bert` from both with the paper's weights or with equal ones, or from the first teacher alone.

Assistants (Mirzadeh et al. 2020). A student of 3 layers and half the width, with random weights, learns by the preset
`kd` from the first teacher directly, or from an assistant of the geometric size between that learnt from the teacher:
`encoder_kd.py` once per hop, with the same total of steps.

Seeds are those of students and assistants; teachers have one. A finished run is not run again; `--smoke` does two
steps of each. Writes `several_encoders.json` and `several_encoders.md` to `--results_dir`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from encoder_measurements import carry_out, measure_accuracy
from encoder_runs import LONG, PRESETS, QUIET, SHORT, TEACHER, Budget, Plan, Run, stages_of
from encoders import HEAD_STEPS, RESULTS, make_material
from result_files import made_by, over_seeds, shown, write_results
from stages import apart
from transformers import AutoConfig, AutoModel, AutoTokenizer

from rlkd_trl.errors import run
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.planning.assistants import geometric_size

TASK = "food"
SECOND_LAYERS = 4  # of the second teacher
CHAIN_STEPS = 160  # of each way, in all
TEACHER_STEPS = 40
STUDENT = {"num_layers": 3, "hidden_size": 192, "num_heads": 6}
LABELS_ALONE = {"stages": ["task"], "losses": ["hard_ce"]}
# What the students of two teachers learn from.
STUDENTS = {
    "one teacher": (False, []),
    "alone, equal weights": (False, ["--teacher_weighting", "fixed"]),
    "alone, MT-BERT's weights": (False, ["--teacher_weighting", "per_example"]),
    "together, equal weights": (True, ["--teacher_weighting", "fixed"]),
    "together, MT-BERT's weights": (True, ["--teacher_weighting", "per_example"]),
}
# (question, one, the other)
QUESTIONS = [
    ("A second teacher", "alone, MT-BERT's weights", "one teacher"),
    ("MT-BERT's weights", "alone, MT-BERT's weights", "alone, equal weights"),
    ("Co-finetuning", "together, MT-BERT's weights", "alone, MT-BERT's weights"),
    ("MT-BERT's weights, after co-finetuning", "together, MT-BERT's weights", "together, equal weights"),
    ("An assistant", "through an assistant", "directly"),
]


class Runs:
    """All runs of this benchmark, in the work folder of `encoders.py`."""

    def __init__(self, here: Path, most_steps: int | None):
        self.place, self.most_steps = here / "several", most_steps
        self.plan = Plan(here, tasks=(TASK,), most_steps=most_steps)
        self.encoders = here / "encoder", self.place / "encoder2"
        self.first = self._teacher("first", self.encoders[0])
        self.second = self._teacher("second", self.encoders[1])
        self.together = self._teacher("together", self.encoders[0], ["--train_along", self.encoders[1]])

    def student(self, name: str, seed: int) -> Run:
        """One of `STUDENTS`."""
        is_together, weighting = STUDENTS[name]
        teachers = [self.first.directory, self.second.directory]
        if is_together:
            teachers = [self.together.directory, self.together.directory / "encoder2"]
        flags = ["--task_teacher", teachers[0], "--num_layers", "3", "--init", "uniform", *weighting]
        flags += [] if name == "one teacher" else ["--more_teachers", teachers[1]]
        return self._run("task", name, _preset("mt_bert"), flags, SHORT, SHORT.task, seed)

    def direct(self, seed: int) -> Run:
        flags = ["--task_teacher", self.first.directory, *_size(STUDENT)]
        return self._run("task", "directly", _preset("kd"), flags, LONG, CHAIN_STEPS, seed)

    def assistant(self, seed: int) -> Run:
        config = AutoConfig.from_pretrained(self.encoders[0])
        names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
        between = {name: geometric_size(getattr(config, names[name]), STUDENT[name], 0.5) for name in names}
        between["hidden_size"] = geometric_size(
            config.hidden_size, STUDENT["hidden_size"], 0.5, multiple_of=between["num_heads"]
        )
        flags = ["--task_teacher", self.first.directory, *_size(between)]
        return self._run("teacher", "assistant", _preset("kd"), flags, LONG, CHAIN_STEPS // 2, seed)

    def through_assistant(self, seed: int) -> Run:
        flags = ["--task_teacher", self.assistant(seed).directory, *_size(STUDENT)]
        return self._run("task", "through an assistant", _preset("kd"), flags, LONG, CHAIN_STEPS // 2, seed)

    def of_seed(self, seed: int) -> list[Run]:
        """In the order in which they are run."""
        students = [self.student(name, seed) for name in STUDENTS]
        return [*students, self.direct(seed), self.assistant(seed), self.through_assistant(seed)]

    @property
    def teachers(self) -> list[Run]:
        return [self.first, self.second, self.together]

    def _teacher(self, name: str, encoder: Path, more: Sequence[object] = ()) -> Run:
        flags = ["--student", encoder, *more, *self.plan.data_of(TASK), *TEACHER, *QUIET, "--seed", "0"]
        directory = self.place / "teachers" / name
        return Run("teacher", name, directory, LABELS_ALONE, list(map(str, flags)), self._steps(TEACHER_STEPS), TASK)

    def _run(
        self, kind: str, name: str, settings: dict, flags: Sequence[object], budget: Budget, steps: int, seed: int
    ) -> Run:
        words = [*flags, *self.plan.data_of(TASK), *budget.task_flags, *QUIET, "--seed", seed]
        directory = self.place / f"seed{seed}" / name.replace(" ", "_").replace(",", "").replace("'", "")
        return Run(kind, name, directory, settings, list(map(str, words)), self._steps(steps), TASK, seed)

    def _steps(self, steps: int) -> int:
        return steps if self.most_steps is None else min(steps, self.most_steps)


def _preset(name: str) -> dict[str, object]:
    return stages_of(yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")), "task")


def _size(sizes: dict[str, int]) -> list[str]:
    return [*(word for name, value in sizes.items() for word in (f"--{name}", str(value))), "--init", "random"]


def make_second_encoder(source: Path, target: Path) -> None:
    if not (target / "config.json").is_file():
        AutoModel.from_pretrained(source, num_hidden_layers=SECOND_LAYERS).save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)


def second_of(together: Run) -> Run:
    """The second of the teachers that were fine-tuned together, to be measured."""
    return Run("teacher", "encoder2", together.directory / "encoder2", {}, [], together.steps, TASK)


def tables(runs: Runs, seeds: Sequence[int]) -> tuple[str, str, dict]:
    of_seeds = [{one.of: one.measured for one in runs.of_seed(seed)} for seed in seeds]
    teachers = {
        "6 layers, alone": runs.first,
        "4 layers, alone": runs.second,
        "6 layers, together": runs.together,
        "4 layers, together": second_of(runs.together),
    }
    lines = [[f"teacher: {name}", f"{one.measured['accuracy']:.1f}", "", ""] for name, one in teachers.items()]
    for name in of_seeds[0]:
        values, seconds = ([of[name][key] for of in of_seeds] for key in ("accuracy", "cpu_seconds"))
        lines.append(
            [name, shown(values, ".1f"), ", ".join(f"{value:.1f}" for value in values), shown(seconds, ".0f")]
        )
    answers = []
    for question, one, other in QUESTIONS:
        differences = [of[one]["accuracy"] - of[other]["accuracy"] for of in of_seeds]
        answers.append([f"{question}: {one} less {other}", shown(differences, "+.1f")])
    results = {
        "teachers": {name: one.measured for name, one in teachers.items()},
        "students": {seed: found for seed, found in zip(seeds, of_seeds, strict=True)},
    }
    found = markdown_table(["model", "accuracy, %", "each seed's", "CPU s"], lines)
    return found, markdown_table(["question", "points"], answers), results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", type=Path, nargs="+", required=True, help="CSV files with columns mr and ref")
    parser.add_argument("--encoder", type=Path, help="directory of another BERT, in place of the package's encoder")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/encoders"))
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="two steps of everything: its numbers say nothing")
    args = parser.parse_args()
    most_steps = 2 if args.smoke else None
    make_material(args.work_dir, args.e2e, args.encoder, most_steps or HEAD_STEPS)
    runs = Runs(args.work_dir, most_steps)
    make_second_encoder(*runs.encoders)
    for encoder in [*runs.teachers, *(of_seed for seed in args.seeds for of_seed in runs.of_seed(seed))]:
        if not encoder.is_done:
            print(encoder.directory, flush=True)
            carry_out(encoder, args.work_dir)
    measured_apart = second_of(runs.together)
    if not measured_apart.is_done:
        apart(measure_accuracy, measured_apart, args.work_dir, 0.0, log=args.work_dir / "logs" / "several.txt")
    accuracies, answers, results = tables(runs, args.seeds)
    text = (
        f"{TASK}, from E2E's sentences; accuracy on held-out ones. Of several teachers: {SHORT.task} steps of "
        f"16; by an assistant or directly: {runs.direct(0).steps} steps of 16 in all. "
        f"{over_seeds(len(args.seeds))} Teachers have one seed.\n\n{accuracies}\n\n"
        f"{answers}\n\n{made_by()}\n"
    )
    write_results(args.results_dir, "several_encoders", results, text)


if __name__ == "__main__":
    run(main)
