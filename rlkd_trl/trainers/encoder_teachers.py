"""Losses of a student with several teachers: multi-teacher distillation (MT-BERT)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers.utils import ModelOutput

from rlkd_trl.errors import InputError
from rlkd_trl.models.layer_tensors import LayerReader
from rlkd_trl.ops.classification import hard_cross_entropy, squared_error
from rlkd_trl.ops.ensembles import loss_factor
from rlkd_trl.students.encoder import EncoderStudent
from rlkd_trl.students.joint_encoders import mean_logits
from rlkd_trl.trainers.encoder_losses import Layers, LossesByUnit, StageLosses, Teachings
from rlkd_trl.trainers.encoder_objective import INGREDIENTS, PROJECTED, Objective


@dataclass(frozen=True)
class SeveralTeachings:
    """The outputs of several teachers for a batch."""

    each: Sequence[Teachings]

    @property
    def logits(self) -> Tensor | None:
        """Of the teachers together (see `mean_logits`); None without heads."""
        logits = [teachings.logits for teachings in self.each]
        return None if logits[0] is None else mean_logits(logits)


@dataclass(frozen=True)
class PanelLosses:
    """The losses of one stage for a student and several teachers, each summed over the teachers.

    per_example: whether in a task `logits_kl` of teacher i is divided by 1 + CE(y, p_i) on each text (Wu, Wu & Huang
    2021, L_dis), in regression by 1 + (y − z_i)²; texts without a label count in full.
    """

    of_teachers: Sequence[StageLosses]
    per_example: bool

    @classmethod
    def of(
        cls, objective: Objective, student: EncoderStudent, readers: Sequence[LayerReader], *, per_example: bool
    ) -> "PanelLosses":
        """Losses that need no teacher are the first one's alone."""
        of_teacher = {name: w for name, w in objective.weights.items() if INGREDIENTS[name].needs_teacher}
        objectives = [objective] + [replace(objective, weights=of_teacher)] * (len(readers) - 1)
        return cls(
            [
                StageLosses(own, student, reader, suffix(number))
                for number, (own, reader) in enumerate(zip(objectives, readers, strict=True))
            ],
            per_example,
        )

    @property
    def is_regression(self) -> bool:
        return self.of_teachers[0].is_regression

    def __call__(
        self, outputs: ModelOutput, layers: Layers, *, batch: Mapping[str, Tensor], teachings: SeveralTeachings
    ) -> LossesByUnit:
        """As `StageLosses`."""
        total_B: LossesByUnit = {}
        for losses, of_teacher in zip(self.of_teachers, teachings.each, strict=True):
            for name, by_unit in losses(outputs, layers, batch=batch, teachings=of_teacher).items():
                sums = total_B.setdefault(name, {})
                for unit, loss_B in by_unit.items():
                    factor = self._factor(of_teacher, batch) if name == "logits_kl" else 1.0
                    sums[unit] = sums.get(unit, 0) + factor * loss_B
        return total_B

    def _factor(self, teachings: Teachings, batch: Mapping[str, Tensor]) -> float | Tensor:
        is_task = self.of_teachers[0].objective.stage == "task"  # else `labels` are masked tokens
        if not (self.per_example and is_task and "labels" in batch):
            return 1.0
        if self.is_regression:
            return loss_factor(squared_error(teachings.logits[:, 0], batch["labels"]))
        return loss_factor(hard_cross_entropy(teachings.logits, batch["labels"]))


def suffix(number: int) -> str:
    """Behind the names of a teacher's projections; none for the first."""
    return f"_{number + 1}" if number else ""


def panel_projections(
    objective: Objective, student: LayerReader, readers: Sequence[LayerReader]
) -> dict[str, tuple[int, int]]:
    """By name, the widths of a projection W_i for each teacher.

    There is one for a teacher of the student's width too, since one state cannot equal those of two.
    """
    return {
        f"{stack}_{name}{suffix(number)}": (student.config.hidden_size, reader.config.hidden_size)
        for number, reader in enumerate(readers)
        for stack in student.stacks
        for name in PROJECTED
        if name in objective.weights
    }


def check_panel(objective: Objective, count: int) -> None:
    """Raises `InputError` if several teachers have nothing to teach in this stage."""
    if count > 1 and not objective.needs_teacher:
        raise InputError(f"{' + '.join(objective.weights)} needs no teacher, and there are {count}: name none.")


def merged(wanted: Sequence[Mapping[str, Mapping[str, set[int]]]]) -> dict[str, dict[str, set[int]]]:
    """By stack and kind of tensor, the layers that any of these want."""
    union: dict[str, dict[str, set[int]]] = {}
    for one in wanted:
        for stack, by_kind in one.items():
            for kind, layers in by_kind.items():
                of_stack = union.setdefault(stack, {})
                of_stack[kind] = of_stack.get(kind, set()) | set(layers)
    return union
