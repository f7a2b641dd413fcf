r"""Supervised training: a teacher on references through its templates, or a student's warm start on pseudo-labels.

    # a teacher from scratch, T0-style: every row through every template
    python recipes/sft.py --dataset train.csv --source_column mr --target_column ref --templates templates.yaml \
        --d_model 128 --num_layers 2 --output_dir runs/teacher
    # a smaller student from scratch with the teacher's tokenizer, on the teacher's answers to the bare sources
    python recipes/sft.py --dataset runs/pseudo.jsonl --source_column mr --target_column pseudo_label \
        --tokenizer runs/teacher --d_model 64 --num_layers 2 --output_dir runs/warm
    # fine-tune an existing checkpoint
    python recipes/sft.py --student google-t5/t5-base --dataset ... --output_dir runs/warm

Cross-entropy over all target tokens of the global batch. Without `--student` a new model is made: T5 or Llama, of the
size given, over a tokenizer trained on the data (byte-pair encoding with T5's special tokens) or taken from
`--tokenizer`. Teacher and student must share one tokenizer.
"""

from typing import TYPE_CHECKING

from rlkd_trl.commands.checks import check_new_model, check_student, require_files
from rlkd_trl.commands.data import load_pairs, load_templates, pairs_within, stream_pairs
from rlkd_trl.commands.hub import check_push, push
from rlkd_trl.commands.loading import load_or_make_model, supervised_writer
from rlkd_trl.commands.model_card import write_supervised_card
from rlkd_trl.commands.run_directory import (
    check_free,
    checkpoint_to_resume,
    clear_results,
    held_alone,
    is_finished,
    mark_finished,
)
from rlkd_trl.commands.run_record import check_own_checkpoint, command_record
from rlkd_trl.commands.settings import CommandLine, SupervisedSettings
from rlkd_trl.commands.student_adapters import check_adapters, check_pushed_adapters, report_adapters, student_adapters
from rlkd_trl.errors import run

if TYPE_CHECKING:
    from rlkd_trl.data.streams import RowStream
    from rlkd_trl.prompts.templates import PromptTemplates

CONFIG = "rlkd_trl.trainers.supervised_config:SupervisedConfig"


def main() -> None:
    # Parse, and find out what is wrong with the input before any model is loaded.
    command = CommandLine(SupervisedSettings, description=__doc__, recipe="sft", config=CONFIG)
    sketch = command.sketch()
    require_files(sketch)
    check_new_model(sketch)
    templates = load_templates(sketch.prompts)
    pairs = stream_pairs(sketch, templates) if sketch.streaming.streaming else load_pairs(sketch, templates)

    from rlkd_trl.trainers.processes import connect_processes

    connect_processes(sketch.args)
    with held_alone(sketch.args.output_dir):
        train(command.settings(), pairs, templates)


def train(
    settings: SupervisedSettings,
    pairs: "list[dict[str, object]] | RowStream",
    templates: "PromptTemplates | None",
) -> None:
    # Find out what is wrong with the directory and the checkpoints.
    args = settings.args
    check_free(args.output_dir, settings.run, args)
    checkpoint, record = checkpoint_to_resume(settings.run, args), command_record(settings)
    check_own_checkpoint(checkpoint, "SupervisedTrainer", args, record)
    check_student(settings.student, fp16=args.fp16)
    check_adapters(settings.adapters, settings.student, has_dropout=True)
    check_pushed_adapters(settings.adapters, settings.student, args)
    check_push(args)
    if is_finished(checkpoint, args):
        push(args)
        return
    is_stream = settings.streaming.streaming
    known = pairs.head if is_stream else pairs
    print(f"{len(known)} {'first ' * is_stream}pairs of prompt and target, e.g. {known[0]}", flush=True)

    # Build.
    from rlkd_trl.trainers.interruption import StopRequest
    from rlkd_trl.trainers.supervised import SupervisedTrainer
    from rlkd_trl.trainers.trainer_internals import finish_pushes

    writer = supervised_writer(settings.student, settings.new, known)
    dataset = pairs if is_stream else pairs_within(pairs, writer, max_prompt_length=args.max_prompt_length)
    model = load_or_make_model(settings.student, settings.new, writer, seed=args.seed)
    tokenizer = writer.processing_class
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    adapters = student_adapters(settings.adapters, settings.student, model, has_dropout=True)
    trainer = SupervisedTrainer(model, args, dataset, tokenizer, peft_config=adapters, chat=writer.chat)
    report_adapters(settings.adapters, trainer.model)
    trainer.run_record["command"] = record

    # Train and save.
    clear_results(args.output_dir, goes_on=checkpoint is not None)
    trainer.train(resume_from_checkpoint=checkpoint)
    with StopRequest().listening(is_last=not args.push_to_hub):  # a signal to stop waits
        if settings.adapters.merge_adapters:
            trainer.merge_adapters()
        trainer.save_model(_internal_call=True)
        if trainer.is_world_process_zero():
            write_supervised_card(trainer, settings, templates, writer)
        mark_finished(args.output_dir, trainer.state.global_step)
        print(f"The model is in {args.output_dir}.", flush=True)
    finish_pushes(trainer)
    push(args)


if __name__ == "__main__":
    run(main)
