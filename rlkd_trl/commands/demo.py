"""The embedded demo: a teacher and a warm-started student for the hiking-trail task, trained in about two minutes.

As T0, the teacher is one model trained on several templates. The student is smaller, reads the bare source, and is
warm-started on the teacher's greedy answers to less than a third of the inputs, not long enough to learn the task.
(From a much worse start, reinforcement learning would drop the facts that the student cannot copy, and texts would get
short.)

The two are trained in a separate process that knows nothing of how the run was launched; see `make_apart`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.apart import make_apart
from rlkd_trl.commands.arguments import PromptArguments
from rlkd_trl.commands.data import load_templates
from rlkd_trl.data import demo_dataset, train_tokenizer
from rlkd_trl.data.demo import SPLIT_SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlkd_trl.commands.assistants import ChainSettings
    from rlkd_trl.commands.comparison.arguments import ComparisonSettings
    from rlkd_trl.commands.settings import DistillationSettings

MAX_COMPLETION_LENGTH = 48
SMOKE_STEPS = {"teacher_steps": 120, "student_steps": 80}


@dataclass(frozen=True)
class DemoRequest:
    """The models to train, into `output_dir/teacher` and `output_dir/warm_start`.

    prompts: the fields of `PromptArguments`, which name the templates. teacher_steps, student_steps: optimizer steps.
    pseudo_labelled_inputs: how many inputs the teacher answers for the student.
    """

    output_dir: str
    prompts: dict
    seed: int
    teacher_steps: int = 1000
    student_steps: int = 600
    pseudo_labelled_inputs: int = 600

    @property
    def teacher(self) -> str:
        return str(Path(self.output_dir) / "teacher")

    @property
    def student(self) -> str:
        return str(Path(self.output_dir) / "warm_start")


def use_demo_models(settings: "DistillationSettings", output_dir: str | Path, *, seed: int) -> None:
    """Makes the demo's models in `output_dir/demo_models` and names them in the settings."""
    request = DemoRequest(str(Path(output_dir) / "demo_models"), asdict(settings.prompts), seed)
    make_demo_models(request)
    settings.teacher.teacher, settings.student.student = [request.teacher], request.student


def name_smoke_demo(settings: "ChainSettings | ComparisonSettings", output_dir: str) -> tuple[DemoRequest, dict]:
    """Names the models of a `--smoke` run, in `output_dir`/demo, in the settings.

    Returns what `make_smoke_demo` is to make, and the demo's data files by split.
    """
    directory = Path(output_dir) / "demo"
    request = DemoRequest(str(directory), asdict(settings.prompts), seed=0, **SMOKE_STEPS)
    settings.teacher.teacher, settings.student.student = [request.teacher], request.student
    return request, demo_files(directory)


def make_smoke_demo(request: DemoRequest) -> None:
    """Writes the demo's data and trains its models briefly, unless an earlier run has."""
    write_demo_files(request.output_dir)
    if not Path(request.student, "config.json").is_file():
        make_demo_models(request)


def make_demo_models(request: DemoRequest) -> None:
    """Trains teacher and warm start in a process of their own. Raises `RuntimeError` as `make_apart`."""
    make_apart("rlkd_trl.commands.demo:train_demo_models", request)


def train_demo_models(**fields) -> None:
    """Trains and saves, in this process, the teacher and the warm start of a `DemoRequest` with these fields."""
    from rlkd_trl.models.answers import answer_prompts, decode
    from rlkd_trl.students.from_scratch import new_model

    request = DemoRequest(**fields)
    templates, seed = load_templates(PromptArguments(**request.prompts)), request.seed
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
    _fit(
        teacher, tokenizer, questions, request.teacher, max_steps=request.teacher_steps, learning_rate=5e-3, seed=seed
    )

    print("Demo 2/3: warming up a smaller student on a few of the teacher's answers", flush=True)
    sources = [row["source"] for row in rows[: request.pseudo_labelled_inputs]]
    questions = [templates.render({"source": text})[0] for text in sources]
    completions = answer_prompts(teacher, tokenizer, questions, max_completion_length=MAX_COMPLETION_LENGTH)
    answers = [text for batch in completions for text in decode(batch, tokenizer)]
    student = new_model(tokenizer, d_model=64, num_layers=2, num_heads=4, seed=seed + 1)
    pairs = [{"prompt": source, "target": answer} for source, answer in zip(sources, answers, strict=True)]
    _fit(student, tokenizer, pairs, request.student, max_steps=request.student_steps, learning_rate=3e-3, seed=seed)


def demo_files(output_dir: str | Path) -> dict[str, str]:
    """Where `write_demo_files` writes, by split."""
    return {split: str(Path(output_dir) / f"{split}.jsonl") for split in SPLIT_SIZES}


def write_demo_files(output_dir: str | Path) -> None:
    """Writes the demo task's splits as JSON lines of `source` and `references`."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for split, path in demo_files(output_dir).items():
        rows = demo_dataset(split).remove_columns("target")
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _fit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pairs: list[dict[str, str]],
    output_dir: str,
    *,
    max_steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    from datasets import Dataset

    from rlkd_trl.trainers.supervised import SupervisedTrainer
    from rlkd_trl.trainers.supervised_config import SupervisedConfig

    arguments = SupervisedConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        learning_rate=learning_rate,
        warmup_steps=50,
        per_device_train_batch_size=16,
        max_completion_length=MAX_COMPLETION_LENGTH,
        save_strategy="no",
        logging_steps=max(max_steps // 5, 1),
        seed=seed,
    )
    trainer = SupervisedTrainer(model, arguments, Dataset.from_list(pairs), tokenizer)
    trainer.train()
    trainer.save_model()
