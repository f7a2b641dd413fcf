r"""Memory and CPU time of training adapters, and of recomputing layers, against training all weights.

    OMP_NUM_THREADS=1 python recipes/benchmarks/adapters.py

RLOO steps of a random T5 of t5-small's shape on a reward function, with a KL penalty, so that there is a reference:
prompts are sampled from, completions read again by student and reference, and the update follows. Each way is trained
in a process of its own, and the ways alternate over the rounds; the first step of a process does not count. Times are
CPU seconds of the process (one thread), medians over steps; bytes are the most that were resident, and how much of
that was more than after the imports. Ratios are to full fine-tuning in the same round, so that only they compare with
other machines. Writes results/adapters.md and adapters.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from result_files import RESULTS, made_by, write_results
from workload import Dimensions, Shape, peak_resident_mib, prompt_texts, resident_mib, t5_config, word_tokenizer

from rlkd_trl.evaluation.tables import markdown_table

T5_SMALL = Dimensions(d_model=512, d_ff=2048, heads=8, layers=6)


@dataclass(frozen=True)
class Way:
    """How the student is trained. lora: settings of `peft.LoraConfig`; None: all weights."""

    lora: dict | None = None
    gradient_checkpointing: bool = False


WAYS = {
    "all weights": Way(),
    "all weights, layers recomputed": Way(gradient_checkpointing=True),
    "LoRA, r 16, queries and values": Way({"r": 16}),
    "LoRA, r 16, all linear layers": Way({"r": 16, "target_modules": "all-linear"}),
    "DoRA, r 16, all linear layers": Way({"r": 16, "target_modules": "all-linear", "use_dora": True}),
    "LoRA, r 16, all linear layers; layers recomputed": Way({"r": 16, "target_modules": "all-linear"}, True),
}


def train(way: Way, shape: Shape, steps: int) -> dict[str, object]:
    """Trains one way in this process."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import T5ForConditionalGeneration, TrainerCallback

    from rlkd_trl import RLOOKDConfig, RLOOKDTrainer

    torch.set_num_threads(1)
    imports = resident_mib()
    rollouts: list[float] = []

    class Timed(RLOOKDTrainer):
        def make_rollout(self, rows):
            start = time.process_time()
            rollout = super().make_rollout(rows)
            rollouts.append(time.process_time() - start)
            return rollout

    class Steps(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *args, **kwargs):
            self.start = time.process_time()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.process_time() - self.start)

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(t5_config(T5_SMALL, shape.vocabulary, v1_1=False))
    with tempfile.TemporaryDirectory() as output_dir:
        args = RLOOKDConfig(
            output_dir,
            max_steps=steps + 1,
            per_device_train_batch_size=shape.completions,
            num_generations=shape.samples,
            max_completion_length=shape.completion_tokens,
            beta=0.05,
            gradient_checkpointing=way.gradient_checkpointing,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Timed(
            model,
            lambda completions, **kwargs: [float(len(text)) for text in completions],
            args,
            Dataset.from_list([{"prompt": text} for text in prompt_texts(shape, 0)]),
            processing_class=word_tokenizer(shape.vocabulary),
            peft_config=None if way.lora is None else LoraConfig(task_type="SEQ_2_SEQ_LM", **way.lora),
            callbacks=[Steps()],
        )
        trainer.train()
        trainer.save_model()
        saved = sum(file.stat().st_size for file in Path(output_dir).glob("*.safetensors"))
    weights = [(weight.numel(), weight.requires_grad) for weight in trainer.model.parameters()]
    updates = [step - rollout for step, rollout in zip(Steps.seconds, rollouts, strict=True)]
    return {
        "weights": sum(count for count, _ in weights),
        "trained": sum(count for count, is_trained in weights if is_trained),
        "peak_bytes": int(peak_resident_mib() * 2**20),
        "peak_bytes_beyond_imports": int((peak_resident_mib() - imports) * 2**20),
        "saved_bytes": saved,
        "rollout_cpu_seconds": median(rollouts[1:]),
        "update_cpu_seconds": median(updates[1:]),
    }


def in_a_process(name: str, flags: argparse.Namespace) -> dict[str, object]:
    """The same in a new process, whose peak is its own."""
    words = [f"--{key}={value}" for key, value in vars(flags).items() if key not in ("way", "rounds", "output_dir")]
    finished = subprocess.run(
        [sys.executable, __file__, f"--way={name}", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


def table(rounds: list[dict[str, dict]]) -> str:
    """One line a way: means over the rounds, and ratios to all weights in the same round."""

    def mean(name: str, key: str) -> float:
        return sum(measured[name][key] for measured in rounds) / len(rounds)

    def ratio(name: str, key: str) -> str:
        ratios = [measured[name][key] / measured["all weights"][key] for measured in rounds]
        return (
            f"{min(ratios):.2f}"
            if f"{min(ratios):.2f}" == f"{max(ratios):.2f}"
            else (f"{min(ratios):.2f} to {max(ratios):.2f}")
        )

    rows = [
        [
            name,
            f"{mean(name, 'trained') / 1e6:.2f} M of {mean(name, 'weights') / 1e6:.1f} M",
            f"{mean(name, 'peak_bytes_beyond_imports') / 1e6:,.0f}",
            ratio(name, "peak_bytes_beyond_imports"),
            f"{mean(name, 'update_cpu_seconds'):.2f}",
            ratio(name, "update_cpu_seconds"),
            ratio(name, "rollout_cpu_seconds"),
            f"{mean(name, 'saved_bytes') / 1e6:,.1f}",
        ]
        for name in rounds[0]
    ]
    heads = ["trained", "weights trained", "peak, MB beyond imports", "ratio", "CPU s of an update", "ratio"]
    return markdown_table([*heads, "of a rollout: ratio", "saved, MB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Shape.add_flags(parser)
    parser.set_defaults(prompts=8, vocabulary=32128)
    parser.add_argument("--steps", type=int, default=2, help="of each process, beside the first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="train this one only, in this process, and print JSON")
    parser.add_argument("--output_dir", default=RESULTS)
    flags = parser.parse_args()
    shape = Shape.of(flags)
    if flags.way is not None:
        print(json.dumps(train(WAYS[flags.way], shape, flags.steps)))
        return
    rounds = []
    for number in range(flags.rounds):
        rounds.append({name: in_a_process(name, flags) for name in WAYS})
        print(f"round {number + 1} of {flags.rounds} is done", flush=True)
    results = {
        "made_by": made_by(),
        "shape": asdict(shape),
        "rounds": rounds,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "machine": {"cores": os.cpu_count(), "threads": 1},
    }
    text = (
        "# Adapters and recomputed layers against training all weights\n\n"
        f"{made_by()}\n\n"
        f"An RLOO step of a random T5 of t5-small's shape (float32, AdamW, beta 0.05) on {shape.completions} "
        f"completions of {shape.completion_tokens} tokens, {shape.samples} for each of {shape.prompts} prompts of "
        f"{shape.prompt_tokens} tokens, in one thread. Each way ran in a process of its own in each of {len(rounds)} "
        f"rounds. CPU seconds are those of the process, medians of {flags.steps} steps, then means over rounds; a "
        "ratio is to all weights in the same round, with its range over rounds. Peak: most resident bytes, less those "
        "after the imports. A rollout is sampling, and the reading by student and reference.\n\n"
        f"{table(rounds)}\n\n"
        "With all weights trained, the reference of the KL penalty is a second model; with adapters it is the student "
        "without them.\n"
    )
    write_results(flags.output_dir, "adapters", results, text)


if __name__ == "__main__":
    main()
