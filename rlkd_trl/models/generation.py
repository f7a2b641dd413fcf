"""Sampling completions: K per prompt, the prompt read once, each completion with random numbers of its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd_trl.errors import InputError
from rlkd_trl.models.backbone import Backbone
from rlkd_trl.models.sharding import largest_of_all
from rlkd_trl.ops.lm_head import mixture_log_probs
from rlkd_trl.ops.masking import completion_mask, masked, state_mask

# Finished rows leave the batch when they are more than this share of it; not one by one, as that copies the cache.
_DROP_FINISHED_SHARE = 0.25
_BLOCK = 128  # ids per block in `invert_distribution`; T5's 32,128 ids are 251 blocks


@dataclass(frozen=True)
class Completions:
    """B completions of at most T tokens.

    ids_BT: token ids, padded with the pad id. mask_BT: True up to and including the first EOS. ended_B: whether there
    is an EOS. support_BTk: with top-k sampling, the k ids that each token was sampled from; meaningless behind the
    mask. logps_BT: log-probabilities of the tokens under the distribution that they were drawn from, 0 behind the
    mask. values_BT1: a value of each token's state and of the one after the last token of a completion that has not
    ended, `[B, T+1]`, 0 elsewhere. Both float32, and None where they were not asked for.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    ended_B: Tensor
    support_BTk: Tensor | None = None
    logps_BT: Tensor | None = None
    values_BT1: Tensor | None = None

    def rows(self, indices: list[int]) -> "Completions":
        """Those of these indices, in their order, no wider than their longest."""
        width = int(self.mask_BT[indices].sum(dim=1).max())

        def part(tensor: Tensor | None, width: int) -> Tensor | None:
            return None if tensor is None else tensor[indices, :width]

        return Completions(
            ids_BT=self.ids_BT[indices, :width],
            mask_BT=self.mask_BT[indices, :width],
            ended_B=self.ended_B[indices],
            support_BTk=part(self.support_BTk, width),
            logps_BT=part(self.logps_BT, width),
            values_BT1=part(self.values_BT1, width + 1),
        )


@dataclass(frozen=True)
class MixedWith:
    """A teacher whose distribution is mixed with the student's: it reads its own prompts and the same completions.

    Completion b continues the teacher's prompt `prompt_index_B[b]`, padded on its backbone's side. `weight` is the
    teacher's share of the mixture, 0 to 1. Model and tensors are on the student's device.

    Raises:
        InputError: `weight` is out of range.
    """

    backbone: Backbone
    prompt_ids_PS: Tensor
    prompt_mask_PS: Tensor
    prompt_index_B: Tensor
    weight: float

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise InputError(f"The teacher's weight in a mixture is from 0 to 1; got {self.weight}.")


class _Reader:
    """A model and what it has read: one row for each completion that is still being decoded.

    precision: returns the context manager in which the model computes.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt_ids_PS: Tensor,
        prompt_mask_PS: Tensor,
        prompt_index_B: Tensor,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.backbone, self._precision = backbone, precision
        with precision():
            self.prefix = backbone.prefill(prompt_ids_PS, prompt_mask_PS).select(prompt_index_B)

    @property
    def state_bD(self) -> Tensor:
        """The states in which each row's next token is chosen."""
        return self.prefix.hidden_B1D[:, 0]

    def next_logits(self) -> Tensor:
        """Logits `[b, V]` of each row's next token, in float32."""
        with self._precision():
            return self.backbone.head(self.state_bD).float()

    def keep(self, rows_b: Tensor) -> None:
        """Drops all other rows."""
        self.prefix = self.prefix.select(rows_b)

    def read(self, token_b: Tensor) -> None:
        """Reads one more token per row."""
        with self._precision():
            self.backbone.extend(self.prefix, token_b[:, None])


@torch.no_grad()
def sample_completions(
    backbone: Backbone,
    prompt_ids_PS: Tensor,
    prompt_mask_PS: Tensor,
    prompt_index_B: Tensor,
    *,
    max_completion_length: int,
    eos_ids: list[int],
    pad_id: int,
    forbidden_V: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    uniforms_BT: Tensor | None = None,
    mixed_with: MixedWith | None = None,
    value_of_states: Callable[[Tensor], Tensor] | None = None,
) -> Completions:
    """Completion b of prompt `prompt_index_B[b]`, token by token, from softmax(z / temperature) over allowed ids.

    Each token is drawn by inverting the cumulative distribution at `uniforms_BT[b, t]` in [0, 1). So a completion
    depends on its own random numbers alone, not on the rest of the batch, on the process it is sampled in, or on which
    others have finished. With `top_k`, it is drawn from the k likeliest allowed ids, renormalised; with `mixed_with`,
    from the mixture of both models at this temperature (see `mixture_log_probs`). Without `uniforms_BT`, decoding is
    greedy, and there are no log-probabilities. With a sharded model, all processes call this together, and decode
    until the last of them has finished.

    value_of_states: from the states `[b, D]` in which tokens are chosen to their values `[b]`. With it the last token
    of completions that have not ended is read too.

    Raises:
        InputError: `top_k` with `mixed_with`.
    """
    if top_k and mixed_with is not None:
        raise InputError(
            f"top_k = {top_k} does not go with a mixture: top-k samples are weighted over the student's k likeliest "
            "tokens, and the teacher's need not be among them. Set top_k = 0."
        )
    readers = [_Reader(backbone, prompt_ids_PS, prompt_mask_PS, prompt_index_B)]
    if mixed_with is not None:
        prompts = (mixed_with.prompt_ids_PS, mixed_with.prompt_mask_PS, mixed_with.prompt_index_B)
        # The teacher computes in its own dtype, also where the student computes under autocast.
        without_autocast = partial(torch.autocast, prompt_ids_PS.device.type, enabled=False)
        readers.append(_Reader(mixed_with.backbone, *prompts, without_autocast))
    sharded = any(reader.backbone.is_sharded for reader in readers)
    batch_size, device = prompt_index_B.shape[0], prompt_ids_PS.device
    eos_E = torch.tensor(eos_ids, device=device)
    ids_BT = torch.full((batch_size, max_completion_length), pad_id, device=device)
    support_BTk = torch.zeros(batch_size, max_completion_length, top_k, dtype=torch.long, device=device)
    logps_BT = torch.zeros(batch_size, max_completion_length, device=device)
    values_BT1 = torch.zeros(batch_size, max_completion_length + 1, device=device)
    row_b = torch.arange(batch_size, device=device)  # the rows still being decoded
    alive_b = torch.ones(batch_size, dtype=torch.bool, device=device)
    for t in range(max_completion_length):
        logits_bV = _next_logits(readers, mixed_with, forbidden_V, temperature)
        if value_of_states is not None:
            values_BT1[row_b, t] = value_of_states(readers[0].state_bD)
        if top_k:
            likeliest = logits_bV.topk(top_k, dim=-1)
            support_BTk[row_b, t] = likeliest.indices
            logits_bV = torch.full_like(logits_bV, -torch.inf).scatter(-1, likeliest.indices, likeliest.values)
        if uniforms_BT is None:
            token_b = logits_bV.argmax(dim=-1)
        else:
            token_b, logps_BT[row_b, t] = _drawn(logits_bV, temperature, uniforms_BT[row_b, t])
        token_b = torch.where(alive_b, token_b, pad_id)
        ids_BT[row_b, t] = token_b
        alive_b = alive_b & ~torch.isin(token_b, eos_E)
        finished = int((~alive_b).sum())
        all_finished = finished == len(row_b)
        if sharded:
            all_finished = largest_of_all(int(not all_finished), device) == 0
        if all_finished or t == max_completion_length - 1:
            break
        # A batch that has finished decodes on while those of other processes have not.
        if _DROP_FINISHED_SHARE * len(row_b) < finished < len(row_b):
            keep = alive_b.nonzero()[:, 0]
            row_b, token_b, alive_b = row_b[keep], token_b[keep], alive_b[keep]
            for reader in readers:
                reader.keep(keep)
        for reader in readers:
            reader.read(token_b)
    if value_of_states is not None and (readers[0].backbone.is_sharded or alive_b.any()):
        readers[0].read(token_b)
        values_BT1[row_b, t + 1] = value_of_states(readers[0].state_bD)
    mask_BT, ended_B = completion_mask(ids_BT[:, : t + 1], eos_ids)
    longest = int(mask_BT.sum(dim=1).max())
    ids_BT, mask_BT = ids_BT[:, :longest], mask_BT[:, :longest]
    return Completions(
        torch.where(mask_BT, ids_BT, pad_id),
        mask_BT,
        ended_B,
        support_BTk[:, :longest] if top_k else None,
        None if uniforms_BT is None else masked(logps_BT[:, :longest], mask_BT),
        None if value_of_states is None else masked(values_BT1[:, : longest + 1], state_mask(mask_BT, ended_B)),
    )


def _next_logits(
    readers: list[_Reader], mixed_with: MixedWith | None, forbidden_V: Tensor, temperature: float
) -> Tensor:
    """z `[b, V]`, −inf on forbidden ids, such that softmax(z / temperature) is the distribution to draw from."""
    logits_bV, *teacher_logits = [reader.next_logits() for reader in readers]
    if mixed_with is None:
        return logits_bV.masked_fill_(forbidden_V, -torch.inf)  # in place, as nothing else reads these logits
    return temperature * mixture_log_probs(
        logits_bV, *teacher_logits, weight=mixed_with.weight, forbidden_V=forbidden_V, temperature=temperature
    )


def _drawn(logits_bV: Tensor, temperature: float, uniforms_b: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `[b]` drawn from softmax(logits / temperature), and their log-probabilities."""
    probabilities_bV = (logits_bV / temperature).softmax(dim=-1)
    token_b = invert_distribution(probabilities_bV, uniforms_b)
    return token_b, probabilities_bV.gather(-1, token_b[:, None])[:, 0].log()


def invert_distribution(probabilities_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Ids v with Σ_{u<v} p_u ≤ uniform < Σ_{u≤v} p_u; an id of probability 0 is never returned.

    First the block of ids that holds v is found, then v in it: sums of blocks are cheaper than running sums over V.
    """
    B, V = probabilities_BV.shape
    blocks_BNn = F.pad(probabilities_BV, (0, -V % _BLOCK)).view(B, -1, _BLOCK)
    sums_BN = blocks_BNn.sum(dim=-1)
    block_B, rest_B = _search(sums_BN, uniforms_B.to(sums_BN) * sums_BN.sum(dim=-1))
    inside_B, _ = _search(blocks_BNn[torch.arange(B, device=block_B.device), block_B], rest_B)
    return block_B * _BLOCK + inside_B


def _search(weights_BN: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first n with target < Σ_{m≤n} w_m, or the last with w_n > 0; and target − Σ_{m<n} w_m."""
    # On GPUs the entries of a cumulative sum are rounded independently: it may fall, or rise where a weight is 0.
    sums_BN = torch.where(weights_BN > 0, weights_BN.cumsum(dim=-1), 0).cummax(dim=-1).values
    last_B1 = (sums_BN < sums_BN[:, -1:]).sum(dim=-1, keepdim=True)
    n_B1 = torch.searchsorted(sums_BN, target_B[:, None], right=True).minimum(last_B1)
    before_B1 = F.pad(sums_BN, (1, 0)).gather(-1, n_B1)
    return n_B1[:, 0], target_B - before_B1[:, 0]
