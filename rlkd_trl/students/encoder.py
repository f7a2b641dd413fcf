"""The student of encoder distillation: a model, and learned projections to the teacher's width if theirs differ."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rlkd_trl.errors import InputError
from rlkd_trl.models.adapters import merged
from rlkd_trl.models.checkpoint_weights import check_complete
from rlkd_trl.models.layer_tensors import LayerReader, LayerTensors, Wanted
from rlkd_trl.models.sharding import loading_shards

Result = TypeVar("Result")
_PROJECTIONS_FILE = "projections.safetensors"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class EncoderStudent(nn.Module):
    """A student whose `forward` returns a function of the model's outputs and of tensors of its layers.

    Losses are computed within `forward`, since distributed wrappers find unused weights by what `forward` returns.

    Args:
        model: The student's model.
        projections: Name -> (student's width, teacher's width): for each a learned matrix without bias (TinyBERT's W_h
            and W_e). They are trained with the model, and saved beside it in a file of their own.
        seed: Of the projections' first weights.
    """

    accepts_loss_kwargs = False  # else `Trainer` takes `**kwargs` for a loss that is divided over the whole step

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        projections: Mapping[str, tuple[int, int]] | None = None,
        *,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.reader = LayerReader(model)
        generator = torch.Generator().manual_seed(seed)
        self.projections = nn.ModuleDict()
        for name, (width, teachers_width) in (projections or {}).items():
            projection = nn.Linear(width, teachers_width, bias=False, device=model.device)
            with torch.no_grad():
                numbers = torch.randn(teachers_width, width, generator=generator) / width**0.5
                projection.weight.copy_(numbers)
            self.projections[name] = projection

    @property
    def config(self):
        return self.model.config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """`Trainer` calls it with `gradient_checkpointing`. Raises `InputError` as `RecomputedLayers`."""
        self.reader.recompute_layers()

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.24

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        wanted: Wanted,
        function: Callable[[ModelOutput, dict[str, LayerTensors]], Result],
    ) -> Result:
        """Calls `function` with the model's outputs and the wanted tensors of its layers (see `LayerReader.read`)."""
        return function(*self.reader.read(inputs, wanted))

    def projected(self, name: str, student_BSD: Tensor) -> Tensor:
        """The states `[B, S, D]` in the teacher's width; unchanged if there is no projection of this name."""
        return self.projections[name](student_BSD) if name in self.projections else student_BSD

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes a checkpoint that plain transformers loads, and projections, if there are any, in another file."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        student = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, source in tied.items():  # gathered shards hold two copies, which transformers does not recognise
            if name in student and source in student and torch.equal(student[name], student[source]):
                del student[name]
        self.model.save_pretrained(output_dir, state_dict=student)
        projections = {k: v.contiguous().clone() for k, v in state_dict.items() if k.startswith("projections.")}
        leftover = () if isinstance(self.model, PeftModel) else _ADAPTER_FILES
        for name in (*leftover, *(() if projections else (_PROJECTIONS_FILE,))):
            (Path(output_dir) / name).unlink(missing_ok=True)
        if projections:
            save_file(projections, Path(output_dir) / _PROJECTIONS_FILE)

    def merge_adapters(self) -> None:
        """Makes the adapters' changes part of the student's own weights. Raises `InputError` as `merged`."""
        self.model = merged(self.model)
        self.reader = LayerReader(self.model)

    def load_pretrained(self, checkpoint_dir: str | Path) -> None:
        """Loads the weights of a checkpoint that `save_pretrained` wrote, into the model or its adapters.

        Raises:
            InputError: The checkpoint lacks the student's projections, or weights of the model.
        """
        file = Path(checkpoint_dir) / _PROJECTIONS_FILE
        if self.projections and not file.is_file():
            raise InputError(f"{checkpoint_dir} has no {file.name}: it is not of a student with projections.")
        if isinstance(self.model, PeftModel):
            set_peft_model_state_dict(self.model, load_peft_weights(str(checkpoint_dir)))
        else:
            with loading_shards(None):  # the copy on disk is whole, also where ZeRO-3 shards the student
                saved, info = type(self.model).from_pretrained(
                    checkpoint_dir, dtype=self.model.dtype, output_loading_info=True
                )
            check_complete(info["missing_keys"], f"The student in {checkpoint_dir}")
            self.model.load_state_dict(saved.state_dict())
        if self.projections:
            self.load_state_dict(load_file(file), strict=False)
