"""The command: its output for real shapes, its errors, and that its help is quick."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlkd_trl.errors import InputError, run
from rlkd_trl.planning import command as plan
from rlkd_trl.planning import report
from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.adapters import Adapters
from rlkd_trl.planning.durations import Timing
from rlkd_trl.planning.estimates import Cluster, Training
from rlkd_trl.planning.machines import MACHINES
from rlkd_trl.planning.tables import gib
from tests.planning.models import T5_BASE, write_config

ROOT = Path(__file__).parents[2]


TINY_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, str]:
    """Directories with nothing but a config.json."""
    root = tmp_path_factory.mktemp("configs")
    small = {**T5_BASE, "num_layers": 2, "num_heads": 4}
    teacher = {**small, "d_model": 128, "d_ff": 512, "tie_word_embeddings": False}
    return {
        "teacher": str(write_config(root / "teacher", teacher)),
        "student": str(write_config(root / "student", {**small, "d_model": 64, "d_ff": 128})),
        # a mixture of experts, whose grouped product of matrices has no form for fake tensors
        "experts": str(
            write_config(root / "experts", {"model_type": "mixtral", **TINY_DECODER, "num_local_experts": 2})
        ),
        "encoder": str(write_config(root / "encoder", {"model_type": "bert"})),
    }


def printed(command: str, configs: dict[str, str], capsys) -> str:
    plan.main(command.format(**configs).split())
    return capsys.readouterr().out


def rows(text: str, heading: str) -> dict[tuple[str, ...], list[str]]:
    """Of the table under a heading: cells by label, "x" marks dropped."""
    lines = text[text.index(heading) :].split("\n\n")[0].splitlines()[1:]
    labels = 1 if lines[0].startswith("sharding") else 2
    cells = [re.split(r"\s{2,}", line.replace(" x", "").strip()) for line in lines]
    return {tuple(line[:labels]): line[labels:] for line in cells}


SMALL_RUN = "--max_prompt_length 16 --max_completion_length 8 --per_device_train_batch_size 8 --num_generations 2"


@pytest.mark.slow
def test_tables_for_every_placement_precision_and_sharding(configs, capsys):
    text = printed(
        f"--teacher {{teacher}} --student {{student}} --gpus 2 --gpu_memory 1 --gpu_name l4 --beta 0.1 {SMALL_RUN}",
        configs,
        capsys,
    )
    teachers = rows(text, "Teacher, GiB")
    replicated = {("replicated", precision) for precision in ("float32", "bfloat16", "int8", "nf4")}
    split = {(placement, dtype) for placement in ("zero3", "offload") for dtype in ("float32", "bfloat16")}
    assert set(teachers) == {("placement", "precision")} | replicated | split
    students = rows(text, "Student, GiB")
    assert list(students) == [("sharding",), ("ddp",), ("zero1",), ("zero2",), ("zero3",)]
    held = ["weights", "gathered", "gradients", "optimizer", "value head", "reference"]
    heads = [*held, "update", "log probs", "sampling", "cache"]
    assert students[("sharding",)] == heads
    reference = heads.index("reference")
    assert all(students[(sharding,)][reference] != "0" for sharding in ("ddp", "zero1", "zero2", "zero3"))
    peaks = rows(text, "Peak, GiB")
    assert set(peaks) == set(teachers)
    assert peaks[("placement", "precision")] == ["ddp", "zero1", "zero2", "zero3"]
    # DeepSpeed's buckets alone are 5e8 elements of 4 bytes
    assert all(float(peak) > 1.86 for peak in peaks[("replicated", "bfloat16")][1:])
    assert float(peaks[("replicated", "bfloat16")][0]) < 1
    cells = text[text.index("Peak, GiB") :].split("\n\n")[0].splitlines()[2:]
    marks = re.findall(r" x(?= |$)", "\n".join(cells), re.MULTILINE)
    assert len(marks) == 3 * 8, "of each line, all but DDP"
    seconds = rows(text, "A step on l4")
    assert set(seconds) == set(teachers) and seconds[("placement", "precision")] == ["ddp", "zero1", "zero2", "zero3"]
    assert all(
        re.fullmatch(r"[\d.]+ s", line[0]) and line[1:] == ["–"] * 3
        for key, line in seconds.items()
        if "placement" not in key
    )
    assert "By the ratings of l4, not measured" in text
    assert "--teacher_placement replicated --teacher_dtype bfloat16" in text
    assert max(map(len, text.replace(configs["teacher"], "").splitlines())) <= 120


@pytest.mark.slow
def test_one_gpu_has_nothing_to_split_and_may_be_too_small(configs, capsys):
    command = f"--teacher {{teacher}} --student {{student}} --critic none --gpu_memory 0.01 {SMALL_RUN}"
    text = printed(command, configs, capsys)
    assert "zero3" not in text and "zero1" not in text
    students = rows(text, "Student, GiB")
    by_head = dict(zip(students[("sharding",)], students[("ddp",)], strict=True))
    assert by_head["value head"] == by_head["reference"] == by_head["gathered"] == "0"
    assert "Nothing fits" in text and "rlkd-trl" not in text


def test_every_flag_arrives(monkeypatch):
    """Memory is in GiB, of 2^30 bytes: 80 of them are 85.9 GB."""
    found = []
    monkeypatch.setattr(report, "report", lambda *args, **more: found.extend([*args, more]) or "")
    plan.main(
        shlex.split(
            "--teacher T --student S --gpus 4 --nodes 2 --gpu_memory 80 --reserve 0.2 --max_prompt_length 11 "
            "--max_completion_length 12 --per_device_train_batch_size 6 --gradient_accumulation_steps 5 "
            "--num_generations 3 --teacher_batch_tokens 13 --sampling_batch_size 14 "
            "--local_rollout_forward_batch_size 15 --student_dtype bfloat16 --critic separate --beta 0.3 --bf16 "
            "--assistants 2 --use_peft --lora_r 9 --lora_target_modules q v --lora_modules_to_save lm_head "
            "--use_dora True --load_in_4bit --gradient_checkpointing True "
            "--gpu_name h100 --max_steps 7 --num_iterations 2 --node_link 50"
        )
    )
    cluster = Cluster(gpus=4, nodes=2, gpu_memory=85_899_345_920, reserve=0.2, node_link=35e9)
    workload = Workload(
        prompt_tokens=11,
        completion_tokens=12,
        num_generations=3,
        micro_batch=6,
        micro_batches=5,
        teacher_batch_tokens=13,
        sampling_batch=14,
        forward_batch=15,
        num_iterations=2,
    )
    assert found == [
        "T",
        "S",
        workload,
        cluster,
        Training(
            student_dtype="bfloat16",
            bf16=True,
            critic="separate",
            beta=0.3,
            quantization="nf4",
            adapters=Adapters(9, ["q", "v"], ["lm_head"], use_dora=True),
            gradient_checkpointing=True,
        ),
        {"assistants": 2, "timing": Timing("h100", MACHINES["h100"], workload, cluster, steps=7)},
    ]


@pytest.mark.parametrize(
    ("flags", "gib_of_a_gpu"), [("", 80), ("--gpu_name l4", 22), ("--gpu_name l4 --gpu_memory 20", 20)]
)
def test_memory_of_a_kind_of_gpu(flags, gib_of_a_gpu, monkeypatch):
    found = []
    monkeypatch.setattr(report, "report", lambda *args, **more: found.extend(args) or "")
    plan.main(f"--teacher T --student S {flags}".split())
    assert found[3].gpu_memory == gib_of_a_gpu * 2**30


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0"), (2**30, "1.0"), (10**9, "0.93"), (80 * 2**30, "80.0"), (10**7, "<0.01"), (2**29, "0.50")],
)
def test_bytes_are_shown_in_gib(nbytes, shown):
    assert gib(nbytes) == shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--teacher {teacher}", "--student"),
        ("--teacher {teacher} --student {student} --gpus 0", "--gpus 0 is out of range"),
        ("--teacher {teacher} --student {student} --nodes -1", "--nodes -1 is out of range"),
        ("--teacher {teacher} --student {student} --gpu_memory nan", "--gpu_memory nan is out of range"),
        ("--teacher {teacher} --student {student} --reserve 1", "--reserve 1.0 is out of range"),
        ("--teacher {teacher} --student {student} --beta -1", "--beta -1.0 is out of range"),
        ("--teacher {teacher} --student {student} --gpus two", "invalid int value: 'two'"),
        ("--teacher {teacher} --student {student} --gpu 2", "unrecognized arguments: --gpu 2"),
        ("--teacher {teacher} --student {student} --gpu_name z9", "invalid choice: 'z9'"),
        ("--teacher {teacher} --student {student} --max_steps 9", "--max_steps has no effect without --gpu_name"),
        (
            "--teacher {teacher} --student {student} --gpu_name l4 --node_link 9",
            "--node_link has no effect on one node",
        ),
        ("--teacher {teacher} --student {student} --gpu_name l4 --node_link 0", "--node_link 0.0 is out of range"),
        ("--teacher {teacher} --student {student} --num_generations 5", "not divisible by --num_generations 5"),
        (
            "--teacher {teacher} --student {student} --per_device_train_batch_size 32768",
            "has 4,194,304 tokens of prompts or completions; up to 1,048,576 can be planned",
        ),
        ("--teacher {teacher} --student {student} --student_dtype float16", "invalid choice: 'float16'"),
        ("--teacher {encoder} --student {student}", "model type 'bert') is neither"),
        ("--teacher {teacher} --student {encoder}", "`--student "),
        ("--teacher {experts} --student {student}", "cannot be planned: its forward pass fails without real tensors"),
        ("--teacher {teacher} --student {student} --lora_r 4", "--lora_r has no effect without --use_peft"),
        ("--teacher {teacher} --student {student} --load_in_4bit", "only adapters on quantised weights are trained"),
        (
            "--teacher {teacher} --student {student} --use_peft --load_in_4bit --load_in_8bit",
            "are two precisions: give one of them",
        ),
        ("--teacher {teacher} --student {student} --use_peft maybe", "'maybe' is neither True nor False"),
        (
            f"--teacher {{teacher}} --student {{student}} --use_peft --lora_target_modules nowhere {SMALL_RUN}",
            "--use_peft with --lora_target_modules nowhere: peft_config does not fit the student",
        ),
        ("--teacher ./nowhere --student {student}", "`--teacher ./nowhere` is not a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, message, configs, capsys):
    with pytest.raises(SystemExit) as exit:
        run(lambda: plan.main(command.format(**configs).split()))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_without_the_hub_a_local_directory_is_asked_for(configs, monkeypatch):
    """What becomes of an error behind the first contact; whether there is a network here does not matter."""
    from huggingface_hub import constants

    from rlkd_trl.planning import skeletons

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def unreachable(name, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

    monkeypatch.setattr(skeletons.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(InputError, match=r"`--teacher someone/unknown`: We couldn't.*local directory with its config"):
        plan.main(["--teacher", "someone/unknown", "--student", configs["student"]])


@pytest.mark.slow
def test_help_and_wrong_flags_load_no_library():
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('rlkd_trl.plan', run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    heavy = {'torch', 'transformers', 'trl', 'deepspeed', 'bitsandbytes'} & set(sys.modules)\n"
        "    print(exit.code, sorted(heavy))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for flags, last in ((["--help"], "0 []"), (["--teacher", "a", "--student", "b", "--gpus", "0"], "2 []")):
        command = [sys.executable, "-c", code, *flags]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert finished.stdout.splitlines()[-1] == last, finished.stderr
