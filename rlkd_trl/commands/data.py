"""Loads the data that a recipe's flags name, as prompts or pairs, and checks it before any model is loaded."""

import random
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import DataArguments, HeldOutArguments, PromptArguments
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.prompt_lengths import fit_prompts, naming, student_prompt
from rlkd_trl.commands.settings import DistillationSettings, SupervisedSettings
from rlkd_trl.data import (
    as_references,
    demo_dataset,
    group_by_source,
    load_rows,
    parse_renames,
    require_columns,
    require_no_blanks,
    require_prompt,
    require_two_columns,
)
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import (
    PromptTemplate,
    PromptTemplates,
    is_conversation,
    question_columns,
    source_text,
    variable_of_source,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from rlkd_trl.models.chat import PromptWriter

# Without --eval_dataset, this share of the inputs is held out for the final table, and at most this many.
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 200


def load_templates(arguments: PromptArguments) -> PromptTemplates | None:
    """The teacher's templates, or None without `--templates` and `--template`. Raises `InputError`."""
    renames = parse_renames(arguments.rename_columns or [])
    if arguments.template is not None:
        if arguments.templates is not None or arguments.template_names:
            raise InputError(
                "--template is the whole text of one template: leave out --templates and --template_names."
            )
        return PromptTemplates.inline(arguments.template, renames)
    if arguments.templates is None:
        if arguments.rename_columns or arguments.template_names:
            raise InputError("--rename_columns and --template_names need --templates.")
        return None
    return PromptTemplates.load(arguments.templates, arguments.template_names or "all", renames)


def load_prompts(
    data: DataArguments,
    prompts: PromptArguments,
    templates: PromptTemplates | None,
    held_out: HeldOutArguments | None = None,
) -> "Dataset":
    """One row for each distinct input, with `prompt` (what the student reads), `source`, `references`, other columns.

    The rows are the training data's, or with `held_out` those of the held-out data. The reference column is left out,
    so that no template can show it to the teacher. Every row is rendered through every template, to find errors now.
    `source` is the source text; where the data has conversations, what the user says last in them.

    Raises:
        InputError: A file, column, split or template is wrong; the message names it.
    """
    if prompts.student_template is not None:
        require_variable("student_template", PromptTemplate("student_template", prompts.student_template).variables)
    for template in templates or []:
        require_variable(template.name, template.input_variables)
    if data.dataset is None:
        rows = demo_dataset("test" if held_out else "train").remove_columns("target")
        grouped, name = group_by_source(rows, "source", "references"), "The demo's data"
    else:
        rows, name = _load_rows(data, held_out), data.dataset if held_out is None else held_out.eval_dataset
        with naming(name):
            grouped = _grouped(rows, data, held_out)
    if data.max_rows is not None and held_out is None:
        grouped = grouped.select(range(min(data.max_rows, len(grouped))))
    with naming(name):
        if prompts.student_template is not None:
            grouped = _with_student_prompts(grouped, prompts.student_template)
        if templates is not None:
            templates.validate(question_columns(templates, row) for row in grouped)
    if templates is not None and held_out is None:
        _say_what_gets_the_source(templates, grouped[0])
    return grouped


def _say_what_gets_the_source(templates: PromptTemplates, row: Mapping[str, object]) -> None:
    """Says which variable of the templates gets the source text: it could be a column's name misspelt."""
    variable = variable_of_source(templates, row)
    if variable is not None:
        say(f"The templates read `{variable}`, which is no column of the data: it gets the source text.")


def _grouped(rows: "Dataset", data: DataArguments, held_out: HeldOutArguments | None) -> "Dataset":
    """One row for each distinct input, with a column `source` too. Raises `InputError` for a wrong column or row."""
    target_column, target_flag = data.target_column, "target_column"
    if held_out is not None and held_out.eval_target_column is not None:
        target_column, target_flag = held_out.eval_target_column, "eval_target_column"
    require_columns(rows, **{"source_column": data.source_column, target_flag: target_column})
    require_two_columns(data.source_column, target_column, flag=target_flag)
    grouped = group_by_source(rows, data.source_column, target_column)
    if data.source_column == "source" and not is_conversation(grouped[0]["prompt"]):
        return grouped
    if "source" in grouped.column_names:
        say(f"The data's own column `source` is replaced by the source text, from `{data.source_column}`.")
        grouped = grouped.remove_columns("source")
    return grouped.add_column("source", [source_text(prompt) for prompt in grouped["prompt"]])


def _with_student_prompts(rows: "Dataset", template: str) -> "Dataset":
    texts = []
    for i, row in enumerate(rows):
        with naming(f"Row {i + 1}"):
            texts.append(str(student_prompt(template, row)))
    return rows.remove_columns("prompt").add_column("prompt", texts)


def _load_rows(data: DataArguments, held_out: HeldOutArguments | None = None) -> "Dataset":
    name, split = (
        (data.dataset, data.dataset_split) if held_out is None else (held_out.eval_dataset, held_out.eval_split)
    )
    return load_rows(name, split, revision=data.dataset_revision, config=data.dataset_config)


def require_variable(name: str, variables: Collection[str]) -> None:
    """Raises `InputError` for a template that reads no column, as it would ask the same about every row."""
    if not variables:
        raise InputError(
            f"Template '{name}' reads no column of the data, so every row would get the same prompt: put one in, as "
            "in 'Summarise: {{ source }}'."
        )


def load_train_and_held_out(
    settings: DistillationSettings, templates: PromptTemplates | None, *, flag: str = "--eval_dataset"
) -> tuple["Dataset", "Dataset"]:
    """Training prompts and held-out rows: `--eval_dataset`, the demo's test split, or a share of the training data.

    flag: the name that `--eval_dataset` has for the user.

    Raises:
        InputError: As `load_prompts`; or too few inputs, to hold some out.
    """
    data, held_out, prompts, args = settings.data, settings.held_out, settings.prompts, settings.args
    if held_out.eval_dataset is not None and data.dataset is None:
        raise InputError("--eval_dataset needs --dataset; the demo has held-out data of its own.")
    if held_out.eval_target_column is not None and held_out.eval_dataset is None:
        raise InputError("--eval_target_column names a column of --eval_dataset: give that too.")
    if held_out.eval_split != HeldOutArguments.eval_split and held_out.eval_dataset is None:
        raise InputError(f"--eval_split {held_out.eval_split} is a split of --eval_dataset: give that too.")
    train = load_prompts(data, prompts, templates)
    if held_out.eval_dataset is not None or data.dataset is None:
        test = load_prompts(data, prompts, templates, held_out)
    else:
        count = min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(train)))
        if count == 0:
            raise InputError(f"{len(train)} distinct inputs are too few to hold some out: give {flag}.")
        order = random.Random(args.seed).sample(range(len(train)), len(train))
        say(f"No {flag}: {count} of {len(train)} distinct inputs are held out for evaluation.")
        train, test = train.select(sorted(order[count:])), train.select(sorted(order[:count]))
    return train, test


def load_pairs(settings: SupervisedSettings, templates: PromptTemplates | None) -> list[dict[str, object]]:
    """Pairs of `prompt` and `target` for supervised training: each row's references, with each template's prompt.

    Without templates the prompt is the student's, a text or a conversation. Without `--dataset` the rows are the
    demo's. Prompts are not cut to a length here; see `pairs_within`.

    Raises:
        InputError: A column is wrong, a template does not render, or all targets are empty.
    """
    from rlkd_trl.trainers.checks import empty_targets

    data, prompts = settings.data, settings.prompts
    rows = demo_dataset("train") if data.dataset is None else _load_rows(data)
    source, target = (data.source_column, data.target_column) if data.dataset else ("source", "target")
    if target is None:
        raise InputError("--target_column is needed here.")
    require_columns(rows, source_column=source, target_column=target)
    require_two_columns(source, target)
    if data.max_rows is not None:
        rows = rows.select(range(min(data.max_rows, len(rows))))
    require_no_blanks(rows[source], source)
    if prompts.student_template is not None:
        require_variable("student_template", PromptTemplate("student_template", prompts.student_template).variables)
    for template in templates or []:
        require_variable(template.name, template.input_variables)
    pairs = []
    for i, row in enumerate(rows):
        require_prompt(row[source], source, i)
        columns = {name: value for name, value in row.items() if name not in (target, "references")}
        columns = {**columns, "source": source_text(row[source]), "prompt": row[source]}
        with naming(f"Row {i + 1}"):
            if templates is not None:
                if i == 0:
                    _say_what_gets_the_source(templates, columns)
                questions = templates.render(question_columns(templates, columns))
            else:
                questions = [student_prompt(prompts.student_template, columns)]
        # A teacher may have answered with nothing, or blanks. (An empty cell of a CSV file is None and an error.)
        is_empty = isinstance(row[target], str) and not row[target].strip()
        answers = [""] if is_empty else as_references(row[target], target, i)
        pairs += [{"prompt": question, "target": answer} for question in questions for answer in answers]
    empty_targets([pair["target"] for pair in pairs])
    return pairs


def pairs_within(pairs: list[dict[str, object]], writer: "PromptWriter", *, max_prompt_length: int) -> "Dataset":
    """The pairs as a dataset, with prompts from templates cut to so many tokens. Raises `InputError`."""
    from datasets import Dataset

    prompts = fit_prompts([pair["prompt"] for pair in pairs], "Training pairs", writer, max_prompt_length)
    return Dataset.from_list([{**pair, "prompt": prompt} for pair, prompt in zip(pairs, prompts, strict=True)])
