"""Student and teachers of a stage of encoder distillation: loaded, checked against losses and data, made ready."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.encoders import know_padding, load_encoder
from rlkd_trl.models.finite import check_weights, refuse_float16_weights
from rlkd_trl.models.layer_tensors import LayerReader
from rlkd_trl.models.limits import check_embedding_rows
from rlkd_trl.models.loading import load_tokenizer
from rlkd_trl.models.precision import check_fp16
from rlkd_trl.models.vocabulary import base_of
from rlkd_trl.students import with_adapters
from rlkd_trl.students.encoder import EncoderStudent
from rlkd_trl.students.joint_encoders import JointEncoders
from rlkd_trl.trainers.encoder_checks import check_inputs, check_models, check_trained_along, projections_needed
from rlkd_trl.trainers.encoder_config import EncoderKDConfig
from rlkd_trl.trainers.encoder_losses import StageLosses
from rlkd_trl.trainers.encoder_objective import Objective
from rlkd_trl.trainers.encoder_teachers import PanelLosses, check_panel, panel_projections

Encoder = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class PreparedEncoders:
    """What a stage trains and learns from.

    model: the student's model, with its adapters. student: with what is trained beside it. readers: of the teachers.
    """

    model: Encoder
    student: EncoderStudent
    teachers: list[Encoder]
    readers: list[LayerReader]
    losses: StageLosses | PanelLosses
    processing_class: PreTrainedTokenizerBase


def prepare_encoders(
    model: PreTrainedModel | str,
    teachers: Sequence[Encoder | str],
    args: EncoderKDConfig,
    objective: Objective,
    data: Sequence[Dataset],
    processing_class: PreTrainedTokenizerBase | None,
    *,
    peft_config: PeftConfig | None,
    weigh_teachers: bool,
    trained_along: Sequence[PreTrainedModel],
) -> PreparedEncoders:
    """The encoders that `EncoderKDTrainer` is given, whose arguments these are, teachers in eval mode and frozen.

    data: training and evaluation rows, those of the latter if there are any.

    Raises:
        InputError: As `EncoderKDTrainer`, of models and tokenizer.
    """
    if isinstance(model, str):
        processing_class = processing_class or load_tokenizer(model)
        model = load_encoder(model, objective.head, "The student", may_be_new=True, seed=args.seed)
    teachers = [
        load_encoder(teacher, objective.teachers_head, "The teacher") if isinstance(teacher, str) else teacher
        for teacher in teachers
    ]
    check_panel(objective, len(teachers))
    check_trained_along(objective, peft_config, len(trained_along))
    if processing_class is None:
        raise InputError("A loaded student needs its tokenizer: pass `processing_class`.")
    if args.fp16:
        check_fp16(model.config, on_cpu=args.use_cpu)
    check_embedding_rows("The student", processing_class, model.config)
    readers = [LayerReader(teacher.eval().requires_grad_(False)) for teacher in teachers]
    for reader in readers or [None]:
        check_models(objective, LayerReader(model), reader)
        check_inputs(args, objective, data, processing_class, LayerReader(model), reader)
    for encoder in (model, *teachers, *trained_along):
        know_padding(base_of(encoder).config, processing_class)
    model = with_adapters(model, peft_config, seed=args.seed)
    check_weights(model, "The student")
    for trained in (model, *trained_along):
        refuse_float16_weights(trained)
    student = _student_of(model, readers, objective, trained_along, seed=args.seed)
    if len(readers) > 1:
        losses = PanelLosses.of(objective, student, readers, per_example=weigh_teachers)
    else:
        losses = StageLosses(objective, student, next(iter(readers), None))
    return PreparedEncoders(model, student, teachers, readers, losses, processing_class)


def _student_of(
    model: Encoder,
    readers: Sequence[LayerReader],
    objective: Objective,
    trained_along: Sequence[PreTrainedModel],
    *,
    seed: int,
) -> EncoderStudent:
    """The model with what is trained beside it: other encoders, or projections to the teachers' widths."""
    if trained_along:
        return JointEncoders(model, trained_along)
    if len(readers) > 1:
        projections = panel_projections(objective, LayerReader(model), readers)
    else:
        projections = projections_needed(objective, LayerReader(model), next(iter(readers), None))
    return EncoderStudent(model, projections, seed=seed)
