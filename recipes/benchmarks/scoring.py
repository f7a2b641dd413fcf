r"""Rewards per second and peak memory of our teacher's scoring against naive scoring, in one run.

    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/scoring.py
    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/scoring.py --prompt_tokens 256 --prompts 8 --samples 8

Both compute r_t = q_t − max_v f_{t+1}[v] of the same completions with the same random T5. "Naive" is what one writes
first: the model's forward pass on every (prompt, completion) pair, with its encoder, and float32 logits of all
positions at once. "Ours" is `Teacher.score` and the reward from its statistics. The script checks that both give the
same rewards.

Time is CPU seconds of the process in one thread, with naive and ours alternating, as the median over `--repetitions`.
Extra memory is how far the peak resident set of a fresh process rises above what it held with the model loaded, as the
median over three processes; a tiny call before lets libraries make their first allocations. Linux only. The last line
is one JSON object. How the cost grows with each size: `growth.py`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from workload import (
    TEACHER,
    Dimensions,
    MatmulRate,
    Shape,
    forward_flops,
    peak_resident_mib,
    prompt_ids,
    prompt_texts,
    random_t5,
    reset_peak,
    resident_mib,
    word_tokenizer,
)

from rlkd_trl.ops.rewards import centre, teacher_forcing_reward
from rlkd_trl.teachers import Teacher

TINY = Shape(prompt_tokens=4, completion_tokens=3, prompts=2, samples=2)


@dataclass(frozen=True)
class Completions:
    """Random completions without EOS, so that each has a state after its last token."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    ended_B: torch.Tensor
    prompt_index_B: torch.Tensor

    @classmethod
    def random(cls, shape: Shape) -> "Completions":
        generator = torch.Generator().manual_seed(0)
        size = (shape.completions, shape.completion_tokens)
        return cls(
            torch.randint(3, shape.vocabulary, size, generator=generator),
            torch.ones(size, dtype=torch.bool),
            torch.zeros(shape.completions, dtype=torch.bool),
            torch.arange(shape.prompts).repeat_interleave(shape.samples),
        )


def naive_rewards(model, prompt_ids_PS: torch.Tensor, completions: Completions) -> torch.Tensor:
    """`[B, T]`, through the model's own forward pass."""
    prompts_BS = prompt_ids_PS[completions.prompt_index_B]
    start_B1 = torch.full_like(completions.ids_BT[:, :1], model.config.decoder_start_token_id)
    with torch.no_grad():
        logits_BT1V = model(
            input_ids=prompts_BS,
            attention_mask=torch.ones_like(prompts_BS),
            decoder_input_ids=torch.cat([start_B1, completions.ids_BT], dim=1),
        ).logits.float()
    centred_BT1V = logits_BT1V - logits_BT1V.mean(dim=-1, keepdim=True)
    chosen_BT = centred_BT1V[:, :-1].gather(-1, completions.ids_BT[..., None])[..., 0]
    return chosen_BT - centred_BT1V[:, 1:].max(dim=-1).values


def our_rewards(teacher: Teacher, prompts: list[str], completions: Completions) -> torch.Tensor:
    scores = teacher.score(
        prompts, completions.prompt_index_B, completions.ids_BT, completions.mask_BT, completions.ended_B
    )
    return teacher_forcing_reward(
        centre(scores.chosen, scores.mean[:, :-1]),
        centre(scores.max, scores.mean),
        completions.mask_BT,
        completions.ended_B,
        gamma=1.0,
    )


class Scorers:
    """Both ways of scoring, with the same weights in a model of its own for each, which is made when first needed."""

    def __init__(self, dimensions: Dimensions, vocabulary: int):
        self._size = dimensions, vocabulary

    @cached_property
    def model(self):
        return random_t5(*self._size, seed=2).eval()

    @cached_property
    def teacher(self) -> Teacher:
        return Teacher(random_t5(*self._size, seed=2), word_tokenizer(self._size[1]))

    def rewards(self, way: str, shape: Shape) -> torch.Tensor:
        completions = Completions.random(shape)
        if way == "naive":
            return naive_rewards(self.model, prompt_ids(shape, 0), completions)
        return our_rewards(self.teacher, prompt_texts(shape, 0), completions)


def extra_mib(way: str, dimensions: Dimensions, shape: Shape) -> float:
    """The extra memory of one way in this process, which must not have scored anything else."""
    scorers = Scorers(dimensions, shape.vocabulary)
    scorers.rewards(way, Shape(**{**asdict(TINY), "vocabulary": shape.vocabulary}))
    reset_peak()
    before = resident_mib()
    scorers.rewards(way, shape)
    return peak_resident_mib() - before


def extra_mib_in_children(way: str, dimensions: Dimensions, shape: Shape, processes: int = 3) -> float:
    """The median of `extra_mib` over fresh processes, as the layout of memory differs between processes."""
    argument = json.dumps({"way": way, "dimensions": asdict(dimensions), "shape": asdict(shape)})
    command = [sys.executable, __file__, "--measure_memory", argument]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(processes)]
    return statistics.median(float(output.splitlines()[-1]) for output in outputs)


def cpu_seconds(
    scorers: Scorers, ways: list[str], shape: Shape, repetitions: int, rate: MatmulRate
) -> dict[str, float]:
    """The median CPU seconds of each way; the ways alternate, and the first round does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repetitions + 1):
        rate.measure()
        for way in ways:
            start = time.process_time()
            scorers.rewards(way, shape)
            seconds[way].append(time.process_time() - start)
    return {way: statistics.median(values[1:]) for way, values in seconds.items()}


def compare(dimensions: Dimensions, shape: Shape, repetitions: int) -> dict[str, object]:
    scorers, rate = Scorers(dimensions, shape.vocabulary), MatmulRate()
    torch.testing.assert_close(scorers.rewards("ours", shape), scorers.rewards("naive", shape), rtol=1e-3, atol=1e-3)
    seconds = cpu_seconds(scorers, ["naive", "ours"], shape, repetitions, rate)
    rewards = shape.completions * shape.completion_tokens
    results: dict[str, object] = {"shape": asdict(shape), "matmul_gflop_per_cpu_second": rate.per_second / 1e9}
    for way in ("naive", "ours"):
        flops = forward_flops(dimensions, shape)
        results[way] = {
            "cpu_seconds": seconds[way],
            "rewards_per_cpu_second": rewards / seconds[way],
            "floor_ratio": seconds[way] * rate.per_second / flops,
            "extra_mib": extra_mib_in_children(way, dimensions, shape),
        }
    results["times_faster"] = seconds["naive"] / seconds["ours"]
    results["memory_ratio"] = results["ours"]["extra_mib"] / results["naive"]["extra_mib"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Shape.add_flags(parser)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--measure_memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure_memory:
        request = json.loads(args.measure_memory)
        print(extra_mib(request["way"], Dimensions(**request["dimensions"]), Shape(**request["shape"])))
        return
    shape = Shape.of(args)
    print(json.dumps(compare(TEACHER, shape, args.repetitions)))


if __name__ == "__main__":
    main()
