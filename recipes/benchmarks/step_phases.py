"""What the benchmarks of whole steps share: CPU seconds and memory by phase, and two libraries' runs in turn.

It imports nothing of this package, so that an interpreter with other versions of the libraries can run it.
"""

import ctypes
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from statistics import median

from transformers import TrainerCallback
from workload import MatmulRate, peak_resident_mib, reset_peak, resident_mib

VERSIONS = ("torch", "transformers", "trl")


class PhaseMeter:
    """CPU seconds and peak memory of a trainer's phases; whatever is outside of the named ones is the update.

    extra_mib: how far a phase's peak rises above what was resident when it began, in all steps but the first, in
    which the optimizer's state is created. A phase may use what an earlier one has freed, which is no rise; but where
    `trims` is set, what is free is given back to the system before each phase.
    """

    def __init__(self):
        self.rate = MatmulRate()
        self.steps: list[dict[str, float]] = []
        self.peak_mib: dict[str, float] = defaultdict(float)
        self.extra_mib: dict[str, float] = defaultdict(float)
        self.trims = False
        self._cpu_seconds: dict[str, float] = defaultdict(float)
        self._current = "update"

    def begin(self) -> None:
        """Starts counting, after a measurement of the matrix rate."""
        self.rate.measure()
        self._enter("update")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch(name)
        yield
        self._switch("update")

    def finish_step(self) -> None:
        self._switch("update")
        self.steps.append({**self._cpu_seconds, "total": sum(self._cpu_seconds.values())})
        self._cpu_seconds.clear()
        self.begin()

    def _switch(self, phase: str) -> None:
        self._cpu_seconds[self._current] += time.process_time() - self._since
        peak = peak_resident_mib()
        self.peak_mib[self._current] = max(self.peak_mib[self._current], peak)
        if self.steps:
            self.extra_mib[self._current] = max(self.extra_mib[self._current], peak - self._resident_mib)
        self._enter(phase)

    def _enter(self, phase: str) -> None:
        if self.trims:
            ctypes.CDLL(None).malloc_trim(0)
        reset_peak()
        self._current, self._resident_mib, self._since = phase, resident_mib(), time.process_time()

    def results(self, flops: dict[str, int], loaded_mib: float) -> dict[str, object]:
        """Medians over all steps but the first; `flops` has what each phase needs."""
        counted = self.steps[1:]
        seconds = {name: median(step[name] for step in counted) for name in (*flops, "total")}
        peak_mib = max(self.peak_mib.values())
        return {
            "total_cpu_seconds": seconds["total"],
            "cpu_seconds_of_steps": [step["total"] for step in counted],
            "peak_mib": peak_mib,
            "extra_mib": peak_mib - loaded_mib,
            "phases": {
                name: {
                    "cpu_seconds": seconds[name],
                    "gflop": flops[name] / 1e9,
                    "floor_ratio": seconds[name] * self.rate.per_second / flops[name],
                    "peak_mib": self.peak_mib[name],
                    "extra_mib": self.extra_mib[name],
                }
                for name in flops
            },
            "matmul_gflop_per_cpu_second": self.rate.per_second / 1e9,
            "versions": {name: version(name) for name in VERSIONS},
        }


class StepEnd(TrainerCallback):
    """Tells a meter where training begins, and where a step of `updates` optimizer steps ends."""

    def __init__(self, meter: PhaseMeter, updates: int):
        self._meter, self._updates = meter, updates

    def on_train_begin(self, *args, **kwargs):
        self._meter.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._updates == 0:
            self._meter.finish_step()


def in_turn(commands: dict[str, list[str]], rounds: int) -> dict[str, list[dict]]:
    """The JSON in each command's last line, in every round; the commands alternate."""
    results: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{finished.stderr[-2000:]}")
            results[name].append(json.loads(finished.stdout.splitlines()[-1]))
    return results


def compare(ours: list[str], theirs: list[str], rounds: int, name: str) -> dict[str, object]:
    """Runs both libraries in fresh processes; ratios are theirs over ours, of medians over all rounds.

    ours, theirs: commands whose last line is the JSON of a run. name: of their results.
    """
    results = in_turn({"ours": ours, "theirs": theirs}, rounds)
    us, them = _over_rounds(results["ours"]), _over_rounds(results["theirs"])
    return {
        **us,
        name: them,
        "times_faster": them["total_cpu_seconds"] / us["total_cpu_seconds"],
        "times_faster_by_phase": {
            phase: them["phases"][phase]["cpu_seconds"] / us["phases"][phase]["cpu_seconds"] for phase in us["phases"]
        },
        "peak_memory_ratio": us["peak_mib"] / them["peak_mib"],
        "extra_memory_ratio": us["extra_mib"] / them["extra_mib"],
    }


def _over_rounds(runs: list[dict]) -> dict[str, object]:
    totals = [seconds for run in runs for seconds in run["cpu_seconds_of_steps"]]
    return {
        **runs[0],
        "cpu_seconds_of_steps": totals,
        "total_cpu_seconds": median(totals),
        **_medians(runs, ("peak_mib", "extra_mib", "matmul_gflop_per_cpu_second")),
        "phases": {name: _medians([run["phases"][name] for run in runs]) for name in runs[0]["phases"]},
    }


def _medians(runs: list[dict[str, float]], names: Iterable[str] | None = None) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in names or runs[0]}
