"""Datasets in and out: columns, local files, the Hub, the embedded demo task and its tokenizer."""

from rlkd_trl.data.columns import (
    answer_in,
    answers_apart,
    as_references,
    group_by_source,
    input_key,
    listed_references,
    parse_renames,
    reference_texts,
    require_columns,
    require_no_blanks,
    require_prompt,
    require_text,
)
from rlkd_trl.data.demo import demo_dataset
from rlkd_trl.data.loading import content_digest, data_files, load_rows, require_dataset
from rlkd_trl.data.tokenizer import train_tokenizer

__all__ = [
    "answer_in",
    "answers_apart",
    "as_references",
    "content_digest",
    "data_files",
    "demo_dataset",
    "group_by_source",
    "input_key",
    "listed_references",
    "load_rows",
    "parse_renames",
    "reference_texts",
    "require_columns",
    "require_dataset",
    "require_no_blanks",
    "require_prompt",
    "require_text",
    "train_tokenizer",
]
