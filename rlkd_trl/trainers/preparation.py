"""The student, made ready for training, and everything that is checked before training begins."""

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.data import reference_texts
from rlkd_trl.errors import InputError
from rlkd_trl.models.chat import PromptWriter
from rlkd_trl.models.finite import check_weights, refuse_float16_weights
from rlkd_trl.models.generation_config import set_trained_generation_config
from rlkd_trl.models.loading import load_model, load_tokenizer
from rlkd_trl.models.precision import check_fp16
from rlkd_trl.models.vocabulary import allow_special_tokens, check_tokenizers, share_special_tokens
from rlkd_trl.prompts import ChatFormat
from rlkd_trl.rewards import RewardModel
from rlkd_trl.students import with_adapters
from rlkd_trl.teachers import AbsentTeacher, Teacher
from rlkd_trl.trainers.checks import check_positions, check_sharded_head
from rlkd_trl.trainers.config import RolloutConfig


def prepare_student(
    model: PreTrainedModel | str,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    reward_model: RewardModel,
    args: RolloutConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    chat: ChatFormat | None,
) -> tuple[PreTrainedModel, PromptWriter]:
    """The student, loaded and with its adapters, and the writer of its prompts, which has its tokenizer.

    Both are checked against teachers and data.

    Its generation config becomes that of its checkpoints, and it shares with the teachers which special tokens are
    content, by the references in the data (see `models.vocabulary`).

    Raises:
        InputError: A loaded student without its tokenizer, tokenizers that differ, prompts and completions beyond a
            model's positions, a conversation that a chat template refuses, T5 with fp16, weights that are not
            finite or in float16, `peft_config` for a student with adapters, adapters on an LM head that ZeRO-3 shards;
            or as `PromptWriter`.
    """
    if isinstance(model, str):
        processing_class = processing_class or load_tokenizer(model)
        model = load_model(model)
    if processing_class is None:
        raise InputError("A loaded student needs its tokenizer: pass `processing_class`.")
    writer = PromptWriter(processing_class, chat)
    processing_class = writer.processing_class
    if args.fp16:
        check_fp16(model.config, on_cpu=args.use_cpu)
    model = with_adapters(model, peft_config, seed=args.seed)
    check_sharded_head(model)
    check_weights(model, "The student")
    refuse_float16_weights(model)
    teachers = teachers_of(reward_model)
    align = args.align_tokenizers if args.can_align else None
    check_tokenizers(processing_class, [teacher.processing_class for teacher in teachers], align=align)
    check_positions(model, writer, reward_model, args, train_dataset, eval_dataset)
    references = reference_texts(train_dataset, eval_dataset)
    for teacher in teachers:
        if teacher.model is None:
            allow_special_tokens(model, processing_class, teacher.content_tokens)
    of_teachers = [(teacher.model, teacher.processing_class) for teacher in teachers if teacher.model is not None]
    share_special_tokens([(model, processing_class), *of_teachers], references)
    for teacher in teachers:
        teacher.aligner(processing_class)
    set_trained_generation_config(model, processing_class, max_completion_length=args.max_completion_length)
    return model, writer


def teachers_of(reward_model: RewardModel) -> list[Teacher | AbsentTeacher]:
    """The teacher of each of the reward's scorers."""
    return [scorer.teacher for panel in reward_model.panels for scorer in panel.scorers]
