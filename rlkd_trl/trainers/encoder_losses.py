"""The losses of a stage of encoder distillation, text by text, of what student and teacher put out for a batch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from rlkd_trl.models.layer_tensors import LayerReader, LayerTensors
from rlkd_trl.models.vocabulary import base_of
from rlkd_trl.ops.classification import IGNORED, hard_cross_entropy, logits_kl, squared_error
from rlkd_trl.students.encoder import EncoderStudent
from rlkd_trl.trainers.encoder_checks import relation_heads_of
from rlkd_trl.trainers.encoder_objective import INGREDIENTS, PROJECTED, Objective, layer_loss

Layers = dict[str, LayerTensors]
# By ingredient and then by unit ("texts", "encoder tokens", ...), the sum of each text's losses, `[B]`.
LossesByUnit = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Teachings:
    """A teacher's outputs for a batch: logits, if it has a head, and by stack the tensors that the losses read."""

    logits: Tensor | None
    layers: Layers


@dataclass(frozen=True)
class StageLosses:
    """The losses of one stage for these two models.

    teacher: None if no loss needs one. suffix: behind the names of the projections, which each teacher has of its own.
    """

    objective: Objective
    student: EncoderStudent
    teacher: LayerReader | None
    suffix: str = ""

    @property
    def is_regression(self) -> bool:
        config = base_of(self.student.model).config
        return config.num_labels == 1 or config.problem_type == "regression"

    def __call__(
        self, outputs: ModelOutput, layers: Layers, *, batch: Mapping[str, Tensor], teachings: Teachings | None
    ) -> LossesByUnit:
        """All losses before their weights. They are to be divided by the number of their units in the global batch."""
        losses_B: LossesByUnit = {}
        for name in self.objective.weights:
            if INGREDIENTS[name].reads is None:
                losses_B[name] = self._of_outputs(name, outputs, batch, teachings)
                continue
            losses_B[name] = {}
            for stack in layers:
                losses_B[name] |= self._of_layers(name, stack, layers, batch, teachings)
        return losses_B

    def _of_layers(
        self, name: str, stack: str, layers: Layers, batch: Mapping[str, Tensor], teachings: Teachings
    ) -> dict[str, Tensor]:
        """A loss of layers in one stack, summed over its pairs of layers, `[B]`, by unit."""
        mask_BS = token_mask(batch, stack)
        kind = INGREDIENTS[name].reads
        student, teacher = getattr(layers[stack], kind), getattr(teachings.layers[stack], kind)
        relation_heads = relation_heads_of(self.objective, self.teacher)
        pairs = self.objective.layers_of(name, self.student.reader.num_layers(stack), self.teacher.num_layers(stack))
        total_B = 0
        for m, n in pairs:
            projected = student[m]
            if name in PROJECTED:
                projected = self.student.projected(f"{stack}_{name}{self.suffix}", projected)
            loss = layer_loss(name, projected, teacher[n], mask_BS, relation_heads)
            total_B = total_B + (loss.sum(dim=1) if loss.dim() == 2 else loss)
        return {"texts" if name == "cls_mse" else f"{stack} tokens": total_B}

    def _of_outputs(
        self, name: str, outputs: ModelOutput, batch: Mapping[str, Tensor], teachings: Teachings | None
    ) -> dict[str, Tensor]:
        """A loss of logits for each text, `[B]`, by unit."""
        logits = logits_of(outputs)
        if name == "nsp_ce":
            labels_B = batch["next_sentence_label"]
            return {"texts": hard_cross_entropy(outputs["seq_relationship_logits"], labels_B)}
        if name == "mlm_ce":
            labels_BS = batch["labels"]
            is_masked_BS = labels_BS != IGNORED
            losses_N = hard_cross_entropy(logits[is_masked_BS], labels_BS[is_masked_BS])
            return {"masked tokens": _by_text(losses_N, is_masked_BS)}
        if name == "hard_ce":
            if self.is_regression:
                return {"labels": squared_error(logits[:, 0], batch["labels"])}
            return {"labels": hard_cross_entropy(logits, batch["labels"])}
        if self.objective.stage == "task":
            if self.is_regression:
                return {"texts": squared_error(logits[:, 0], teachings.logits[:, 0])}
            return {"texts": logits_kl(logits, teachings.logits, temperature=self.objective.temperature)}
        stack = self.student.reader.stacks[-1]
        mask_BS = token_mask(batch, stack)
        losses_N = logits_kl(logits[mask_BS], teachings.logits[mask_BS], temperature=self.objective.temperature)
        return {f"{stack} tokens": _by_text(losses_N, mask_BS)}


def logits_of(outputs: ModelOutput) -> Tensor | None:
    """The logits of classes or tokens; None of a model without a head."""
    return next((outputs[name] for name in ("logits", "prediction_logits") if name in outputs), None)


def token_mask(batch: Mapping[str, Tensor], stack: str = "encoder") -> Tensor:
    """True on the real tokens that a stack of layers reads, `[B, S]`."""
    is_second = stack == "decoder" and "decoder_input_ids" in batch
    return batch["decoder_attention_mask" if is_second else "attention_mask"].bool()


def count_units(batch: Mapping[str, Tensor], stacks: tuple[str, ...]) -> dict[str, float]:
    """How many of each unit, over which losses are averaged, the batch has: tokens of each stack, texts, labels."""
    counts = {f"{stack} tokens": float(token_mask(batch, stack).sum()) for stack in stacks}
    counts["texts"] = float(len(batch["input_ids"]))
    labels = batch.get("labels")
    if labels is not None:
        # A number to predict may be any, that which elsewhere says that there is no label, too.
        is_label = torch.ones_like(labels) if labels.is_floating_point() else labels != IGNORED
        counts["labels" if labels.dim() == 1 else "masked tokens"] = float(is_label.sum())
    return counts


def _by_text(losses_N: Tensor, mask_BS: Tensor) -> Tensor:
    """The losses of the tokens where the mask is True, summed for each text, `[B]`."""
    losses_BS = torch.zeros(mask_BS.shape, dtype=losses_N.dtype, device=losses_N.device)
    return losses_BS.masked_scatter(mask_BS, losses_N).sum(dim=1)
