"""Models that have shapes but no memory, built from a config."""

import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlkd_trl.errors import InputError
from rlkd_trl.models.loading import check_language_model, making_model_of, require_checkpoint
from rlkd_trl.models.remote_code import may_run_code
from rlkd_trl.settings.hub import split_revision

# Integer tensors with more elements than this have no values.
_MAX_REAL_ELEMENTS = 2**20


class ShapesOnly(FakeTensorMode):
    """Within it floating-point tensors have a shape but no memory; small integer ones, such as masks, are real.

    So code can depend on which rows belong to which prompt and on where there is padding, and can select entries by a
    mask. If Python reads a number from a tensor without memory it gets 0, or True for a bool, with which weights pass
    the checks for NaN.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(argument, FakeTensor) for argument in tree_iter((args, kwargs))):
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 0
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], _without_masks(args[1]))
            return super().dispatch(func, types, args, kwargs)
        try:
            result = super().dispatch(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        tensors = [item for item in tree_iter(result) if isinstance(item, Tensor)]
        if any(tensor.is_floating_point() or tensor.numel() > _MAX_REAL_ELEMENTS for tensor in tensors):
            return result
        return func(*args, **kwargs)


def _without_masks(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replaces real masks by the positions where they are True, so that the number of selected entries is known."""
    unmasked: list[Tensor | None] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        unmasked += index.nonzero().unbind(dim=1) if is_mask else [index]
    return unmasked


class CopyingSkeletons(TorchFunctionMode):
    """Within it `copy.deepcopy` works on models without memory, which have no bytes for torch to copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__deepcopy__ or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            copied = torch.empty_like(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
        return memo[id(tensor)]


@dataclass(frozen=True)
class Skeleton:
    """A model whose weights are fake tensors of `mode`: operations on them compute shapes and allocate nothing."""

    model: PreTrainedModel | PeftModel
    mode: ShapesOnly

    @property
    def num_parameters(self) -> int:
        """The number of parameters; tied weights count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_trained(self) -> int:
        """The number of parameters that are trained: all, or those of adapters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def trained_itemsize(self) -> int:
        """Bytes of each of these; adapters are in float32 also where the weights beneath them are not."""
        return next(parameter.element_size() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def head_is_tied(self) -> bool:
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight

    def tensors(self) -> list[Tensor]:
        """All weights and buffers."""
        return [*self.model.parameters(), *self.model.buffers()]


THE_WORD = "word"


def one_word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that gives a text as many ids as it has words; for memory, which ids does not matter."""
    tokenizer = Tokenizer(WordLevel({"</s>": 0, THE_WORD: 1}, unk_token=THE_WORD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@dataclass(frozen=True)
class Checkpoint:
    """A model without its weights: its config, and whether its LM head is tied to its embeddings."""

    config: PreTrainedConfig
    head_is_tied: bool

    @classmethod
    def of(cls, flag: str, name_or_path: str) -> "Checkpoint":
        """Reads the config.json of a directory or Hub id; errors name `flag`.

        Raises:
            InputError: It cannot be read, or is not of a language model that completes prompts.
        """
        config, as_written = _read_config(flag, name_or_path)
        check_language_model(config, f"`{flag} {name_or_path}`")
        return cls(config, _head_is_tied(config, as_written, Path(name_or_path)))

    @cached_property
    def num_parameters(self) -> int:
        """The number of parameters; tied weights count once."""
        return self.build(torch.float32).num_parameters

    def build(self, dtype: torch.dtype) -> Skeleton:
        """The model without memory, in this dtype and in eval mode. Raises `InputError` if its config makes none."""
        auto_class = AutoModelForSeq2SeqLM if self.config.is_encoder_decoder else AutoModelForCausalLM
        with ShapesOnly() as mode, making_model_of(self.config):
            may_run = may_run_code(self.config.name_or_path)
            model = auto_class.from_config(self.config, dtype=dtype, trust_remote_code=may_run).eval()
            head = model.get_output_embeddings()
            if not self.head_is_tied and head.weight is model.get_input_embeddings().weight:
                head.weight = nn.Parameter(torch.empty_like(head.weight))
        if self.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
            model.generation_config.decoder_start_token_id = 0  # which token it is does not matter for memory
        return Skeleton(model, mode)


def _read_config(flag: str, name_or_path: str) -> tuple[PreTrainedConfig, dict]:
    """The config as transformers reads it, and the settings as they stand in its file."""
    require_checkpoint(flag, name_or_path)
    try:
        repository, revision = split_revision(name_or_path)
        may_run = may_run_code(repository, revision)
        config = AutoConfig.from_pretrained(repository, revision=revision, trust_remote_code=may_run)
        return config, PreTrainedConfig.get_config_dict(repository, revision=revision)[0]
    except Exception as error:  # it may be missing, unreachable, private, malformed, or of an unknown model type
        hint = "" if Path(name_or_path).is_dir() else " Without the Hub, give a local directory with its config.json."
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        if "trust_remote_code=True" in str(error):
            reason = "it is Python code. Read it, and give --trust_remote_code if you want it to run."
        raise InputError(f"Could not read the config of `{flag} {name_or_path}`: {reason}{hint}") from error


def _head_is_tied(config: PreTrainedConfig, as_written: dict, directory: Path) -> bool:
    """Whether LM head and embeddings are one matrix, for which T5's config is not enough.

    For T5 and mT5, transformers 5 always sets `tie_word_embeddings` to true, and then unties models whose checkpoint
    holds two matrices. If the weights are not at hand, the file of an older transformers still says so; in one written
    by transformers 5, models with two matrices (v1.1, T0, Flan) are those that do not scale the decoder's outputs.
    """
    names = _weight_names(directory)
    if names and config.is_encoder_decoder:
        return "lm_head.weight" not in names or "shared.weight" not in names
    if as_written.get("tie_word_embeddings") is False or as_written.get("scale_decoder_outputs") is False:
        return False
    return config.get_text_config(decoder=True).tie_word_embeddings


def _weight_names(directory: Path) -> set[str]:
    """The names of all tensors in a directory's safetensors files, read from their headers."""
    names: set[str] = set()
    for file in directory.glob("*.safetensors") if directory.is_dir() else []:
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names
