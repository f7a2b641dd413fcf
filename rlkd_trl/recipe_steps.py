"""The steps that recipes share, from parsed flags to a finished output directory. Each recipe is a story of these."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.cli import (
    DataArguments,
    HeldOutArguments,
    NewModelArguments,
    PromptArguments,
    PseudoLabelArguments,
    RewardArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
)
from rlkd_trl.data import (
    as_references,
    demo_dataset,
    group_by_source,
    load_rows,
    parse_renames,
    require_columns,
    require_text,
)
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates, question_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from rlkd_trl.rewards import RewardModel
    from rlkd_trl.teachers import TeacherPanel
    from rlkd_trl.trainers.config import OnPolicyConfig

# Without --eval_dataset, this share of the inputs, and at most this many, are held out for the final table.
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 200


def load_templates(arguments: PromptArguments) -> PromptTemplates | None:
    """The teacher's templates, or None without `--templates`. Raises `InputError`."""
    if arguments.templates is None:
        if arguments.rename_columns or arguments.template_names:
            raise InputError("--rename_columns and --template_names need --templates.")
        return None
    return PromptTemplates.load(
        arguments.templates, arguments.template_names or "all", parse_renames(arguments.rename_columns or [])
    )


def load_prompts(
    data: DataArguments,
    prompts: PromptArguments,
    templates: PromptTemplates | None,
    held_out: HeldOutArguments | None = None,
) -> "Dataset":
    """One row for each distinct input: `prompt` (what the student reads), `source`, `references`, other columns.

    The reference column itself is not among them, so that no template can show it to the teacher. Every row is
    rendered through every template here, before a model is loaded. With `held_out`, the held-out data's rows.

    Raises:
        InputError: A file, column, split or template is wrong; the message names it.
    """
    if data.dataset is None:
        rows = demo_dataset("test" if held_out else "train").remove_columns("target")
        source_column, target_column = "source", "references"
    else:
        rows = _load_rows(data, held_out)
        source_column, target_column = data.source_column, data.target_column
        require_columns(rows, source_column=source_column, target_column=target_column)
    grouped = group_by_source(rows, source_column, target_column)
    if data.max_rows is not None:
        grouped = grouped.select(range(min(data.max_rows, len(grouped))))
    if source_column != "source":
        if "source" in grouped.column_names:
            print(
                f"The data's own column `source` is replaced by the source text, from `{source_column}`.", flush=True
            )
            grouped = grouped.remove_columns("source")
        grouped = grouped.add_column("source", grouped["prompt"][:])
    if prompts.student_template is not None:
        own = PromptTemplate("student_template", prompts.student_template)
        texts = [own.render({k: v for k, v in row.items() if k != "references"}) for row in grouped]
        grouped = grouped.remove_columns("prompt").add_column("prompt", texts)
    check_templates(templates, grouped)
    return grouped


def _load_rows(data: DataArguments, held_out: HeldOutArguments | None = None) -> "Dataset":
    name, split = (
        (data.dataset, data.dataset_split) if held_out is None else (held_out.eval_dataset, held_out.eval_split)
    )
    return load_rows(name, split, revision=data.dataset_revision, config=data.dataset_config)


def check_templates(templates: PromptTemplates | None, rows: "Dataset") -> None:
    """Renders every row through every template. Raises `InputError`, naming the first that fails."""
    if templates is None:
        return
    templates.validate(question_columns(templates, row) for row in rows)


def load_train_and_held_out(
    data: DataArguments,
    held_out: HeldOutArguments,
    prompts: PromptArguments,
    templates: PromptTemplates | None,
    args: "OnPolicyConfig",
) -> tuple["Dataset", "Dataset"]:
    """Training prompts and held-out rows: `--eval_dataset`, the demo's test split, or a share of the training data.

    Raises:
        InputError: As `load_prompts`; or too few inputs, to hold some out or for one rollout.
    """
    from rlkd_trl.trainers.checks import check_prompts

    if held_out.eval_dataset is not None and data.dataset is None:
        raise InputError("--eval_dataset needs --dataset; the demo has held-out data of its own.")
    train = load_prompts(data, prompts, templates)
    if held_out.eval_dataset is not None or data.dataset is None:
        test = load_prompts(data, prompts, templates, held_out)
    else:
        count = min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(train)))
        if count == 0:
            raise InputError(f"{len(train)} distinct inputs are too few to hold some out: give --eval_dataset.")
        order = random.Random(args.seed).sample(range(len(train)), len(train))
        print(f"No --eval_dataset: {count} of {len(train)} distinct inputs are held out for evaluation.", flush=True)
        train, test = train.select(sorted(order[count:])), train.select(sorted(order[:count]))
    check_prompts(train, args)
    return train, test


def load_pairs(data: DataArguments, prompts: PromptArguments, templates: PromptTemplates | None) -> "Dataset":
    """Supervised pairs, `prompt` and `target`: every row's reference after every template, or after the bare source.

    Without `--dataset`, the demo's. Raises `InputError`.
    """
    from datasets import Dataset

    rows = demo_dataset("train") if data.dataset is None else _load_rows(data)
    source, target = (data.source_column, data.target_column) if data.dataset else ("source", "target")
    require(**{"--target_column": target})
    require_columns(rows, source_column=source, target_column=target)
    if data.max_rows is not None:
        rows = rows.select(range(min(data.max_rows, len(rows))))
    own = None if prompts.student_template is None else PromptTemplate("student_template", prompts.student_template)
    pairs = []
    for i, row in enumerate(rows):
        require_text(row[source], source, i)
        columns = {name: value for name, value in row.items() if name not in (target, "references")}
        columns = {**columns, "source": row[source], "prompt": row[source]}
        if templates is not None:
            questions = templates.render(question_columns(templates, columns))
        else:
            questions = [own.render(columns) if own else row[source]]
        # A teacher may have answered nothing; an empty cell of a CSV file is None, not this.
        answers = [""] if row[target] == "" else as_references(row[target], target, i)
        pairs += [{"prompt": question, "target": answer} for question in questions for answer in answers]
    return Dataset.from_list(pairs)


def load_or_make_model(
    student: StudentArguments, new: NewModelArguments, pairs: "Dataset", *, seed: int
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """`--student`'s checkpoint, or a new model over `--tokenizer` or one trained on the pairs. Raises `InputError`."""
    if student.student is not None:
        check_student(student)
        return load_student(student)
    from rlkd_trl.data import train_tokenizer
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.students.from_scratch import new_model

    if new.tokenizer is not None:
        tokenizer = load_tokenizer(new.tokenizer)
    else:
        tokenizer = train_tokenizer([*pairs["prompt"], *pairs["target"]], vocab_size=new.vocab_size)
    sizes = {
        name: getattr(new, name) for name in ("architecture", "d_model", "num_layers", "num_heads", "d_ff", "dropout")
    }
    return new_model(tokenizer, **sizes, seed=seed), tokenizer


def require(**flags: object) -> None:
    """Raises `InputError` for the first flag without a value."""
    for flag, value in flags.items():
        if value is None:
            raise InputError(f"{flag} is needed here.")


def check_checkpoints(teacher: TeacherArguments, student: StudentArguments) -> None:
    """Teacher and student exist and share a tokenizer; before any weights are read. Raises `InputError`."""
    from rlkd_trl.models.loading import load_tokenizer
    from rlkd_trl.models.vocabulary import check_same_tokenizer

    check_teacher(teacher)
    check_student(student)
    student_tokenizer = load_tokenizer(student.student, revision=student.student_revision)
    for name in teacher.teacher or []:
        check_same_tokenizer(student_tokenizer, load_tokenizer(name, revision=teacher.teacher_revision))


def check_teacher(teacher: TeacherArguments) -> None:
    """The teachers are checkpoints or may be Hub ids, and the dtype is known. Raises `InputError`."""
    from rlkd_trl.models.loading import check_dtype, require_checkpoint

    check_dtype(teacher.teacher_dtype)
    for name in teacher.teacher or []:
        require_checkpoint("--teacher", name)


def check_student(student: StudentArguments) -> None:
    """The student is a checkpoint or may be a Hub id, and the dtype is known. Raises `InputError`."""
    from rlkd_trl.models.loading import check_dtype, require_checkpoint

    check_dtype(student.student_dtype)
    require_checkpoint("--student", student.student)


def check_pseudo_labels(data: DataArguments, teacher: TeacherArguments, labels: PseudoLabelArguments) -> None:
    """One teacher, a known strategy, beams and references to interpolate, and a writable file. Raises `InputError`."""
    from rlkd_trl.models.answers import check_strategy

    check_teacher(teacher)
    if len(teacher.teacher) != 1:
        raise InputError(f"{len(teacher.teacher)} teachers: pseudo-labels are one teacher's answers.")
    check_strategy(labels.strategy)
    if labels.interpolate and (labels.strategy != "beam" or data.target_column is None):
        raise InputError(
            "--interpolate takes the teacher's beam that is nearest to the references: it needs --strategy beam and "
            "--target_column with the references."
        )
    if Path(labels.output).is_dir():
        raise InputError(f"--output {labels.output} is a directory: name a file in it.")


def load_panel(teacher: TeacherArguments, templates: PromptTemplates | None) -> "TeacherPanel":
    """The named teachers, asked through the templates. Raises `InputError`."""
    from rlkd_trl.teachers import Teacher, TeacherPanel

    teachers = [
        Teacher.from_pretrained(
            name,
            revision=teacher.teacher_revision,
            dtype=teacher.teacher_dtype,
            max_prompt_length=teacher.teacher_max_prompt_length,
            max_batch_tokens=teacher.teacher_batch_tokens,
        )
        for name in teacher.teacher
    ]
    return TeacherPanel(teachers, templates)


def load_reward_model(
    reward: RewardArguments,
    teacher: TeacherArguments,
    templates: PromptTemplates | None,
    *,
    gamma: float,
    weights: Sequence[float] | None,
) -> "RewardModel":
    """The named rewards on one panel of the named teachers.

    Raises:
        InputError: As `load_reward`, `Teacher.from_pretrained`, `TeacherForcingReward` and `RewardModel`.
    """
    from rlkd_trl.rewards import RewardModel, TeacherForcingReward, TeacherReward, load_reward

    found = [load_reward(name) for name in reward.reward]  # names first: loading a teacher takes minutes
    panel = load_panel(teacher, templates)
    terms = []
    for one in found:
        if one is TeacherForcingReward:
            terms.append(one(panel, value=reward.value, k=reward.k, tau=reward.tau, gamma=gamma))
        elif isinstance(one, type) and issubclass(one, TeacherReward):
            terms.append(one(panel))
        else:
            terms.append(one)
    return RewardModel(terms, weights, panel=panel)


def check_rewards(
    reward: RewardArguments, weights: Sequence[float] | None, args: "OnPolicyConfig | None" = None
) -> None:
    """The rewards exist, with as many weights, a known V, and fit the trainer's settings. Raises `InputError`."""
    from rlkd_trl.rewards import load_reward
    from rlkd_trl.rewards.teacher_rewards import VALUES
    from rlkd_trl.trainers.checks import check_k_step, check_log_ratio

    for name in reward.reward:
        found = load_reward(name)
        if args is not None:
            check_log_ratio(found, args)
    if reward.value not in VALUES:
        raise InputError(f"--value {reward.value}: choose one of {', '.join(VALUES)}.")
    if weights is not None and len(weights) != len(reward.reward):
        raise InputError(f"{len(weights)} --reward_weights for {len(reward.reward)} rewards: give one each.")
    if args is not None:
        check_k_step(reward.k, args)


def name_or_make_models(
    teacher: TeacherArguments,
    student: StudentArguments,
    data: DataArguments,
    templates: PromptTemplates | None,
    args: "TrainingArguments",
) -> None:
    """Fills in the demo's teacher and warm start, trained here, where none of data, teacher and student is named.

    Raises:
        InputError: Some of the three are named and others not.
    """
    named = {"--dataset": data.dataset, "--teacher": teacher.teacher, "--student": student.student}
    missing = [flag for flag, value in named.items() if value is None]
    if not missing:
        return
    if len(missing) < len(named):
        raise InputError(
            f"{' and '.join(missing)} missing: give --dataset, --teacher and --student, or none of them for the demo."
        )
    from rlkd_trl.demo import make_demo_models

    models = make_demo_models(Path(args.output_dir) / "demo_models", templates, seed=args.seed)
    teacher.teacher, student.student = [models.teacher], models.student


def load_student(student: StudentArguments) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The student and its tokenizer. Raises `InputError`."""
    from rlkd_trl.models.loading import load_model, load_tokenizer

    model = load_model(student.student, revision=student.student_revision, dtype=student.student_dtype)
    return model, load_tokenizer(student.student, revision=student.student_revision)


def last_checkpoint(run: RunArguments, output_dir: str) -> str | None:
    """The newest checkpoint in `output_dir` if `--resume` asks for it.

    Raises:
        InputError: There is none, or `output_dir` is a file.
    """
    from transformers.trainer_utils import get_last_checkpoint

    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise InputError(f"--output_dir {output_dir} is a file: name a directory.")
    if not run.resume:
        return None
    found = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if found is None:
        raise InputError(f"--resume: there is no checkpoint in {output_dir}; save some with --save_steps.")
    return found
