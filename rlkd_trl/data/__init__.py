"""Datasets in and out: columns, local files, the Hub, the embedded demo task and its tokenizer."""

from rlkd_trl.data.demo import demo_dataset
from rlkd_trl.data.loading import (
    as_references,
    content_digest,
    data_files,
    group_by_source,
    listed_references,
    load_rows,
    parse_renames,
    reference_texts,
    require_columns,
    require_dataset,
    require_no_blanks,
    require_text,
    require_two_columns,
)
from rlkd_trl.data.tokenizer import train_tokenizer

__all__ = [
    "as_references",
    "content_digest",
    "data_files",
    "demo_dataset",
    "group_by_source",
    "listed_references",
    "load_rows",
    "parse_renames",
    "reference_texts",
    "require_columns",
    "require_dataset",
    "require_no_blanks",
    "require_text",
    "require_two_columns",
    "train_tokenizer",
]
