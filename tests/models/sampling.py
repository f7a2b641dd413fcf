"""Samples of tiny models, and the exact distribution of a next token, from the model's own plain forward pass."""

import torch

from rlkd_trl.models.backbone import backbone_of
from rlkd_trl.models.generation import sample_completions
from rlkd_trl.models.vocabulary import forbidden_ids
from tests.models.reference import own_logits, pad_prompts
from tests.tiny_models import EOS, PAD, PADDED_VOCAB, word_tokenizer

PROMPTS = [[4, 5, 6, 7, 8], [9], [10, 11, 12], [13, 14], [15, 16, 17, 18]]
FORBIDDEN = forbidden_ids(word_tokenizer(), PADDED_VOCAB, [EOS])
ALLOWED_IDS = (~FORBIDDEN).nonzero()[:, 0].tolist()
# So many words end a completion that some rows end early, some late and some not at all.
MANY_EOS = [1, 5, 8, 11, 14, 17, 20, 23]
FORBIDDEN_MANY_EOS = forbidden_ids(word_tokenizer(), PADDED_VOCAB, MANY_EOS)


def sample(model, prompts, index, **kwargs):
    """With one EOS, or with many where `kwargs` say so."""
    settings = {"eos_ids": [EOS], "pad_id": PAD, "forbidden_V": FORBIDDEN, **kwargs}
    ids_PS, mask_PS = pad_prompts(model, prompts)
    return sample_completions(backbone_of(model), ids_PS, mask_PS, torch.tensor(index), **settings)


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def next_token_distribution(model, prompt, completion, temperature, allowed=ALLOWED_IDS) -> torch.Tensor:
    """Softmax in float64 of the model's own logits after `completion`, over the allowed ids only."""
    z_V = own_logits(model, prompt, completion)[-1].double() / temperature
    p_V = torch.zeros_like(z_V)
    p_V[allowed] = z_V[allowed].softmax(-1)
    return p_V
