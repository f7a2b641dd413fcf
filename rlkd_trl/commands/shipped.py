"""Where the files that come with the package are: inside it where it is installed, beside it in a clone."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_ROOT = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
RECIPES = _ROOT / "recipes"
PRESETS = RECIPES / "configs"
METHODS = PRESETS / "methods"
ACCELERATE_CONFIGS = _ROOT / "accelerate_configs"
PLANNER = _PACKAGE / "plan.py"


def recipe_scripts() -> dict[str, Path]:
    """Each recipe's name, `ppo_kd`, with its script."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.py")) if path.stem != "__init__"}
