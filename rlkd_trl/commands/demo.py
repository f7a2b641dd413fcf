"""The embedded demo: a teacher and a warm-started student for the hiking-trail task, trained in about two minutes.

As T0, the teacher is one model trained on several templates. The student is smaller, reads the bare source, and is
warm-started on the teacher's greedy answers to less than a third of the inputs, not long enough to learn the task.
(From a much worse start, reinforcement learning would drop the facts that the student cannot copy, and texts would get
short.)

The two are trained in a separate process that knows nothing of how the run was launched. Otherwise DeepSpeed's engine
would train them, of which a process can have only one, and several processes would train them differently than one.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlkd_trl.commands.arguments import PromptArguments
from rlkd_trl.commands.data import load_templates
from rlkd_trl.data import demo_dataset, train_tokenizer
from rlkd_trl.data.demo import SPLIT_SIZES
from rlkd_trl.errors import is_first_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlkd_trl.commands.encoder_demo import EncoderDemoRequest
    from rlkd_trl.commands.settings import DistillationSettings

MAX_COMPLETION_LENGTH = 48
# Beginnings of the environment variables that launchers (torchrun, accelerate, MPI) set for their processes.
_LAUNCHERS_PREFIXES = (
    *("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_", "PMI_", "OMPI_", "MASTER_", "GROUP_", "ROLE_"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK"),
)
_WAIT_SECONDS = 3600.0  # for which the other processes wait for the first one
_TRAIN = """
import json, pkgutil, sys
request = json.load(sys.stdin)
sys.path[:] = request["path"]
from rlkd_trl.errors import end_with_parent, run
end_with_parent()
run(lambda: pkgutil.resolve_name(request["train"])(**request["of"]))
"""


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


def make_demo_models(request: DemoRequest) -> None:
    """Trains teacher and warm start in a process of their own. Raises `RuntimeError` as `make_apart`."""
    make_apart("rlkd_trl.commands.demo:train_demo_models", request)


def make_apart(train: str, request: "DemoRequest | EncoderDemoRequest") -> None:
    """Trains models in a new process, which the first of the launched processes starts; the others wait for them.

    train: a function, as "package.module:function", that is called with the request's fields.

    Raises:
        RuntimeError: Training failed; or the first process did not finish within an hour.
    """
    from rlkd_trl.trainers.processes import wait_for_all

    outcome = Path(request.output_dir) / "outcome.txt"
    if is_first_process():
        outcome.unlink(missing_ok=True)
    wait_for_all()  # so that nobody reads the outcome of an earlier run
    if is_first_process():
        result = _train_apart(train, request)
        outcome.parent.mkdir(parents=True, exist_ok=True)
        written = outcome.with_suffix(".new")
        written.write_text(result, encoding="utf-8")
        written.replace(outcome)
    # They wait for the file: a connection may have a shorter timeout than the training takes.
    deadline = time.monotonic() + _WAIT_SECONDS
    while not outcome.is_file():
        if time.monotonic() > deadline:
            raise RuntimeError(f"The first process left no {outcome} in {_WAIT_SECONDS:.0f} seconds.")
        time.sleep(0.2)
    if (result := outcome.read_text(encoding="utf-8")) != "done":
        raise RuntimeError(result)


def _train_apart(train: str, request: "DemoRequest | EncoderDemoRequest") -> str:
    """Trains in a process without a launcher, on one device; returns "done", or what went wrong."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS_PREFIXES)}
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # Models of this size train more slowly with several threads, above all if other programs use the cores too.
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", _TRAIN]
    request_json = json.dumps({"path": sys.path, "train": train, "of": asdict(request)})
    # In a session of its own: Ctrl-C comes to this process, which then ends the other.
    finished = subprocess.run(command, input=request_json, text=True, env=environment, start_new_session=True)
    code = finished.returncode
    return "done" if code == 0 else f"The demo's models could not be trained: their process ended with code {code}."


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
