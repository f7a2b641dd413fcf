"""Maximum likelihood on (prompt, target) pairs: trains teachers on references, warms students up on pseudo-labels."""

import logging
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.data.streams import RowStream, known_rows
from rlkd_trl.models.adapters import merged
from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.models.finite import check_weights, refuse_float16_weights
from rlkd_trl.models.generation_config import completion_start_ids, set_trained_generation_config
from rlkd_trl.models.limits import check_embedding_rows, check_lengths, position_limits
from rlkd_trl.models.precision import check_fp16
from rlkd_trl.models.prompts import prompt_token_ids, target_token_ids
from rlkd_trl.models.vocabulary import base_of, padding_id, require_eos, share_special_tokens
from rlkd_trl.prompts import ChatFormat
from rlkd_trl.students import remove_files_of_others, with_adapters
from rlkd_trl.trainers.checks import (
    check_column,
    check_conversations,
    check_endless,
    check_prompt_column,
    empty_targets,
)
from rlkd_trl.trainers.curves import keep_curves_together
from rlkd_trl.trainers.finite import MicroBatch
from rlkd_trl.trainers.resumable import ResumableTrainer
from rlkd_trl.trainers.run_record import student_record
from rlkd_trl.trainers.supervised_config import SupervisedConfig

_IGNORED = -100
_logger = logging.getLogger(__name__)


class SupervisedTrainer(ResumableTrainer):
    """Cross-entropy of the target's tokens, EOS included, averaged over all tokens of the global batch.

    The model gets the generation config of its checkpoints: greedy, at most `max_completion_length` tokens, and the
    special tokens that occur in targets allowed as content.

    Args:
        train_dataset: Rows with `prompt`, a text or a conversation, and `target`, a text; or a `RowStream` of them.
        peft_config: Adapters to train in place of the model's weights, as in TRL.
        chat: Whether prompts go through a chat template: by default, if the tokenizer has one (see `PromptWriter`).

    Raises:
        InputError: One of the two columns is missing, no row has a target, a tokenizer without EOS, or T5 with fp16;
            or as `PromptWriter`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SupervisedConfig,
        train_dataset: Dataset | RowStream,
        processing_class: PreTrainedTokenizerBase,
        *,
        peft_config: PeftConfig | None = None,
        chat: ChatFormat | None = None,
        **kwargs,
    ):
        if isinstance(train_dataset, RowStream):
            check_endless(args)
        known = known_rows(train_dataset)
        check_prompt_column(known, "training data")
        check_column(known, "target", "training data")
        writer = PromptWriter(processing_class, chat)
        processing_class = writer.processing_class
        check_conversations(lambda row: writer.text(row["prompt"]), known, "training data")
        model = with_adapters(model, peft_config, seed=args.seed)
        require_eos(processing_class)
        empty = empty_targets(known["target"])
        if empty:
            _logger.warning(
                "%d of %d targets are empty, the first in row %d: there the model learns to answer nothing. Drop "
                "these rows if they are gaps in the data.",
                *(len(empty), len(known), empty[0] + 1),
            )
        check_embedding_rows("The model", processing_class, model.config)
        limits = position_limits(model)
        if limits.completion is not None:
            targets = processing_class(text_target=list(known["target"]), add_special_tokens=False, verbose=False)
            longest = max(map(len, targets["input_ids"])) + 1  # EOS
            check_lengths(
                "The model",
                limits,
                processing_class,
                map(writer.text, known["prompt"]),
                max_prompt_length=args.max_prompt_length,
                max_completion_length=min(longest, args.max_completion_length),
            )
        if args.fp16:
            check_fp16(model.config, on_cpu=args.use_cpu)
        check_weights(model, "The model")
        refuse_float16_weights(model)
        share_special_tokens([(model, processing_class)], known["target"])
        set_trained_generation_config(model, processing_class, max_completion_length=args.max_completion_length)
        collate = PairCollator(
            processing_class,
            start_ids=completion_start_ids(model) if model.config.is_encoder_decoder else None,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            chat=chat,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=collate,
            # With a function of ours Trainer counts the tokens of the global batch. T5 accepts `num_items_in_batch`
            # and ignores it, so that by default gradients would be multiplied by accumulation steps and processes.
            compute_loss_func=partial(_summed_cross_entropy, shift=not model.config.is_encoder_decoder),
            **kwargs,
        )
        keep_curves_together(args, self.callback_handler.callbacks)
        self.run_record["student"] = student_record(model, writer)

    def compute_loss(self, model, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = super().compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        return self.checked_loss(loss)

    # Pairs that are not finite

    def sample_loss(self, model, micro_batch: MicroBatch, b: int) -> Tensor:
        inputs, num_items_in_batch = micro_batch
        pair = {name: tensor[b : b + 1].to(self.args.device) for name, tensor in inputs.items()}
        return super().compute_loss(model, pair, num_items_in_batch=num_items_in_batch)

    def prompt_of(self, micro_batch: MicroBatch, b: int) -> str:
        inputs, _ = micro_batch
        is_prompt_S = inputs["attention_mask"][b].bool()
        if self._shifts:  # the target follows it
            is_prompt_S = is_prompt_S & (inputs["labels"][b] == _IGNORED)
        return self.processing_class.decode(inputs["input_ids"][b][is_prompt_S], skip_special_tokens=True)

    def samples_in(self, micro_batch: MicroBatch) -> Tensor:
        return torch.ones(len(micro_batch[0]["labels"]), dtype=torch.bool)

    def keeping(self, micro_batches: list[MicroBatch], kept: list[Tensor]) -> list[MicroBatch]:
        parts, lost = [], torch.zeros((), dtype=torch.long, device=self.args.device)
        for (inputs, _), kept_B in zip(micro_batches, kept, strict=True):
            labels_B = (inputs["labels"][:, int(self._shifts) :] != _IGNORED).sum(dim=1).to(lost.device)
            lost += labels_B[~kept_B.to(lost.device)].sum()
            # One without any pair is gone through as it is, for nothing.
            rows = kept_B if kept_B.any() else torch.ones_like(kept_B)
            parts.append({name: tensor[rows.to(tensor.device)] for name, tensor in inputs.items()})
        if self.args.average_tokens_across_devices:
            lost = self.accelerator.reduce(lost, reduction="sum")
        return [(part, count - lost) for part, (_, count) in zip(parts, micro_batches, strict=True)]

    @property
    def _shifts(self) -> bool:
        """Whether position t predicts label t+1."""
        return not self.accelerator.unwrap_model(self.model).config.is_encoder_decoder

    def merge_adapters(self) -> None:
        """After training: makes the adapters' changes part of the model, which is then saved as a whole checkpoint.

        Raises `InputError` as `models.adapters.merged`.
        """
        self.model = self.model_wrapped = merged(self.accelerator.unwrap_model(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        directory, has_adapters = output_dir or self.args.output_dir, isinstance(self.model, PeftModel)
        if has_adapters:
            base_of(self.model).generation_config.save_pretrained(directory)  # PEFT leaves it out
        remove_files_of_others(directory, has_critic=False, has_adapters=has_adapters)


@dataclass
class PairCollator:
    """Token ids of (prompt, target) rows: encoder and decoder inputs, or one sequence with the prompt unlabelled.

    start_ids: what an encoder-decoder model's decoder reads before the target, unlabelled; None for decoder-only ones.
    chat: as in `SupervisedTrainer`.
    """

    tokenizer: PreTrainedTokenizerBase
    start_ids: list[int] | None
    max_prompt_length: int
    max_completion_length: int
    chat: ChatFormat | None = None

    def __post_init__(self):
        self._writer = PromptWriter(self.tokenizer, self.chat)

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        tokenizer = self._writer.processing_class
        texts = self._writer.texts(row["prompt"] for row in rows)
        prompts = prompt_token_ids(tokenizer, texts, max_length=self.max_prompt_length)
        targets = [target_token_ids(tokenizer, row["target"], max_length=self.max_completion_length) for row in rows]
        pad = padding_id(tokenizer)
        if self.start_ids is not None:
            input_ids, attention_mask = _pad_right(prompts, pad)
            num_given = len(self.start_ids) - 1  # positions that predict what is given too
            labels, _ = _pad_right([[_IGNORED] * num_given + ids for ids in targets], _IGNORED)
            decoder_input_ids, _ = _pad_right([[*self.start_ids, *ids[:-1]] for ids in targets], pad)
            return {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "decoder_input_ids": decoder_input_ids,
                "labels": labels,
            }
        pairs = list(zip(prompts, targets, strict=True))
        input_ids, attention_mask = _pad_right([prompt + target for prompt, target in pairs], pad)
        labels, _ = _pad_right([[_IGNORED] * len(prompt) + target for prompt, target in pairs], _IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _pad_right(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [value] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _summed_cross_entropy(outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, shift: bool):
    """Σ −log p(label) over this micro-batch's labels, divided by the global batch's count of them.

    With `shift`, position t of a decoder-only model predicts label t+1.
    """
    loss = _cross_entropy(outputs.logits, labels, shift=shift, reduction="sum")
    if shift:
        labels = labels[:, 1:]
    return loss / ((labels != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def _cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, *, shift: bool, reduction: str) -> Tensor:
    """−log p of all labels, flattened; 0 where there is no label."""
    logits_BTV = logits_BTV.float()
    if shift:
        logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=_IGNORED, reduction=reduction
    )
