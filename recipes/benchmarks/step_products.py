r"""Where the time of a step's phases goes: matrix products, what they take alone in their own shapes, and the rest.

    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/step_products.py --models t5
    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/step_products.py --models decoder_only \
        --prompt_tokens 256 --prompts 8 --samples 8

`step.py` and `decoder_step.py` hold each phase against the time that its arithmetic would take at the rate of large
matrix products. That is a bound that no shape of these models reaches: a product of 64 rows reads its weights from
memory for a few operations each. Here the same trainers run two steps, and torch's profiler counts the operators of
each phase in the second one. Every product (mm, addmm, bmm, baddbmm) is then timed alone, five times in its own shape
with contiguous operands, of which the median counts: `alone` is the sum over all products of a phase, the time that it
would take if nothing but its products were computed. Below it stand the operators that take most of the rest.

Seconds are the profiler's, of one thread by the wall's clock: run it on a machine that is doing nothing else. Writes
`step_products_MODELS_TOKENS.json` and `.md` to `--results_dir`, where TOKENS are the prompt's.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import decoder_step
import step
import torch
from result_files import RESULTS, made_by, write_results
from step_phases import PhaseMeter
from torch.profiler import ProfilerActivity, profile
from workload import Shape

from rlkd_trl.evaluation.tables import markdown_table

MODELS = {"t5": (step, 16), "decoder_only": (decoder_step, None)}  # the script, and completions of an update
PHASES = ("generate", "score", "update")
PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "aten::mm": torch.mm,
    "aten::addmm": torch.addmm,
    "aten::bmm": torch.bmm,
    "aten::baddbmm": torch.baddbmm,
}
SHOWN = 6  # operators beside the products


class ProfiledPhases:
    """Profiles each stretch of each phase of one step, and adds the stretches up.

    seconds: by phase and operator. products: by phase, how often each product of these shapes was computed.
    """

    def __init__(self, meter: PhaseMeter, step_number: int):
        self.seconds: dict[str, Counter] = defaultdict(Counter)
        self.products: dict[str, Counter] = defaultdict(Counter)
        self._meter, self._step, self._switch = meter, step_number, meter._switch
        self._profiler: profile | None = None
        self._finish, self._is_finishing = meter.finish_step, False
        meter._switch, meter.finish_step = self._switched, self._finished

    def _switched(self, phase: str) -> None:
        self._end()
        self._switch(phase)
        if len(self._meter.steps) == self._step and not self._is_finishing:
            self._phase, self._profiler = phase, profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self._profiler.start()

    def _finished(self) -> None:
        """Without what the meter does between two steps: it measures the rate of large products."""
        self._is_finishing = True
        self._finish()
        self._is_finishing = False

    def _end(self) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        for event in self._profiler.key_averages(group_by_input_shape=True):
            self.seconds[self._phase][event.key] += event.self_cpu_time_total / 1e6
            if event.key in PRODUCTS:
                operands = tuple(tuple(shape) for shape in event.input_shapes if shape)
                self.products[self._phase][event.key, operands] += event.count
        self._profiler = None


def seconds_alone(operator: str, operands: Sequence[Sequence[int]], repetitions: int = 5) -> float:
    """The median seconds of one product, after one that is not counted."""
    tensors = [torch.randn(*shape) for shape in operands]
    PRODUCTS[operator](*tensors)
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        PRODUCTS[operator](*tensors)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(script: object, shape: Shape, update_batch_size: int, beta: float) -> dict[str, dict]:
    """By phase: seconds in all, in products, of these alone, at the rate of large ones, and of the other operators."""
    with tempfile.TemporaryDirectory() as output_dir:
        trainer, meter = script.measured_trainer(shape, 2, update_batch_size, beta, output_dir)
        profiled = ProfiledPhases(meter, step_number=1)
        trainer.train()
    flops = script.phase_flops(shape, reference=beta > 0)
    found = {}
    for phase in PHASES:
        seconds = profiled.seconds[phase]
        others = Counter({name: value for name, value in seconds.items() if name not in PRODUCTS})
        found[phase] = {
            "seconds": sum(seconds.values()),
            "products": sum(seconds[name] for name in PRODUCTS),
            "alone": sum(
                count * seconds_alone(*product) for product, count in sorted(profiled.products[phase].items())
            ),
            "large": flops[phase] / meter.rate.per_second,
            "others": dict(others.most_common(SHOWN)),
        }
    return found


def table(found: dict[str, dict]) -> str:
    rows = []
    for phase, of_phase in found.items():
        cells = [f"{of_phase[name]:.2f}" for name in ("seconds", "products", "alone", "large")]
        ratios = [f"{of_phase['seconds'] / of_phase[name]:.2f}" for name in ("alone", "large")]
        rest = ", ".join(
            f"{name.removeprefix('aten::')} {100 * seconds / of_phase['seconds']:.1f}"
            for name, seconds in of_phase["others"].items()
        )
        rows.append([phase, *cells, *ratios, rest])
    heads = ["phase", "s", "in products, s", "these alone, s", "at the large rate, s", "s / alone", "s / large"]
    return markdown_table([*heads, "% in other operators"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Shape.add_flags(parser)
    parser.add_argument("--models", choices=list(MODELS), default="t5")
    parser.add_argument("--beta", type=float, default=0.05, help="KL coefficient; 0 does without the initial student")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape.of(args)
    script, update_batch_size = MODELS[args.models]
    found = measure(script, shape, update_batch_size or shape.completions, args.beta)
    about = f"{shape.prompt_tokens}-token prompts, {shape.prompts} prompts × {shape.samples} samples."
    text = f"# Where a step's time goes: {args.models}\n\n{about}\n\n{table(found)}\n\n{made_by()}\n"
    write_results(args.results_dir, f"step_products_{args.models}_{shape.prompt_tokens}", found, text)


if __name__ == "__main__":
    main()
