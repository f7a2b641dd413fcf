"""Rotary positions whose angles depend on the length of the text that is read."""

from transformers import PreTrainedConfig

# transformers computes their frequencies anew when a call goes beyond a length; keys in a cache stay as they are.
_BY_LENGTH = {"dynamic", "longrope"}


def angles_change_with_length(config: PreTrainedConfig) -> bool:
    """Whether a text read in one call gives other states than the same text read token by token."""
    return bool(_BY_LENGTH & _kinds(getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}))


def _kinds(parameters: dict) -> set[str | None]:
    """The kinds of rotary positions; some models have different ones in different kinds of layers."""
    of_layers = [_kinds(value) for value in parameters.values() if isinstance(value, dict)]
    return {parameters.get("rope_type")}.union(*of_layers)
