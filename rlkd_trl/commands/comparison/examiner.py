"""Tests of what the runs of a comparison have made, of the teacher and of the warm start."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from rlkd_trl.commands.arguments import RewardArguments, StudentArguments
from rlkd_trl.commands.comparison.arguments import ComparisonSettings, as_flags
from rlkd_trl.commands.comparison.cells import Method
from rlkd_trl.commands.comparison.grid import Grid
from rlkd_trl.commands.comparison.outcome import Outcome, kept_outcome, measure
from rlkd_trl.commands.comparison.statistics import Entry, summarise
from rlkd_trl.commands.files_read import FileDigests
from rlkd_trl.commands.loading import load_reward_model, load_student
from rlkd_trl.prompts import PromptTemplates


class Examiner:
    """Tests models on the test rows, in the eyes of the teacher; what was tested before is read from disk.

    The reward is the same for all: teacher-forcing, V = max, γ = 1, whatever a method was trained on.
    """

    def __init__(
        self,
        settings: ComparisonSettings,
        rows: list[dict],
        templates: PromptTemplates | None,
        digests: FileDigests,
    ):
        prompts, teacher, student, test = settings.prompts, settings.teacher, settings.student, settings.measurement
        self.rows, self.student = rows, student
        self.num_samples, self.num_resamples = test.num_samples, test.num_resamples
        self.baseline = settings.compare.baseline
        self.lengths = {"max_completion_length": test.max_completion_length, "batch_size": test.batch_size}
        self.max_prompt_length = test.max_prompt_length
        self.reward_model = load_reward_model(RewardArguments(), teacher, templates, gamma=1.0, weights=None)
        self.digests = digests
        self.not_finite: dict[str, dict[str, float]] = {}  # metrics by directory, where numbers are not
        self.settings = {
            "rows": hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest(),
            "asked": as_flags(prompts, teacher, student),
            "files": digests.of_groups(prompts, teacher),
            "max_prompt_length": test.max_prompt_length,
            "max_completion_length": test.max_completion_length,
            "num_samples": test.num_samples,
        }

    def test_warm_start(self, directory: Path) -> Outcome:
        """The outcome of the student before training, kept in `directory`."""
        return self._test_student(directory, self.student)

    def test_trained(self, checkpoint: Path) -> Outcome:
        """The outcome of a training run's student, kept beside it."""
        trained = dataclasses.replace(self.student, student=str(checkpoint), student_revision=None)
        return self._test_student(checkpoint, trained)

    def test_teacher(self, directory: Path) -> Outcome:
        """The outcome of the first teacher, asked through its first template; kept in `directory`."""
        return self._noted(directory, kept_outcome(directory, self.settings, self._measure_teacher))

    def _test_student(self, directory: Path, student: StudentArguments) -> Outcome:
        tested = self.digests.of_groups(student)
        settings = {**self.settings, "files": {**self.settings["files"], **tested}}
        return self._noted(directory, kept_outcome(directory, settings, lambda: self._measure_student(student)))

    def _noted(self, directory: Path, outcome: Outcome) -> Outcome:
        """The outcome, remembered if a number in it is not finite."""
        from rlkd_trl.evaluation.evaluate import NOT_FINITE

        bad = {kind: found for kind in ("greedy", "sampled") if (found := getattr(outcome, kind)).get(NOT_FINITE)}
        self.not_finite |= {f"{directory} ({kind})": metrics for kind, metrics in bad.items()}
        return outcome

    def _measure_student(self, student: StudentArguments) -> Outcome:
        from rlkd_trl.evaluation.evaluate import evaluate_student
        from rlkd_trl.models.loading import default_device
        from rlkd_trl.students import Policy

        print(f"Testing {student.student}", flush=True)
        model, tokenizer = load_student(student)
        policy = Policy(model.to(default_device()), tokenizer)
        lengths = {**self.lengths, "max_prompt_length": self.max_prompt_length}
        return measure(
            lambda seed: evaluate_student(policy, tokenizer, self.rows, self.reward_model, seed=seed, **lengths),
            self.rows,
            self.num_samples,
        )

    def _measure_teacher(self) -> Outcome:
        from rlkd_trl.evaluation.evaluate import evaluate_teacher

        print("Testing the teacher", flush=True)
        tokenizer = self.reward_model.panels[0].scorers[0].teacher.processing_class
        return measure(
            lambda seed: evaluate_teacher(tokenizer, self.rows, self.reward_model, seed=seed, **self.lengths),
            self.rows,
            self.num_samples,
        )

    def summaries(self, grid: Grid, chosen: Mapping[str, float | None], output_dir: Path) -> dict[str, list[dict]]:
        """The lines of the tables, by budget: the teacher, the warm start, and each method at its learning rate."""
        of_teacher = self.test_teacher(output_dir / "teacher")
        of_warm_start = self.test_warm_start(output_dir / "warm_start")
        given_models = [Entry("teacher", [of_teacher]), Entry("warm_start", [of_warm_start])]
        return {
            budget: summarise(
                [
                    *given_models,
                    *(self._of_method(grid, budget, method, chosen[method.name]) for method in grid.methods),
                ],
                teacher=of_teacher,
                baseline=self.baseline or grid.methods[0].name,
                num_resamples=self.num_resamples,
            )
            for budget in grid.budgets
        }

    def _of_method(self, grid: Grid, budget: str, method: Method, rate: float | None) -> Entry:
        """A method at one budget: its finished seeds, tested."""
        cells = {} if rate is None else {seed: grid.cell(budget, method, seed, rate) for seed in grid.seeds}
        done = {seed: cell for seed, cell in cells.items() if cell.is_done}
        return Entry(
            method.name,
            [self.test_trained(cell.directory) for cell in done.values()],
            rate,
            seeds=list(done),
            costs=[cell.read("cost.json") for cell in done.values()],
            failed_seeds=[seed for seed in grid.seeds if seed not in done],
        )
