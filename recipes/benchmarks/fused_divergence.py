r"""Memory and time of the losses over the whole vocabulary, sliced and on whole logits: one CPU thread, float32.

    python recipes/benchmarks/fused_divergence.py

Measured is one loss and its backward pass down to the hidden states and the head's weight, at 64 × 64 positions, with
V = 32,128, D = 512 and one teacher of the same size. "Plain" is `distillation_loss` on whole logits through autograd,
"sliced" is `sliced_divergence`; for all actions (signal log p − log π) they are `all_actions_loss` and
`sliced_all_actions_loss`. Both compute the same equations.

Extra memory is how far the peak resident set of a fresh process rises above what it held when its inputs and the
libraries were loaded; the gradients (71 MiB) are part of it. Time is CPU time of the process, with plain and sliced
alternating in one process, as the median over the repetitions. On a busy machine the ratio says more than the seconds.
Linux only.

It writes `results/fused_divergence.json` and `results/fused_divergence.md` beside this file.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from result_files import RESULTS

from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.ops.all_actions import all_actions_loss, log_ratio_signal, sliced_all_actions_loss
from rlkd_trl.ops.divergences import DIVERGENCES, TeacherStates, distillation_loss, sliced_divergence
from rlkd_trl.ops.lm_head import MAX_SLICE_ELEMENTS

N, V, D = 64 * 64, 32_128, 512
ALLOWED_MEMORY, ALLOWED_TIME = 0.25, 1.3
LOSSES = [*DIVERGENCES, "all_actions"]
SLICE_SIZES = [2**20, 2**21, 2**22, 2**23, 2**24, 2**25]


class Problem:
    """Student and teacher states and heads, with logits of standard deviation about 1."""

    def __init__(self, positions: int = N):
        torch.manual_seed(0)
        self.hidden_ND = torch.randn(positions, D, requires_grad=True)
        self.weight_VD = torch.empty(V, D).normal_(std=D**-0.5).requires_grad_()
        self.teacher_hidden_ND = torch.randn(positions, D)
        self.teacher_weight_VD = torch.empty(V, D).normal_(std=D**-0.5)
        self.weights_N = torch.full((positions,), 1 / positions)
        # Of all actions: sampled tokens, their futures, and their log-probabilities at about this size of V.
        self.sampled = (torch.randint(V, (positions,)), torch.randn(positions), torch.full((positions,), -10.0))

    def head(self, hidden_nD):
        return hidden_nD @ self.weight_VD.T

    def teacher_head(self, hidden_nD):
        return hidden_nD @ self.teacher_weight_VD.T

    def plain(self, name: str) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits_NV = self.teacher_head(self.teacher_hidden_ND)
        student_logits_NV = self.head(self.hidden_ND)
        if name == "all_actions":
            with torch.no_grad():
                signal_NV = log_ratio_signal([teacher_logits_NV], [1.0])
            del teacher_logits_NV
            loss, _ = all_actions_loss(
                student_logits_NV, signal_NV, self.weights_N, *self.sampled, subtract_log_pi=True
            )
        else:
            loss, _ = distillation_loss(
                student_logits_NV, [teacher_logits_NV], self.weights_N, divergence=DIVERGENCES[name]
            )
        return loss

    def sliced(self, name: str, max_elements: int) -> torch.Tensor:
        teachers = [TeacherStates(self.teacher_hidden_ND, self.teacher_head)]
        states = (self.hidden_ND, self.head, [self.weight_VD], teachers, self.weights_N)
        sizes = {"vocab_size": V, "max_elements": max_elements}
        if name == "all_actions":
            loss, _ = sliced_all_actions_loss(
                *states, *self.sampled, teacher_signal=log_ratio_signal, subtract_log_pi=True, **sizes
            )
        else:
            loss, _ = sliced_divergence(*states, divergence=DIVERGENCES[name], **sizes)
        return loss

    def gradients(self, name: str, max_elements: int) -> float:
        """One loss and its backward pass; `max_elements` 0 is plain. Returns the loss."""
        self.hidden_ND.grad = self.weight_VD.grad = None
        loss = self.sliced(name, max_elements) if max_elements else self.plain(name)
        loss.backward()
        return loss.item()


def peak_resident_mib() -> float:
    """The peak of this process since it began; `ru_maxrss` would also count the parent that it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure_memory(name: str, max_elements: int) -> float:
    """The extra MiB of one variant, in this process, which must not have done anything else."""
    Problem(positions=1).gradients(name, max_elements)  # so that libraries have made their first allocations
    problem = Problem()
    before = peak_resident_mib()
    problem.gradients(name, max_elements)
    return peak_resident_mib() - before


def memory_in_child(name: str, max_elements: int) -> float:
    command = [sys.executable, __file__, "--measure", name, str(max_elements)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def cpu_seconds(problem: Problem, name: str, variants: list[int], repetitions: int) -> dict[int, list[float]]:
    """CPU seconds of the variants, which alternate; checks that all give the same loss."""
    seconds: dict[int, list[float]] = {variant: [] for variant in variants}
    losses = []
    for _ in range(repetitions):
        for variant in variants:
            start = time.process_time()
            losses.append(problem.gradients(name, variant))
            seconds[variant].append(time.process_time() - start)
    assert max(losses) - min(losses) < 1e-5 * abs(max(losses)), f"the variants differ: {losses}"
    return seconds


def compare(label: str, memory: dict[int, float], seconds: dict[int, list[float]], variant: int) -> dict:
    """A row of the table: plain against the variant with that slice size."""
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    row = {
        "case": label,
        "max_elements": variant,
        "plain_mib": round(memory[0]),
        "sliced_mib": round(memory[variant]),
        "memory_ratio": round(memory[variant] / memory[0], 3),
        "plain_cpu_s": round(medians[0], 2),
        "sliced_cpu_s": round(medians[variant], 2),
        "time_ratio": round(medians[variant] / medians[0], 3),
        "time_ratio_per_repetition": [
            round(sliced / plain, 3) for plain, sliced in zip(seconds[0], seconds[variant], strict=True)
        ],
    }
    row["met"] = row["memory_ratio"] <= ALLOWED_MEMORY and row["time_ratio"] <= ALLOWED_TIME
    print(json.dumps(row), flush=True)
    return row


def table(rows: list[dict]) -> str:
    heads = ["", "slice, logits", "plain, MiB", "sliced, MiB", "memory ratio", "plain, CPU s", "sliced, CPU s"]
    heads += ["time ratio", "range", "met"]
    lines = []
    for row in rows:
        ratios = row["time_ratio_per_repetition"]
        sizes = [f"2^{row['max_elements'].bit_length() - 1}", row["plain_mib"], row["sliced_mib"]]
        times = [row["plain_cpu_s"], row["sliced_cpu_s"], f"{row['time_ratio']:.2f}"]
        outcome = [f"{min(ratios):.2f} – {max(ratios):.2f}", "yes" if row["met"] else "no"]
        lines.append([row["case"], *map(str, sizes), f"{row['memory_ratio']:.2f}", *map(str, times), *outcome])
    return markdown_table(heads, lines)


def write_results(by_loss: list[dict], by_slice_size: list[dict], conditions: dict[str, str | int]) -> str:
    """Writes both files, from the rows that exist so far; returns the Markdown."""
    results = {
        "positions": N,
        "vocabulary": V,
        "width": D,
        **conditions,
        "losses": by_loss,
        "slice_sizes": by_slice_size,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fused_divergence.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = (
        f"Loss over the whole vocabulary and backward pass, {N} positions, V = {V}, D = {D}, float32, one CPU thread; "
        f"medians over {conditions['repetitions']} repetitions. Wanted: at most {ALLOWED_MEMORY} of the plain "
        f"version's extra memory and {ALLOWED_TIME} of its CPU time.\n\n    {conditions['command']}\n\n"
        f"{conditions['date']}, {conditions['machine']}, Python {conditions['python']}, torch {conditions['torch']}."
        f"\n\nAt the default slice size:\n\n{table(by_loss)}\n"
    )
    if by_slice_size:
        text += f"\nForward KL by slice size:\n\n{table(by_slice_size)}\n"
    (RESULTS / "fused_divergence.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("LOSS", "MAX_ELEMENTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(measure_memory(args.measure[0], int(args.measure[1])))
        return

    conditions = {
        "repetitions": args.repetitions,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    problem = Problem()
    by_loss, by_slice_size = [], []
    for name in args.losses:
        variants = [0, *SLICE_SIZES] if name == "forward_kl" else [0, MAX_SLICE_ELEMENTS]
        memory = {variant: memory_in_child(name, variant) for variant in variants}
        seconds = cpu_seconds(problem, name, variants, args.repetitions)
        by_loss.append(compare(name, memory, seconds, MAX_SLICE_ELEMENTS))
        if name == "forward_kl":
            by_slice_size = [compare(name, memory, seconds, size) for size in SLICE_SIZES]
        text = write_results(by_loss, by_slice_size, conditions)
    print(text)


if __name__ == "__main__":
    main()
