"""Every file in accelerate_configs/: it says when to choose it, and starts what it promises where a CPU can."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from transformers import AutoModelForSeq2SeqLM

from tests.distributed import forked_launchers
from tests.distributed.launching import ENVIRONMENT, environments_of_ranks, free_port, run_forked
from tests.recipes.command_lines import COLUMNS, ROOT, metrics_of

CONFIGS = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}
LAUNCHED = Path(__file__).with_name("launched_recipe.py")
# What Accelerate sets up on a CPU: kind, ZeRO stage, processes. The file for two CPU processes is launched in
# test_processes.py; FSDP2 needs an accelerator: without one, Accelerate runs DDP and says nothing.
EXPECTED = {
    "single_gpu": "NO none 1",
    "multi_gpu": "MULTI_CPU none 2",
    "zero1": "DEEPSPEED 1 2",
    "zero2": "DEEPSPEED 2 2",
    "zero3": "DEEPSPEED 3 2",
    "zero3_cpu_offload": "DEEPSPEED 3 2",
    "zero3_multi_node": "DEEPSPEED 3 2",
}


def test_all_ways_to_launch_are_there():
    assert CONFIGS.keys() == {*EXPECTED, "cpu_2_processes", "fsdp2"}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_opens_with_when_to_choose_it_and_parses(name):
    text = CONFIGS[name].read_text()
    comment = text[: text.index("compute_environment")]
    assert all(line.startswith("# ") or line.startswith("#  ") for line in comment.splitlines())
    assert "Choose it" in " ".join(comment.split()).replace("# ", "")
    assert f"accelerate launch --config_file accelerate_configs/{name}.yaml recipes/" in comment
    config = load_config_from_file(str(CONFIGS[name]))  # refuses unknown keys
    settings = yaml.safe_load(text)
    assert config.num_processes == settings["num_processes"] and config.num_machines == settings["num_machines"]
    if settings["distributed_type"] == "DEEPSPEED":
        stage = settings["deepspeed_config"]["zero_stage"]
        assert name.startswith(f"zero{stage}")
        assert settings["deepspeed_config"].get("zero3_save_16bit_model", False) == (stage == 3)
        assert ("cpu" in name) == (settings["deepspeed_config"]["offload_optimizer_device"] == "cpu")


def test_the_multi_node_file_says_what_to_change():
    comment = CONFIGS["zero3_multi_node"].read_text().split("compute_environment")[0]
    for key in ("main_process_ip", "main_process_port", "machine_rank", "num_machines", "num_processes"):
        assert f"{key}:" in comment or f"{key}," in comment or f"{key};" in comment, key


@pytest.mark.parametrize("name", [name for name, kind in EXPECTED.items() if kind.startswith("DEEPSPEED")])
def test_several_machines_need_no_host_file(name, monkeypatch):
    """The planner recommends these files for several nodes, too; Accelerate's default there is pdsh, over ssh."""
    flags = "--num_machines 2 --num_processes 4 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500"
    command = f"--config_file {CONFIGS[name]} {flags} recipes/ppo_kd.py"
    launched = []
    monkeypatch.setattr(launch, "deepspeed_launcher", launched.append)
    launch.launch_command(launch.launch_command_parser().parse_args(command.split()))
    (arguments,) = launched
    program, _ = prepare_deepspeed_cmd_env(arguments)
    assert program is None, "DeepSpeed's own launcher, with a host file"
    assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "2")


def told_by_launcher(name: str, processes: int) -> dict[str, str]:
    """The environment variables that `accelerate launch` gives the processes of a run, besides each one's rank."""
    told = []

    def started(words, env):
        told.append(env)
        return SimpleNamespace(wait=lambda: None, returncode=0)

    command = f"--config_file {CONFIGS[name]} --num_processes {processes} recipe.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", lambda arguments: told.append(dict(os.environ)))
        patch.setattr(launch, "subprocess", SimpleNamespace(Popen=started))  # where there is one process
        launch.launch_command(launch.launch_command_parser().parse_args(command.split()))
    (environment,) = told
    return {variable: value for variable, value in environment.items() if os.environ.get(variable) != value}


def launched(name: str, words: str, directory: Path, *launch_flags: str) -> str:
    """What is printed by as many launchers, each in processes of its own, as there are `launch_flags`."""
    environment = {**ENVIRONMENT, "HF_DATASETS_CACHE": str(directory / "cache"), "FEW_DEMO_STEPS": "3"}
    start = f"accelerate launch --config_file {CONFIGS[name]}"
    lines = [f"{start} {flags} {LAUNCHED} {directory / 'kind'} {words}" for flags in launch_flags]
    finished = forked_launchers.launched(*lines, directory=directory, environment=environment)
    return finished.stdout + finished.stderr


@pytest.mark.slow(5)
@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "zero3"])  # with the demo, below
def test_it_starts_what_it_promises(name, checkpoints, train_csv, test_csv, tmp_path):
    """Two updates with a sharded teacher, up to a student that plain transformers loads.

    For one machine, in forked processes that are told what the launcher tells them; for several, by two launchers,
    forked too.
    """
    pair, processes = checkpoints["t5-untied"], int(EXPECTED[name].split()[-1])
    words = f"{ROOT}/recipes/ppo_kd.py --teacher {pair.teacher} --student {pair.student} --teacher_placement zero3 "
    words += f"--dataset {train_csv} --eval_dataset {test_csv} {COLUMNS} --num_generations 2 "
    words += "--max_completion_length 3 --max_steps 2 --logging_steps 1 --per_device_train_batch_size 4 "
    words += f"--disable_tqdm True --output_dir {tmp_path / 'student'}"
    if name == "zero3_multi_node":
        common = "--num_processes 2 --num_machines 2 --main_process_ip 127.0.0.1 "
        common += f"--main_process_port {free_port()}"
        log = launched(name, words, tmp_path, *(f"{common} --machine_rank {rank}" for rank in (0, 1)))
    else:
        told = {**told_by_launcher(name, processes), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        ranks = environments_of_ranks(processes) if processes > 1 else [{}]
        environments = [{**told, **rank} for rank in ranks]
        log = run_forked("tests.recipes.launched_recipe", tmp_path, environments, tmp_path / "kind", *words.split())
    assert (tmp_path / "kind").is_file(), log[-6000:]
    assert (tmp_path / "kind").read_text() == EXPECTED[name]
    assert log.count("Student, metrics.json and report.html are in") == 1, "one process speaks"
    assert log.count(f"Teacher {pair.teacher}: sharded (zero3), float32, not quantised") == 1
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student").state_dict()
    before = AutoModelForSeq2SeqLM.from_pretrained(pair.student).state_dict()
    assert student.keys() == before.keys()
    assert any(not student[key].equal(before[key]) for key in before), "nothing was learnt"
    assert json.loads((tmp_path / "student" / "metrics.json").read_text()).keys() == {"teacher", "before", "after"}


@pytest.mark.slow(10)
def test_the_demo_makes_its_models_outside_of_the_launchers_engine(tmp_path):
    """Once, on the first process, while the others wait; of DeepSpeed's engines a process has one."""
    flags = f"{ROOT}/recipes/ppo_kd.py --bf16 false --use_cpu --teacher_placement zero3 --max_steps 1 --max_rows 20 "
    flags += "--per_device_train_batch_size 4 --max_completion_length 4 --disable_tqdm True "
    flags += f"--output_dir {tmp_path / 'student'}"
    log = launched("zero3", flags, tmp_path, "--num_processes 2")
    assert (tmp_path / "kind").is_file(), log[-6000:]
    assert (tmp_path / "kind").read_text() == EXPECTED["zero3"]
    assert log.count("Demo 1/3") == log.count("Demo 2/3") == 1
    assert log.count("demo_models/teacher: sharded (zero3), float32, not quantised") == 1
    assert log.count("Student, metrics.json and report.html are in") == 1
    assert "Traceback" not in log and log.count("FutureWarning") < 10, log[-6000:]
    assert list(metrics_of(tmp_path / "student")) == ["teacher", "before", "after"]
    for model in ("demo_models/teacher", "demo_models/warm_start", "."):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student" / model)
