"""One small interface over encoder-decoder and decoder-only models, built around sharing a prompt.

K completions of a prompt have the prompt in common. Both families compute that common part once, in `prefill`, and
keep it as a key/value cache: the cross-attention keys and values of an encoder-decoder model (whose decoder has then
read its start tokens), the self-attention keys and values of a decoder-only one. `Prefix.select` gives each completion
its prompt: just the index of the prompt's rows of the cache (see `shared_attention`), or a copy of them where the
model's attention cannot be replaced. `extend` then reads completion tokens. Sampling uses these three calls.

Teacher scoring and the training forward pass read whole completions with `completion_states`. It makes the same calls,
except that an encoder-decoder model with shared cross-attention reads a completion in one call, without a cache.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from rlkd_trl.errors import InputError
from rlkd_trl.models.fusion import FusedParts
from rlkd_trl.models.generation_config import completion_start_ids
from rlkd_trl.models.logit_scale import scaled_logits
from rlkd_trl.models.prefix import Prefix
from rlkd_trl.models.private_apis import execution_device, whole_shape
from rlkd_trl.models.recomputation import Context, RecomputedLayers, check_cache
from rlkd_trl.models.sharding import is_sharded
from rlkd_trl.models.shared_attention import (
    PromptRows,
    SharedPrompts,
    can_share,
    can_share_self_attention,
    with_shared_prompts,
)

Result = TypeVar("Result")

# T5's descendants that may multiply the decoder's output by d_model**-0.5 before the LM head. In transformers 5, t5
# and longt5 do as `scale_decoder_outputs` says, umt5 and switch_transformers as `tie_word_embeddings`, mt5 never.
_SCALED_HEAD_MODEL_TYPES = {"t5", "longt5", "umt5", "switch_transformers"}
# Its attention wants one row of cross-attention keys for each row of queries, unless the keys come from a cache.
_SHARES_CACHED_ONLY = {"umt5"}


@cache
def _cache_argument(reader: type[nn.Module]) -> str:
    """By which name a model takes its cache: `cache` since transformers 5.24, `past_key_values` in older code."""
    return "cache" if "cache" in inspect.signature(reader.forward).parameters else "past_key_values"


class Backbone:
    """A causal continuation model: `prefill` reads prompts, `extend` reads completion tokens, `head` gives logits.

    It holds no parameters of its own: `model` is a plain `PreTrainedModel`, trained, frozen or sharded by others.
    During a call, and only then, its norms and GELUs are replaced by equal, faster ones (`models.fusion`). With a
    sharded model every method is a collective operation (see `models.sharding`): all processes call it together.
    """

    padding_side: str
    # How many logits may exist at a time in passes without gradients; None: as many as is fast on the device.
    max_slice_elements: int | None = None

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._fused = FusedParts(model)
        self._recomputed: RecomputedLayers | None = None
        self._apply_head: Callable[[Tensor], Tensor] | None = None  # inside `with_whole_head`

    def recompute_layers(self) -> None:
        """From now on passes with gradients keep the layers' inputs only (see `models.recomputation`).

        Raises:
            InputError: The architecture has no layers that can be computed again.
        """
        check_cache(DynamicCache(config=self.model.config.get_text_config(decoder=True)), self.model)
        self._recomputed = RecomputedLayers(self.model)

    @contextmanager
    def _parts_in_place(self, context: Context = nullcontext) -> Iterator[None]:
        """Within it, and in `context`, the model's parts compute as they do in all calls from here."""

        @contextmanager
        def of_a_layer() -> Iterator[None]:
            with self._fused.in_place(), context():
                yield

        with of_a_layer(), nullcontext() if self._recomputed is None else self._recomputed.in_place(of_a_layer):
            yield

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.model)

    @property
    def hidden_size(self) -> int:
        """D, the width of the states that the LM head reads."""
        return whole_shape(self.model.get_output_embeddings().weight)[-1]

    def head_parameters(self) -> list[torch.nn.Parameter]:
        """The LM head's parameters; tied embeddings are among them."""
        return list(self.model.get_output_embeddings().parameters())

    @property
    def vocab_size(self) -> int:
        """V, the number of LM-head rows, padding rows included."""
        return self.model.config.get_text_config().vocab_size

    @property
    def device(self) -> torch.device:
        """The device for inputs: the weights' own, or where Accelerate brings parked weights for a call."""
        parked = execution_device(self.model) if self.model.device.type == "meta" else None
        return parked or self.model.device

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., D]`, in the model's dtype, through the model's own head path."""
        head = self._apply_head or self.model.get_output_embeddings()
        return scaled_logits(head(hidden), self.model.config.get_text_config())

    def with_whole_head(self, work: Callable[[], Result]) -> Result:
        """`work()`, inside which each process may apply a sharded model's head as often as it needs to.

        For ZeRO-3 this is one call of the head's module: it gathers the weight before `work` and drops it after. Not
        for work that needs the head's gradients.
        """
        results: list[Result] = []
        self.through_whole_head(lambda: results.append(work()))
        return results[0]

    def through_whole_head(self, work: Callable[..., Result], *states: Tensor) -> Result:
        """As `with_whole_head`, for `work(*states)` that may give gradients to the states and the head.

        Such work must compute its gradients in the forward pass (see `ops.sliced_loss`), because in the backward pass
        ZeRO-3 gathers the weight once more on every process, and no more often than that.
        """
        if not self.is_sharded:
            return work(*states)
        module = self.model.get_output_embeddings()
        self._apply_head, module.forward = module.forward, work
        try:
            return module(*states)
        finally:
            del module.forward  # the instance's, which hides the class's
            self._apply_head = None

    def prefill(self, prompt_ids_PS: Tensor, prompt_mask_PS: Tensor) -> Prefix:
        """Reads each prompt once; the rows of the prefix are the P prompts.

        Raises:
            InputError: The model uses gradient checkpointing in training mode. transformers then drops the key/value
                cache, and with it the prompt, without an error.
        """
        self._refuse_gradient_checkpointing()
        return self._prefill(prompt_ids_PS, prompt_mask_PS, tokens_at_once=1)

    def _refuse_gradient_checkpointing(self) -> None:
        if any(
            module.training and getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
        ):
            raise InputError(
                "transformers' gradient checkpointing in training mode drops what the completions of a prompt share: "
                "put the model in eval mode, or disable it, and set gradient_checkpointing in the trainer's config."
            )

    def _prefill(self, prompt_ids_PS: Tensor, prompt_mask_PS: Tensor, *, tokens_at_once: int | None) -> Prefix:
        """tokens_at_once: so many of a completion are going to be read in one call; None: each prompt has only one."""
        raise NotImplementedError

    def extend(self, prefix: Prefix, token_ids_Bt: Tensor) -> Tensor:
        """Reads t more tokens per row; returns their states `[B, t, D]` and grows the prefix in place."""
        raise NotImplementedError

    def completion_states(
        self,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        completion_ids_BT: Tensor,
        prompt_index_B: Tensor,
        *,
        with_final_state: bool = True,
    ) -> Tensor:
        """States s_1 .. s_{T+1} of each completion as `[B, T+1, D]`: position t predicts token y_t.

        Completion b continues prompt `prompt_index_B[b]`. Without `with_final_state` the last token is not read and
        the result is `[B, T, D]`. Completions are padded on the right, which a causal decoder never looks at.
        """
        self._refuse_gradient_checkpointing()
        tokens_at_once = completion_ids_BT.shape[1] if len(prompt_index_B) > len(prompt_ids_PS) else None
        prefix = self._prefill(prompt_ids_PS, prompt_mask_PS, tokens_at_once=tokens_at_once).select(prompt_index_B)
        first_B1D = prefix.hidden_B1D
        read_BT = completion_ids_BT if with_final_state else completion_ids_BT[:, :-1]
        if read_BT.shape[1] == 0:
            if not self.is_sharded:
                return first_B1D
            # Other processes may have longer completions, for which they call the decoder a second time, forward and
            # backward; this one must do so too.
            return first_B1D + 0 * self.extend(prefix, completion_ids_BT)
        return torch.cat([first_B1D, self.extend(prefix, read_BT)], dim=1)

    def own_logits(self, prompt_ids_BS: Tensor, completion_ids_BT: Tensor) -> Tensor:
        """Logits `[B, T+1, V]` by the model's own forward pass, of prompts and completions without padding."""
        with self._fused.in_place():  # for experts: with their capacity they would drop tokens that ours keep
            return self._own_logits(prompt_ids_BS, completion_ids_BT)

    def _own_logits(self, prompt_ids_BS: Tensor, completion_ids_BT: Tensor) -> Tensor:
        raise NotImplementedError


class EncoderDecoderBackbone(Backbone):
    """T5, T0, Flan-T5, mT5, UL2 and other encoder-decoder models with the same cache layout."""

    padding_side = "right"

    def head(self, hidden: Tensor) -> Tensor:
        config = self.model.config
        if config.model_type in _SCALED_HEAD_MODEL_TYPES and getattr(
            config, "scale_decoder_outputs", config.tie_word_embeddings
        ):
            hidden = hidden * config.d_model**-0.5
        logits = super().head(hidden)
        bias = getattr(self.model, "final_logits_bias", None)
        return logits if bias is None else logits + bias.squeeze(0)

    def _start_Bn(self, like_BT: Tensor) -> Tensor:
        """The decoder's start tokens, once for each row of `like_BT`."""
        return like_BT.new_tensor(completion_start_ids(self.model)).expand(len(like_BT), -1)

    def _prefill(self, prompt_ids_PS: Tensor, prompt_mask_PS: Tensor, *, tokens_at_once: int | None) -> Prefix:
        encoder_hidden_PSD = self._encode(prompt_ids_PS, prompt_mask_PS)
        shares = can_share(self.model.get_decoder())
        prefix = Prefix(
            # Without the config, whose `num_layers` is the encoder's depth, not the decoder's.
            cache=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            mask=prompt_mask_PS,
            hidden_B1D=encoder_hidden_PSD[:, :0],
            encoder_hidden_BSD=encoder_hidden_PSD,
            prompt_rows=PromptRows.one_each(prompt_ids_PS) if shares else None,
        )
        # Reading the start tokens projects the cross-attention keys and values, once per prompt.
        self.extend(prefix, self._start_Bn(prompt_ids_PS))
        return prefix

    def completion_states(
        self,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        completion_ids_BT: Tensor,
        prompt_index_B: Tensor,
        *,
        with_final_state: bool = True,
    ) -> Tensor:
        """As in the base class, but in one call of the decoder, which reads start tokens and completion together.

        Raises:
            InputError: As `prefill`.
        """
        if not can_share(self.model.get_decoder()) or self.model.config.model_type in _SHARES_CACHED_ONLY:
            inputs = (prompt_ids_PS, prompt_mask_PS, completion_ids_BT, prompt_index_B)
            return super().completion_states(*inputs, with_final_state=with_final_state)
        self._refuse_gradient_checkpointing()
        encoder_hidden_PSD = self._encode(prompt_ids_PS, prompt_mask_PS)
        start_Bn = self._start_Bn(completion_ids_BT)
        read_BT = torch.cat([start_Bn, completion_ids_BT if with_final_state else completion_ids_BT[:, :-1]], dim=1)
        prompt_rows = PromptRows.of(prompt_index_B, len(prompt_ids_PS))
        states = self._decode(read_BT, encoder_hidden_PSD, prompt_mask_PS, prompt_rows, use_cache=False)
        return states[:, start_Bn.shape[1] - 1 :]

    def extend(self, prefix: Prefix, token_ids_Bt: Tensor) -> Tensor:
        hidden_BtD = self._decode(
            token_ids_Bt,
            prefix.encoder_hidden_BSD,
            prefix.mask,
            prefix.prompt_rows,
            **{_cache_argument(type(self.model.get_decoder())): prefix.cache},
            use_cache=True,
        )
        prefix.hidden_B1D = hidden_BtD[:, -1:]
        return hidden_BtD

    def _encode(self, prompt_ids_PS: Tensor, prompt_mask_PS: Tensor) -> Tensor:
        with self._parts_in_place():
            return self.model.get_encoder()(input_ids=prompt_ids_PS, attention_mask=prompt_mask_PS).last_hidden_state

    def _decode(
        self, token_ids_Bt: Tensor, encoder_hidden: Tensor, mask: Tensor, prompt_rows: PromptRows | None, **kwargs
    ) -> Tensor:
        """States `[B, t, D]`; with `prompt_rows`, encoder states and mask have one row per prompt."""
        decoder, context = self.model.get_decoder(), nullcontext
        if prompt_rows is not None:
            mask = mask[:, None, None].bool()  # fits any number of queries; a `[P, S]` mask would be expanded to T
            kwargs["prompt_rows"], context = prompt_rows, partial(with_shared_prompts, decoder)
        with self._parts_in_place(context):
            return decoder(
                input_ids=token_ids_Bt,
                encoder_hidden_states=encoder_hidden,
                encoder_attention_mask=mask,
                **kwargs,
            ).last_hidden_state

    def _own_logits(self, prompt_ids_BS: Tensor, completion_ids_BT: Tensor) -> Tensor:
        start_Bn = self._start_Bn(completion_ids_BT)
        decoder_ids = torch.cat([start_Bn, completion_ids_BT], dim=1)
        return self.model(input_ids=prompt_ids_BS, decoder_input_ids=decoder_ids).logits[:, start_Bn.shape[1] - 1 :]


class DecoderOnlyBackbone(Backbone):
    """Llama, Qwen, GLM, GPT-2 and other decoder-only models. Prompts are padded on the left."""

    padding_side = "left"

    def _prefill(self, prompt_ids_PS: Tensor, prompt_mask_PS: Tensor, *, tokens_at_once: int | None) -> Prefix:
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        prefix = Prefix(cache=cache, mask=prompt_mask_PS[:, :0], hidden_B1D=torch.empty(0))
        self._read(prefix, prompt_ids_PS, prompt_mask_PS)
        if tokens_at_once is not None and can_share_self_attention(self.model.base_model, cache, tokens_at_once):
            prefix.cache = EncoderDecoderCache(DynamicCache(), cache)
            prefix.prompt_rows = PromptRows.one_each(prompt_ids_PS)
        return prefix

    def extend(self, prefix: Prefix, token_ids_Bt: Tensor) -> Tensor:
        if prefix.prompt_rows is None:
            return self._read(prefix, token_ids_Bt, torch.ones_like(token_ids_Bt))
        own_cache, prompts_cache = prefix.cache.self_attention_cache, prefix.cache.cross_attention_cache
        padding_PS = prefix.mask == 0
        prompts = SharedPrompts(prompts_cache, prefix.prompt_rows, padding_PS if padding_PS.any() else None)
        lengths_B = prefix.mask.sum(dim=1)[prefix.prompt_rows.prompt_index_B]
        places_t = own_cache.get_seq_length() + torch.arange(token_ids_Bt.shape[1], device=token_ids_Bt.device)
        hidden_BtD = self._states(
            token_ids_Bt,
            lengths_B[:, None] + places_t,
            own_cache,
            partial(with_shared_prompts, self.model.base_model),
            attention_mask=None,
            shared_prompts=prompts,
        )
        prefix.hidden_B1D = hidden_BtD[:, -1:]
        return hidden_BtD

    def _read(self, prefix: Prefix, token_ids_Bt: Tensor, mask_Bt: Tensor) -> Tensor:
        prefix.mask = torch.cat([prefix.mask, mask_Bt], dim=1)
        position_ids_Bt = (prefix.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -token_ids_Bt.shape[1] :]
        hidden_BtD = self._states(token_ids_Bt, position_ids_Bt, prefix.cache, attention_mask=prefix.mask)
        prefix.hidden_B1D = hidden_BtD[:, -1:]
        return hidden_BtD

    def _states(
        self, token_ids_Bt: Tensor, position_ids_Bt: Tensor, cache: Cache, context: Context = nullcontext, **kwargs
    ) -> Tensor:
        reader = self.model.base_model
        with self._parts_in_place(context):
            return reader(
                input_ids=token_ids_Bt,
                position_ids=position_ids_Bt,
                **{_cache_argument(type(reader)): cache},
                use_cache=True,
                **kwargs,
            ).last_hidden_state

    def _own_logits(self, prompt_ids_BS: Tensor, completion_ids_BT: Tensor) -> Tensor:
        ids = torch.cat([prompt_ids_BS, completion_ids_BT], dim=1)
        return self.model(input_ids=ids).logits[:, prompt_ids_BS.shape[1] - 1 :]


def backbone_of(model: PreTrainedModel | PeftModel) -> Backbone:
    """The backbone for a model's family, by `config.is_encoder_decoder`.

    A PEFT model is read through the base model that its adapters sit in.

    Raises:
        InputError: A PEFT model whose adapter is a learned prompt, which is not part of the base model.
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise InputError(f"PEFT's {model.active_peft_config.peft_type} is not supported: use LoRA or the like.")
        model = model.get_base_model()
    return EncoderDecoderBackbone(model) if model.config.is_encoder_decoder else DecoderOnlyBackbone(model)
