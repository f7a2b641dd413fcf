r"""CPU seconds of sampling a rollout: `Policy.sample`, and `generate()` with its growing and its static cache.

    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/sampling.py
    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmarks/sampling.py --prompt_tokens 256 --prompts 8 --samples 8

The student is that of `step.py`, a random T5. Completions never end early, so that nothing is gained by dropping
finished ones. `generate()` reads each prompt once for each of its completions. `gpu.py` times the same three ways on a
GPU, where a static cache can be compiled. Everything runs in one thread and is measured in CPU time of the process;
the ways alternate, and figures are medians over the repetitions, of which the first does not count. The last line is
one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from workload import (
    EOS,
    PAD,
    STUDENT,
    UNK,
    MatmulRate,
    Shape,
    forward_flops,
    prompt_ids,
    random_t5,
    word_tokenizer,
)

from rlkd_trl.students import Policy


def ways(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: Shape
) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that sample `shape.completions` completions of full length, all for the same prompts.

    Each returns ids that end with the completions' ids.
    """
    policy = Policy(student.eval(), tokenizer)
    policy.forbidden_V[[EOS, UNK]] = True
    device = student.device
    ids_PS = prompt_ids(shape, 0).to(device)
    mask_PS = torch.ones_like(ids_PS)
    index_B = torch.arange(shape.prompts, device=device).repeat_interleave(shape.samples)
    uniforms_BT = torch.rand(shape.completions, shape.completion_tokens, device=device)

    def ours() -> torch.Tensor:
        return policy.sample(
            ids_PS, mask_PS, index_B, max_completion_length=shape.completion_tokens, uniforms_BT=uniforms_BT
        ).ids_BT

    def generate(**kwargs) -> torch.Tensor:
        return student.generate(
            input_ids=ids_PS[index_B],
            attention_mask=mask_PS[index_B],
            do_sample=True,
            top_k=0,
            min_new_tokens=shape.completion_tokens,
            max_new_tokens=shape.completion_tokens,
            suppress_tokens=[PAD, EOS, UNK],
            **kwargs,
        )

    return {"ours": ours, "generate": generate, "generate_static": lambda: generate(cache_implementation="static")}


@torch.no_grad()
def measure(shape: Shape, repetitions: int) -> dict[str, object]:
    torch.manual_seed(0)
    calls = ways(random_t5(STUDENT, shape.vocabulary, seed=1), word_tokenizer(shape.vocabulary), shape)
    rate, seconds = MatmulRate(), {name: [] for name in calls}
    for _ in range(repetitions + 1):
        rate.measure()
        for name, call in calls.items():
            start = time.process_time()
            ids_BT = call()[:, -shape.completion_tokens :]
            seconds[name].append(time.process_time() - start)
            assert ids_BT.shape == (shape.completions, shape.completion_tokens)
            assert not torch.isin(ids_BT, torch.tensor([PAD, EOS, UNK])).any(), f"{name} ended early"
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    return {
        "cpu_seconds": medians,
        "times_faster": {name: value / medians["ours"] for name, value in medians.items()},
        "floor_ratio": medians["ours"] * rate.per_second / forward_flops(STUDENT, shape, cached=True),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Shape.add_flags(parser)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(Shape.of(args), args.repetitions)))


if __name__ == "__main__":
    main()
