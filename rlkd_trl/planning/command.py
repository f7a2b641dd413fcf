r"""Estimates bytes on each GPU, and time, of teacher, student and training, before anything is downloaded or started.

    rlkd-trl plan --teacher bigscience/T0 --student google-t5/t5-base --gpus 4 --gpu_memory 80

--teacher and --student are Hub ids, of which only config.json is read, or local directories with a config.json;
weights are not needed. Lengths and batch sizes are those of the run; at a shorter length everything takes less.
`rlkd_trl/planning/__init__.py` says what is assumed.
"""

import argparse
import math
from typing import TYPE_CHECKING, Annotated

from rlkd_trl.errors import InputError
from rlkd_trl.planning.machines import GIGA, LINK_SHARE, MACHINES
from rlkd_trl.settings.ranges import Coefficient, Count, Length, Range, ShareBelowOne, check_values
from rlkd_trl.settings.trusted_code import trust_code_of

if TYPE_CHECKING:
    from rlkd_trl.planning.adapters import Adapters

_DTYPES = ("float32", "bfloat16")
_GPU_MEMORY = 80.0
_CRITICS = ("shared", "separate", "none")
_MOST_TOKENS = 2**20  # of a micro-batch: of integer tensors with more elements `skeletons` knows no values
_GIB = Annotated[float, Range(0, 1e6, above=True)]

# Flags that recipes have too have the same ranges there.
_RANGES = {
    "gpus": Count,
    "nodes": Count,
    "gpu_memory": _GIB | None,
    "node_link": _GIB,
    "max_steps": Count,
    "reserve": ShareBelowOne,
    "max_prompt_length": Length,
    "teacher_max_prompt_length": Length | None,
    "max_completion_length": Length,
    "per_device_train_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_iterations": Count,
    "num_generations": Count,
    "teacher_batch_tokens": Count,
    "sampling_batch_size": Count,
    "local_rollout_forward_batch_size": Count,
    "beta": Coefficient,
    "assistants": Annotated[int, Range(0, 20)],
    "lora_r": Count,
}
_OF_LORA = ("lora_r", "lora_target_modules", "lora_modules_to_save", "use_dora")
_OF_GPU = ("node_link", "max_steps", "num_iterations")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def _boolean(word: str) -> bool:
    """As recipes read it, so that their flags can be copied."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return word.lower() == "true"


def parser() -> argparse.ArgumentParser:
    """The command's flags. Those that recipes have too have the same names and defaults there."""
    flags = _Parser(
        prog="rlkd-trl plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --teacher T --student S [flags]",
        allow_abbrev=False,
    )

    def add(name: str, help: str, kind: type = int, **more) -> None:
        default = more.get("default")
        flags.add_argument(name, type=kind, help=help if default is None else f"{help} [{default}]", **more)

    def switch(name: str, help: str) -> None:
        flags.add_argument(name, type=_boolean, nargs="?", const=True, default=False, metavar="True", help=help)

    add("--teacher", "Checkpoint directory or Hub id.", str, required=True, metavar="T")
    add("--student", "Checkpoint directory or Hub id.", str, required=True, metavar="S")
    add("--gpus", "GPUs on each node.", default=1, metavar="N")
    add("--nodes", "Nodes.", default=1, metavar="N")
    kinds = "Kind of GPU (a100: SXM, 80 GB; h100, h200: SXM), to estimate times by its ratings."
    add("--gpu_name", kinds, str.lower, choices=MACHINES)
    add("--gpu_memory", "Memory of each GPU, in GiB [80, or what --gpu_name has].", float, metavar="GIB")
    add("--reserve", "Share of it that is to stay free.", float, default=0.1, metavar="X")
    add("--node_link", "With --gpu_name: rated link between --nodes, GB/s.", float, default=25.0, metavar="GB/S")
    add("--max_steps", "With --gpu_name: optimizer steps of the run.", default=1000, metavar="N")
    add("--num_iterations", "With --gpu_name: optimizer steps from a rollout.", default=1, metavar="N")
    add("--max_prompt_length", "Longest prompt.", default=512, metavar="N")
    add("--teacher_max_prompt_length", "Longest question to the teacher [as --max_prompt_length].", metavar="N")
    add("--max_completion_length", "Longest completion.", default=64, metavar="N")
    add("--per_device_train_batch_size", "Completions in a micro-batch.", default=64, metavar="N")
    add("--gradient_accumulation_steps", "Micro-batches in a rollout.", default=1, metavar="N")
    add("--num_generations", "Completions of each prompt.", default=4, metavar="N")
    add("--teacher_batch_tokens", "Padded tokens in a scoring batch.", default=16384, metavar="N")
    add("--sampling_batch_size", "Completions decoded at a time.", default=256, metavar="N")
    add("--local_rollout_forward_batch_size", "Completions read without gradients at a time.", default=64, metavar="N")
    add("--assistants", "Also print sizes of so many teacher assistants (assistant_kd).", metavar="N", default=0)
    add("--student_dtype", "Of the student's weights.", str, default="float32", choices=_DTYPES)
    add("--critic", "PPO's; none for other methods.", str, default="shared", choices=_CRITICS)
    add("--beta", "KL coefficient; above 0 there is a reference model.", float, default=0.0, metavar="X")
    switch("--bf16", "Train in mixed precision.")
    switch("--gradient_checkpointing", "Recompute layers in the backward pass.")
    switch("--use_peft", "Train adapters, LoRA's, in place of the student's weights.")
    add("--lora_r", "Rank r.", default=16, metavar="N")
    modules = {"nargs": "+", "metavar": "NAME"}
    add("--lora_target_modules", "Layers that get adapters; all-linear; or a regular expression.", str, **modules)
    add("--lora_modules_to_save", "Layers of which copies are trained.", str, **modules)
    switch("--use_dora", "Train the lengths of weights beside them (DoRA).")
    switch("--load_in_8bit", "Quantise the student's weights to 8 bits, beneath adapters.")
    switch("--load_in_4bit", "Quantise the student's weights to 4 bits (nf4), beneath adapters.")
    flags.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    flags.add_argument("--trust_remote_code", action="store_true", help="Run code in the checkpoints. Read it first.")
    return flags


def _check(flags: argparse.Namespace) -> None:
    check_values(vars(flags), _RANGES)
    completions = flags.per_device_train_batch_size * flags.gradient_accumulation_steps
    if completions % flags.num_generations:
        raise InputError(
            f"A rollout of {completions} completions (--per_device_train_batch_size "
            f"{flags.per_device_train_batch_size} × --gradient_accumulation_steps "
            f"{flags.gradient_accumulation_steps}) is not divisible by --num_generations {flags.num_generations}."
        )
    prompt_length = max(flags.max_prompt_length, flags.teacher_max_prompt_length or 0)
    prompts = math.ceil(flags.per_device_train_batch_size / flags.num_generations)
    tokens = max(flags.per_device_train_batch_size * flags.max_completion_length, prompts * prompt_length)
    if tokens > _MOST_TOKENS:
        raise InputError(
            f"A micro-batch of --per_device_train_batch_size {flags.per_device_train_batch_size} has {tokens:,} "
            f"tokens of prompts or completions; up to {_MOST_TOKENS:,} can be planned. Give a smaller one, and more "
            "--gradient_accumulation_steps."
        )
    if flags.load_in_8bit and flags.load_in_4bit:
        raise InputError("--load_in_8bit and --load_in_4bit are two precisions: give one of them.")
    if (flags.load_in_8bit or flags.load_in_4bit) and not flags.use_peft:
        raise InputError("--load_in_8bit, --load_in_4bit: only adapters on quantised weights are trained: --use_peft.")
    defaults = parser()
    for needed, names in {"use_peft": _OF_LORA, "gpu_name": _OF_GPU}.items():
        for name in names if not getattr(flags, needed) else ():
            if getattr(flags, name) != defaults.get_default(name):
                raise InputError(f"--{name} has no effect without --{needed}: give that, or leave it out.")
    if flags.nodes == 1 and flags.node_link != defaults.get_default("node_link"):
        raise InputError("--node_link has no effect on one node: give --nodes, or leave it out.")


def _adapters(flags: argparse.Namespace) -> "Adapters | None":
    from rlkd_trl.planning.adapters import Adapters

    return Adapters(**{name: getattr(flags, name) for name in _OF_LORA}) if flags.use_peft else None


def main(argv: list[str] | None = None) -> None:
    """Prints the tables and the advice. Raises `InputError`."""
    flags = parser().parse_args(argv)
    _check(flags)
    trust_code_of([flags.teacher, flags.student] if flags.trust_remote_code else [])
    # Imported only now: torch and transformers take seconds, for which `--help` and a wrong flag should not wait.
    import transformers

    from rlkd_trl.planning.activations import Workload
    from rlkd_trl.planning.durations import Timing
    from rlkd_trl.planning.estimates import Cluster, Training
    from rlkd_trl.planning.report import report

    transformers.utils.logging.set_verbosity_error()
    memory = flags.gpu_memory or (MACHINES[flags.gpu_name].memory_gib if flags.gpu_name else _GPU_MEMORY)
    cluster = Cluster(
        flags.gpus, flags.nodes, int(memory * 2**30), flags.reserve, node_link=flags.node_link * GIGA * LINK_SHARE
    )
    training = Training(
        student_dtype=flags.student_dtype,
        bf16=flags.bf16,
        critic=flags.critic,
        beta=flags.beta,
        quantization="int8" if flags.load_in_8bit else "nf4" if flags.load_in_4bit else "none",
        adapters=_adapters(flags),
        gradient_checkpointing=flags.gradient_checkpointing,
    )
    workload = Workload(
        prompt_tokens=flags.max_prompt_length,
        question_tokens=flags.teacher_max_prompt_length,
        completion_tokens=flags.max_completion_length,
        num_generations=flags.num_generations,
        micro_batch=flags.per_device_train_batch_size,
        micro_batches=flags.gradient_accumulation_steps,
        teacher_batch_tokens=flags.teacher_batch_tokens,
        sampling_batch=flags.sampling_batch_size,
        forward_batch=flags.local_rollout_forward_batch_size,
        num_iterations=flags.num_iterations,
    )
    timing = flags.gpu_name and Timing(flags.gpu_name, MACHINES[flags.gpu_name], workload, cluster, flags.max_steps)
    models = (flags.teacher, flags.student)
    print(report(*models, workload, cluster, training, assistants=flags.assistants, timing=timing))
