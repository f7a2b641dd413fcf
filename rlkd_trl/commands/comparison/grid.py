"""Which training runs a comparison consists of: budgets × methods × seeds, and each method's search for a rate."""

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkd_trl.commands.comparison.arguments import SELECTION, Budget, ComparisonSettings
from rlkd_trl.commands.comparison.cells import Cell, Method, run_cells
from rlkd_trl.commands.comparison.choice import best, choose_learning_rate
from rlkd_trl.commands.files_read import FileDigests


@dataclass(frozen=True)
class Grid:
    """budgets: by name, the smallest first. flags: those of every run; flags_later:
    of one that begins with what another has made. select_on: one of `SELECTION`.

    digests: of the files that the runs read. until: no run is begun after it, a reading of `time.monotonic`.
    """

    output_dir: Path
    methods: Sequence[Method]
    budgets: Mapping[str, Budget]
    seeds: Sequence[int]
    top: int
    top_seeds: Sequence[int]
    learning_rates: Sequence[float]
    flags: Sequence[str]
    flags_later: Sequence[str]
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
            flags_later=settings.run_flags(names_student=False),
            select_on=compare.select_on,
            jobs=compare.jobs,
            until=time.monotonic() + 60 * minutes,
            digests=FileDigests(),
        )

    def cell(self, budget: str, method: Method, seed: int, rates: Sequence[float]) -> Cell:
        """A run of a method with a rate for each of its parts; with fewer rates, of so many of its first parts."""
        place, cell = self.place(budget, method), None
        for number, (part, rate) in enumerate(zip(method.parts, rates, strict=False)):
            name = f"seed{seed}"
            if len(self.learning_rates) > 1:
                name += "".join(f"-lr{earlier:g}" for earlier in rates[: number + 1])
            directory = place / name if part is method else place / part.name / name
            share = self.budgets[budget].flag(number, len(method.parts))
            named = self.flags if cell is None else self.flags_later
            flags = (*named, share, f"--learning_rate={rate}", f"--seed={seed}")
            cell = Cell(part, directory, flags, self.digests, before=cell)
        return cell

    def place(self, budget: str, method: Method) -> Path:
        """The directory of all runs of a method with a budget."""
        return self.output_dir / budget / method.name

    def is_edge(self, rates: Sequence[float]) -> bool:
        """One of the rates is the smallest or the largest of several, so that the best one may lie beyond."""
        edges = (min(self.learning_rates), max(self.learning_rates))
        return len(self.learning_rates) > 1 and any(rate in edges for rate in rates)

    def check(self) -> None:
        """Raises `InputError` if any of its directories holds the results of another command, or of other files."""
        for method in self.methods:
            for number in range(1, len(method.parts) + 1):
                rates_of_parts = itertools.product(self.learning_rates, repeat=number)
                seeds = [*self.seeds, *self.top_seeds]
                for budget, seed, rates in itertools.product(self.budgets, seeds, rates_of_parts):
                    self.cell(budget, method, seed, rates).check()

    def search(self, failures: dict[Path, str]) -> dict:
        """Runs every method with every rate, at the smallest budget and the first seed, and chooses.

        Of methods that follow one another each has its own rate: the first one's is chosen by the student that it
        leaves, and with that the next one's.

        Returns a dict of plain values: `budget`, `seed`, `select_on`, `lower_is_better`, and by method `scores` and
        `cost` (each by rate; a score is None where there is no finished run) and `chosen` (None where all are; among
        what there is, where time ran out). A method that another goes on from has entries of its own under
        `part_name`. With one rate, nothing is run. What fails is added to `failures`.
        """
        budget, seed, rates = next(iter(self.budgets)), self.seeds[0], self.learning_rates
        outcome = {
            "budget": budget,
            "seed": seed,
            "select_on": self.select_on,
            "lower_is_better": SELECTION[self.select_on],
            "scores": {},
            "cost": {},
            "chosen": {part_name(method, part): None for method in self.methods for part in method.parts},
        }
        if len(rates) == 1:
            outcome["chosen"] = dict.fromkeys(outcome["chosen"], rates[0])
            return outcome
        for number in range(max(len(method.parts) for method in self.methods)):
            cells = {}
            for method in self.methods:
                chosen = rates_of(method, outcome["chosen"], parts=number)
                if number < len(method.parts) and chosen is not None:
                    name = part_name(method, method.parts[number])
                    cells[name] = {rate: self.cell(budget, method, seed, (*chosen, rate)) for rate in rates}
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
        rates = {method.name: rates_of(method, chosen) for method in self.methods}
        rated = [method for method in self.methods if rates[method.name] is not None]
        cells = {
            (budget, method.name): [self.cell(budget, method, seed, rates[method.name]) for seed in self.seeds]
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
            self.cell(budget, method, seed, rates[method.name])
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


def part_name(method: Method, part: Method) -> str:
    """Under which the search has a part of a method: of the last one the method's own name."""
    return method.name if part is method else f"{part.name} (of {method.name})"


def rates_of(
    method: Method, chosen: Mapping[str, float | None], *, parts: int | None = None
) -> tuple[float, ...] | None:
    """The chosen rates of a method's parts, or of so many of the first; None where one has none."""
    rates = tuple(chosen.get(part_name(method, part)) for part in method.parts[:parts])
    return None if None in rates else rates
