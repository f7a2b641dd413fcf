r"""Runs with models of real size and random weights: time, and memory against the planner's number.

    python recipes/benchmarks/true_size.py --work_dir runs/true_size --cases t0_3b-bfloat16 t0_3b-int8

Checkpoints of the shapes of T0-3B (5.7 GB), T0-11B (22 GB) and t5-base are written to the work directory with random
weights, in shards, of which one is in memory at a time. A teacher is deleted when no case is left that needs it, and
everything else at the end, also of a case that fails.
`ppo_kd.py` then runs with the shipped preset for the teacher, but for the data (random words), the lengths and the
batch, which are a rehearsal's, and the number of steps: two, which are one rollout with the presets' two passes over
it. Memory is what belongs to no file at its greatest, and the weights that stay in the mapped checkpoint, which are
those that are not quantised; beside it stands the resident set at its greatest, with all pages of the checkpoint that
have been read and not yet taken back. The planner's number is for a GPU, so what Python and the libraries take of
their own, measured in a process that only imports them, is added. Cases that `--results_dir` has already, from other
calls, stay in the table.

A case named for `offload` runs in two processes on the CPU, which share the teacher in bfloat16 and keep their shards
in files: its memory is that of the process that has most. `rlkd-trl plan` plans shards in CPU memory, of which up to
10^9 weights stay gathered. What stands as planned here is its number changed for files: the buffers are added, which
are locked and so resident, and of the teacher's weights what is gathered out of files, a layer at a time. Plan's own
stands beside it in the JSON (`plan_prints_gib`). Both processes give all memory of a MiB or more back as soon as it is
free: of T0-3B's gathered weights glibc's heap would keep fragments of gigabytes.
Linux only.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from result_files import RESULTS, made_by, write_results
from safetensors.torch import save_file
from stages import RECIPES
from transformers import T5Config, T5ForConditionalGeneration
from workload import EOS, PAD, word_tokenizer

from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.estimates import Cluster, Training, peak_bytes, student_estimates, teacher_estimates
from rlkd_trl.planning.skeletons import Checkpoint
from rlkd_trl.planning.weights import weight_bytes

ROWS, WORDS = 32_128, 32_100  # T5's embeddings have more rows than its tokenizer has tokens
SHARD_BYTES = 2 * 10**9
PROMPT, BATCH, GENERATIONS, BATCH_TOKENS = 64, 16, 4, 16384
PREFETCHED = 5 * 10**7  # parameters: DeepSpeed's default for `stage3_prefetch_bucket_size`


@dataclass(frozen=True)
class Size:
    """A T5: of v1.1 (gated, untied), or the first one.

    preset: the shipped one with such a teacher. completion: tokens; a teacher answers held-out prompts one by one.
    """

    d_model: int
    d_ff: int
    heads: int
    layers: int
    v1_1: bool = True
    preset: str = ""
    completion: int = 32

    def config(self) -> T5Config:
        return T5Config(
            vocab_size=ROWS,
            d_model=self.d_model,
            d_kv=64,
            d_ff=self.d_ff,
            num_layers=self.layers,
            num_decoder_layers=self.layers,
            num_heads=self.heads,
            feed_forward_proj="gated-gelu" if self.v1_1 else "relu",
            tie_word_embeddings=not self.v1_1,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        )


STUDENT = Size(768, 3072, 12, 12, v1_1=False)
TEACHERS = {
    "t0_3b": Size(2048, 5120, 32, 24, preset="t0_3b_t5_base_dailydialog"),
    "t0_11b": Size(4096, 10240, 64, 24, preset="t0_11b_t5_base_xsum", completion=8),
}
PHASES = ("sample", "log_probs", "score", "update")


@dataclass(frozen=True)
class Way:
    """How a teacher in bfloat16 is kept, by how many processes, and through how many bytes of buffers for files.

    allocator: environment variables of the processes.
    """

    placement: str = "replicated"
    quantization: str = "none"
    processes: int = 1
    buffers: int = 0
    allocator: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_in_files(self) -> bool:
        return self.buffers > 0

    def launcher(self) -> list[str]:
        if self.processes == 1:
            return [sys.executable]
        config = RECIPES.parent / "accelerate_configs" / "cpu_2_processes.yaml"
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]


WAYS = {
    "bfloat16": Way(),
    "int8": Way(quantization="int8"),
    "nf4": Way(quantization="nf4"),
    "offload": Way(
        "offload",
        processes=2,
        buffers=5 * 10**8 * torch.bfloat16.itemsize,  # DeepSpeed's, see Placement
        allocator={"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)},
    ),
}
CASES = [f"{teacher}-{way}" for teacher in TEACHERS for way in WAYS]


def write_checkpoint(size: Size, directory: Path, dtype: torch.dtype) -> None:
    """Random weights, a matrix's with the variance 1 / columns; norms are 1. Nothing if it is there already."""
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in T5ForConditionalGeneration(size.config()).state_dict().items()
        }
    left_out = {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        *([] if size.v1_1 else ["lm_head.weight"]),
    }
    generator = torch.Generator().manual_seed(0)
    shard, where, count = {}, {}, 0

    def write() -> None:
        nonlocal count
        count += 1
        name = f"model-{count:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        if name in left_out:
            continue
        matrix = torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.empty(shape, dtype=dtype)
        if len(shape) > 1:
            matrix.normal_(std=shape[-1] ** -0.5, generator=generator)
        shard[name] = matrix
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            write()
    if shard:
        write()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    word_tokenizer(WORDS).save_pretrained(directory)
    config = size.config()
    config.architectures, config.dtype = ["T5ForConditionalGeneration"], dtype
    config.save_pretrained(directory)


def write_data(path: Path, rows: int) -> None:
    """Documents longer than a prompt may be, so that every prompt has its greatest length."""
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(3, WORDS)}" for _ in range(2 * PROMPT)) for _ in range(rows)]
    path.write_text("".join(json.dumps({"source": text, "target": text[:50]}) + "\n" for text in texts))


@dataclass(frozen=True)
class Run:
    """Seconds of all processes, and bytes when one of them had most.

    mapped: of these the pages of files. own: at its own greatest, memory that is of no file.
    """

    wall_seconds: float
    cpu_seconds: float
    peak: int
    mapped: int
    own: int


def run(command: list[str], variables: Mapping[str, str] | None = None) -> Run:
    """Runs it, and reads its memory fifty times a second. Raises `SystemExit` if it fails.

    variables: of the environment, besides this process's.
    """
    environment = {**os.environ, **(variables or {})}
    started, peak, mapped, own = time.perf_counter(), 0, 0, 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, env=environment)
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            for resident in map(memory_of, family(process.pid)):
                own = max(own, resident.get("RssAnon", 0) + resident.get("RssShmem", 0))
                if resident.get("VmRSS", 0) > peak:
                    peak, mapped = resident["VmRSS"], resident["RssFile"]
            time.sleep(0.02)
        _, status, usage = ended
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{said.read()[-4000:]}")
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak, mapped, own)


def family(pid: int) -> list[int]:
    """The process, its children, theirs, and so on."""
    try:
        children = [
            int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):  # one ended meanwhile
        children = []
    return [pid, *(member for child in children for member in family(child))]


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by name in the process's status; none of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def planned_bytes(teacher: Path, student: Path, completion: int, way: Way) -> tuple[int, int]:
    """The peak on a GPU with this rehearsal's sizes: what `rlkd-trl plan` prints, and the same changed for files.

    Mixed precision and KL are as the presets have them.
    """
    workload = Workload(PROMPT, completion, GENERATIONS, BATCH, 1, BATCH_TOKENS)
    cluster = Cluster(gpus=way.processes, nodes=1, gpu_memory=2**40, reserve=0.0)
    of_teacher, of_student = Checkpoint.of("--teacher", str(teacher)), Checkpoint.of("--student", str(student))
    wanted = (way.placement, "bfloat16", way.quantization)
    estimates = teacher_estimates(of_teacher, workload, cluster)
    chosen = next(t for t in estimates if (t.placement, t.dtype, t.quantization) == wanted)
    student_bytes = student_estimates(of_student, workload, cluster, Training(bf16=True, beta=0.01))[0]
    printed = peak_bytes(chosen, student_bytes)
    if not way.is_in_files:
        return printed, printed
    out_of_files = replace(chosen, gathered=gathered_from_files(of_teacher))
    return printed, peak_bytes(out_of_files, student_bytes) + way.buffers


def gathered_from_files(teacher: Checkpoint) -> int:
    """A bound on what is whole at a time: the largest layer's own weights, and those fetched meanwhile.

    DeepSpeed fetches weights as long as they are fewer than `PREFETCHED`, the last one whole.
    """
    skeleton = teacher.build(torch.bfloat16)
    layers = (module.parameters(recurse=False) for module in skeleton.model.modules())
    largest_layer = max(sum(weight.numel() for weight in layer) for layer in layers)
    largest_weight = max(weight.numel() for weight in skeleton.model.parameters())
    return min(weight_bytes(skeleton), (largest_layer + PREFETCHED + largest_weight) * torch.bfloat16.itemsize)


def bytes_left_in_file(teacher: Path, way: Way) -> int:
    """Of the teacher's weights those that stay in the mapped file: what is not quantised; of shards nothing does."""
    if way.placement != "replicated":
        return 0
    skeleton = Checkpoint.of("--teacher", str(teacher)).build(torch.bfloat16)
    whole = weight_bytes(skeleton)
    if way.quantization == "none":
        return whole
    saved = whole - weight_bytes(skeleton, "int8")  # a byte of each weight that is quantised, less a few scales
    return whole - 2 * saved


def rehearse(case: str, work_dir: Path, steps: int) -> dict:
    """One case: what it took, and what the planner said."""
    name, way = case.split("-")[0], WAYS[case.split("-")[1]]
    size = TEACHERS[name]
    teacher, student = work_dir / name, work_dir / "t5_base"
    data, held_out, templates = (work_dir / name for name in ("data.jsonl", "held_out.jsonl", "templates.yaml"))
    started = time.perf_counter()
    write_checkpoint(size, teacher, torch.bfloat16)
    write_checkpoint(STUDENT, student, torch.float32)
    write_data(data, 64), write_data(held_out, 2)
    templates.write_text('again: "{{source}} again :"\n')
    print(f"{case}: checkpoints written in {time.perf_counter() - started:.0f} s", flush=True)
    output_dir = work_dir / f"out_{case}"
    command = [*way.launcher(), str(RECIPES / "ppo_kd.py"), "--config", size.preset]
    command += ["--teacher", str(teacher), "--student", str(student), "--dataset", str(data)]
    command += ["--dataset_split", "train", "--eval_dataset", str(held_out)]
    command += ["--source_column", "source", "--target_column", "target", "--student_template", "{{source}}"]
    command += ["--templates", str(templates), "--template_names", "again"]
    command += ["--teacher_placement", way.placement, "--teacher_quantization", way.quantization]
    if way.is_in_files:
        shards = work_dir / "shards"
        shards.mkdir(exist_ok=True)
        command += ["--teacher_offload_path", str(shards)]
    command += ["--teacher_batch_tokens", str(BATCH_TOKENS)]
    command += ["--teacher_max_prompt_length", str(PROMPT), "--max_prompt_length", str(PROMPT)]
    command += ["--per_device_train_batch_size", str(BATCH), "--gradient_accumulation_steps", "1"]
    command += ["--num_generations", str(GENERATIONS), "--max_completion_length", str(size.completion)]
    command += ["--max_steps", str(steps), "--logging_steps", "1", "--save_strategy", "no", "--use_cpu", "True"]
    command += ["--output_dir", str(output_dir), "--overwrite_output_dir", "True", "--disable_tqdm", "True"]
    rehearsal = run(command, way.allocator)
    imported = "rlkd_trl.trainers.ppo, rlkd_trl.commands.distillation" + (", deepspeed" if way.is_in_files else "")
    libraries = run([sys.executable, "-c", f"import {imported}"])
    printed, planned = planned_bytes(teacher, student, size.completion, way)
    return {
        "case": case,
        "wall_seconds": rehearsal.wall_seconds,
        "cpu_seconds": rehearsal.cpu_seconds,
        "peak_gib": rehearsal.peak / 2**30,
        "mapped_gib": rehearsal.mapped / 2**30,
        "own_gib": rehearsal.own / 2**30,
        "in_file_gib": bytes_left_in_file(teacher, way) / 2**30,
        "libraries_gib": libraries.own / 2**30,
        "plan_prints_gib": printed / 2**30,
        "planned_gib": planned / 2**30,
        **logged(output_dir),
        "made_by": made_by(),
    }


def logged(output_dir: Path) -> dict[str, float]:
    """Of the run: seconds of training, and of the last rollout's phases, its updates together."""
    cost = json.loads((output_dir / "cost.json").read_text(encoding="utf-8"))
    history = json.loads((output_dir / "run_log.json").read_text(encoding="utf-8"))["history"]
    last = [entry for entry in history if "loss" in entry][-1]
    phases = {name: value for name, value in last.items() if name.startswith("seconds/")}
    return {"training_cpu_seconds": cost["cpu_seconds"], "training_wall_seconds": cost["wall_seconds"], **phases}


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        expected = row["planned_gib"] + row["libraries_gib"]
        lines.append(
            [
                row["case"],
                f"{row['cpu_seconds'] - row['training_cpu_seconds']:.0f}",
                f"{row['training_cpu_seconds']:.0f}",
                *(f"{row[f'seconds/{phase}']:.1f}" for phase in PHASES),
                f"{row['peak_gib']:.1f}",
                f"{row['own_gib']:.1f} + {row['in_file_gib']:.1f}",
                f"{row['planned_gib']:.1f} + {row['libraries_gib']:.1f}",
                f"{(row['own_gib'] + row['in_file_gib']) / expected:.2f}",
            ]
        )
    heads = ["case", "around training, CPU s", "training, CPU s", *(f"{phase}, s" for phase in PHASES)]
    heads += ["resident, GiB", "own + weights in the file", "planned + libraries", "the former over these"]
    return markdown_table(heads, lines)


def add_result(results_dir: Path, row: dict) -> None:
    """Writes the table with this row, and those of other cases that are there already."""
    file = results_dir / "true_size.json"
    rows = {one["case"]: one for one in json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}
    rows[row["case"]] = row
    ordered = [rows[case] for case in CASES if case in rows]
    commands = "\n".join(f"- {one['case']}: {one['made_by']}" for one in ordered)
    text = f"""# Rehearsals with models of real size

PPO with the shipped presets' settings, but for lengths and batch: one rollout of {BATCH} completions of 32 tokens
(T0-11B's 8), {GENERATIONS} for each prompt of {PROMPT}, and two optimizer steps from it; random weights, t5-base's
shape as the student. Seconds of the phases are by the wall's clock, the update's of both steps; "around training" is
everything else: imports, loading (and quantising), evaluations, saving. "planned" is what `rlkd-trl plan` prints; for
`offload`, which it plans for CPU memory, that number changed for files.

{table(ordered)}

{commands}
"""
    write_results(results_dir, "true_size", ordered, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/true_size"))
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the presets pass over a rollout twice, and log its phases then.")
    if args.work_dir.exists():
        parser.error(f"{args.work_dir} is there, and would be deleted at the end: name a new --work_dir.")
    args.work_dir.mkdir(parents=True)
    try:
        for index, case in enumerate(args.cases):
            row = rehearse(case, args.work_dir, args.steps)
            print(json.dumps(row), flush=True)
            add_result(args.results_dir, row)
            teacher = case.split("-")[0]
            if not any(later.startswith(teacher) for later in args.cases[index + 1 :]):
                shutil.rmtree(args.work_dir / teacher)
    finally:
        shutil.rmtree(args.work_dir)


if __name__ == "__main__":
    main()
