"""The recipes' checkpoints and data, for the pages' commands."""

from tests.recipes.conftest import checkpoints, encoders, own_cache  # noqa: F401  (fixtures)
