"""A checkpoint of adapters (LoRA and its relatives, as PEFT saves them), and the whole model that they make."""

import json
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
_BENEATH = ("base_layer", "original_module")  # what PEFT calls the model's own layer beneath an adapter, or a copy
_PREFIX = "base_model.model."  # of names in the file
_NOT_COMPLETE = "Found missing adapter keys"  # how PEFT's warning begins


@dataclass(frozen=True)
class SavedAdapters:
    """Adapters at `name_or_path`, and the checkpoint of the model that they are for, with revisions on the Hub."""

    name_or_path: str
    revision: str | None
    model: str
    model_revision: str | None

    def refuse_several(self) -> None:
        """Raises `InputError` if the model that the adapters are for consists of adapters itself."""
        if find_adapters(self.model, self.model_revision) is not None:
            raise InputError(
                f"The adapters in {self.name_or_path!r} are for {self.model!r}, which are adapters too: merge these "
                "into their model (PEFT's merge_and_unload), and name the result as base_model_name_or_path."
            )

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
        with self._refusing("merged into"):
            config = PeftConfig.from_pretrained(self.name_or_path, revision=self.revision)
            config.task_type = None  # PEFT's class for a task would ask for the task's head
            place = self._place_in(model)
            adapted = PeftModel.from_pretrained(place, self.name_or_path, config=config, revision=self.revision)
            self._check_placed(adapted, place)
            adapted.merge_and_unload()
        return model.requires_grad_(True)

    def placed_on(self, model: PreTrainedModel) -> PeftModel:
        """The model with the adapters on it, which can be trained further; the model's own weights are frozen.

        Raises:
            InputError: They do not fit the model, are not complete, or are of a kind that is no change of weights.
        """
        with self._refusing("put on"):
            config = PeftConfig.from_pretrained(self.name_or_path, revision=self.revision)
            if config.is_prompt_learning:
                raise ValueError(f"{config.peft_type.value} is not supported")
            adapted = PeftModel.from_pretrained(
                model, self.name_or_path, config=config, revision=self.revision, is_trainable=True
            )
            self._check_placed(adapted, model)
        return adapted

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Turns whatever PEFT raises, or warns about weights that are missing, into an `InputError`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", message=_NOT_COMPLETE)
                yield
        except Exception as error:  # PEFT raises whatever happens to fail
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            raise InputError(
                f"The adapters in {self.name_or_path!r} cannot be {what} their model {self.model!r} ({reason}): "
                "give a merged model, or adapters of weights, such as LoRA's."
            ) from error

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


def tied_weights(model: PeftModel) -> list[str]:
    """Names of weights beneath adapters that the model also uses elsewhere, as an LM head that is the embeddings too.

    A merge would change them there, too.
    """
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, weight in model.get_base_model().named_parameters(remove_duplicate=False):
        names_of[id(weight)].append(name)
    shared = [name for names in names_of.values() if len(names) > 1 for name in names]
    return [name for name in shared if any(f".{part}." in f".{name}" for part in _BENEATH)]


def merged(model: PeftModel) -> PreTrainedModel:
    """The model with the adapters' changes in its own weights.

    Raises:
        InputError: There are adapters on tied weights.
    """
    refuse_tied_adapters(model)
    return model.merge_and_unload()


def refuse_tied_adapters(model: PeftModel) -> None:
    """Raises `InputError` if the adapters cannot be merged, as they are on tied weights."""
    if tied := tied_weights(model):
        raise InputError(
            f"The adapters on {tied[0]} cannot be merged: the model uses this weight elsewhere too, where the merge "
            "would change it. Leave it out of the adapters' target_modules and modules_to_save."
        )


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
