"""The recipes' checkpoints, for the pages' commands."""

from tests.recipes.conftest import checkpoints, own_cache  # noqa: F401  (fixtures)
