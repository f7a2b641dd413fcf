"""The loss of a stage of encoder distillation: a weighted sum of ingredients, their layers and their temperature."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkd_trl.errors import InputError
from rlkd_trl.ops.layer_maps import Pairs, layer_pairs
from rlkd_trl.ops.layers import (
    attention_kl,
    attention_score_mse,
    cosine_distance,
    mean_squared_error,
    normalised_distance,
)
from rlkd_trl.ops.relations import relation_kl

STAGES = ("general", "task")


@dataclass(frozen=True)
class Ingredient:
    """A loss that can be part of the sum.

    stages: in which it may be used. reads: the kind of tensor that it compares (see `models.layer_tensors`); None for
    logits. where: whether it compares the layers of the "map", the "last" ones, or the "embeddings".
    """

    stages: tuple[str, ...]
    reads: str | None = None
    where: str = ""
    needs_teacher: bool = True


INGREDIENTS: dict[str, Ingredient] = {
    "embedding_mse": Ingredient(STAGES, "hidden_states", "embeddings"),
    "hidden_mse": Ingredient(STAGES, "hidden_states", "map"),
    "cls_mse": Ingredient(STAGES, "hidden_states", "map"),
    "cosine": Ingredient(STAGES, "hidden_states", "last"),
    "attention_mse": Ingredient(STAGES, "scores", "map"),
    "attention_kl": Ingredient(STAGES, "scores", "map"),
    "query_relation_kl": Ingredient(STAGES, "queries", "map"),
    "key_relation_kl": Ingredient(STAGES, "keys", "map"),
    "value_relation_kl": Ingredient(STAGES, "values", "map"),
    "logits_kl": Ingredient(STAGES),
    "hard_ce": Ingredient(("task",), needs_teacher=False),
    "mlm_ce": Ingredient(("general",), needs_teacher=False),
    "nsp_ce": Ingredient(("general",), needs_teacher=False),
}
# These have no learned projection: student and teacher must have the same width.
SAME_WIDTH = ("cls_mse", "cosine")
SAME_HEADS = ("attention_mse", "attention_kl")
PROJECTED = ("embedding_mse", "hidden_mse")
RELATIONS = ("query_relation_kl", "key_relation_kl", "value_relation_kl")


def parse_losses(text: str) -> dict[str, float]:
    """The weight of each ingredient in a sum like "5*logits_kl + 2*mlm_ce + cosine".

    Raises:
        InputError: An ingredient is unknown or named twice; a weight is not a number above 0.
    """
    weights: dict[str, float] = {}
    for term in text.split("+") if text.strip() else []:
        factor, star, name = term.strip().rpartition("*")
        name = name.strip()
        if name not in INGREDIENTS:
            raise InputError(
                f"losses = {text!r}: there is no ingredient {name!r}. Write a sum such as '5*logits_kl + cosine' of: "
                f"{', '.join(INGREDIENTS)}."
            )
        if name in weights:
            raise InputError(f"losses = {text!r}: {name} is there twice.")
        is_number = re.fullmatch(r"\d+(\.\d*)?([eE][+-]?\d+)?", factor.strip()) is not None
        weight = float(factor) if is_number else 1.0 if not star else 0.0
        if not 0 < weight <= 1e6:
            raise InputError(f"losses = {text!r}: the weight {factor.strip()!r} of {name} is no number above 0.")
        weights[name] = weight
    if not weights:
        raise InputError(f"losses = {text!r}: name at least one of: {', '.join(INGREDIENTS)}.")
    return weights


@dataclass(frozen=True)
class Objective:
    """The losses of one stage.

    stage: one of `STAGES`. weights: of the ingredients, by name. layer_map: in a form of `ops.layer_maps.layer_pairs`.
    temperature: T of `logits_kl`. relation_heads: A_r (Wang et al. 2021); None for the teacher's attention heads.
    """

    stage: str
    weights: Mapping[str, float]
    layer_map: str = "uniform"
    temperature: float = 1.0
    relation_heads: int | None = None

    @property
    def head(self) -> str:
        """The head that the student has in this stage, one of `models.encoders.HEADS`."""
        if self.stage == "task":
            return "classes"
        if "nsp_ce" in self.weights:
            return "tokens and next sentence"
        return "tokens" if {"logits_kl", "mlm_ce"} & self.weights.keys() else "kept"

    @property
    def teachers_head(self) -> str:
        """The head that the teacher needs, one of `models.encoders.HEADS`."""
        if "logits_kl" not in self.weights:
            return "none"
        return "classes" if self.stage == "task" else "tokens"

    @property
    def needs_teacher(self) -> bool:
        return any(INGREDIENTS[name].needs_teacher for name in self.weights)

    @property
    def reads_maps(self) -> bool:
        """Whether a loss reads attention maps, for which the layers have to run eager attention."""
        return any(INGREDIENTS[name].reads == "scores" for name in self.weights)

    def kinds(self) -> set[str]:
        """The kinds of tensors that the losses read from layers."""
        return {kind for name in self.weights if (kind := INGREDIENTS[name].reads) is not None}

    def pairs(self, student_layers: int, teacher_layers: int) -> Pairs:
        """The layer map's pairs. Raises `InputError` if it does not fit the two models."""
        try:
            return layer_pairs(self.layer_map, student_layers, teacher_layers)
        except ValueError as error:
            raise InputError(
                f"layer_map = {self.layer_map} does not go with {student_layers} layers of the student and "
                f"{teacher_layers} of the teacher: {error}."
            ) from error

    def layers_of(self, name: str, student_layers: int, teacher_layers: int) -> Pairs:
        """The pairs (student's layer, teacher's layer) that an ingredient compares; layer 0 is the embeddings."""
        where = INGREDIENTS[name].where
        if where == "embeddings":
            return [(0, 0)]
        return [(student_layers, teacher_layers)] if where == "last" else self.pairs(student_layers, teacher_layers)

    def wanted(self, student_layers: int, teacher_layers: int) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
        """By kind of tensor, the layers that the losses read: the student's, the teacher's."""
        wanted: tuple[dict[str, set[int]], dict[str, set[int]]] = ({}, {})
        for name in self.weights:
            if (kind := INGREDIENTS[name].reads) is not None:
                for pair in self.layers_of(name, student_layers, teacher_layers):
                    for of_model, layer in zip(wanted, pair, strict=True):
                        of_model.setdefault(kind, set()).add(layer)
        return wanted


def layer_loss(name: str, student: Tensor, teacher: Tensor, mask_BS: Tensor, relation_heads: int) -> Tensor:
    """An ingredient's loss on one pair of layers: `[B, S]`, per token, or for `cls_mse` `[B]`, per text.

    student, teacher: the tensors that the ingredient reads; the student's have the teacher's width by a projection.
    """
    return _LAYER_LOSSES[name](student, teacher, mask_BS, relation_heads)


def _of_maps(loss: Callable) -> Callable:
    """The loss of attention scores, over the keys that both models may attend to (padding, causality, windows)."""

    def of_scores(student_BHSS: Tensor, teacher_BHSS: Tensor, mask_BS: Tensor, relation_heads: int) -> Tensor:
        mask_BSS = mask_BS[:, :, None] & mask_BS[:, None, :]
        for scores_BHSS in (student_BHSS, teacher_BHSS):
            mask_BSS = mask_BSS & (scores_BHSS[:, 0] > torch.finfo(scores_BHSS.dtype).min / 2)
        return loss(student_BHSS, teacher_BHSS, mask_BSS)

    return of_scores


def _of_relations(student_BSHd: Tensor, teacher_BSHd: Tensor, mask_BS: Tensor, relation_heads: int) -> Tensor:
    return relation_kl(student_BSHd.flatten(2), teacher_BSHd.flatten(2), mask_BS, relation_heads=relation_heads)


def _of_first_tokens(student_BSD: Tensor, teacher_BSD: Tensor, mask_BS: Tensor, relation_heads: int) -> Tensor:
    first_B1 = mask_BS.long().argmax(dim=1)[:, None]  # 0 unless texts are padded on the left
    student_BD, teacher_BD = (
        x.gather(1, first_B1[..., None].expand(-1, 1, x.shape[-1]))[:, 0] for x in (student_BSD, teacher_BSD)
    )
    return normalised_distance(student_BD, teacher_BD)


def _of_states(loss: Callable) -> Callable:
    return lambda student_BSD, teacher_BSD, mask_BS, relation_heads: loss(student_BSD, teacher_BSD, mask_BS)


_LAYER_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "embedding_mse": _of_states(mean_squared_error),
    "hidden_mse": _of_states(mean_squared_error),
    "cls_mse": _of_first_tokens,
    "cosine": _of_states(cosine_distance),
    "attention_mse": _of_maps(attention_score_mse),
    "attention_kl": _of_maps(attention_kl),
    **dict.fromkeys(RELATIONS, _of_relations),
}
