"""Where a teacher's weights are kept, and as what."""

from transformers import PreTrainedModel

from rlkd_trl.models.memory import held_bytes


def describe_weights(model: PreTrainedModel) -> str:
    """One line: where the weights are, their dtype and quantisation, and the bytes of them on this process."""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"replicated, {dtype}, {_quantization_of(model)}, {held_bytes(model):,} bytes of weights on this process"


def _quantization_of(model: PreTrainedModel) -> str:
    """As the model itself says, not as the flags did: a checkpoint may have been saved quantised."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return "not quantised"
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("load_in_8bit"):
        return "linear layers quantised to int8"
    if settings.get("load_in_4bit"):
        return f"linear layers quantised to {settings['bnb_4bit_quant_type']}"
    return f"quantised in the checkpoint ({settings.get('quant_method')})"
