"""YAML presets: found by name or path, and read strictly.

A key is a flag, for any recipe that the file is given to; or it is the name of a recipe, and the flags under it are
for that recipe alone and override the others:

    teacher: [bigscience/T0_3B]
    learning_rate: 1.0e-5
    ppo_kd:
      num_iterations: 2
    reinforce_kd:
      top_k: 2
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

from rlkd_trl.commands.shipped import PRESETS, recipe_scripts
from rlkd_trl.errors import InputError

SUFFIXES = (".yaml", ".yml")
# An alias can stand for other aliases, so a few lines can expand to billions of values; a preset has some dozens.
_MOST_VALUES = 10_000


def find_preset(name: str) -> Path:
    """The file at that path, or the preset that ships under that name: `llmr_t0_3b_t5_base`, `minillm`.

    Raises:
        InputError: There is no such file and no such name, or several presets have it.
    """
    if not name.strip():
        raise InputError("--config is empty: name a YAML file, or a preset that ships.")
    path = Path(name)
    try:
        if path.is_file():
            return path
    except OSError as error:  # the name is too long
        raise InputError(f"Cannot read the preset {name[:60]}…: {error.strerror}.") from error
    shipped = shipped_presets()
    of_this_name = [
        preset for preset in shipped if preset.stem == (path.stem if path.suffix in SUFFIXES else path.name)
    ]
    is_name = path.name == name
    if is_name and len(of_this_name) == 1:
        return of_this_name[0]
    if is_name and of_this_name:
        raise InputError(f"--config {name}: there are several; give a path: {', '.join(map(str, of_this_name))}.")
    if of_this_name:
        raise InputError(f"Cannot read the preset {name}: no such file. One of this name ships: --config {path.stem}.")
    if path.is_dir():
        raise InputError(f"Cannot read the preset {name}: it is a directory; name a file in it.")
    if path.suffix in SUFFIXES or not is_name or path.exists():
        raise InputError(f"Cannot read the preset {name}: no such file.")
    names = sorted({preset.stem for preset in shipped})
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"those that ship are: {', '.join(names)}."
    raise InputError(f"--config {name} is neither a file nor the name of a preset; {hint}")


def shipped_presets() -> list[Path]:
    """The presets in `recipes/configs/` and `recipes/configs/methods/RECIPE/`."""
    return sorted(PRESETS.rglob("*.yaml"))


@dataclass(frozen=True)
class Preset:
    """Flags and their values. shared: for every recipe. sections: by recipe, the flags for that one alone."""

    shared: dict[str, object]
    sections: dict[str, dict[str, object]]

    def values_for(self, recipe: str) -> dict[str, object]:
        """The flags for one recipe, with their values."""
        return self.shared | self.sections.get(recipe, {})


def read_preset(path: Path) -> Preset:
    """The content of a preset file; whether the recipes know its flags is not checked here.

    Raises:
        InputError: The file cannot be read, is not a mapping of texts to values, has a key twice, or expands to too
            many values; or what stands under a recipe's name is not a mapping.
    """
    shared, sections = {}, {}
    recipes = recipe_scripts()
    for key, value in _read_mapping(path).items():
        if key not in recipes:
            shared[key] = value
        elif isinstance(value, dict):
            sections[key] = value
        else:
            raise InputError(f"{path}: {key} is a recipe: its flags stand under it, each on a line, not {value!r}.")
    return Preset(shared, sections)


def _read_mapping(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"The preset {path} is not a YAML mapping of flags to values.")
        if _expanded_size(node, {}) > _MOST_VALUES:
            raise InputError(f"The preset {path} expands to more than {_MOST_VALUES} values: leave out its aliases.")
        return loader.construct_document(node)
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"Cannot read the preset {path}: its brackets are nested too deeply.") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise InputError(f"Cannot read the preset {path}: {error.problem or error.context}{line}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"Cannot read the preset {path}: {error}. Save it as UTF-8.") from error
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:  # ValueError: e.g. a 32nd of January
        raise InputError(f"Cannot read the preset {path}: {str(error).splitlines()[0]}") from error


class _Loader(yaml.SafeLoader):
    """Loads plain YAML types only; every key must be a text, and occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                written = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                problem = f"the key {written} is not a text; put it in quotes if it is meant as one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _expanded_size(node: yaml.Node, size_of: dict[int, int]) -> int:
    """The number of values under a node, where an alias counts as much as what it stands for.

    size_of: by id, the sizes of nodes that are known; 0 while a node is being counted.

    Raises:
        yaml.composer.ComposerError: An alias stands for something that it is part of.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if size_of.get(id(node)) == 0:  # entered and not left
        raise yaml.composer.ComposerError(None, None, "an alias stands within what it stands for", node.start_mark)
    if id(node) not in size_of:
        size_of[id(node)] = 0
        is_list = isinstance(node, yaml.SequenceNode)
        children = node.value if is_list else [child for pair in node.value for child in pair]
        size_of[id(node)] = 1 + sum(_expanded_size(child, size_of) for child in children)
    return size_of[id(node)]
