"""Presets: found by name or path; whatever is doubtful in a file is one clear error."""

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from rlkd_trl.commands.comparison.cells import Method
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.presets import find_preset, read_preset, shipped_presets
from rlkd_trl.errors import InputError

ROOT = Path(__file__).parents[2]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llmr_t0_3b_t5_base", "recipes/configs/llmr_t0_3b_t5_base.yaml"),
        ("llmr_t0_3b_t5_base.yaml", "recipes/configs/llmr_t0_3b_t5_base.yaml"),
        ("minillm", "recipes/configs/methods/all_actions_kd/minillm.yaml"),
    ],
)
def test_a_preset_that_ships_is_found_by_its_name(name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_preset(name) == ROOT / path
    (tmp_path / name).mkdir()  # a run's directory may have a preset's name
    assert find_preset(name) == ROOT / path


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = written(tmp_path / "minillm", "seed: 1")
    assert find_preset("minillm").resolve() == own


def test_names_of_presets_are_unambiguous():
    names = [path.stem for path in shipped_presets()]
    assert len(names) == len(set(names)) > 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llmr_t0_3b", "did you mean llmr_t0_3b_t5_base"),
        ("zzzz", "those that ship are: .*minillm"),
        ("nowhere.yaml", "Cannot read the preset nowhere.yaml: no such file"),
        ("some/minillm.yaml", "no such file. One of this name ships: --config minillm"),
    ],
)
def test_no_such_preset(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        find_preset(name)


# Nine aliases of nine aliases …: 9 ** 9 values.
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmax_steps: 2\nseed: 3\n", r"the key seed stands there twice \(line 3\)"),
        ("a: {b: 1, b: 2}", "the key b stands there twice"),
        ("1: 2", r"the key 1 is not a text; put it in quotes .*\(line 1\)"),
        ("yes: 2", "the key yes is not a text"),
        ("? [a, b]\n: 2", "the key a list or mapping is not a text"),
        ("seed: 2026-13-45", "month must be in 1..12"),
        ("seed: 2026-02-30", "day"),
        (f"seed: {'[' * 5000}{']' * 5000}", "its brackets are nested too deeply"),
        (f"seed: {'{a: ' * 5000}1{'}' * 5000}", "its brackets are nested too deeply"),
        (BOMB, "expands to more than 10000 values"),
        ("a: &a [*a]", "an alias stands within what it stands for"),
        ("a: &a {b: *a}", "an alias stands within what it stands for"),
        ("a: *missing", r"found undefined alias 'missing'? ?.*line 1|undefined alias"),
        ("seed: 1\n  max_steps: 2", r"mapping values are not allowed here \(line 2\)"),
        ("- seed\n- 1", "is not a YAML mapping"),
        ("", "is not a YAML mapping"),
        ("seed", "is not a YAML mapping"),
        ("a: 1\n---\nb: 2", "expected a single document|another document"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_a_doubtful_file_is_one_clear_error(text, message, tmp_path):
    path = written(tmp_path / "preset.yaml", text)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(InputError, match=message) as caught:
        read_preset(path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).replace(str(path), "").splitlines()) == 1
    assert after.ru_utime - before.ru_utime < 5
    assert after.ru_maxrss - before.ru_maxrss < 200_000  # KiB


def test_aliases_of_few_values_are_read(tmp_path):
    path = written(tmp_path / "preset.yaml", "a: &a [1, x]\nb: *a\nc: 2.5\n")
    assert read_preset(path).shared == {"a": [1, "x"], "b": [1, "x"], "c": 2.5}


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="Cannot read the preset"):
        read_preset(path)


@dataclass
class Flags:
    """Some of a recipe's."""

    REPLACED: ClassVar = {"template": ("templates",), "templates": ("template",)}
    templates: str | None = None
    template: str | None = None
    steps: int = 1
    rate: float = 0.5
    top_k: int = 0


SECTIONS = """
steps: 2
templates: many.yaml
ppo_kd:
  steps: 3
  template: "{{ source }}"
reinforce_kd: {top_k: 2}
"""


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("ppo_kd", [], Flags(None, "{{ source }}", 3)),
        ("ppo_kd", ["--steps", "4", "--templates", "own.yaml"], Flags("own.yaml", None, 4)),
        ("reinforce_kd", [], Flags("many.yaml", None, 2, top_k=2)),
        ("kd", [], Flags("many.yaml", None, 2)),  # no section of its own
        (None, [], Flags("many.yaml", None, 2)),
    ],
)
def test_a_recipe_reads_its_section_over_what_is_for_all(recipe, flags, expected, tmp_path):
    path = written(tmp_path / "preset.yaml", SECTIONS)
    assert RecipeParser(Flags, description="", recipe=recipe).parse([f"--config={path}", *flags]) == (expected,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reinforce_kdd: {top_k: 2}", "preset.yaml: unknown key reinforce_kdd; did you mean reinforce_kd"),
        ("ppo_kd: {stepz: 2}", "preset.yaml, under ppo_kd: unknown key stepz; did you mean steps"),
        ("ppo_kd: {steps: x}", "preset.yaml, under ppo_kd: steps has the value 'x'"),
        ("ppo_kd: {config: other}", "preset.yaml, under ppo_kd: config is for the command line only"),
        ("ppo_kd: {ppo_kd: {steps: 2}}", "preset.yaml, under ppo_kd: unknown key ppo_kd"),
        ("ppo_kd: {steps: 2, steps: 3}", "the key steps stands there twice"),
        ("ppo_kd: true", "preset.yaml: ppo_kd is a recipe: its flags stand under it, each on a line, not True"),
        ("kd: [steps]", "kd is a recipe: its flags"),  # in whichever section
        ("kd:", "kd is a recipe: its flags"),
    ],
)
def test_a_wrong_section_is_an_error(text, message, tmp_path):
    path = written(tmp_path / "preset.yaml", text)
    with pytest.raises(InputError, match=message):
        RecipeParser(Flags, description="", recipe="ppo_kd").parse(["--config", str(path)])


def test_a_comparison_takes_the_section_of_a_methods_recipe(tmp_path):
    path = written(tmp_path / "preset.yaml", SECTIONS)
    method = Method("own", ROOT / "recipes" / "reinforce_kd.py", path)
    assert method.settings() == {"steps": 2, "templates": "many.yaml", "top_k": 2}
