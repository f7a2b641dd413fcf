"""Every flag of encoder_kd.py arrives where it is read: at the loaders of data and models, or in what is trained.

The real command runs, with loaders that note their arguments and a trainer that does not train. A flag that is new
must get a line in `ARRIVES`, or a test fails. The trainer's own settings: tests/trainers/test_encoder.py.
"""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from datasets import Dataset
from transformers.trainer_utils import TrainOutput

from rlkd_trl.commands import arguments, checks
from rlkd_trl.trainers.encoder import EncoderKDTrainer
from tests.recipes.command_lines import run
from tests.recipes.conftest import labelled_rows

HUB_ID, HUB_ROWS = "owner/name", labelled_rows(50, seed=9)


@dataclass
class Seen:
    """What a command loaded and trained."""

    loads: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))  # by role
    datasets: list[dict] = field(default_factory=list)  # of the Hub
    trainers: list[EncoderKDTrainer] = field(default_factory=list)  # of the stages
    states: list[dict] = field(default_factory=list)  # their students' weights at the start

    def rows(self, stage: int, held_out: bool = False) -> list[dict]:
        trainer = self.trainers[stage]
        return list(trainer.eval_dataset if held_out else trainer.train_dataset.rows)

    def texts(self, stage: int, held_out: bool = False) -> list[str]:
        return [row["text"] for row in self.rows(stage, held_out)]

    def hub(self, argument: str) -> object:
        (call,) = self.datasets
        return call[argument]

    def has_revision(self, role: str, revision: str | None) -> bool:
        """Whether config, model and tokenizer were all loaded at it. (transformers loads configs anew by itself.)"""
        found = defaultdict(set)
        for call in self.loads[role]:
            found[call["what"]].add(call.get("revision"))
        return found["model"] == found["tokenizer"] == {revision} and revision in found["config"]

    def config(self, stage: int = 0):
        return self.trainers[stage].student.config


@pytest.fixture
def observe(encoders, tmp_path, monkeypatch):
    """Runs a command; what was seen of it."""
    roles = {str(path): role for role, path in encoders._asdict().items()}
    numbers = iter(range(100))

    def observed(command: str) -> Seen:
        seen, original = Seen(), {"load_dataset": datasets.load_dataset}

        def load_dataset(path, name=None, **kwargs):
            if path != HUB_ID:
                return original["load_dataset"](path, name, **kwargs)
            seen.datasets.append({"name": name, **kwargs})
            return Dataset.from_list(HUB_ROWS)

        def noting(what: str, function):
            def load(*args, **kwargs):
                name = next(arg for arg in args if not isinstance(arg, type))
                seen.loads[roles.get(str(name), str(name))].append({"what": what, **kwargs})
                kwargs.pop("revision", None)
                return function(*args, **kwargs)

            return load

        def train(trainer, resume_from_checkpoint=None):
            seen.trainers.append(trainer)
            seen.states.append({name: w.clone() for name, w in trainer.student.model.state_dict().items()})
            return TrainOutput(0, 0.0, {"train_loss": 0.0})

        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)  # the Hub is not asked for it
            patch.setattr(checks, "_check_revisions", lambda settings: None)  # local files stand for those of the Hub
            patch.setattr(datasets, "load_dataset", load_dataset)
            for what, kind in (("config", transformers.AutoConfig), ("tokenizer", transformers.AutoTokenizer)):
                patch.setattr(kind, "from_pretrained", noting(what, kind.from_pretrained))
            own = transformers.PreTrainedModel.from_pretrained.__func__
            patch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(noting("model", own)))
            patch.setattr(EncoderKDTrainer, "train", train)
            assert run(f"{command} --output_dir {tmp_path / str(next(numbers))}") == 0
        return seen

    return observed


BASE = (
    "encoder_kd --stages general task --losses hidden_mse logits_kl --max_length 32 --teacher {general} "
    "--dataset {train} --task_teacher {task} --task_dataset {train} --disable_tqdm True"
)
HUB, TASK_HUB = f"--dataset {HUB_ID}", f"--task_dataset {HUB_ID}"
HUB_TEXTS = [row["text"] for row in HUB_ROWS]

# Flag: (the command line with it, whether it is seen).
ARRIVES = {
    "GeneralDataArguments.dataset": (HUB, lambda s: {*s.texts(0), *s.texts(0, True)} == set(HUB_TEXTS)),
    "GeneralDataArguments.dataset_split": (f"{HUB} --dataset_split dev", lambda s: s.hub("split") == "dev"),
    "GeneralDataArguments.dataset_config": (f"{HUB} --dataset_config c", lambda s: s.hub("name") == "c"),
    "GeneralDataArguments.dataset_revision": (f"{HUB} --dataset_revision v", lambda s: s.hub("revision") == "v"),
    "GeneralDataArguments.source_column": (
        "--source_column next",
        lambda s: (
            all(len(text.split()) == 3 for text in s.texts(0)) and not all(len(t.split()) == 3 for t in s.texts(1))
        ),
    ),
    "GeneralDataArguments.pair_column": (
        "--pair_column next",
        lambda s: "text_pair" in s.rows(0)[0] and "text_pair" not in s.rows(1)[0],
    ),
    "GeneralDataArguments.max_rows": (
        "--max_rows 20",
        lambda s: len(s.texts(0)) + len(s.texts(0, True)) == 20 < len(s.texts(1)),
    ),
    "TaskDataArguments.task_dataset": (TASK_HUB, lambda s: {*s.texts(1), *s.texts(1, True)} == set(HUB_TEXTS)),
    "TaskDataArguments.task_split": (f"{TASK_HUB} --task_split dev", lambda s: s.hub("split") == "dev"),
    "TaskDataArguments.task_config": (f"{TASK_HUB} --task_config c", lambda s: s.hub("name") == "c"),
    "TaskDataArguments.task_revision": (f"{TASK_HUB} --task_revision v", lambda s: s.hub("revision") == "v"),
    "TaskDataArguments.task_source_column": (
        "--task_source_column next",
        lambda s: (
            all(len(text.split()) == 3 for text in s.texts(1)) and not all(len(t.split()) == 3 for t in s.texts(0))
        ),
    ),
    "TaskDataArguments.task_pair_column": (
        "--task_pair_column next",
        lambda s: "text_pair" in s.rows(1)[0] and "text_pair" not in s.rows(0)[0],
    ),
    "TaskDataArguments.label_column": (
        "--label_column number",
        lambda s: {row["label"] for row in s.rows(1)} == {0, 1, 2} and "label" not in s.rows(0)[0],
    ),
    "TaskDataArguments.task_max_rows": (
        "--task_max_rows 20",
        lambda s: len(s.texts(1)) + len(s.texts(1, True)) == 20 < len(s.texts(0)),
    ),
    "EncoderHeldOutArguments.eval_dataset": (
        "--eval_dataset {test}",
        lambda s: (len(s.texts(0, True)), len(s.texts(0)), len(s.texts(1, True))) == (10, 40, 4),
    ),
    "EncoderHeldOutArguments.eval_split": (
        f"--eval_dataset {HUB_ID} --eval_split dev",
        lambda s: s.hub("split") == "dev" and s.texts(0, True) == HUB_TEXTS,
    ),
    "EncoderHeldOutArguments.task_eval_dataset": (
        "--task_eval_dataset {test}",
        lambda s: (len(s.texts(1, True)), len(s.texts(1)), len(s.texts(0, True))) == (10, 40, 4),
    ),
    "EncoderHeldOutArguments.task_eval_split": (
        f"--task_eval_dataset {HUB_ID} --task_eval_split dev",
        lambda s: s.hub("split") == "dev" and s.texts(1, True) == HUB_TEXTS,
    ),
    "EncoderTeacherArguments.teacher": (
        "--teacher {student} --num_layers 1",
        lambda s: "general" not in s.loads and len(s.trainers[0].teacher.encoder.layer) == 2,
    ),
    "EncoderTeacherArguments.task_teacher": (
        "--task_teacher {regression}",
        lambda s: "task" not in s.loads and s.trainers[1].teacher.config.num_labels == 1,
    ),
    "EncoderTeacherArguments.teacher_revision": (
        "--teacher_revision v1",
        lambda s: s.has_revision("general", "v1") and s.has_revision("task", None),
    ),
    "EncoderTeacherArguments.task_teacher_revision": (
        "--task_teacher_revision v1",
        lambda s: s.has_revision("task", "v1") and s.has_revision("general", None),
    ),
    "EncoderTeacherArguments.teacher_dtype": (
        "--teacher_dtype bfloat16",
        lambda s: (
            [t.teacher.dtype for t in s.trainers] == [torch.bfloat16] * 2
            and s.trainers[0].student.model.dtype == torch.float32
        ),
    ),
    "EncoderPanelArguments.more_teachers": (
        "--more_teachers {task}",
        lambda s: (
            "more_teachers" in s.trainers[1].run_record
            and "more_teachers" not in s.trainers[0].run_record
            and len([call for call in s.loads["task"] if call["what"] == "model"]) == 2
        ),
    ),
    "EncoderPanelArguments.teacher_weighting": (
        "--more_teachers {task} --teacher_weighting fixed",
        lambda s: s.trainers[1].run_record["more_teachers"]["weighed_per_text"] is False,
    ),
    "EncoderPanelArguments.train_along": (
        "--stages task --losses hard_ce --student {general} --label_column label --train_along {task}",
        lambda s: len(s.trainers[0].student.companions) == 1,
    ),
    "EncoderStudentArguments.student": (
        "--student {student}",
        lambda s: (
            torch.equal(
                s.states[0]["embeddings.word_embeddings.weight"],
                s.trainers[0].student.model.embeddings.word_embeddings.weight,
            )
            and any(call["what"] == "model" for call in s.loads["student"])
        ),
    ),
    "EncoderStudentArguments.student_revision": (
        "--student {student} --student_revision v1",
        lambda s: s.has_revision("student", "v1"),
    ),
    "EncoderStudentArguments.num_layers": ("--num_layers 3", lambda s: s.config().num_hidden_layers == 3),
    "EncoderStudentArguments.hidden_size": (
        "--hidden_size 8",
        lambda s: (s.config().hidden_size, s.config().intermediate_size) == (8, 16),
    ),
    "EncoderStudentArguments.num_heads": ("--num_heads 4", lambda s: s.config().num_attention_heads == 4),
    "EncoderStudentArguments.intermediate_size": (
        "--intermediate_size 20",
        lambda s: (s.config().hidden_size, s.config().intermediate_size) == (16, 20),
    ),
    "EncoderStudentArguments.init": (
        "--init top",
        lambda s: torch.equal(
            s.states[0]["encoder.layer.0.output.dense.weight"],
            s.trainers[0].teacher.encoder.layer[2].output.dense.weight,
        ),
    ),
}
GROUPS = [
    kind
    for name, kind in vars(arguments).items()
    if dataclasses.is_dataclass(kind)
    and (name.startswith("Encoder") or name in ("GeneralDataArguments", "TaskDataArguments"))
]


def test_every_flag_has_its_line():
    assert len(GROUPS) == 6
    missing = {
        f"{kind.__name__}.{option.name}" for kind in GROUPS for option in dataclasses.fields(kind)
    } - ARRIVES.keys()
    assert not missing, "say in ARRIVES where they are seen"


# Flags of a run, none of which hides what another does.
RUNS = {
    "general data": (
        *(
            f"GeneralDataArguments.{name}"
            for name in ("dataset", "dataset_split", "dataset_config", "dataset_revision")
        ),
        *("TaskDataArguments.task_source_column", "EncoderTeacherArguments.teacher_revision"),
    ),
    "task data": (
        *(f"TaskDataArguments.{name}" for name in ("task_dataset", "task_split", "task_config", "task_revision")),
        *("GeneralDataArguments.source_column", "EncoderTeacherArguments.task_teacher_revision"),
    ),
    "general pairs": (
        *("GeneralDataArguments.pair_column", "TaskDataArguments.task_max_rows"),
        *("EncoderTeacherArguments.teacher_dtype", "EncoderStudentArguments.num_layers"),
        *("EncoderStudentArguments.num_heads", "EncoderStudentArguments.intermediate_size"),
    ),
    "task pairs": (
        *("TaskDataArguments.task_pair_column", "GeneralDataArguments.max_rows"),
        "EncoderStudentArguments.hidden_size",
    ),
    "held-out data": (
        *("EncoderHeldOutArguments.eval_dataset", "TaskDataArguments.label_column", "EncoderStudentArguments.init"),
    ),
    "task's held-out data": (
        *("EncoderHeldOutArguments.task_eval_dataset", "EncoderStudentArguments.student"),
        "EncoderStudentArguments.student_revision",
    ),
    "held-out split": ("EncoderHeldOutArguments.eval_split", "EncoderPanelArguments.more_teachers"),
    "task's held-out split": ("EncoderHeldOutArguments.task_eval_split", "EncoderPanelArguments.teacher_weighting"),
    "teachers": ("EncoderTeacherArguments.teacher", "EncoderTeacherArguments.task_teacher"),
    "train_along": ("EncoderPanelArguments.train_along",),
}
QUICK = ("general data", "held-out data", "teachers")


def test_every_flag_is_in_one_of_the_runs():
    assert sorted(name for names in RUNS.values() for name in names) == sorted(ARRIVES)


@pytest.mark.parametrize(
    "run_of", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow(0.4)) for name in RUNS]
)
def test_every_flag_arrives(run_of, encoders, observe):
    flags = " ".join(ARRIVES[name][0] for name in RUNS[run_of])
    seen = observe(f"{BASE} {flags}".format(**encoders._asdict()))
    for name in RUNS[run_of]:
        assert ARRIVES[name][1](seen), name
