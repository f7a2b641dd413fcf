r"""Scoring, rollouts and PPO steps on a GPU, with random weights of the true shapes of T0-3B, T0-11B and T5-base.

    python recipes/benchmarks/gpu.py                                   # one GPU; 11B in bfloat16 takes 22 GB
    python recipes/benchmarks/gpu.py --teachers t0_3b --precisions int8
    python recipes/benchmarks/gpu.py --dry_run                         # the same calls on a CPU, on tiny shapes

For each teacher and precision (int8 by bitsandbytes) it measures the completion tokens scored per second, the seconds
of a step of `PPOKDTrainer`, and the peak memory of both. Scoring is also given as a share of the GPU's rate in large
bfloat16 matrix multiplications, measured in the same run: the FLOPs that are needed if each prompt is read once
(`workload.py`), per second, over that rate. For the student it measures completion tokens per second of
`Policy.sample` and of `generate()` on the repeated prompts, plain and with its static cache (`sampling.py`).
Completions never end early. The goals on one H200: scoring at half the matrix rate or more at 256-token prompts, and
rollouts 4 times as fast as plain `generate()`.

It writes `results/gpu.json` and `results/gpu.md` beside this file, or to `--results_dir`. A dry run measures nothing:
its files say "not measured", and it does not overwrite files of measurements.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from result_files import RESULTS, write_results
from sampling import ways
from transformers import BitsAndBytesConfig, PreTrainedModel, T5ForConditionalGeneration, TrainerCallback
from workload import EOS, UNK, Dimensions, Shape, forward_flops, prompt_texts, t5_config, word_tokenizer

from rlkd_trl import PPOKDConfig, PPOKDTrainer, TeacherForcingReward
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.teachers import Teacher

TEACHERS = {
    "t0_3b": Dimensions(d_model=2048, d_ff=5120, heads=32, layers=24),
    "t0_11b": Dimensions(d_model=4096, d_ff=10240, heads=64, layers=24),
}
STUDENT = Dimensions(d_model=768, d_ff=3072, heads=12, layers=12)
TINY = Dimensions(d_model=64, d_ff=64, heads=2, layers=1, d_kv=32)
PRECISIONS = ("bfloat16", "int8")
SHAPE = Shape(prompt_tokens=256, completion_tokens=64, prompts=128, samples=8, vocabulary=32128)
TINY_SHAPE = Shape(prompt_tokens=6, completion_tokens=3, prompts=4, samples=2, vocabulary=64)


def random_model(dimensions: Dimensions, vocabulary: int, device: str, *, t0: bool, precision: str) -> PreTrainedModel:
    """A model of T0's or T5-base's architecture, initialised on the device."""
    config = t5_config(dimensions, vocabulary, v1_1=t0)
    torch.manual_seed(0)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if precision == "float32" else torch.bfloat16)
    try:
        with torch.device(device):
            model = T5ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default_dtype)
    if precision != "int8":
        return model
    return T5ForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=model.state_dict(),
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.bfloat16,
        device_map={"": device},
    )


class Stopwatch:
    """Measures seconds and peak GPU memory of calls; on a CPU no memory."""

    def __init__(self, device: str, repetitions: int):
        self._on_gpu, self._repetitions = device != "cpu", repetitions

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        """The median seconds of a call, and its peak GiB; the first call does not count."""
        seconds = []
        for _ in range(self._repetitions + 1):
            self.reset()
            start = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:]), self.peak_gib()

    def wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def reset(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self._on_gpu else 0.0


def matmul_rate(device: str, size: int, stopwatch: Stopwatch) -> float:
    """Floating-point operations per second in bfloat16 products of `[size, size]` matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = stopwatch.time(lambda: [left @ right for _ in range(10)])
    return 10 * 2 * size**3 / seconds


def scoring(teacher: Teacher, dimensions: Dimensions, shape: Shape, rate: float, stopwatch: Stopwatch) -> dict:
    device = teacher.backbone.device
    ids_BT = torch.randint(3, shape.vocabulary, (shape.completions, shape.completion_tokens), device=device)
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    index_B = torch.arange(shape.prompts, device=device).repeat_interleave(shape.samples)
    prompts, ended_B = prompt_texts(shape, 0), torch.zeros(shape.completions, dtype=torch.bool, device=device)
    seconds, peak_gib = stopwatch.time(lambda: teacher.score(prompts, index_B, ids_BT, mask_BT, ended_B))
    return {
        "tokens_per_second": ids_BT.numel() / seconds,
        "share_of_matmul_rate": forward_flops(dimensions, shape) / seconds / rate,
        "peak_gib": peak_gib,
    }


def rollouts(student: PreTrainedModel, tokenizer, shape: Shape, stopwatch: Stopwatch) -> dict:
    """Tokens per second of `Policy.sample` in one batch, and of `generate()` with its growing and its static cache."""
    tokens, results = shape.completions * shape.completion_tokens, {}
    with torch.no_grad():
        for name, call in ways(student, tokenizer, shape).items():
            seconds, peak_gib = stopwatch.time(call)
            results[name] = {"tokens_per_second": tokens / seconds, "peak_gib": peak_gib}
    return results


class _StepClock(TrainerCallback):
    def __init__(self, stopwatch: Stopwatch):
        self.seconds: list[float] = []
        self._stopwatch = stopwatch

    def on_train_begin(self, *args, **kwargs):
        self._stopwatch.reset()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._stopwatch.wait()
        now = time.perf_counter()
        self.seconds.append(now - self._start)
        self._start = now


def ppo_steps(
    student: PreTrainedModel, teacher: Teacher, tokenizer, shape: Shape, steps: int, stopwatch: Stopwatch
) -> dict:
    """Seconds of a PPO step with one update, accumulated over micro-batches; the first step does not count."""
    micro_batches = min(8, shape.prompts)
    on_cpu = student.device.type == "cpu"
    with tempfile.TemporaryDirectory() as output_dir:
        args = PPOKDConfig(
            output_dir=output_dir,
            num_generations=shape.samples,
            max_completion_length=shape.completion_tokens,
            per_device_train_batch_size=shape.completions // micro_batches,
            gradient_accumulation_steps=micro_batches,
            sampling_batch_size=shape.completions,
            max_steps=steps + 1,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            save_strategy="no",
            disable_tqdm=True,
        )
        texts = [text for step in range(steps + 1) for text in prompt_texts(shape, step)]
        rows = Dataset.from_list([{"prompt": text} for text in texts])
        trainer = PPOKDTrainer(student, TeacherForcingReward(teacher), args, rows, processing_class=tokenizer)
        trainer.policy.forbidden_V[[EOS, UNK]] = True
        clock = _StepClock(stopwatch)
        trainer.add_callback(clock)
        trainer.train()
    return {"seconds_per_step": statistics.median(clock.seconds[1:]), "peak_gib": stopwatch.peak_gib()}


def measure(teachers: list[str], precisions: list[str], shape: Shape, steps: int, *, dry: bool) -> dict:
    device = "cpu" if dry else "cuda"
    stopwatch = Stopwatch(device, steps)
    tokenizer = word_tokenizer(shape.vocabulary)
    student_size = TINY if dry else STUDENT

    def student() -> PreTrainedModel:
        return random_model(student_size, shape.vocabulary, device, t0=False, precision="float32")

    rate = matmul_rate(device, 64 if dry else 8192, stopwatch)
    results: dict = {"matmul_tflop_per_second": rate / 1e12, "student": {}, "teachers": {}}
    results["student"] = rollouts(student().to(torch.bfloat16), tokenizer, shape, stopwatch)
    for name in teachers:
        dimensions = TINY if dry else TEACHERS[name]
        for precision in precisions:
            model = random_model(dimensions, shape.vocabulary, device, t0=True, precision=precision)
            teacher = Teacher(model, tokenizer)
            results["teachers"][f"{name} {precision}"] = {
                "weights_gib": model.get_memory_footprint() / 2**30,
                "scoring": scoring(teacher, dimensions, shape, rate, stopwatch),
                "ppo": ppo_steps(student(), teacher, tokenizer, shape, steps, stopwatch),
            }
            del model, teacher
            if not dry:
                torch.cuda.empty_cache()
    return results


def as_markdown(results: dict, shape: Shape) -> str:
    """The results of `measure`, with `device` and `date`, as text and a table."""
    ours, plain, static = results["student"].values()
    lines = [
        f"{results['device']}; torch {torch.__version__}, transformers {version('transformers')}; {results['date']}. "
        f"{shape.prompts} prompts of {shape.prompt_tokens} tokens × {shape.samples} completions of "
        f"{shape.completion_tokens}. Large bfloat16 products: {results['matmul_tflop_per_second']:.0f} TFLOP/s.",
        "",
        f"Rollouts, T5-base in bfloat16: {ours['tokens_per_second']:.0f} tokens/s; plain `generate()` "
        f"{plain['tokens_per_second']:.0f}, with its static cache {static['tokens_per_second']:.0f}. Peak "
        f"{ours['peak_gib']:.1f}, {plain['peak_gib']:.1f} and {static['peak_gib']:.1f} GiB.",
        "",
    ]
    heads = ["teacher", "weights, GiB", "scored tokens/s", "share of matrix rate", "peak GiB"]
    heads += ["s per PPO step", "peak GiB"]
    rows = []
    for name, row in results["teachers"].items():
        score, ppo = row["scoring"], row["ppo"]
        scored = [f"{score['tokens_per_second']:.0f}", f"{score['share_of_matmul_rate']:.2f}"]
        scored.append(f"{score['peak_gib']:.1f}")
        trained = [f"{ppo['seconds_per_step']:.2f}", f"{ppo['peak_gib']:.1f}"]
        rows.append([name, f"{row['weights_gib']:.1f}", *scored, *trained])
    return "\n".join([*lines, markdown_table(heads, rows)]) + "\n"


def has_measurements(directory: Path) -> bool:
    """Whether the directory holds results of a real run, not of a dry one."""
    file = directory / "gpu.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["measured"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry_run makes the same calls on a CPU, on tiny shapes.")
    shape = TINY_SHAPE if args.dry_run else SHAPE
    results = measure(args.teachers, args.precisions, shape, args.steps, dry=args.dry_run)
    if args.dry_run:
        results, text = {"measured": False}, "Not measured. `python recipes/benchmarks/gpu.py` does it.\n"
    else:
        results |= {"measured": True, "device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d")}
        text = as_markdown(results, shape)
    if not args.dry_run or not has_measurements(args.results_dir):
        write_results(args.results_dir, "gpu", results, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
