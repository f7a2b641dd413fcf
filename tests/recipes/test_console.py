"""`rlkd-trl`: the same code as the recipes', found by name; and the package as a wheel brings it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM

from rlkd_trl.commands import console
from rlkd_trl.errors import InputError
from tests.distributed import forked_launchers
from tests.distributed.launching import ENVIRONMENT
from tests.recipes.command_lines import COLUMNS, RECIPES, ROOT, SAMPLING, TWO_STEPS

COMMANDS = (*RECIPES, "generate_data", "compare", "encoder_search", "assistant_kd", "plan", "report", "score")


def run_console(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlkd-trl", *argv])
    try:
        console.main()
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_it_lists_the_commands(argv, monkeypatch, capsys):
    assert run_console(monkeypatch, *argv) == 0
    text = capsys.readouterr().out
    commands, presets = text.split("Presets, for --config:\n")
    listed = {line.split()[0] for line in commands.splitlines() if line.startswith("    ") and "rlkd-trl" not in line}
    assert listed == set(COMMANDS)
    assert "    encoder_kd       distilbert, kd, minilm" in presets, "by the recipe that they are for"
    for word in ("llmr_t0_3b_t5_base", "zero2", "--num_processes 2"):
        assert word in text
    assert max(len(line) for line in text.splitlines() if line.startswith("    ")) <= 119


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_own_help(command, monkeypatch, capsys):
    assert run_console(monkeypatch, command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: rlkd-trl {command} ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ppokd",), "there is no command 'ppokd'; did you mean ppo_kd"),
        (("xyzzy",), "there is no command 'xyzzy'; choose one of all_actions_kd, "),
        (("ppo_kd", "--max_step", "2"), "unknown flag --max_step; did you mean --max_steps"),
        (("ppo_kd", "--config", "minillms"), "did you mean minillm"),
        (("plan",), "the following arguments are required: --teacher, --student"),
        (("--num_processes", "2", "ppokd"), "there is no command 'ppokd'"),
        (("--num_proceses", "2", "ppo_kd"), "--num_proceses"),
        (("--num_processes", "two", "ppo_kd"), "--num_processes.*: invalid int value: 'two'"),
        (("--num_processes", "2"), "required: COMMAND"),
        (("--config_file", "zero9", "ppo_kd"), "--config_file zero9 is neither .*; did you mean zero"),
    ],
)
def test_what_it_refuses(argv, message, monkeypatch, capsys):
    assert run_console(monkeypatch, *argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message, lines[0])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("ppo_kd --seed 1", None),
        ("--num_processes 1 ppo_kd", None),
        ("--num_processes 2 ppo_kd", "cpu_2_processes.yaml"),
        ("--config_file zero2 ppo_kd", "zero2.yaml"),
        ("--config_file zero2.yaml --num_processes 4 ppo_kd", "zero2.yaml"),
        ("--config_file accelerate_configs/zero3.yaml ppo_kd", "zero3.yaml"),
    ],
)
def test_the_launchers_configuration(flags, expected, monkeypatch):
    """Everything before the command is the launcher's, everything after it the command's."""
    from accelerate.commands import launch

    launched = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launch, "launch_command", launched.append)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    if expected is None and not flags.startswith("-"):
        monkeypatch.setattr(console, "_main_of", lambda script: lambda: launched.append(script))
        assert run_console(monkeypatch, *flags.split()) == 0
        assert launched == [ROOT / "recipes" / "ppo_kd.py"], "in this process"
        return
    assert run_console(monkeypatch, *flags.split(), "--seed", "7") == 0
    (arguments,) = launched
    assert arguments.training_script == str(ROOT / "recipes" / "ppo_kd.py")
    assert arguments.training_script_args == ["--seed", "7"]
    assert (arguments.config_file and Path(arguments.config_file).name) == expected


def test_a_script_is_known_by_its_file_name():
    assert console.script_of("plan") == ROOT / "rlkd_trl" / "plan.py"
    with pytest.raises(InputError, match="no command"):
        console.script_of("__init__")


# The package as users get it


def _sources(root: Path) -> Path:
    """A copy of what the package is built from, which building writes into."""
    sources = root / "sources"
    for name in ("rlkd_trl", "recipes", "accelerate_configs", "docs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    return sources


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A new environment's directory of programs: the built wheel, and this environment's packages beside it."""
    root = tmp_path_factory.mktemp("wheel")
    sources = _sources(root)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    _run([*pip, "wheel", "--no-build-isolation", *offline, "-w", str(root), str(sources)], root)
    _run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], root)
    python = root / "venv" / "bin" / "python"
    site_packages = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], root).strip()
    (Path(site_packages) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (wheel,) = root.glob("*.whl")
    _run([*pip, "--python", str(python), "install", *offline, str(wheel)], root)
    return python.parent


def _run(command: list[str], directory: Path, *, code: int = 0) -> str:
    """Standard output of a command that knows nothing of the clone; its exit code is as expected."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(directory / "cache")}
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=500, cwd=directory, env=environment, check=False
    )
    assert finished.returncode == code, finished.stderr[-4000:]
    return finished.stdout if code == 0 else finished.stderr


@pytest.mark.slow
def test_a_wheel_brings_everything(installed, tmp_path):
    program = str(installed / "rlkd-trl")
    listed = _run([program], tmp_path)
    assert all(f"    {command}" in listed for command in COMMANDS)
    found = _run([str(installed / "python"), "-c", "import rlkd_trl; print(rlkd_trl.__file__)"], tmp_path)
    assert ROOT not in Path(found.strip()).parents, "not the clone's"
    assert _run([str(installed / "python"), "-m", "rlkd_trl"], tmp_path) == listed
    assert "--ibleu" in _run([program, "evaluate", "--help"], tmp_path)
    refused = _run([program, "reinforce_kd", "--config", "llmr_t0_3b_t5_base", "--seed", "x"], tmp_path, code=2)
    assert "argument --seed" in refused
    packed = {path.stem for path in (Path(found.strip()).parent / "accelerate_configs").glob("*.yaml")}
    assert packed == {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    recipes = Path(found.strip()).parent / "recipes"
    presets = {path.relative_to(recipes) for path in recipes.rglob("*.yaml")}
    assert presets == {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes" / "configs").rglob("*.yaml")}
    assert not (recipes / "benchmarks").exists()


@pytest.mark.slow
def test_a_source_archive_brings_what_the_package_is_built_from(tmp_path):
    build = "import setuptools.build_meta as backend; print(backend.build_sdist('..'))"
    said = _run([sys.executable, "-c", build], _sources(tmp_path))
    with tarfile.open(tmp_path / said.splitlines()[-1]) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [ROOT / name for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE")]
    for folder, endings in {
        "rlkd_trl": (".py", ".yaml"),
        "recipes": (".py", ".yaml"),
        "accelerate_configs": (".yaml",),
        "docs": (".md",),
    }.items():
        of_folder = [path for path in (ROOT / folder).rglob("*") if path.suffix in endings]
        assert of_folder
        wanted += of_folder
    assert {str(path.relative_to(ROOT)) for path in wanted if "results" not in path.parts} <= found


# The embedded demo as `rlkd-trl ppo_kd` starts it, but for the minutes in which its models learn and are tested.
SHORT_DEMO = """
import sys
from functools import partial
from rlkd_trl.commands import console, demo
demo.DemoRequest = partial(demo.DemoRequest, teacher_steps=5, student_steps=5, pseudo_labelled_inputs=16)
demo.SPLIT_SIZES.update(validation=6, test=10)
sys.argv = ["rlkd-trl", *sys.argv[1:]]
console.main()
"""


@pytest.mark.slow(10)
def test_a_wheel_runs_the_demo(installed, tmp_path):
    """The one command of the README, without the minutes in which its models learn and are tested."""
    flags = "ppo_kd --max_steps 2 --max_completion_length 12 --max_rows 20"
    _run([str(installed / "python"), "-c", SHORT_DEMO, *flags.split()], tmp_path)
    found = tmp_path / "runs" / "demo_ppo"
    assert list(json.loads((found / "metrics.json").read_text())) == ["teacher", "before", "after"]
    assert (found / "report.html").is_file()
    for name in ("demo_models/teacher", "demo_models/warm_start", "."):
        AutoModelForSeq2SeqLM.from_pretrained(found / name)
    card = (found / "README.md").read_text()
    assert "the embedded demo of rlkd_trl" in card
    assert str(Path("runs", "demo_ppo", "demo_models", "teacher")) in card


@pytest.mark.slow(15)
def test_a_wheel_trains(installed, checkpoints, train_csv, test_csv, tmp_path):
    """In two processes; the demo above trains in one."""
    pair = checkpoints["t5-tied"]
    flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} --eval_dataset {test_csv}"
    command = f"--num_processes 2 ppo_kd --config ppo {flags} {COLUMNS} {TWO_STEPS} {SAMPLING} --output_dir out"
    said = _run([str(installed / "rlkd-trl"), *command.split()], tmp_path)
    assert said.count("Student, metrics.json and report.html are in out.") == 1
    assert list(json.loads((tmp_path / "out" / "metrics.json").read_text())) == ["teacher", "before", "after"]
    cost = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert cost["optimizer_steps"] == 2


@pytest.mark.slow(1)
def test_an_input_error_under_the_launcher_is_no_traceback(tmp_path):
    command = "rlkd-trl --num_processes 2 ppo_kd --dataset nowhere.csv --teacher t --student s --output_dir out"
    finished = forked_launchers.launched(command, directory=tmp_path, environment=ENVIRONMENT)
    assert finished.returncode == 2
    assert finished.stderr.count("error: Dataset nowhere.csv does not exist") == 1
    assert finished.stderr.count("\n") <= 3
    assert not (tmp_path / "out").exists()
