"""The places of the files that ship with the package: inside an installed package, beside it in a clone."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
RECIPES = _ROOT / "recipes"
PRESETS = RECIPES / "configs"
METHODS = PRESETS / "methods"
ACCELERATE_CONFIGS = _ROOT / "accelerate_configs"
PACKAGE_SCRIPTS = {name: _PACKAGE / f"{name}.py" for name in ("plan", "report", "score")}


def recipe_scripts() -> dict[str, Path]:
    """The script of each recipe, by the recipe's name, e.g. `ppo_kd`."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.py")) if path.stem != "__init__"}
