"""Tests of what the runs of a comparison have made, of the teacher and of the warm start."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import RewardArguments, StudentArguments, TeacherArguments
from rlkd_trl.commands.comparison.arguments import ComparisonSettings, as_flags
from rlkd_trl.commands.comparison.cells import Method
from rlkd_trl.commands.comparison.grid import Grid, rates_of
from rlkd_trl.commands.comparison.outcome import Outcome, kept_outcome, measure
from rlkd_trl.commands.comparison.statistics import Entry, summarise
from rlkd_trl.commands.files_read import FileDigests
from rlkd_trl.commands.loading import load_panel, load_reward_model, load_student
from rlkd_trl.prompts import PromptTemplates

if TYPE_CHECKING:
    from rlkd_trl.evaluation.completions import Evaluation
    from rlkd_trl.rewards import RewardModel

COVERAGE = "nll_of_teacher_samples_per_token"


class Examiner:
    """Tests models on the rows of each test set, in the eyes of the teacher; what was tested before is read from disk.

    The reward is the same for all: teacher-forcing, V = max, γ = 1, whatever a method was trained on.
    """

    def __init__(
        self,
        settings: ComparisonSettings,
        tests: dict[str, list[dict]],
        templates: PromptTemplates | None,
        digests: FileDigests,
    ):
        prompts, teacher, student, test = settings.prompts, settings.teacher, settings.student, settings.measurement
        self.tests, self.student = tests, student
        self.num_samples, self.num_resamples = test.num_samples, test.num_resamples
        self.baseline = settings.compare.baseline
        self.lengths = {"max_completion_length": test.max_completion_length, "batch_size": test.batch_size}
        self.max_prompt_length = test.max_prompt_length
        self._load_rewards = partial(_load_reward, teacher, templates)
        self._reward_model: RewardModel | None = None
        self.digests = digests
        self.not_finite: dict[str, dict[str, float]] = {}  # metrics by directory, where numbers are not
        self.settings = {
            "asked": as_flags(prompts, teacher, student),
            "files": digests.of_groups(prompts, teacher),
            "max_prompt_length": test.max_prompt_length,
            "max_completion_length": test.max_completion_length,
            "num_samples": test.num_samples,
        }
        self._teacher_samples: dict[str, Evaluation] = {}

    @property
    def reward_model(self) -> "RewardModel":
        """With the teacher, which is loaded when it is first asked for."""
        if self._reward_model is None:
            self._reward_model = self._load_rewards()
        return self._reward_model

    def test_given_models(self, output_dir: Path) -> None:
        """Tests what is there before any run, the teacher and the warm start, and leaves the memory to the runs.

        Raises:
            InputError: As `load_panel` and `load_student`.
            TrainingError: Numbers that are not finite stand in the results.
        """
        from accelerate.utils import release_memory

        from rlkd_trl.evaluation.not_finite import check_finite

        load_student(self.student)  # before anything is written, as the teacher
        self._reward_model = self._load_rewards()
        for test in self.tests:
            self._test_given_models(test, output_dir)
        check_finite(self.not_finite, "No run was begun.")
        (self._reward_model,) = release_memory(self._reward_model)

    def _test_given_models(self, test: str, output_dir: Path) -> list[Entry]:
        of_teacher = self._test_teacher(test, output_dir / "teacher")
        of_warm_start = self._test_student(test, output_dir / "warm_start", self.student)
        return [Entry("teacher", [of_teacher]), Entry("warm_start", [of_warm_start])]

    def summaries(
        self,
        grid: Grid,
        chosen: Mapping[str, float | None],
        best: Mapping[str, Sequence[str]],
        failures: Mapping[Path, str],
    ) -> dict[str, dict[str, list[dict]]]:
        """The lines of the tables, by test set and budget: the teacher, the warm start, each method at its rate.

        best: names of the methods that have `grid.top_seeds` too, by budget. failures: why, by a run's directory.
        """
        by_test = {}
        for test in self.tests:
            given_models = self._test_given_models(test, grid.output_dir)
            by_test[test] = {}
            for budget in grid.budgets:
                of_methods = []
                for method in grid.methods:
                    more = grid.top_seeds if method.name in best[budget] else []
                    rates = rates_of(method, chosen)
                    of_methods.append(
                        self._of_method(test, grid, budget, method, rates, [*grid.seeds, *more], failures)
                    )
                by_test[test][budget] = summarise(
                    [*given_models, *of_methods],
                    teacher=given_models[0].outcomes[0],
                    baseline=self.baseline or grid.methods[0].name,
                    num_resamples=self.num_resamples,
                )
        return by_test

    def _of_method(
        self,
        test: str,
        grid: Grid,
        budget: str,
        method: Method,
        rates: Sequence[float] | None,
        seeds: Sequence[int],
        failures: Mapping[Path, str],
    ) -> Entry:
        """A method at one budget: its finished seeds, tested. rates: of its parts; the table has the last one's."""
        if rates is None:  # what the search for them began has failed, or nothing was begun in time
            place = grid.place(next(iter(grid.budgets)), method)
            has_failed = any(directory.is_relative_to(place) for directory in failures)
            return Entry(method.name, [], **{"failed_seeds" if has_failed else "missing_seeds": list(seeds)})
        cells = {seed: grid.cell(budget, method, seed, rates) for seed in seeds}
        done = {seed: cell for seed, cell in cells.items() if cell.is_done}
        left = {seed: cell.directory for seed, cell in cells.items() if seed not in done}
        return Entry(
            method.name,
            [self._test_trained(test, cell.directory) for cell in done.values()],
            rates[-1],
            seeds=list(done),
            costs=[cell.cost() for cell in done.values()],
            failed_seeds=[seed for seed, directory in left.items() if directory in failures],
            missing_seeds=[seed for seed, directory in left.items() if directory not in failures],
            at_the_edge=grid.is_edge(rates),
        )

    def _test_trained(self, test: str, checkpoint: Path) -> Outcome:
        """The outcome of a training run's student, kept beside it."""
        trained = dataclasses.replace(self.student, student=str(checkpoint), student_revision=None)
        return self._test_student(test, checkpoint, trained)

    def _test_teacher(self, test: str, directory: Path) -> Outcome:
        """The outcome of the first teacher, asked through its first template; kept in `directory`."""
        return self._kept(test, directory, self._settings_of(test), lambda: self._measure_teacher(test))

    def _test_student(self, test: str, directory: Path, student: StudentArguments) -> Outcome:
        settings = self._settings_of(test)
        settings["files"] = {**settings["files"], **self.digests.of_groups(student)}
        return self._kept(test, directory, settings, lambda: self._measure_student(test, student))

    def _settings_of(self, test: str) -> dict:
        """What makes an outcome on a test set what it is."""
        rows = json.dumps(self.tests[test], default=str)
        return {**self.settings, "rows": hashlib.sha256(rows.encode()).hexdigest()}

    def _kept(self, test: str, directory: Path, settings: dict, make: Callable[[], Outcome]) -> Outcome:
        """The outcome, remembered if a number in it is not finite."""
        from rlkd_trl.evaluation.not_finite import NOT_FINITE

        outcome = kept_outcome(directory, test, settings, make)
        bad = {kind: metrics for kind in ("greedy", "sampled") if (metrics := getattr(outcome, kind)).get(NOT_FINITE)}
        self.not_finite |= {f"{directory} ({test}, {kind})": metrics for kind, metrics in bad.items()}
        return outcome

    def _measure_student(self, test: str, student: StudentArguments) -> Outcome:
        from rlkd_trl.evaluation.evaluate import evaluate_student
        from rlkd_trl.models.loading import default_device
        from rlkd_trl.students import Policy

        print(f"Testing {student.student} on {test}", flush=True)
        model, writer = load_student(student)
        tokenizer = writer.processing_class
        policy = Policy(model.to(default_device()), tokenizer, writer=writer)

        def evaluate(**settings) -> "Evaluation":
            settings |= {"max_prompt_length": self.max_prompt_length, **self.lengths}
            return evaluate_student(policy, tokenizer, self.tests[test], self.reward_model, **settings)

        return self._measured(test, evaluate)

    def _measure_teacher(self, test: str) -> Outcome:
        print(f"Testing the teacher on {test}", flush=True)
        return self._measured(test, partial(self._evaluate_teacher, test))

    def _measured(self, test: str, evaluate: Callable[..., "Evaluation"]) -> Outcome:
        """`evaluate` gets a seed, or None, and with the greedy outputs what a model's coverage is measured by."""
        of_teacher = self._teacher_sample(test).completions

        def answer(seed: int | None) -> "Evaluation":
            evaluation = evaluate(seed=seed, teacher_completions=of_teacher if seed is None else None)
            if seed is None:  # under this name elsewhere: of the teacher's greedy answers
                evaluation.metrics[COVERAGE] = evaluation.metrics.pop("student_nll_of_teacher_per_token")
            return evaluation

        return measure(answer, self.tests[test], self.num_samples)

    def _teacher_sample(self, test: str) -> "Evaluation":
        """One sampled answer of the teacher to every input."""
        if test not in self._teacher_samples:
            self._teacher_samples[test] = self._evaluate_teacher(test, seed=0)
        return self._teacher_samples[test]

    def _evaluate_teacher(self, test: str, **settings) -> "Evaluation":
        from rlkd_trl.evaluation.evaluate import evaluate_teacher

        return evaluate_teacher(self.tests[test], self.reward_model, **settings, **self.lengths)


def _load_reward(teacher: TeacherArguments, templates: PromptTemplates | None) -> "RewardModel":
    from rlkd_trl.rewards import TeacherForcingReward

    panel = load_panel(teacher, templates)
    return load_reward_model([TeacherForcingReward], RewardArguments(), panel, gamma=1.0, weights=None)
