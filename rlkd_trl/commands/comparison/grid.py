"""Which training runs a comparison consists of: budgets × methods × seeds, and each method's search for a rate."""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkd_trl.commands.comparison.arguments import SELECTION, ComparisonSettings
from rlkd_trl.commands.comparison.cells import Cell, Method, run_cells
from rlkd_trl.commands.comparison.statistics import best, choose_learning_rate
from rlkd_trl.commands.files_read import FileDigests


@dataclass(frozen=True)
class Grid:
    """budgets: name to flag, the smallest first. flags: those of every run. select_on: one of `SELECTION`.

    digests: of the files that the runs read. until: no run is begun after it, a reading of `time.monotonic`.
    """

    output_dir: Path
    methods: Sequence[Method]
    budgets: Mapping[str, str]
    seeds: Sequence[int]
    top: int
    top_seeds: Sequence[int]
    learning_rates: Sequence[float]
    flags: Sequence[str]
    select_on: str
    jobs: int
    until: float
    digests: FileDigests

    @classmethod
    def of(cls, settings: ComparisonSettings, methods: Sequence[Method]) -> "Grid":
        """The runs that the flags ask for."""
        compare = settings.compare
        minutes = math.inf if compare.stop_after_minutes is None else compare.stop_after_minutes
        return cls(
            Path(compare.output_dir),
            methods,
            compare.budgets(),
            compare.seeds,
            compare.top or 0,
            compare.top_seeds or [],
            compare.learning_rates,
            flags=settings.run_flags(),
            select_on=compare.select_on,
            jobs=compare.jobs,
            until=time.monotonic() + 60 * minutes,
            digests=FileDigests(),
        )

    def cell(self, budget: str, method: Method, seed: int, rate: float) -> Cell:
        name = f"seed{seed}" if len(self.learning_rates) == 1 else f"seed{seed}-lr{rate:g}"
        flags = (*self.flags, self.budgets[budget], f"--learning_rate={rate}", f"--seed={seed}")
        return Cell(method, self.output_dir / budget / method.name / name, flags, self.digests)

    def is_edge(self, rate: float) -> bool:
        """The rate is the smallest or the largest of several, so that the best one may lie beyond."""
        return len(self.learning_rates) > 1 and rate in (min(self.learning_rates), max(self.learning_rates))

    def check(self) -> None:
        """Raises `InputError` if any of its directories holds the results of another command, or of other files."""
        for method in self.methods:
            for budget in self.budgets:
                for seed in [*self.seeds, *self.top_seeds]:
                    for rate in self.learning_rates:
                        self.cell(budget, method, seed, rate).check()

    def search(self, failures: dict[Path, str]) -> dict:
        """Runs every method with every rate, at the smallest budget and the first seed, and chooses.

        Returns a dict of plain values: `budget`, `seed`, `select_on`, `lower_is_better`, and by method `scores` and
        `cost` (each by rate; a score is None where there is no finished run) and `chosen` (None where all are; among
        what there is, where time ran out). With one rate, nothing is run. What fails is added to `failures`.
        """
        budget, seed, rates = next(iter(self.budgets)), self.seeds[0], self.learning_rates
        outcome = {
            "budget": budget,
            "seed": seed,
            "select_on": self.select_on,
            "lower_is_better": SELECTION[self.select_on],
            "scores": {},
            "cost": {},
            "chosen": {method.name: rates[0] for method in self.methods},
        }
        if len(rates) == 1:
            return outcome
        cells = {
            method.name: {rate: self.cell(budget, method, seed, rate) for rate in rates} for method in self.methods
        }
        failures |= self._run(cell for by_rate in cells.values() for cell in by_rate.values())
        for name, by_rate in cells.items():
            done = {rate: cell for rate, cell in by_rate.items() if cell.is_done}
            scores = {rate: self._score(cell) for rate, cell in done.items()}
            outcome["scores"][name] = {rate: scores.get(rate) for rate in rates}
            outcome["cost"][name] = {rate: cell.read("cost.json") for rate, cell in done.items()}
            outcome["chosen"][name] = choose_learning_rate(scores, lower_is_better=SELECTION[self.select_on])
        return outcome

    def train(self, chosen: Mapping[str, float | None], failures: dict[Path, str]) -> dict[str, list[str]]:
        """Runs every budget, method and seed at the chosen rates, then the best methods with more seeds.

        Returns the names of those, by budget: none while time has run out before the others' runs. What fails is added
        to `failures`. Once time has run out in the search, nothing is run: what is chosen may change.
        """
        best_of = {budget: [] for budget in self.budgets}
        rated = [method for method in self.methods if chosen[method.name] is not None]
        cells = {
            (budget, method.name): [self.cell(budget, method, seed, chosen[method.name]) for seed in self.seeds]
            for budget in self.budgets
            for method in rated
        }
        failures |= self._run(cell for of_seed in zip(*cells.values(), strict=True) for cell in of_seed)
        left = [cell for of_method in cells.values() for cell in of_method if not cell.is_done]
        if self.top == 0 or any(cell.directory not in failures for cell in left):
            return best_of
        for budget in self.budgets:
            scores = {
                method.name: statistics.fmean(map(self._score, cells[budget, method.name]))
                for method in rated
                if all(cell.is_done for cell in cells[budget, method.name])
            }
            best_of[budget] = best(scores, self.top, lower_is_better=SELECTION[self.select_on])
        failures |= self._run(
            self.cell(budget, method, seed, chosen[method.name])
            for seed in self.top_seeds
            for budget in self.budgets
            for method in rated
            if method.name in best_of[budget]
        )
        return best_of

    def _score(self, cell: Cell) -> float:
        """What methods are chosen by, of a finished run's student on the validation inputs; NaN where it has none."""
        score = cell.read("metrics.json")["after"].get(self.select_on)
        return math.nan if score is None else score

    def _run(self, cells: Iterator[Cell]) -> dict[Path, str]:
        return run_cells(list(cells), self.jobs, until=self.until)
