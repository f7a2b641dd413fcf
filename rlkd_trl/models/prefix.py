"""What a model has read of prompts and completions so far, as a key/value cache."""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

from rlkd_trl.models.shared_attention import (
    PromptRows,
)


@dataclass
class Prefix:
    """What the model has read so far, one row per sequence.

    cache: keys and values. mask: attention mask over the source tokens (encoder-decoder, `[B, S]`) or over every
    cached position (decoder-only, `[B, S+t]`). hidden_B1D: the last position's state, from which the next token is
    predicted. encoder_hidden_BSD: only for encoder-decoder models. prompt_rows: if set, mask, encoder states and the
    cross-attention cache have one row per prompt instead of one per completion, and this maps completions to them. A
    decoder-only model's cache then is of the same form: "cross-attention" has the prompts, self-attention the
    completions' own tokens, and the mask is over the prompts, `[P, S]`.
    """

    cache: Cache
    mask: Tensor
    hidden_B1D: Tensor
    encoder_hidden_BSD: Tensor | None = None
    prompt_rows: PromptRows | None = None

    def select(self, index_B: Tensor) -> "Prefix":
        """Rows `index_B`, repeats allowed: one prompt's row for each of its completions. Invalidates this prefix."""
        hidden_B1D = self.hidden_B1D[index_B]
        if self.prompt_rows is None:
            self.cache.batch_select_indices(index_B)
            encoder_hidden = None if self.encoder_hidden_BSD is None else self.encoder_hidden_BSD[index_B]
            return Prefix(self.cache, self.mask[index_B], hidden_B1D, encoder_hidden)
        self.cache.self_attention_cache.batch_select_indices(index_B)
        kept_P, prompt_index_B = self.prompt_rows.prompt_index_B[index_B].unique(return_inverse=True)
        mask, encoder_hidden = self.mask, self.encoder_hidden_BSD
        if len(kept_P) < self.prompt_rows.num_prompts:
            self.cache.cross_attention_cache.batch_select_indices(kept_P)
            mask = mask[kept_P]
            encoder_hidden = None if encoder_hidden is None else encoder_hidden[kept_P]
        return Prefix(self.cache, mask, hidden_B1D, encoder_hidden, PromptRows.of(prompt_index_B, len(kept_P)))
