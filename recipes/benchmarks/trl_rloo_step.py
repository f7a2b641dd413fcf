"""One RLOO step in TRL 1.16, whose RLOOTrainer takes decoder-only models; `decoder_step.py --versus` runs it.

It needs nothing of this package. The reward is what a user of TRL would write: the teacher's logits of prompts and
completions at once, each prompt read once for each of its completions, and Σ_t z[y_t] − max_v z_{t+1}[v] as one number
per sequence. TRL's other settings are its defaults, without bfloat16 and gradient checkpointing, which ours do not use
either. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import warnings

import torch
from datasets import Dataset
from step_phases import PhaseMeter, StepEnd
from transformers import Qwen2ForCausalLM
from trl import RLOOConfig, RLOOTrainer
from workload import (
    DECODER_STUDENT,
    DECODER_TEACHER,
    EOS,
    PAD,
    UNK,
    Shape,
    decoder_phase_flops,
    prompt_texts,
    random_decoder,
    resident_mib,
    word_tokenizer,
)


class MeteredTrainer(RLOOTrainer):
    meter: PhaseMeter

    def _generate(self, *args, **kwargs):
        with self.meter.phase("generate"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        with self.meter.phase("score"):
            return super()._calculate_rewards(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    Shape.add_flags(parser)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--update_batch_size", type=int, required=True)
    parser.add_argument("--beta", type=float, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    shape = Shape.of(args)
    tokenizer = word_tokenizer(shape.vocabulary)
    tokenizer.padding_side = "left"
    teacher = random_decoder(DECODER_TEACHER, shape.vocabulary, seed=2).eval().requires_grad_(False)

    @torch.no_grad()
    def teacher_reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_
    ) -> list[float]:
        S = shape.prompt_tokens
        prompts_BS = tokenizer(prompts, return_tensors="pt", padding=True)["input_ids"]
        chosen_BT = torch.tensor(completion_ids)
        assert chosen_BT.shape == (shape.completions, shape.completion_tokens) and prompts_BS.shape[1] == S
        logits_BTV = teacher(input_ids=torch.cat([prompts_BS, chosen_BT], dim=1)).logits[:, S - 1 : -1]
        rewards_BT = logits_BTV.gather(-1, chosen_BT[..., None])[..., 0]
        rewards_BT[:, :-1] -= logits_BTV[:, 1:].max(dim=-1).values
        return rewards_BT.sum(dim=1).tolist()

    updates = shape.completions // args.update_batch_size
    with tempfile.TemporaryDirectory() as directory:
        # The trainer reads the initial student, which it needs for the KL penalty, from the student's directory.
        random_decoder(DECODER_STUDENT, shape.vocabulary, seed=1).save_pretrained(f"{directory}/student")
        config = RLOOConfig(
            output_dir=f"{directory}/run",
            per_device_train_batch_size=args.update_batch_size,
            steps_per_generation=updates,
            num_generations=shape.samples,
            max_completion_length=shape.completion_tokens,
            beta=args.beta,
            learning_rate=1e-5,
            generation_kwargs={
                "min_new_tokens": shape.completion_tokens,
                "suppress_tokens": [PAD, EOS, UNK],
            },
            max_steps=(args.steps + 1) * updates,
            logging_steps=(args.steps + 1) * updates,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        rows = [{"prompt": text} for step in range(args.steps + 1) for text in prompt_texts(shape, step)]
        meter = PhaseMeter()
        trainer = MeteredTrainer(
            Qwen2ForCausalLM.from_pretrained(f"{directory}/student", dtype=torch.float32),
            teacher_reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[StepEnd(meter, updates)],
        )
        trainer.meter = meter
        loaded_mib = resident_mib()
        trainer.train()
    needed = decoder_phase_flops(shape, reference=args.beta > 0)
    print(json.dumps(meter.results(needed, loaded_mib)))


if __name__ == "__main__":
    main()
