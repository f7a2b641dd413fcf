"""The embedded demo: a teacher and a warm-started student for the hiking-trail task, trained here in two minutes.

The teacher is T0-style: one model trained on several templates. The student sees the bare source, is smaller, and is
warm-started on the teacher's greedy answers to under a third of the inputs, too briefly to learn the task from.
(From a much worse start, reinforcement learning drops the facts that the student cannot copy, and texts get short.)
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.data import demo_dataset, train_tokenizer
from rlkd_trl.data.demo import SPLIT_SIZES
from rlkd_trl.models.answers import answer_prompts, decode
from rlkd_trl.prompts import PromptTemplates
from rlkd_trl.students.from_scratch import new_model
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig

MAX_COMPLETION_LENGTH = 48
PSEUDO_LABELLED_INPUTS = 600


@dataclass(frozen=True)
class DemoModels:
    """Checkpoint directories."""

    teacher: str
    student: str


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models of this size are slower on several threads, above all where others use the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def make_demo_models(
    output_dir: str | Path,
    templates: PromptTemplates,
    *,
    seed: int,
    teacher_steps: int = 1000,
    student_steps: int = 600,
) -> DemoModels:
    """Trains teacher and warm start and saves them in `output_dir/teacher` and `output_dir/warm_start`."""
    paths = DemoModels(str(Path(output_dir) / "teacher"), str(Path(output_dir) / "warm_start"))
    rows = list(demo_dataset("train"))
    texts = [row["source"] for row in rows] + [text for row in rows for text in row["references"]]
    tokenizer = train_tokenizer(texts + [template.jinja for template in templates])

    print("Demo 1/3: training a teacher on several templates", flush=True)
    teacher = new_model(tokenizer, d_model=96, num_layers=2, num_heads=8, d_ff=192, dropout=0.0, seed=seed)
    questions = [
        {"prompt": question, "target": reference}
        for row in rows
        for question in templates.render({"source": row["source"]})
        for reference in row["references"]
    ]
    _fit(teacher, tokenizer, questions, paths.teacher, max_steps=teacher_steps, learning_rate=5e-3, seed=seed)

    print("Demo 2/3: warming up a smaller student on a few of the teacher's answers", flush=True)
    sources = [row["source"] for row in rows[:PSEUDO_LABELLED_INPUTS]]
    questions = [templates.render({"source": text})[0] for text in sources]
    completions = answer_prompts(teacher, tokenizer, questions, max_completion_length=MAX_COMPLETION_LENGTH)
    answers = [text for batch in completions for text in decode(batch, tokenizer)]
    student = new_model(tokenizer, d_model=64, num_layers=2, num_heads=4, seed=seed + 1)
    pairs = [{"prompt": source, "target": answer} for source, answer in zip(sources, answers, strict=True)]
    _fit(student, tokenizer, pairs, paths.student, max_steps=student_steps, learning_rate=3e-3, seed=seed)
    return paths


def write_demo_files(output_dir: str | Path) -> dict[str, str]:
    """The demo task's splits as files for `--dataset` and the like: JSON lines of `source` and `references`."""
    paths = {}
    for split in SPLIT_SIZES:
        path = Path(output_dir) / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = demo_dataset(split).remove_columns("target")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths[split] = str(path)
    return paths


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict[str, str]],
    output_dir: str,
    *,
    max_steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    arguments = SupervisedConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        learning_rate=learning_rate,
        warmup_steps=50,
        per_device_train_batch_size=16,
        max_completion_length=MAX_COMPLETION_LENGTH,
        save_strategy="no",
        logging_steps=max_steps // 5,
        seed=seed,
    )
    trainer = SupervisedTrainer(model, arguments, Dataset.from_list(pairs), tokenizer)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # the other processes read it next
