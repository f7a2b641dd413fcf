"""Metrics of encoders: on the labels of a task, and of the likeness to a teacher."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig

from rlkd_trl.ops.classification import IGNORED
from rlkd_trl.ops.finite import usable_rows, usable_states

_SAMPLES = 20  # texts shown in a report
_MOST_COMPARED = 500  # texts whose similarities to each other are compared: 125,000 pairs


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """The share of texts whose class is predicted correctly, in percent."""
    return 100 * sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)


def f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Macro F1, in percent: the mean of 2 TP / (2 TP + FP + FN) over the classes that occur or are predicted."""
    scores = []
    for label in sorted({*predictions, *labels}):
        pairs = [(p == label, y == label) for p, y in zip(predictions, labels, strict=True)]
        hits = sum(p and y for p, y in pairs)
        scores.append(2 * hits / sum(p + y for p, y in pairs))
    return 100 * sum(scores) / len(scores)


def pearson(x_N: Tensor, y_N: Tensor) -> float:
    """Pearson's correlation of two lists of numbers; NaN if all numbers of one list are equal."""
    x_N, y_N = (values.double() - values.double().mean() for values in (x_N, y_N))
    norm = float(x_N.norm() * y_N.norm())
    return float(x_N @ y_N) / norm if norm > 0 else math.nan


def spearman(x_N: Tensor, y_N: Tensor) -> float:
    """Pearson's correlation of the ranks; equal numbers have their mean rank (Spearman 1904)."""
    return pearson(_ranks(x_N), _ranks(y_N))


def _ranks(values_N: Tensor) -> Tensor:
    _, which_N, counts = torch.unique(values_N, return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    return (below.double() + (counts.double() - 1) / 2)[which_N]


def pair_similarities(embeddings_ND: Tensor) -> Tensor:
    """The cosines of all pairs of different texts' embeddings, `[N (N − 1) / 2]`."""
    unit_ND = torch.nn.functional.normalize(embeddings_ND.double(), dim=-1)
    N = len(unit_ND)
    rows, columns = torch.triu_indices(N, N, offset=1)
    return (unit_ND @ unit_ND.T)[rows, columns]


@dataclass
class Seen:
    """Collects the models' outputs for all batches of evaluation data, and computes metrics of them."""

    predictions: list[Tensor] = field(default_factory=list)
    ensembles: list[Tensor] = field(default_factory=list)
    teachers: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    embeddings: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    cosines: list[Tensor] = field(default_factory=list)
    usable: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add_losses(self, losses: Iterable[Tensor]) -> None:
        """Adds a batch's losses, each `[B]`."""
        self._note("the losses", torch.stack(list(losses), dim=1))

    def add_outputs(
        self,
        logits: Tensor,
        teachers_logits: Tensor | None,
        labels_B: Tensor | None,
        ensembles_logits: Tensor | None = None,
    ) -> None:
        """Adds a batch of a task: logits `[B, C]`, `[B, 1]` in regression, and labels `[B]`.

        ensembles_logits: of the student and the encoders trained along, together.
        """
        self._note("the logits", logits)
        self.predictions.append(_predicted(logits))
        if ensembles_logits is not None:
            self._note("the encoders' mean logits", ensembles_logits)
            self.ensembles.append(_predicted(ensembles_logits))
        if teachers_logits is not None:
            self._note("the teacher's logits", teachers_logits)
            self.teachers.append(_predicted(teachers_logits))
        if labels_B is not None:
            self.labels.append(labels_B.cpu())

    def add_states(self, student_BSD: Tensor, teacher_BSD: Tensor, mask_BS: Tensor) -> None:
        """Adds the last hidden states of a batch of texts, of which the means over tokens are the embeddings."""
        for name, states_BSD in (("the states", student_BSD), ("the teacher's states", teacher_BSD)):
            self.usable[name].append(usable_states(states_BSD, mask_BS).cpu())
        for embeddings, states_BSD in zip(self.embeddings, (student_BSD, teacher_BSD), strict=True):
            states_BSD = torch.where(mask_BS[..., None], states_BSD.float(), 0)
            embeddings.append((states_BSD.sum(dim=1) / mask_BS.sum(dim=1, keepdim=True).clamp(min=1)).cpu())
        if student_BSD.shape[-1] == teacher_BSD.shape[-1]:
            cosines_BS = torch.nn.functional.cosine_similarity(student_BSD.float(), teacher_BSD.float(), dim=-1)
            self.cosines.append(cosines_BS[mask_BS].cpu())

    def _note(self, name: str, numbers_BN: Tensor) -> None:
        self.usable[name].append(usable_rows(numbers_BN, torch.ones_like(numbers_BN, dtype=torch.bool)).cpu())

    @property
    def is_usable(self) -> dict[str, Tensor]:
        """Whether the numbers of each text are finite, `[N]`, by what they are."""
        return {name: torch.cat(batches) for name, batches in self.usable.items()}

    def metrics(self, *, is_regression: bool) -> dict[str, float]:
        """Accuracy and F1, or in regression correlations; and agreement with the teacher's classes or numbers.

        `ensemble_accuracy` and so on are of the student and the encoders trained along, together.
        """
        predictions = torch.cat(self.predictions)
        metrics = self._right(predictions, is_regression)
        if self.ensembles:
            of_all = self._right(torch.cat(self.ensembles), is_regression)
            metrics |= {f"ensemble_{name}": value for name, value in of_all.items()}
        if self.teachers:
            teachers = torch.cat(self.teachers)
            if is_regression:
                metrics["agreement"] = pearson(predictions, teachers)
            else:
                metrics["agreement"] = accuracy(predictions.tolist(), teachers.tolist())
        return metrics

    def _right(self, predictions: Tensor, is_regression: bool) -> dict[str, float]:
        """How right the predictions are on the texts with a label; {} if there are none."""
        if not self.labels:
            return {}
        labels = torch.cat(self.labels)
        if is_regression:
            return {"pearson": pearson(predictions, labels), "spearman": spearman(predictions, labels)}
        known = labels != IGNORED
        if not known.any():
            return {}
        of_known = predictions[known].tolist(), labels[known].tolist()
        return {"accuracy": accuracy(*of_known), "f1": f1(*of_known)}

    def only_class(self) -> int | None:
        """The class that is predicted for every text, if the labels, or else the teacher's classes, are several.

        None in regression, and if some numbers are not finite: then the classes say nothing.
        """
        is_finite = all(usable_N.all() for usable_N in self.is_usable.values())
        if not self.predictions or self.predictions[0].is_floating_point() or not is_finite:
            return None
        right = [set(torch.cat(batches).tolist()) - {IGNORED} for batches in (self.labels, self.teachers) if batches]
        predicted = set(torch.cat(self.predictions).tolist())
        are_several = len(next(filter(None, right), ())) > 1
        return predicted.pop() if len(predicted) == 1 and are_several else None

    def likeness(self) -> dict[str, float]:
        """How like the teacher's the student's last hidden states are.

        `similarity_spearman`: Spearman's correlation of the student's and the teacher's cosines of all pairs of texts.
        `hidden_cosine`: the mean cosine of the two models' states of the same token, if their widths are equal.
        """
        metrics = {}
        if self.embeddings[0]:
            similarities = [pair_similarities(torch.cat(batches)[:_MOST_COMPARED]) for batches in self.embeddings]
            if len(similarities[0]) > 1:
                metrics["similarity_spearman"] = spearman(*similarities)
        if self.cosines:
            metrics["hidden_cosine"] = float(torch.cat(self.cosines).mean())
        return metrics

    def samples(self, rows: Dataset, config: PreTrainedConfig) -> list[dict[str, object]]:
        """The first rows, with the predicted classes or numbers."""
        table = []
        columns = {"student": self.predictions, "teacher": self.teachers, "label": self.labels}
        predicted = {name: torch.cat(batches).tolist() for name, batches in columns.items() if batches}
        texts = [name for name in ("text", "text_pair") if name in rows.column_names]
        for i, row in enumerate(rows.select(range(min(_SAMPLES, len(rows))))):
            of_row = {name: _named(values[i], config) for name, values in predicted.items()}
            table.append({**{name: row[name] for name in texts}, **of_row})
        return table


def _predicted(logits: Tensor) -> Tensor:
    """The predicted classes `[B]`, or in regression the predicted numbers."""
    return (logits[:, 0].float() if logits.shape[1] == 1 else logits.argmax(dim=1)).cpu()


def _named(value: float, config: Mapping) -> object:
    return value if isinstance(value, float) else config.id2label.get(value, value)
