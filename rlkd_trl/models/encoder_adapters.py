"""A checkpoint of adapters (LoRA and its relatives, as PEFT saves them), and the whole model that they make."""

import json
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from rlkd_trl.errors import InputError
from rlkd_trl.models.private_apis import checkpoint_file
from rlkd_trl.settings.files import ADAPTERS_CONFIG, adapted_model
from rlkd_trl.settings.hub import split_revision

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in the file
_NOT_COMPLETE = "Found missing adapter keys"  # how PEFT's warning begins


@dataclass(frozen=True)
class SavedAdapters:
    """Adapters at `name_or_path`, and the checkpoint of the model that they are for, with revisions on the Hub."""

    name_or_path: str
    revision: str | None
    model: str
    model_revision: str | None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the weights in the file, by their names in the model.

        Besides those of adapters there are weights that replace the model's own, as a classification head.
        """
        file = checkpoint_file(self.name_or_path, _WEIGHTS, self.revision)
        if file is None:
            raise InputError(f"{self.name_or_path!r} holds no {_WEIGHTS}: save the adapters with `save_pretrained`.")
        try:
            with safe_open(file, framework="pt") as weights:
                names = list(weights.keys())
                return {name.removeprefix(_PREFIX): tuple(weights.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}): copy or save it again.") from error

    def merged_into(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with the adapters' changes in its own weights. It may have another head than they were made with.

        Raises:
            InputError: They do not fit the model, as those for more layers than it has, are not complete, or are of a
                kind that cannot be merged.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", message=_NOT_COMPLETE)
                config = PeftConfig.from_pretrained(self.name_or_path, revision=self.revision)
                config.task_type = None  # PEFT's class for a task would ask for the task's head
                place = self._place_in(model)
                adapted = PeftModel.from_pretrained(place, self.name_or_path, config=config, revision=self.revision)
                self._check_placed(adapted, place)
                adapted.merge_and_unload()
        except Exception as error:  # PEFT raises whatever happens to fail
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            raise InputError(
                f"The adapters in {self.name_or_path!r} cannot be merged into their model {self.model!r} ({reason}): "
                "give a merged model, or adapters of weights, such as LoRA's."
            ) from error
        return model.requires_grad_(True)

    def _check_placed(self, adapted: PeftModel, place: nn.Module) -> None:
        """Raises `ValueError` if weights of the body have no place in the model: PEFT drops them and says nothing.

        A head or a pooler may have none, since the model may have another head than the adapters were made with.
        """
        weights = load_peft_weights(self.name_or_path, device="cpu", revision=self.revision)
        unplaced = [name.removeprefix(_PREFIX) for name in set_peft_model_state_dict(adapted, weights).unexpected_keys]
        parts = dict(place.named_children())
        lost = sorted(name for name in unplaced if name.split(".")[0] in parts and "pooler." not in name)
        if lost:
            raise ValueError(f"the model has no place for {len(lost)} of their weights, as {lost[0]}")

    def _place_in(self, model: PreTrainedModel) -> nn.Module:
        """The module whose names the file has: those of a body within a model with a head have its prefix."""
        prefix = model.base_model_prefix
        is_of_body_within = any(name.startswith(f"{prefix}.") for name in self.shapes())
        if model.base_model is model and is_of_body_within:
            around = nn.Module()
            setattr(around, prefix, model)
            return around
        return model if is_of_body_within else model.base_model


def find_adapters(name_or_path: str, revision: str | None) -> SavedAdapters | None:
    """The adapters that a checkpoint consists of; None if it is a model's.

    Raises:
        InputError: Their config is damaged, or does not name their model.
    """
    file = checkpoint_file(name_or_path, ADAPTERS_CONFIG, revision)
    if file is None:
        return None
    model = adapted_model(Path(file).parent)
    if model is None:
        raise InputError(
            f"{file} does not name the model that the adapters are for (base_model_name_or_path), or is damaged: save "
            "the adapters again with `save_pretrained`."
        )
    of_model = json.loads(Path(file).read_text("utf-8")).get("revision")
    return SavedAdapters(*split_revision(name_or_path, revision), model, of_model)
