"""Which flags name files and outputs: of every dataclass of flags, so that a new flag cannot be forgotten."""

import dataclasses
import typing

import pytest

from rlkd_trl.commands import arguments, assistants, encoder_search
from rlkd_trl.commands.comparison import arguments as of_compare
from rlkd_trl.commands.files_read import FILES_OF, READ_BY_FLAG
from rlkd_trl.settings.files import Reads, files_read, places_written
from rlkd_trl.trainers import config, encoder_config, full_vocabulary_config, supervised_config

MODULES = [arguments, of_compare, encoder_search, assistants, config, encoder_config, full_vocabulary_config]
MODULES.append(supervised_config)
KINDS = sorted(
    {
        kind
        for module in MODULES
        for kind in vars(module).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not kind.__name__.endswith("Settings")
        if not kind.__dataclass_params__.frozen  # what a config makes of its fields
    },
    key=lambda kind: kind.__name__,
)
# Texts that name neither a file that is read nor an output: names, texts, choices.
NO_FILES = set(
    "dataset_split dataset_config dataset_revision source_column target_column eval_split eval_target_column template "
    "template_names rename_columns student_template teacher_revision teacher_dtype teacher_quantization "
    "teacher_placement teacher_offload_path student_revision student_dtype value architecture strategy "
    "baseline select_on common validation_split test_split critic level ensemble divergence "
    "teacher_server teacher_server_model teacher_api_key_env dtype "
    "sequences signal future report_to average_reward allowed_special_tokens pair_column label_column init "
    "teacher_system_prompt teacher_chat_template_kwargs student_system_prompt student_chat_template_kwargs "
    "task_split task_config task_revision task_source_column task_pair_column task_eval_split task_teacher_revision "
    "stages losses layer_map teacher_weighting teacher_column template_column stage sets candidates metric "
    "lora_target_modules lora_modules_to_save".split()
)
# The same of transformers.TrainingArguments.
INHERITED_NO_FILES = set(
    "lr_scheduler_type lr_scheduler_kwargs optim optim_args optim_target_modules torch_compile_backend "
    "torch_compile_mode logging_strategy log_level log_level_replica run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id eval_strategy save_strategy hub_token hub_model_id hub_strategy "
    "hub_revision metric_for_best_model dataloader_multiprocessing_context label_names train_sampling_strategy "
    "length_column_name ddp_backend fsdp debug include_for_metrics activation_checkpointing_kwargs "
    "liger_kernel_config gradient_checkpointing_kwargs include_num_input_tokens_seen".split()
)


def takes_text(hint: object) -> bool:
    return hint is str or any(takes_text(part) for part in typing.get_args(hint))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_text_is_known_to_name_a_file_or_not(kind):
    hints = typing.get_type_hints(kind)
    texts = {field.name for field in dataclasses.fields(kind) if field.init and takes_text(hints[field.name])}
    reads = set(files_read(kind))
    written = set(places_written(kind))
    assert not (reads | written) & (NO_FILES | INHERITED_NO_FILES) and not reads & written
    assert texts - reads - written - NO_FILES - INHERITED_NO_FILES == set(), (
        "say in settings/files.py whether it names a file"
    )


def test_there_are_flags_to_test():
    assert len(KINDS) >= 15
    assert files_read(arguments.TeacherArguments) == {
        "teacher": Reads.CHECKPOINT,
        "teacher_chat_template": Reads.CHAT_TEMPLATE,
    }
    assert files_read(arguments.RewardArguments) == {"reward": Reads.REWARD}
    assert files_read(of_compare.MeasurementArguments) == {
        "validation_dataset": Reads.DATA,
        "test_dataset": Reads.DATA,
    }
    assert files_read(config.PPOKDConfig)["deepspeed"] is Reads.JSON
    assert places_written(arguments.PseudoLabelArguments) == ["output"]
    for kind in (config.PPOKDConfig, arguments.EvaluationArguments, of_compare.ComparisonArguments):
        assert places_written(kind) == ["output_dir"]


def test_each_kind_has_its_files():
    assert set(FILES_OF) == set(Reads)


def test_a_training_run_is_known_by_all_that_it_reads():
    groups = [arguments.DataArguments, arguments.HeldOutArguments, arguments.PromptArguments]
    groups += [arguments.TeacherArguments, arguments.StudentArguments, arguments.RewardArguments, config.PPOKDConfig]
    groups += [arguments.GeneralDataArguments, arguments.TaskDataArguments, arguments.EncoderHeldOutArguments]
    groups += [arguments.EncoderTeacherArguments, arguments.EncoderStudentArguments, arguments.EncoderPanelArguments]
    groups += [arguments.AbsentTeacherArguments]
    expected = {f"--{name}" for group in groups for name in files_read(group)}
    assert set(READ_BY_FLAG) == expected
    assert expected >= {"--dataset", "--eval_dataset", "--templates", "--teacher", "--student", "--reward"}
