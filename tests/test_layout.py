"""The shape of the package: who imports whom, what is exported, and what the README says is where."""

import ast
import importlib
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlkd_trl
from tests.distributed.launching import run_forked

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlkd_trl"
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text()

# Each may import from those above it, and from itself. Those in one line do not import each other. The text metrics
# and the layout of tables stand with evaluation and need nothing of the package, for rewards and the planner.
LAYERS = [
    ["errors"],
    ["settings"],
    ["ops", "prompts", "evaluation.metrics", "evaluation.tables"],
    ["data"],
    ["models"],
    ["teachers", "students"],
    ["rewards", "planning"],
    ["evaluation"],
    ["trainers"],
    ["commands"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ENTRY_POINTS = {"__init__", "__main__", "errors", "plan", "report", "score"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem == "errors")


def part(module: str) -> str:
    """rlkd_trl.ops.losses -> ops, rlkd_trl.evaluation.metrics -> evaluation.metrics"""
    names = module.split(".")[1:3]
    return ".".join(names) if ".".join(names) in LEVEL else names[0]


def part_of(path: Path) -> str:
    """The part of a file of the package."""
    return part(".".join(("rlkd_trl", *path.relative_to(PACKAGE).with_suffix("").parts)))


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports anywhere, functions and TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from rlkd_trl import plan` imports the module rlkd_trl.plan
            found |= {
                f"{node.module}.{alias.name}" if node.module == "rlkd_trl" else node.module for alias in node.names
            }
    return found


def parts_imported(path: Path) -> set[str]:
    return {part(name) for name in imports(path) if name.startswith("rlkd_trl.")}


def test_every_part_of_the_package_has_a_level():
    assert {part_of(path) for path in MODULES} == set(LEVEL)


def test_only_rooms_and_entry_points_stand_at_the_top():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ENTRY_POINTS


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part_of(path)
    for imported in parts_imported(path) - {own}:
        assert LEVEL[imported] < LEVEL[own], f"{own} imports {imported}"


def test_the_reader_of_imports_sees_them():
    """So that the test above cannot pass for want of imports."""
    assert parts_imported(PACKAGE / "trainers" / "rollout_trainer.py") >= {
        "evaluation",
        "models",
        "rewards",
        "students",
    }
    assert "trainers" in parts_imported(PACKAGE / "commands" / "results.py"), "under TYPE_CHECKING"
    assert "evaluation.metrics" in parts_imported(PACKAGE / "rewards" / "sequence_rewards.py")
    assert "trainers" in parts_imported(PACKAGE / "commands" / "checks.py"), "in a function"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda path: path.name)
def test_equations_need_torch_only(path):
    outside = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert outside <= {"torch", "rlkd_trl"}
    assert parts_imported(path) <= {"ops"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_does_not_import_tests_or_recipes(path):
    assert not {"tests", "recipes", "pytest"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    "modules",
    ["rlkd_trl", "rlkd_trl.errors", "rlkd_trl.settings.ranges", "rlkd_trl.prompts", "rlkd_trl.data"],
)
def test_light_imports_stay_light(modules):
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'accelerate'}"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert finished.stdout.strip() == "[]"


@pytest.mark.parametrize("name", rlkd_trl.__all__)
def test_public_names(name):
    thing = getattr(rlkd_trl, name)
    assert thing.__name__ == name
    assert thing.__doc__


@pytest.mark.parametrize("name", rlkd_trl.__all__)
def test_signatures_show_every_parameter(name):
    parameters = inspect.signature(getattr(rlkd_trl, name)).parameters.values()
    assert len(parameters) >= 2
    assert not [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def test_a_trainers_signature():
    found = inspect.signature(rlkd_trl.PPOKDTrainer).parameters
    names = ["model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"]
    assert list(found)[:6] == names
    assert {name: found[name].kind.name for name in ("peft_config", "callbacks")} == {
        "peft_config": "KEYWORD_ONLY",
        "callbacks": "KEYWORD_ONLY",
    }
    assert "templates" in inspect.signature(rlkd_trl.KDTrainer).parameters


def test_dir_lists_the_public_names():
    assert dir(rlkd_trl) == sorted([*rlkd_trl.__all__, "__version__"])


@pytest.mark.slow(1)
def test_importing_changes_no_other_librarys_log_level(tmp_path):
    """In a process that has imported the package, and done nothing."""
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, rlkd_trl, rlkd_trl.trainers.ppo, rlkd_trl.models.precision, bitsandbytes\n"
        'print(logging.getLogger("bitsandbytes").level)\n'
    )
    printed = run_forked("tests.distributed.forked_script", tmp_path, [{}], str(script))
    assert int(printed.splitlines()[-1]) == logging.NOTSET


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = rlkd_trl.Trainer


def equation_rows() -> list[tuple[str, str]]:
    """Functions and tests of each line of the table of equations in docs/methods.md."""
    table = METHODS_PAGE[METHODS_PAGE.index("| equation |") :].split("\n\n")[0]
    rows = [tuple(line.split(" | ")[1:3]) for line in table.splitlines()[2:]]
    assert len(rows) > 10
    return rows


@pytest.mark.parametrize("functions, tests", equation_rows())
def test_the_table_of_equations(functions, tests):
    files = [ROOT / name for name in re.findall(r"`([^`]+)`", tests)]
    assert files and all(file.is_file() for file in files)
    tested = "\n".join(file.read_text() for file in files)
    module = None
    for name in re.findall(r"`([^`]+)`", functions):
        if "." in name:  # a name without its module is of the same module as the one before
            module, _, name = name.rpartition(".")
        function = getattr(importlib.import_module(f"rlkd_trl.{module}"), name)
        assert function.__module__ == f"rlkd_trl.{module}", "defined there, not only imported"
        assert re.search(rf"\b{name}\b", tested), f"no test of {name} in these files"


def shipped_files() -> list[Path]:
    files = [ROOT / "README.md", ROOT / "pyproject.toml", *(ROOT / "docs").glob("*.md")]
    for directory in ("rlkd_trl", "recipes", "accelerate_configs"):
        files += [p for p in (ROOT / directory).rglob("*") if p.suffix in (".py", ".yaml", ".md")]
    return files


PATH_OF_ONE_MACHINE = re.compile(r"(?<!\w)/(?:home|work|tmp|root|opt|Users)/")


@pytest.mark.parametrize("path", shipped_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_of_one_machine(path):
    text = path.read_text()
    assert not re.search(r"\bshared/", text), "a data folder beside the repository"
    assert not PATH_OF_ONE_MACHINE.search(text)


def test_no_path_of_one_machine_in_results():
    files = [p for p in (ROOT / "recipes" / "benchmarks" / "results").rglob("*") if p.suffix in (".json", ".csv")]
    assert len(files) > 20
    assert not [path for path in files if PATH_OF_ONE_MACHINE.search(path.read_text())]
