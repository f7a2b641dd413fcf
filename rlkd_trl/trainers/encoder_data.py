"""Batches of texts for encoders: token ids, labels, and masked tokens that depend on seed, epoch and row alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd_trl.data.streams import RowStream
from rlkd_trl.ops.classification import IGNORED

ROW = "row"  # column of a row's number in the training data, on which the choice of masked tokens depends
# Shares of the chosen tokens that stay, and that become a random token; the others become the mask token.
_KEPT, _RANDOM = 0.1, 0.1


class NumberedRows(torch.utils.data.Dataset):
    """The rows, each with its number in the column `ROW`."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return {**self.rows[i], ROW: i}


class NumberedStream(torch.utils.data.IterableDataset):
    """The rows of a stream, each with a number of its own in the column `ROW`, also where the stream begins anew."""

    def __init__(self, rows: RowStream):
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        for i, row in enumerate(self.rows):
            yield {**row, ROW: i}


@dataclass
class TextCollator:
    """Makes batches of rows with `text`; optional are `text_pair`, `label`, `next_sentence_label` and `row`.

    start_id: the id that an encoder-decoder's decoder reads first, None for other models. What it reads then is
    `text_pair`, its target, or in a task the text itself once more, as in transformers' classifiers. Elsewhere `text`
    and `text_pair` are tokenised as one pair. of_task: whether the rows are a task's, whose column `label` is read.
    Rows with `input_ids` are already tokenised and are only padded.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    start_id: int | None = None
    of_task: bool = True

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = self._tokens(rows)
        if self.start_id is not None and self.of_task:
            batch |= self._decoder_inputs(batch)
        if self.of_task and "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        for name in (ROW, "next_sentence_label"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def _tokens(self, rows: list[dict]) -> dict[str, Tensor]:
        if "input_ids" in rows[0]:
            names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in rows[0]]
            features = [{name: row[name][: self.max_length] for name in names} for row in rows]
            return dict(self.tokenizer.pad(features, return_tensors="pt"))
        texts = [row["text"] for row in rows]
        pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
        settings = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        if self.start_id is None or self.of_task:
            return dict(self.tokenizer(texts, pairs, **settings))
        targets = self.tokenizer(text_target=pairs, **settings)
        return {**self.tokenizer(texts, **settings), **self._decoder_inputs(targets)}

    def _decoder_inputs(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the decoder reads to predict the target: the start, and the target without its last token.

        Where a target is over, nothing is predicted: positions are real where the predicted tokens are.
        """
        ids_BS = targets["input_ids"]
        start_B1 = torch.full_like(ids_BS[:, :1], self.start_id)
        return {
            "decoder_input_ids": torch.cat([start_B1, ids_BS[:, :-1]], dim=1),
            "decoder_attention_mask": targets["attention_mask"],
        }


def masked_tokens(
    batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, *, probability: float, seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Token ids `[B, S]` with some masked, and labels `[B, S]`: their ids, else `IGNORED` (Devlin et al. 2019, 3.1).

    Each of a row's real tokens that is no special token is chosen with this probability, and at least one of them is.
    Of the chosen ones 80 % become the mask token, 10 % a random token, and 10 % stay. The draws depend only on the
    seed, the epoch and the row's number, so that they do not depend on the batches, and a resumed run repeats them.
    """
    ids_BS = batch["input_ids"].clone()
    labels_BS = torch.full_like(ids_BS, IGNORED)
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    may_BS = batch["attention_mask"].bool() & ~torch.isin(ids_BS, special.to(ids_BS.device))
    for ids_S, labels_S, may_S, row in zip(ids_BS, labels_BS, may_BS, batch[ROW].tolist(), strict=True):
        places_N = may_S.nonzero()[:, 0]
        N = len(places_N)
        if N == 0:
            continue
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_000_000_007 % 2**63 + row)
        chosen_N = torch.rand(N, generator=generator) < probability
        chosen_N[int(torch.randint(N, (), generator=generator))] |= not chosen_N.any()
        what_N = torch.rand(N, generator=generator)
        random_N = torch.randint(len(tokenizer), (N,), generator=generator)
        labels_S[places_N[chosen_N]] = ids_S[places_N[chosen_N]]
        ids_S[places_N[chosen_N & (what_N >= _KEPT + _RANDOM)]] = tokenizer.mask_token_id
        is_random_N = chosen_N & (what_N >= _KEPT) & (what_N < _KEPT + _RANDOM)
        ids_S[places_N[is_random_N]] = random_N[is_random_N].to(ids_S)
    return ids_BS, labels_BS
