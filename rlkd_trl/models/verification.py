"""Checks that `Backbone`, which calls a model's parts one by one, computes the same as the model's forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlkd_trl.errors import InputError
from rlkd_trl.models.backbone import Backbone


@torch.no_grad()
def verify(backbone: Backbone) -> None:
    """Compares the logits of both on a few tokens. With a sharded model all processes call it together.

    Raises:
        InputError: The model's own forward pass fails or gives logits that are not finite; or the logits differ, since
            the architecture scales, shifts or caches in a way that is not supported.
    """
    model = backbone.model
    name, was_training = f"{type(model).__name__} (model type {model.config.model_type!r})", model.training
    model.eval()
    try:
        ours_BTV, theirs_BTV = logits_of_both(backbone, name)
    finally:
        model.train(was_training)
    precision = str(model.dtype).removeprefix("torch.")
    is_quantised = getattr(model, "is_quantized", False)
    if not theirs_BTV.isfinite().all():
        remedy = "Its weights may be damaged: copy, download or train it again."
        if model.dtype == torch.float16:
            remedy = "It ends at 65,504: load the model in bfloat16 or float32."
        raise InputError(f"The logits of {name} are not finite in {precision}. {remedy}")
    # In bfloat16, and in int8 layers, which round activations, a difference in the last bit can grow.
    tolerance = 1e-3 if precision == "float32" and not is_quantised else 5e-2
    ours_BTV, theirs_BTV = ours_BTV.cpu().double(), theirs_BTV.cpu().double()  # whose squares may be beyond float32
    difference, size = (ours_BTV - theirs_BTV).norm(), theirs_BTV.norm()  # a new head may be 0, and so all its logits
    if not difference <= tolerance * size:
        raise InputError(
            f"{name} is not supported: its logits differ from states × LM head by a relative {difference / size:.2g}."
        )


def logits_of_both(backbone: Backbone, name: str) -> tuple[Tensor, Tensor]:
    """Logits `[2, 3, V]` of two completions of a prompt, from the backbone and from the model's own forward pass.

    Raises:
        InputError: One of the two fails.
    """
    # Ids 1..3 exist in every vocabulary; which tokens they are does not matter for comparing two computations.
    prompt_ids_PS = torch.tensor([[3, 2, 1]], device=backbone.device)
    completion_ids_BT = torch.tensor([[2, 3], [3, 1]], device=backbone.device)
    with _refusing(f"The forward pass of {name} fails", _about_split_weights(backbone.model)):
        theirs_BTV = backbone.own_logits(prompt_ids_PS.expand(2, -1), completion_ids_BT)
    with _refusing(f"{name} is not supported"):
        index_B = torch.zeros(2, dtype=torch.long, device=backbone.device)
        states = backbone.completion_states(prompt_ids_PS, torch.ones_like(prompt_ids_PS), completion_ids_BT, index_B)
        ours_BTV = backbone.head(states)
    return ours_BTV.float(), theirs_BTV.float()


@contextmanager
def _refusing(what: str, remedy: str = "") -> Iterator[None]:
    """Turns every exception but `InputError` and `torch.OutOfMemoryError` into an `InputError`."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as cause:
        raise InputError(f"{what}: {type(cause).__name__}: {cause}. {remedy}".strip()) from cause


def _about_split_weights(model: PreTrainedModel) -> str:
    """A remedy for tied weights that the device map puts in different places; "" if there are none."""
    places = getattr(model, "hf_device_map", None) or {}

    def place_of(weight: str) -> str | None:
        prefixes = [name for name in places if name == "" or weight.startswith(f"{name}.")]
        return str(places[max(prefixes, key=len)]) if prefixes else None

    tied = sorted({*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()})
    place_of_tied = {name: place_of(name) for name in tied}
    if len({*place_of_tied.values()}) < 2:
        return ""
    held = ", ".join(f"{name} on {place}" for name, place in place_of_tied.items())
    return (
        f"Its device map holds tied weights in different places ({held}), which Accelerate cannot offload: give their "
        'modules one place in `device_map`, or load it with device_map="auto", which does.'
    )
