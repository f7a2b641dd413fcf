"""A rollout: everything that the update reads, as tensors that can be cut into micro-batches."""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rlkd_trl.models.generation import Completions
from rlkd_trl.ops.masking import last_token

# What the first one or two dimensions of a field's tensors stand for, which says how a micro-batch is cut from them.
_PROMPTS = {"extent": "prompts"}  # [P, ...]
_COMPLETIONS = {"extent": "completions"}  # [B, ...]
_TOKENS = {"extent": "tokens"}  # [B, T, ...]
_STATES = {"extent": "states"}  # [B, T+1, ...]: the tokens' states, and the one after the last token


@dataclass(frozen=True)
class Rollout:
    """B = P · K completions of this device's P prompts; the K of a prompt are next to each other.

    loss_mask_BT: True on tokens that enter the loss: all real ones, unless truncated completions are masked.
    support_BTk: with top_k, the ids that each token was sampled from. teacher_states: each scorer's hidden states that
    predict the completion's tokens, `[B, T, D']`. teacher_shares: each scorer's share of their mean, `[B, 1]`, where
    that differs by example. span_logps, span_ends: with teachers of other tokenizers, each scorer's log p of the
    common spans, at each span's last token, and the last token of each token's span. old_logps_BT, old_values_BT1: of
    the policy and critic that sampled; if old_logps_BT is None, the update uses its own. rewards_BT: per token, with
    the penalties for KL and truncation; completion_rewards_BT: the part of them that a completion earns once, on its
    last token. potentials_BT1: the teacher's V. importance_BT: the weight of each token's loss, for samples of a
    mixture. advantages_BT, and with a critic returns_BT, come from the advantage step; returns_BT and old_values_BT1
    are in the critic's normalised units. kept_B: False on completions that are left out of the loss and of all
    statistics (see `dropping`); None leaves out none.
    """

    prompt_ids_PS: Tensor = field(metadata=_PROMPTS)
    prompt_mask_PS: Tensor = field(metadata=_PROMPTS)
    prompt_index_B: Tensor = field(metadata=_COMPLETIONS)
    completion_ids_BT: Tensor = field(metadata=_TOKENS)
    completion_mask_BT: Tensor = field(metadata=_TOKENS)
    loss_mask_BT: Tensor = field(metadata=_TOKENS)
    ended_B: Tensor = field(metadata=_COMPLETIONS)
    support_BTk: Tensor | None = field(default=None, metadata=_TOKENS)
    teacher_states: list[Tensor] | None = field(default=None, metadata=_TOKENS)
    teacher_shares: list[Tensor] | None = field(default=None, metadata=_COMPLETIONS)
    span_logps: list[Tensor] | None = field(default=None, metadata=_TOKENS)
    span_ends: list[Tensor] | None = field(default=None, metadata=_TOKENS)
    old_logps_BT: Tensor | None = field(default=None, metadata=_TOKENS)
    old_values_BT1: Tensor | None = field(default=None, metadata=_STATES)
    rewards_BT: Tensor | None = field(default=None, metadata=_TOKENS)
    completion_rewards_BT: Tensor | None = field(default=None, metadata=_TOKENS)
    potentials_BT1: Tensor | None = field(default=None, metadata=_STATES)
    importance_BT: Tensor | None = field(default=None, metadata=_TOKENS)
    advantages_BT: Tensor | None = field(default=None, metadata=_TOKENS)
    returns_BT: Tensor | None = field(default=None, metadata=_TOKENS)
    kept_B: Tensor | None = field(default=None, metadata=_COMPLETIONS)

    @classmethod
    def of(
        cls,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        prompt_index_B: Tensor,
        completions: Completions,
        *,
        mask_truncated: bool,
    ) -> "Rollout":
        mask_BT = completions.mask_BT
        loss_mask_BT = mask_BT & completions.ended_B[:, None] if mask_truncated else mask_BT
        return cls(
            prompt_ids_PS,
            prompt_mask_PS,
            prompt_index_B,
            completions.ids_BT,
            mask_BT,
            loss_mask_BT,
            completions.ended_B,
            completions.support_BTk,
            old_logps_BT=completions.logps_BT,
            old_values_BT1=completions.values_BT1,
        )

    def with_(self, **tensors: Tensor | list[Tensor] | None) -> "Rollout":
        """A copy with some fields set."""
        return replace(self, **tensors)

    def micro_batch(self, index: int, size: int) -> "Rollout":
        """Completions `index · size` to `(index + 1) · size` and their prompts, cut to the longest completion."""
        rows = slice(index * size, (index + 1) * size)
        prompt_index_b = self.prompt_index_B[rows]
        first, last = int(prompt_index_b[0]), int(prompt_index_b[-1])
        longest = int(self.completion_mask_BT[rows].sum(dim=1).max())
        part = {
            "prompts": slice(first, last + 1),
            "completions": rows,
            "tokens": (rows, slice(longest)),
            "states": (rows, slice(longest + 1)),
        }
        cut = {}
        for item in fields(self):
            value, index = getattr(self, item.name), part[item.metadata["extent"]]
            if value is not None:
                is_list = isinstance(value, list)
                cut[item.name] = [tensor[index] for tensor in value] if is_list else value[index]
        return replace(Rollout(**cut), prompt_index_B=prompt_index_b - first)

    def dropping(self, kept_B: Tensor) -> "Rollout":
        """The rollout without the completions where `kept_B` is False; the shapes stay the same.

        Each of them is replaced by a kept completion, of the same prompt if there is one, otherwise together with the
        prompt. These stand-ins are left out of the loss; with them the update's forward pass reads no number that is
        not finite. If no completion is kept, all floating-point numbers become 0.
        """
        dropped = replace(self, loss_mask_BT=self.loss_mask_BT & kept_B[:, None], kept_B=kept_B)
        if not kept_B.any():
            numbers = {
                item.name: tensors
                for item in fields(self)
                if (tensors := getattr(self, item.name)) is not None
                and (tensors[0] if isinstance(tensors, list) else tensors).is_floating_point()
            }
            return replace(dropped, **{name: _zeros(tensors) for name, tensors in numbers.items()})
        prompt_index_B = self.prompt_index_B
        any_kept = int(kept_B.nonzero()[0])
        source_B = torch.arange(len(kept_B), device=kept_B.device)
        source_P = torch.arange(len(self.prompt_ids_PS), device=kept_B.device)
        for b in (~kept_B).nonzero()[:, 0].tolist():
            siblings = (kept_B & (prompt_index_B == prompt_index_B[b])).nonzero()[:, 0]
            source_B[b] = siblings[0] if len(siblings) else any_kept
            source_P[prompt_index_B[b]] = prompt_index_B[source_B[b]]
        stand_ins = {}
        for item in fields(self):
            tensors = getattr(self, item.name)
            if tensors is None or item.name in ("prompt_index_B", "loss_mask_BT", "kept_B"):
                continue
            index = source_P if item.metadata == _PROMPTS else source_B
            listed = tensors if isinstance(tensors, list) else [tensors]
            chosen = [tensor[index.to(tensor.device)] for tensor in listed]
            stand_ins[item.name] = chosen if isinstance(tensors, list) else chosen[0]
        return replace(dropped, **stand_ins)

    @property
    def counted_BT(self) -> Tensor:
        """The tokens that statistics are taken over: the real ones of completions that are kept."""
        mask_BT = self.completion_mask_BT
        return mask_BT if self.kept_B is None else mask_BT & self.kept_B[:, None]

    @property
    def counted_B(self) -> Tensor:
        """The completions that statistics are taken over."""
        return torch.ones_like(self.ended_B) if self.kept_B is None else self.kept_B

    @property
    def completions(self) -> Completions:
        return Completions(self.completion_ids_BT, self.completion_mask_BT, self.ended_B)

    def policy_inputs(self) -> dict[str, Tensor]:
        """The arguments of the policy's forward pass."""
        inputs = {
            "prompt_ids_PS": self.prompt_ids_PS,
            "prompt_mask_PS": self.prompt_mask_PS,
            "prompt_index_B": self.prompt_index_B,
            "completion_ids_BT": self.completion_ids_BT,
            "completion_mask_BT": self.completion_mask_BT,
        }
        return inputs if self.support_BTk is None else {**inputs, "support_BTk": self.support_BTk}

    def truncated_last_token_BT(self) -> Tensor:
        """True at the last token of each truncated completion."""
        return last_token(self.completion_mask_BT) & ~self.ended_B[:, None]


def _zeros(tensors: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [torch.zeros_like(tensor) for tensor in tensors] if isinstance(tensors, list) else torch.zeros_like(tensors)
