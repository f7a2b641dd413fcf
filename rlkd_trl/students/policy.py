"""The student as a policy: what it samples, the log-probabilities of that, and a value head for PPO."""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from rlkd_trl.errors import InputError
from rlkd_trl.models.adapters import merged
from rlkd_trl.models.backbone import Result, backbone_of
from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.models.checkpoint_weights import check_complete
from rlkd_trl.models.generation import Completions, MixedWith, sample_completions
from rlkd_trl.models.precision import computes_in_float32
from rlkd_trl.models.rotary import angles_change_with_length
from rlkd_trl.models.sharding import largest_of_all, loading_shards
from rlkd_trl.models.verification import verify
from rlkd_trl.models.vocabulary import base_of, eos_token_ids, forbidden_ids_of, padding_id
from rlkd_trl.ops.lm_head import (
    BLOCKS_IN_A_SLICE,
    TokenLogProbs,
    map_head_slices,
    slices_needed,
    support_log_probs,
    token_log_probs,
)
from rlkd_trl.ops.masking import pad_columns
from rlkd_trl.settings.ranges import Temperature, check_values

CRITICS = ("none", "shared", "separate")
_VALUE_HEAD_FILE = "value_head.safetensors"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

# A function of (hidden_ND, head, head_parameters): the first arguments of `ops.divergences.sliced_divergence`.
FunctionOfStates = Callable[[Tensor, Callable[[Tensor], Tensor], list[nn.Parameter]], Result]


class PolicyOutput(NamedTuple):
    """What a forward pass says of each token, differentiable.

    logps_BT, entropy_BT: in nats, float32, 0 behind the mask; the entropy is None if it was not requested. values:
    V^π(s_1 .. s_{T+1}), `[B, T+1]`; `[B, T]` without the final value; None without a critic.
    """

    logps_BT: Tensor
    entropy_BT: Tensor | None
    values: Tensor | None


class Policy(nn.Module):
    """π(y_t | s_t) = softmax(z_t / temperature) over the ids that may be sampled.

    There is one distribution: `sample` draws from it and `forward` returns its log-probabilities. Dropout is off in
    both, because it would add noise to the ratio of new to old policy. Completions sampled with `top_k` come with the
    k ids that each token was drawn from; given these, `forward` returns log-probabilities over them.

    Args:
        model: The student, encoder-decoder or decoder-only.
        critic: "none"; "shared", a linear value head on the decoder's states; or "separate", the same head on a copy
            of the student's body with weights of its own. The head starts at zero.
        writer: How prompts are written for the student, and with which tokenizer: by default `processing_class`, with
            its chat template if it has one.

    Raises:
        InputError: Unknown critic, unsupported architecture, no EOS, or temperature out of range.
    """

    accepts_loss_kwargs = False  # else `Trainer` takes `**kwargs` for a loss that is divided over the whole step

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        critic: str = "none",
        writer: PromptWriter | None = None,
    ):
        super().__init__()
        if critic not in CRITICS:
            raise InputError(f"Unknown critic {critic!r}; choose one of: {', '.join(CRITICS)}.")
        check_values({"temperature": temperature}, {"temperature": Temperature}, prefix="")
        self.model = model
        self.temperature = temperature
        self.writer = PromptWriter(processing_class) if writer is None else writer
        processing_class = self.writer.processing_class
        self.eos_ids = eos_token_ids(model, processing_class)
        self.pad_id = padding_id(processing_class)
        self.backbone = backbone_of(model)
        verify(self.backbone)
        forbidden_V = forbidden_ids_of(model, processing_class)
        self.register_buffer("forbidden_V", forbidden_V.to(self.backbone.device), persistent=False)
        self.critic_model = copy_of_trained(model) if critic == "separate" else None
        self.critic_backbone = backbone_of(self.critic_model) if critic == "separate" else self.backbone
        self.value_head = None
        if critic != "none":
            self.value_head = nn.Linear(self.backbone.hidden_size, 1, device=model.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        if self.critic_model is not None:
            # Only the critic's states are used. Its head is frozen, as gradient reduction would wait for its gradient.
            head = self.critic_model.get_output_embeddings()
            if head.weight is not self.critic_model.get_input_embeddings().weight:
                head.requires_grad_(False)
        self.train()

    @property
    def config(self):
        return self.model.config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """`Trainer` calls it with `gradient_checkpointing`. Raises `InputError` as `Backbone.recompute_layers`."""
        for backbone in {self.backbone, self.critic_backbone}:
            backbone.recompute_layers()

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.24

    def critic_parameters(self) -> list[nn.Parameter]:
        """The value head's parameters, and the separate critic's."""
        modules = [module for module in (self.value_head, self.critic_model) if module is not None]
        return [parameter for module in modules for parameter in module.parameters()]

    def train(self, mode: bool = True) -> "Policy":
        """Keeps dropout off, whatever `mode` is."""
        return super().train(False)

    def forward(
        self, *args: Tensor, function_of_states: FunctionOfStates | None = None, **kwargs
    ) -> PolicyOutput | Result:
        """`token_statistics` of completions; or, with `function_of_states`, `of_states`, with the same arguments.

        Both go through `forward`, as it is the only call that distributed wrappers, engines and autocast intercept.
        """
        if function_of_states is not None:
            return self.of_states(function_of_states, *args, **kwargs)
        return self.token_statistics(*args, **kwargs)

    def token_statistics(
        self,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
        support_BTk: Tensor | None = None,
        *,
        with_entropy: bool = True,
        with_final_value: bool = True,
        precise: bool = False,
    ) -> PolicyOutput:
        """Log-probabilities, entropies and values of completions; each prompt is encoded once, gradients included.

        With `support_BTk`, log-probabilities and entropies are of π restricted to these ids (`support_log_probs`).
        Losses need values at tokens only: without the final value, V(s_{T+1}), the model does not read the last token.
        precise: for losses that read 1 − π (see `token_log_probs`); not with `support_BTk` or the entropy.
        """
        texts = (prompt_ids_PS, prompt_mask_PS, completion_ids_BT, prompt_index_B)
        need_final_state = with_final_value and self.value_head is not None and self.critic_model is None
        states_BTD = self.backbone.completion_states(*texts, with_final_state=need_final_state)
        states_ND = states_BTD[:, : completion_ids_BT.shape[1]][completion_mask_BT]
        per_token = [completion_ids_BT] if support_BTk is None else [completion_ids_BT, support_BTk]
        statistics = self._head_statistics(
            states_ND,
            *(tensor[completion_mask_BT] for tensor in per_token),
            with_entropy=with_entropy,
            precise=precise,
        )
        logps_BT, entropy_BT = (
            None
            if values_N is None
            else torch.zeros(completion_mask_BT.shape, device=values_N.device).masked_scatter(
                completion_mask_BT, values_N
            )
            for values_N in statistics
        )
        if self.value_head is None:
            return PolicyOutput(logps_BT, entropy_BT, None)
        if self.critic_model is not None:
            del states_BTD, states_ND  # their memory is needed for the critic's states
            states_BTD = self.critic_backbone.completion_states(*texts, with_final_state=with_final_value)
        return PolicyOutput(logps_BT, entropy_BT, self._values(states_BTD))

    def _values(self, states: Tensor) -> Tensor:
        """The critic's values `[...]` of states `[..., D]`, in float32 whatever else is computed in."""
        with torch.autocast(states.device.type, enabled=False):
            return self.value_head(states.to(self.value_head.weight.dtype))[..., 0].float()

    def of_states(
        self,
        function: FunctionOfStates,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        prompt_index_B: Tensor,
        completion_ids_BT: Tensor,
        completion_mask_BT: Tensor,
    ) -> Result:
        """`function(states_ND, head, head_parameters)`, of the N states that predict real tokens.

        For losses over the whole vocabulary; a sharded head is whole while `function` runs.
        """
        states_BTD = self.backbone.completion_states(
            prompt_ids_PS, prompt_mask_PS, completion_ids_BT, prompt_index_B, with_final_state=False
        )
        return self.backbone.through_whole_head(
            lambda states_ND: function(states_ND, self.backbone.head, self.backbone.head_parameters()),
            states_BTD[completion_mask_BT],
        )

    def _head_statistics(
        self, states_ND: Tensor, *per_token: Tensor, with_entropy: bool, precise: bool
    ) -> list[Tensor | None]:
        """`_token_statistics` of the N states, in slices of positions."""
        backbone, num_slices = self.backbone, None
        with_gradient = torch.is_grad_enabled()
        if with_gradient and backbone.is_sharded:
            # ZeRO-3 gathers the head for every slice, also in the backward pass, so all processes need as many slices.
            needed = slices_needed(states_ND.shape[0], backbone.vocab_size)
            num_slices = largest_of_all(needed, states_ND.device)

        def statistics() -> list[Tensor | None]:
            return map_head_slices(
                backbone.head,
                states_ND,
                partial(self._token_statistics, with_entropy=with_entropy, precise=precise),
                *per_token,
                vocab_size=backbone.vocab_size,
                max_elements=backbone.max_slice_elements,
                num_slices=num_slices,
            )

        return statistics() if with_gradient else backbone.with_whole_head(statistics)

    def _token_statistics(
        self,
        logits_NV: Tensor,
        chosen_N: Tensor,
        support_Nk: Tensor | None = None,
        *,
        with_entropy: bool,
        precise: bool,
    ) -> TokenLogProbs:
        if support_Nk is not None:
            return support_log_probs(logits_NV, chosen_N, support_Nk, temperature=self.temperature)
        slice_elements = self.backbone.max_slice_elements
        return token_log_probs(
            logits_NV,
            chosen_N,
            temperature=self.temperature,
            forbidden_V=self.forbidden_V,
            entropy=with_entropy,
            overwrite=True,
            precise=precise,
            block_elements=None if slice_elements is None else slice_elements // BLOCKS_IN_A_SLICE,
        )

    def sample(
        self,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        prompt_index_B: Tensor,
        *,
        max_completion_length: int,
        uniforms_BT: Tensor | None,
        top_k: int = 0,
        mixed_with: MixedWith | None = None,
        with_values: bool = False,
    ) -> Completions:
        """One completion per entry of `prompt_index_B`; greedy without `uniforms_BT` (see `sample_completions`).

        With `mixed_with`, tokens are drawn from the mixture of π and a teacher's distribution. with_values: of the
        shared critic, too.

        Raises:
            InputError: `with_values`, and there is no critic that shares the student's weights.
        """
        if with_values and (self.value_head is None or self.critic_model is not None):
            raise InputError("Values with samples need a critic that shares the student's weights: critic='shared'.")
        return sample_completions(
            self.backbone,
            prompt_ids_PS,
            prompt_mask_PS,
            prompt_index_B,
            max_completion_length=max_completion_length,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            forbidden_V=self.forbidden_V,
            temperature=self.temperature,
            top_k=top_k,
            uniforms_BT=uniforms_BT,
            mixed_with=mixed_with,
            value_of_states=self._values if with_values else None,
        )

    def samples_as_it_reads(self) -> bool:
        """Whether sampling tells what reading the samples would tell, log-probabilities and values, but for rounding.

        So it is in float32, where the two differ by 1e-6 to 1e-4 nats a token. In 16 bits, or TF32, it can be some
        hundredths: enough for a KL penalty to see a difference between equal models. A quantised student computes in
        another precision than its other weights have, a critic with weights of its own does not sample, and some
        rotary positions turn by other angles in a longer text than when its first tokens were sampled.
        """
        model = base_of(self.model)
        return computes_in_float32(model) and self.critic_model is None and not angles_change_with_length(model.config)

    def save_pretrained(self, output_dir: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes a checkpoint that plain transformers loads, and a file of its own for the critic.

        `state_dict`, if given, is written instead of the weights in memory: a sharded run gathers one. An earlier
        checkpoint's critic or adapters in the directory are removed, as they would be loaded with this one.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        student = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
        self.model.save_pretrained(output_dir, state_dict=student)
        base_of(self.model).generation_config.save_pretrained(output_dir)  # PEFT leaves it out
        of_critic = [name for name in state_dict if not name.startswith("model.")]
        if isinstance(self.critic_model, PeftModel):  # its frozen weights are the student's
            trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
            of_critic = [name for name in of_critic if name in trained]
        critic = {name: state_dict[name].contiguous().clone() for name in of_critic}
        if critic:
            save_file(critic, Path(output_dir) / _VALUE_HEAD_FILE)
        remove_files_of_others(output_dir, has_critic=bool(critic), has_adapters=isinstance(self.model, PeftModel))

    def merge_adapters(self) -> None:
        """Makes the adapters' changes part of the student's own weights. Raises `InputError` as `merged`."""
        self.model = merged(self.model)

    def load_pretrained(self, checkpoint_dir: str | Path) -> None:
        """Weights of a checkpoint that `save_pretrained` wrote, into the model (or the adapters) in memory.

        Raises:
            InputError: There is a critic, and the checkpoint has none.
        """
        if isinstance(self.model, PeftModel):
            set_peft_model_state_dict(self.model, load_peft_weights(str(checkpoint_dir)))
        else:
            with loading_shards(None):  # loads the whole checkpoint also where ZeRO-3 shards the student
                saved, info = type(self.model).from_pretrained(
                    checkpoint_dir, dtype=self.model.dtype, output_loading_info=True
                )
            check_complete(info["missing_keys"], f"The student in {checkpoint_dir}")
            self.model.load_state_dict(saved.state_dict())
        if self.value_head is None:
            return
        critic_file = Path(checkpoint_dir) / _VALUE_HEAD_FILE
        if not critic_file.is_file():
            raise InputError(f"{checkpoint_dir} has no {_VALUE_HEAD_FILE}: it is not of a student with a critic.")
        self.load_state_dict(load_file(critic_file), strict=False)


def log_probs_in_batches(policy: Policy, batches: Iterable[Mapping[str, Tensor]], width: int) -> Tensor:
    """log π(y_t | s_t), `[B, width]`; each batch holds the arguments of `Policy.token_statistics`."""
    outputs = (policy(**batch, with_entropy=False, with_final_value=False) for batch in batches)
    return pad_columns([output.logps_BT for output in outputs], width)


def remove_files_of_others(checkpoint_dir: str | Path, *, has_critic: bool, has_adapters: bool) -> None:
    """Removes the files of a critic, or of adapters, from the checkpoint of a student that has none."""
    names = () if has_critic else (_VALUE_HEAD_FILE,)
    names += () if has_adapters else _ADAPTER_FILES
    for name in names:
        (Path(checkpoint_dir) / name).unlink(missing_ok=True)


def copy_of_trained(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """A copy that shares with the model what is not trained: with adapters it takes no more memory than these.

    Not where ZeRO-3 is to shard the model, since a shard belongs to one engine.
    """
    shared = {}
    if isinstance(model, PeftModel) and not is_deepspeed_zero3_enabled():
        shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, shared)


def frozen_copy(policy: Policy, processing_class: PreTrainedTokenizerBase) -> Policy:
    """A copy of the student as it is in memory now, without critic or gradients: the reference of the KL penalty."""
    model = copy_of_trained(policy.model).requires_grad_(False)
    return Policy(model, processing_class, temperature=policy.temperature, writer=policy.writer)
