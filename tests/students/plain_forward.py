"""What a model itself says about one completion, by a plain forward pass of one unpadded row."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny_models import EOS, PAD, UNK, VOCAB

# `<pad>` 0, `<unk>` 2 and the two sentinels (the tokenizer's last ids) are never sampled; `</s>` and the words are.
ALLOWED = [EOS, *range(UNK + 1, VOCAB - 2)]


class RaggedBatch(NamedTuple):
    """Prompts and completions as lists of ids; completion b answers prompt `index[b]`."""

    prompts: list[list[int]]
    index: list[int]
    completions: list[list[int]]

    def tensors(self, padding_side: str, *, prompt_filler: int = PAD, completion_filler: int = PAD) -> list[Tensor]:
        """What `Policy.forward` takes, with `filler` ids where there is no token."""
        S, T = max(map(len, self.prompts)), max(map(len, self.completions))
        prompt_ids, prompt_mask = [], []
        for ids in self.prompts:
            gap, ones, zeros = [prompt_filler] * (S - len(ids)), [1] * len(ids), [0] * (S - len(ids))
            prompt_ids.append(ids + gap if padding_side == "right" else gap + ids)
            prompt_mask.append(ones + zeros if padding_side == "right" else zeros + ones)
        completion_ids = [ids + [completion_filler] * (T - len(ids)) for ids in self.completions]
        completion_mask = [[t < len(ids) for t in range(T)] for ids in self.completions]
        lists = (prompt_ids, prompt_mask, self.index, completion_ids, completion_mask)
        return [torch.tensor(values) for values in lists]


RAGGED = RaggedBatch(
    prompts=[[5, 9, 13, 22, EOS], [7, EOS], [26, 3, 11, EOS]],
    index=[0, 0, 1, 2, 2],
    completions=[[4, 8, EOS], [20, 6, 24, 17, 3], [EOS], [11, 11], [9, 25, 14, EOS]],
)


def plain_forward(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor]:
    """Logits `[T+1, V]` and the last hidden states `[T+1, D]` at the states s_1 .. s_{T+1} of one completion."""
    if model.config.is_encoder_decoder:
        output = model(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id, *completion]]),
            output_hidden_states=True,
            use_cache=False,
        )
        return output.logits[0], output.decoder_hidden_states[-1][0]
    output = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False)
    first = len(prompt) - 1
    return output.logits[0, first:], output.hidden_states[-1][0, first:]


def allowed_log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`[..., V]`: log-probabilities in float64, renormalised over the ids that may be sampled; −inf elsewhere."""
    logps = torch.full(logits.shape, -torch.inf, dtype=torch.float64)
    logps[..., ALLOWED] = torch.log_softmax(logits[..., ALLOWED].double() / temperature, dim=-1)
    return logps


def chosen_log_probs(
    model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> Tensor:
    """`[T]`, differentiable, float64."""
    logits = plain_forward(model, prompt, completion)[0][:-1]
    return allowed_log_softmax(logits, temperature)[range(len(completion)), completion]


def entropies(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """`[T]`, differentiable, float64."""
    logits = plain_forward(model, prompt, completion)[0][:-1]
    logps = allowed_log_softmax(logits, temperature)[:, ALLOWED]
    return -(logps.exp() * logps).sum(dim=-1)


def plain_values(model: PreTrainedModel, head: nn.Linear, prompt: list[int], completion: list[int]) -> Tensor:
    """`[T+1]`, differentiable, float64: the value head on the model's last hidden states."""
    states = plain_forward(model, prompt, completion)[1].double()
    return states @ head.weight[0].double() + head.bias[0].double()
