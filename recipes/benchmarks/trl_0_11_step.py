"""One PPO step in TRL 0.11.4, the last release whose PPOTrainer takes T5; `step.py --versus` runs it.

It needs an environment of its own (see `step.py`) and nothing of this package. The student is wrapped in TRL's own
`AutoModelForSeq2SeqLMWithValueHead`. The reward is what a user of that release would write: the teacher's logits of
all completions at once, its encoder run for each of them, and Σ_t z[y_t] − max_v z_{t+1}[v] as one number per
sequence, since this release takes no more. Its other settings are TRL's defaults, except that `generate` decodes all
completions in one batch, not 4 at a time. The last line is one JSON object.
"""

import argparse
import json
import time
import warnings
from importlib.metadata import version
from itertools import pairwise
from statistics import median

import torch
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from workload import (
    EOS,
    PAD,
    STUDENT,
    TEACHER,
    UNK,
    MatmulRate,
    Shape,
    peak_resident_mib,
    prompt_ids,
    random_t5,
    reset_peak,
    resident_mib,
    word_tokenizer,
)


@torch.no_grad()
def sequence_rewards(teacher, queries: list[torch.Tensor], responses: list[torch.Tensor]) -> list[torch.Tensor]:
    """One scalar per completion; a response begins with the decoder's start token."""
    prompts_BS, decoded_BT = torch.stack(queries), torch.stack(responses)
    logits_BTV = teacher(
        input_ids=prompts_BS, attention_mask=torch.ones_like(prompts_BS), decoder_input_ids=decoded_BT[:, :-1]
    ).logits
    chosen_BT = logits_BTV.gather(-1, decoded_BT[:, 1:, None])[..., 0]
    next_values_BT = torch.nn.functional.pad(logits_BTV[:, 1:].max(dim=-1).values, (0, 1))
    return list((chosen_BT - next_values_BT).sum(dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    Shape.add_flags(parser)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--update_batch_size", type=int, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    shape = Shape.of(args)
    student = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(random_t5(STUDENT, shape.vocabulary, seed=1))
    teacher = random_t5(TEACHER, shape.vocabulary, seed=2).eval().requires_grad_(False)
    config = PPOConfig(
        batch_size=shape.completions,
        mini_batch_size=args.update_batch_size,
        ppo_epochs=1,
        seed=0,
        accelerator_kwargs={"cpu": True},
    )
    trainer = PPOTrainer(config, student, ref_model=None, tokenizer=word_tokenizer(shape.vocabulary))
    generation = {
        "min_new_tokens": shape.completion_tokens,
        "max_new_tokens": shape.completion_tokens,
        "do_sample": True,
        "top_k": 0,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "suppress_tokens": [PAD, EOS, UNK],
    }
    loaded_mib, rate, steps = resident_mib(), MatmulRate(), []
    reset_peak()
    for step in range(args.steps + 1):
        rate.measure()
        queries = list(prompt_ids(shape, step).repeat_interleave(shape.samples, dim=0))
        times = [time.process_time()]
        responses = trainer.generate(queries, batch_size=shape.completions, return_prompt=False, **generation)
        times.append(time.process_time())
        rewards = sequence_rewards(teacher, queries, responses)
        times.append(time.process_time())
        trainer.step(queries, responses, rewards)
        times.append(time.process_time())
        assert all(len(response) == shape.completion_tokens + 1 for response in responses)
        steps.append([end - start for start, end in pairwise(times)])
    counted = steps[1:]
    totals = [sum(phases) for phases in counted]
    result = {
        "library": f"trl {version('trl')}",
        "total_cpu_seconds": median(totals),
        "cpu_seconds_of_steps": totals,
        "peak_mib": peak_resident_mib(),
        "extra_mib": peak_resident_mib() - loaded_mib,
        "phases": {
            name: {"cpu_seconds": median(phases[i] for phases in counted)}
            for i, name in enumerate(("generate", "score", "update"))
        },
        "matmul_gflop_per_cpu_second": rate.per_second / 1e9,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
