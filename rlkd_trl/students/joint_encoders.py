"""Several encoders that are trained together under one pooler and head, so that their hidden spaces agree."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rlkd_trl.errors import InputError
from rlkd_trl.models.checkpoint_weights import check_complete
from rlkd_trl.models.layer_tensors import LayerReader, LayerTensors, Wanted
from rlkd_trl.models.sharding import loading_shards
from rlkd_trl.students.encoder import EncoderStudent

Result = TypeVar("Result")


class JointEncoders(EncoderStudent):
    """Multi-teacher co-finetuning (Wu, Wu & Huang 2021, "One Teacher is Enough?", MT-BERT).

    The first encoder's pooler and head are those of all. `forward` gives the sum of a function over the encoders; of
    the loss −log p(y) that is the paper's Σ_i CE(y, p_i). Its second part, lists of logits, is one list of all. Each
    encoder is saved as a checkpoint of its own, the first in the directory
    itself, the others in `encoder2`, `encoder3` and so on.

    Where this differs from the paper: the head is that of the architecture (in BERT a dense layer on the first token,
    and a linear layer), not an attention network over tokens; all encoders are of one architecture, width and
    tokenizer.

    Raises:
        InputError: The encoders' poolers or heads differ in shape.
    """

    def __init__(self, model: PreTrainedModel, companions: Sequence[PreTrainedModel]):
        super().__init__(model)
        self.companions = nn.ModuleList(companions)
        self._readers = [self.reader, *(LayerReader(companion) for companion in companions)]
        for number, companion in enumerate(companions, start=2):
            _share_head(model, companion, number)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        wanted: Wanted,
        function: Callable[[ModelOutput, dict[str, LayerTensors]], Result],
    ) -> Result:
        """As in `EncoderStudent`; the function gives losses by name and unit, or these and a list of logits."""
        results = [function(*reader.read(inputs, wanted)) for reader in self._readers]
        if isinstance(results[0], tuple):
            losses, logits = zip(*results, strict=True)
            return _sum(losses), [one for of_encoder in logits for one in of_encoder]
        return _sum(results)

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """As in the base class, of all encoders."""
        for reader in self._readers:
            reader.recompute_layers()

    gradient_checkpointing_enable = activation_checkpointing_enable

    @staticmethod
    def directories(output_dir: str | Path, count: int) -> list[Path]:
        """Where `count` encoders beside the first are saved."""
        return [Path(output_dir) / f"encoder{number}" for number in range(2, count + 2)]

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes each encoder as a checkpoint that plain transformers loads."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(output_dir, state_dict)
        directories = self.directories(output_dir, len(self.companions))
        for number, (companion, directory) in enumerate(zip(self.companions, directories, strict=True)):
            prefix = f"companions.{number}."
            of_companion = {name.removeprefix(prefix): w for name, w in state_dict.items() if name.startswith(prefix)}
            companion.save_pretrained(directory, state_dict=of_companion)

    def load_pretrained(self, checkpoint_dir: str | Path) -> None:
        """Loads what `save_pretrained` wrote. Raises `InputError` if weights are missing."""
        super().load_pretrained(checkpoint_dir)
        directories = self.directories(checkpoint_dir, len(self.companions))
        for companion, directory in zip(self.companions, directories, strict=True):
            if not directory.is_dir():
                raise InputError(f"{checkpoint_dir} has no {directory.name}: it is not of encoders trained together.")
            with loading_shards(None):
                saved, info = type(companion).from_pretrained(
                    directory, dtype=companion.dtype, output_loading_info=True
                )
            check_complete(info["missing_keys"], f"The encoder in {directory}")
            companion.load_state_dict(saved.state_dict())


def mean_logits(logits_KNC: Sequence[Tensor]) -> Tensor:
    """log of the models' mean probabilities, `[N, C]`; of numbers to predict (C = 1) their mean."""
    logits_KNC = torch.stack(list(logits_KNC)).float()
    if logits_KNC.shape[-1] == 1:
        return logits_KNC.mean(dim=0)
    return logits_KNC.log_softmax(dim=-1).logsumexp(dim=0) - torch.tensor(len(logits_KNC)).log()


def _sum(results: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    first = results[0]
    return {
        name: {unit: sum(result[name][unit] for result in results) for unit in by_unit}
        for name, by_unit in first.items()
    }


def _heads(model: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    """The modules outside of the body, and the body's pooler, by name: each with its parent and its name there."""
    body = model.base_model
    heads = {
        name: (model, name)
        for name, module in model.named_children()
        if module is not body and any(True for _ in module.parameters())
    }
    if getattr(body, "pooler", None) is not None:
        heads["pooler"] = (body, "pooler")
    return heads


def _share_head(model: PreTrainedModel, companion: PreTrainedModel, number: int) -> None:
    of_model, of_companion = _heads(model), _heads(companion)
    shapes = [
        {
            f"{name}.{key}": tuple(weight.shape)
            for name, (parent, child) in heads.items()
            for key, weight in getattr(parent, child).named_parameters()
        }
        for heads in (of_model, of_companion)
    ]
    if shapes[0] != shapes[1]:
        differing = min(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise InputError(
            f"Encoder {number} cannot have the first one's pooler and head: {differing} is {shapes[0].get(differing)} "
            f"in the first and {shapes[1].get(differing)} in it. Choose encoders of one architecture and width."
        )
    for name, (parent, child) in of_companion.items():
        setattr(parent, child, getattr(*of_model[name]))
