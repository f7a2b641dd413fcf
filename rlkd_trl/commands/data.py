"""Loads the data that a recipe's flags name, as prompts or pairs, and checks it before any model is loaded."""

import random
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import (
    DataArguments,
    GeneralDataArguments,
    HeldOutArguments,
    PromptArguments,
    StreamingArguments,
)
from rlkd_trl.commands.launched import say
from rlkd_trl.commands.loading import supervised_writer
from rlkd_trl.commands.prompt_lengths import fit_prompts, naming, student_prompt
from rlkd_trl.commands.settings import DistillationSettings, SupervisedSettings
from rlkd_trl.data import (
    answers_apart,
    as_references,
    demo_dataset,
    group_by_source,
    load_rows,
    parse_renames,
    require_columns,
    require_no_blanks,
    require_prompt,
)
from rlkd_trl.data.columns import input_key
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import (
    Message,
    PromptTemplate,
    PromptTemplates,
    is_conversation,
    question_columns,
    source_text,
    variable_of_source,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from rlkd_trl.data.streams import RowStream
    from rlkd_trl.models.chat import PromptWriter

# Without --eval_dataset, this share of the inputs is held out for the final table, and at most this many.
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 200
HOLDS_NOTHING_OUT = "--streaming cannot hold out a share of rows whose number it does not know"


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
    require_variables(prompts, templates)
    if data.dataset is None:
        rows = demo_dataset("test" if held_out else "train").remove_columns("target")
        grouped, name = group_by_source(rows, "source", "references"), "The demo's data"
    else:
        rows, name = _load_rows(data, held_out), data.dataset if held_out is None else held_out.eval_dataset
        with naming(name):
            grouped = _grouped(rows, data, held_out)
        _say_what_is_replaced(rows, data)
    _say_what_is_continued(grouped["prompt"])
    if data.max_rows is not None and held_out is None:
        grouped = grouped.select(range(min(data.max_rows, len(grouped))))
    with naming(name):
        grouped = _rendered(grouped, prompts, templates)
    if templates is not None and held_out is None:
        _say_what_gets_the_source(templates, grouped[0], data.target_column)
    return grouped


def stream_prompts(
    data: DataArguments,
    streaming: StreamingArguments,
    prompts: PromptArguments,
    templates: PromptTemplates | None,
    seed: int,
) -> "RowStream":
    """As `load_prompts`, of training data that is read while training goes on.

    An input that stands in several rows is one only where these are prepared together.

    Raises:
        InputError: A file, column, split or template is wrong, or one of the first rows; the message names it.
    """
    require_variables(prompts, templates)

    def prepare(rows: "Dataset") -> "Dataset":
        return _rendered(_grouped(rows, data, None), prompts, templates)

    stream = open_stream(data, streaming, prepare, seed)
    if templates is not None:
        _say_what_gets_the_source(templates, stream.head[0], data.target_column)
    _say_what_is_continued(stream.head["prompt"])
    return stream


def open_stream(
    data: DataArguments | GeneralDataArguments,
    streaming: StreamingArguments,
    prepare: Callable[["Dataset"], "Dataset"],
    seed: int,
) -> "RowStream":
    """The stream of `--dataset`, and a sentence that says what this means. Raises `InputError`."""
    from rlkd_trl.data.streams import RowStream, stream_rows

    if data.dataset is None:
        raise InputError("--streaming needs --dataset: the demo's data is small.")
    if data.max_rows is not None:
        raise InputError("--max_rows counts the inputs of data that is read at once: leave it out with --streaming.")
    rows = stream_rows(data.dataset, data.dataset_split, revision=data.dataset_revision, config=data.dataset_config)
    stream = RowStream(rows, prepare, name=data.dataset, buffer_size=streaming.shuffle_buffer_size, seed=seed)
    say(
        f"--streaming: {data.dataset} is read while training goes on. Its first {len(stream.head)} rows are checked "
        "now; of later rows nobody counts how many are shortened, and one that is wrong ends the run when it is read."
    )
    return stream


def _rendered(rows: "Dataset", prompts: PromptArguments, templates: PromptTemplates | None) -> "Dataset":
    """The rows with the student's prompts, after all have been rendered through the templates. Raises `InputError`."""
    if prompts.student_template is not None:
        rows = _with_student_prompts(rows, prompts.student_template)
    if templates is not None:
        templates.validate(question_columns(templates, row) for row in rows)
    return rows


def _say_what_is_replaced(rows: "Dataset", data: DataArguments) -> None:
    if "source" in rows.column_names and data.source_column != "source":
        say(f"The data's own column `source` is replaced by the source text, from `{data.source_column}`.")


def _say_what_is_continued(prompts: Collection[str | list[Message]]) -> None:
    """Says that conversations end with the assistant: they may be whole ones, whose last message is the answer."""
    count = sum(is_conversation(prompt) and prompt[-1]["role"] == "assistant" for prompt in prompts)
    if count:
        say(
            f"{count} of {len(prompts)} conversations end with the assistant, whose last words are gone on from. If "
            "they are the answers, name the source column as --target_column (for held-out data "
            "--eval_target_column) too: they are then the targets, and no part of prompts."
        )


def _say_what_gets_the_source(
    templates: PromptTemplates, row: Mapping[str, object], target_column: str | None
) -> None:
    """Says which variable of the templates gets the source text: it could be a column's name misspelt.

    Raises `InputError` if it is the target column's name, which templates do not see.
    """
    variable = variable_of_source(templates, row)
    if variable is not None and variable == target_column:
        raise InputError(
            f"The templates read `{variable}`, which is the --target_column: no prompt shows it. Write "
            "{{ source }} for the source text, or another column's name."
        )
    if variable is not None:
        say(f"The templates read `{variable}`, which is no column of the data: it gets the source text.")


def _grouped(rows: "Dataset", data: DataArguments, held_out: HeldOutArguments | None) -> "Dataset":
    """One row for each distinct input, with a column `source` too. Raises `InputError` for a wrong column or row."""
    target_column, target_flag = data.target_column, "target_column"
    if held_out is not None and held_out.eval_target_column is not None:
        target_column, target_flag = held_out.eval_target_column, "eval_target_column"
    require_columns(rows, **{"source_column": data.source_column, target_flag: target_column})
    rows, target_column = answers_apart(rows, data.source_column, target_column, flag=target_flag)
    grouped = group_by_source(rows, data.source_column, target_column)
    if data.source_column == "source" and not is_conversation(grouped[0]["prompt"]):
        return grouped
    if "source" in grouped.column_names:
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


def require_variables(prompts: PromptArguments, templates: PromptTemplates | None) -> None:
    """Raises `InputError` for a template of the student's or the teacher's that reads no column."""
    if prompts.student_template is not None:
        require_variable("student_template", PromptTemplate("student_template", prompts.student_template).variables)
    for template in templates or []:
        require_variable(template.name, template.input_variables)


def require_variable(name: str, variables: Collection[str]) -> None:
    """Raises `InputError` for a template that reads no column, as it would ask the same about every row."""
    if not variables:
        raise InputError(
            f"Template '{name}' reads no column of the data, so every row would get the same prompt: put one in, as "
            "in 'Summarise: {{ source }}'."
        )


def load_train_and_held_out(
    settings: DistillationSettings, templates: PromptTemplates | None, *, flag: str = "--eval_dataset"
) -> "tuple[Dataset | RowStream, Dataset]":
    """Training prompts and held-out rows: `--eval_dataset`, the demo's test split, or a share of the training data.

    With `--streaming` the training prompts are a `RowStream`.

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
    if settings.streaming.streaming:
        from rlkd_trl.trainers.checks import check_endless

        check_endless(args)
        if held_out.eval_dataset is None:
            raise InputError(f"{HOLDS_NOTHING_OUT}: give {flag}.")
        train = stream_prompts(data, settings.streaming, prompts, templates, args.seed)
        return train, load_prompts(data, prompts, templates, held_out)
    train = load_prompts(data, prompts, templates)
    if held_out.eval_dataset is not None or data.dataset is None:
        test = load_prompts(data, prompts, templates, held_out)
        say_what_is_shared(*(map(input_key, rows["prompt"]) for rows in (train, test)), flag)
    else:
        count = min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(train)))
        if count == 0:
            raise InputError(f"{len(train)} distinct inputs are too few to hold some out: give {flag}.")
        order = random.Random(args.seed).sample(range(len(train)), len(train))
        say(f"No {flag}: {count} of {len(train)} distinct inputs are held out for evaluation.")
        train, test = train.select(sorted(order[count:])), train.select(sorted(order[:count]))
    return train, test


def say_what_is_shared(trained: Iterable[Hashable], held_out: Iterable[Hashable], flag: str) -> None:
    """Says how many held-out inputs are training inputs too: the table would call them held out."""
    trained = set(trained)
    is_shared = [tested in trained for tested in held_out]
    if any(is_shared):
        say(
            f"{sum(is_shared)} of {len(is_shared)} inputs of {flag} are training inputs too: results on these are not "
            "held out."
        )


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
    if data.max_rows is not None:
        rows = rows.select(range(min(data.max_rows, len(rows))))
    require_variables(prompts, templates)
    pairs = _pairs_of(rows, data, prompts, templates)
    if templates is not None:
        _say_what_gets_the_source(templates, pairs[0], data.target_column)
    _say_what_is_continued([pair["prompt"] for pair in pairs])
    empty_targets([pair["target"] for pair in pairs])
    return pairs


def stream_pairs(settings: SupervisedSettings, templates: PromptTemplates | None) -> "RowStream":
    """As `load_pairs` and `pairs_within`, of data that is read while training goes on.

    Raises:
        InputError: As `load_pairs`, of the first rows; or a flag does not go with a stream.
    """
    from datasets import Dataset

    from rlkd_trl.trainers.checks import check_endless, empty_targets

    check_endless(settings.args)
    if settings.student.student is None and settings.new.tokenizer is None:
        raise InputError("A new tokenizer is trained on all data: with --streaming give --student or --tokenizer.")
    data, prompts, length = settings.data, settings.prompts, settings.args.max_prompt_length
    require_variables(prompts, templates)
    writer = supervised_writer(settings.student, settings.new, [])

    def prepare(rows: "Dataset") -> "Dataset":
        pairs = _pairs_of(rows, data, prompts, templates)
        texts = fit_prompts([pair["prompt"] for pair in pairs], data.dataset, writer, length, counts=False)
        return Dataset.from_list(
            [{"prompt": text, "target": pair["target"]} for text, pair in zip(texts, pairs, strict=True)]
        )

    stream = open_stream(data, settings.streaming, prepare, settings.args.seed)
    empty_targets(stream.head["target"])
    return stream


def _pairs_of(
    rows: "Dataset", data: DataArguments, prompts: PromptArguments, templates: PromptTemplates | None
) -> list[dict[str, object]]:
    """The pairs of some rows; see `load_pairs`. Raises `InputError`."""
    source, target = (data.source_column, data.target_column) if data.dataset else ("source", "target")
    if target is None:
        raise InputError("--target_column is needed here.")
    require_columns(rows, source_column=source, target_column=target)
    rows, target = answers_apart(rows, source, target)
    require_no_blanks(rows[source], source)
    pairs = []
    for i, row in enumerate(rows):
        require_prompt(row[source], source, i)
        columns = {name: value for name, value in row.items() if name != target}
        columns = {**columns, "source": source_text(row[source]), "prompt": row[source]}
        with naming(f"Row {i + 1}"):
            if templates is not None:
                questions = templates.render(question_columns(templates, columns))
            else:
                questions = [student_prompt(prompts.student_template, columns)]
        # A teacher may have answered with nothing, or blanks. (An empty cell of a CSV file is None and an error.)
        is_empty = isinstance(row[target], str) and not row[target].strip()
        answers = [""] if is_empty else as_references(row[target], target, i)
        pairs += [{"prompt": question, "target": answer} for question in questions for answer in answers]
    return pairs


def pairs_within(pairs: list[dict[str, object]], writer: "PromptWriter", *, max_prompt_length: int) -> "Dataset":
    """The pairs as a dataset, with prompts from templates cut to so many tokens. Raises `InputError`."""
    from datasets import Dataset

    prompts = fit_prompts([pair["prompt"] for pair in pairs], "Training pairs", writer, max_prompt_length)
    return Dataset.from_list([{**pair, "prompt": prompt} for pair, prompt in zip(pairs, prompts, strict=True)])
