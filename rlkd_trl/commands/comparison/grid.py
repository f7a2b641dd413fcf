"""Which training runs a comparison consists of: budgets × methods × seeds, and each method's search for a rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkd_trl.commands.comparison.arguments import SELECTION, ComparisonSettings
from rlkd_trl.commands.comparison.cells import Cell, Method, run_cells
from rlkd_trl.commands.comparison.statistics import choose_learning_rate
from rlkd_trl.commands.files_read import FileDigests


@dataclass(frozen=True)
class Grid:
    """budgets: name to flag, the smallest first. flags: those of every run. select_on: one of `SELECTION`.

    digests: of the files that the runs read.
    """

    output_dir: Path
    methods: Sequence[Method]
    budgets: Mapping[str, str]
    seeds: Sequence[int]
    learning_rates: Sequence[float]
    flags: Sequence[str]
    select_on: str
    jobs: int
    digests: FileDigests

    @classmethod
    def of(cls, settings: ComparisonSettings, methods: Sequence[Method]) -> "Grid":
        """The runs that the flags ask for."""
        compare = settings.compare
        return cls(
            Path(compare.output_dir),
            methods,
            compare.budgets(),
            compare.seeds,
            compare.learning_rates,
            flags=settings.run_flags(),
            select_on=compare.select_on,
            jobs=compare.jobs,
            digests=FileDigests(),
        )

    def cell(self, budget: str, method: Method, seed: int, rate: float) -> Cell:
        name = f"seed{seed}" if len(self.learning_rates) == 1 else f"seed{seed}-lr{rate:g}"
        flags = (*self.flags, self.budgets[budget], f"--learning_rate={rate}", f"--seed={seed}")
        return Cell(method, self.output_dir / budget / method.name / name, flags, self.digests)

    def check(self) -> None:
        """Raises `InputError` if any of its directories holds the results of another command, or of other files."""
        for method in self.methods:
            for budget in self.budgets:
                for seed in self.seeds:
                    for rate in self.learning_rates:
                        self.cell(budget, method, seed, rate).check()

    def search(self, failures: dict[Path, str]) -> dict:
        """Runs every method with every rate, at the smallest budget and the first seed, and chooses.

        Returns a dict of plain values: `budget`, `seed`, `select_on`, `lower_is_better`, and by method `scores` and
        `cost` (each by rate; a score is None where the run failed) and `chosen` (None where all failed). With one
        rate, nothing is run. What fails is added to `failures`.
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
        failures |= run_cells([cell for by_rate in cells.values() for cell in by_rate.values()], self.jobs)
        for name, by_rate in cells.items():
            done = {rate: cell for rate, cell in by_rate.items() if cell.is_done}
            scores = {rate: cell.read("metrics.json")["after"].get(self.select_on) for rate, cell in done.items()}
            outcome["scores"][name] = {rate: scores.get(rate) for rate in rates}
            outcome["cost"][name] = {rate: cell.read("cost.json") for rate, cell in done.items()}
            outcome["chosen"][name] = choose_learning_rate(scores, lower_is_better=SELECTION[self.select_on])
        return outcome

    def train(self, chosen: Mapping[str, float | None], failures: dict[Path, str]) -> None:
        """Runs every budget, method and seed at the chosen rates. What fails is added to `failures`."""
        cells = [
            self.cell(budget, method, seed, chosen[method.name])
            for budget in self.budgets
            for seed in self.seeds
            for method in self.methods
            if chosen[method.name] is not None
        ]
        failures |= run_cells(cells, self.jobs)
