"""What transformers' own `generate` answers to one prompt, alone and unpadded, with the tests' words and tokenizer."""

import torch
from transformers import PreTrainedModel

from tests.tiny_models import EOS, PAD

NEVER_SAMPLED = [0, 2, 27, 28, 29, 30, 31]  # pad, unknown, two sentinels, and the LM head's three rows without a token


def plain_answers(model: PreTrainedModel, prompt: str, *, max_new_tokens: int, **generation) -> list[list[int]]:
    """The ids of each sequence that comes back (`num_return_sequences`), up to and with its EOS."""
    prompt_ids = [*(int(word[1:]) for word in prompt.split()), EOS]
    output_ids = model.generate(
        input_ids=torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        suppress_tokens=NEVER_SAMPLED,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **generation,
    ).tolist()
    first = 1 if model.config.is_encoder_decoder else len(prompt_ids)
    answers = [ids[first:] for ids in output_ids]
    return [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in answers]


def plain_texts(model: PreTrainedModel, prompt: str, *, max_new_tokens: int, **generation) -> list[str]:
    """`plain_answers` as text: their words, without pad, EOS and the unknown token."""
    answers = plain_answers(model, prompt, max_new_tokens=max_new_tokens, **generation)
    return [" ".join(f"w{token}" for token in ids if token > 2) for ids in answers]
