"""Every flag of every recipe arrives where it is read: at the loaders of data, models and teachers, or in the results.

The real commands run, with loaders that note their arguments and a trainer that does not train. A flag that is new
must get a line in `ARRIVES`, or a test fails. The trainers' own settings: tests/trainers/test_every_setting.py.

Flags of which none hides what another does share a run, `TOGETHER`; any other has one of its own.
"""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_utils import TrainOutput

from rlkd_trl.commands import arguments, checks
from rlkd_trl.data.streams import RowStream
from rlkd_trl.models.vocabulary import allowed_special_tokens
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.recipes.command_lines import COLUMNS, metrics_of, read_jsonl, run, word_rows, write_csv, write_templates
from tests.recipes.conftest import Pair
from tests.tiny_models import tiny_t5, word_tokenizer

HUB_ID, HUB_ROWS = "owner/name", word_rows(40, seed=9)


@dataclass
class Seen:
    """What a command loaded, made and left."""

    output_dir: Path
    datasets: list[dict] = field(default_factory=list)  # of the Hub
    loads: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))  # by role
    teachers: list[dict] = field(default_factory=list)
    panels: list[TeacherPanel] = field(default_factory=list)
    shapes: dict[str, list[torch.Size]] = field(default_factory=lambda: defaultdict(list))  # of prompts, by role
    models: dict[str, transformers.PreTrainedModel] = field(default_factory=dict)  # by role
    trainer: transformers.Trainer | None = None
    resumed_from: str | None = None

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return metrics_of(self.output_dir)

    @property
    def model(self) -> torch.nn.Module:
        return self.trainer.model

    def hub(self, argument: str) -> str | None:
        """Of the one data set that was taken from there."""
        (call,) = self.datasets
        return call[argument]

    def batch(self) -> dict[str, torch.Tensor]:
        return self.trainer.data_collator(list(self.trainer.train_dataset))

    @property
    def outputs(self) -> list[dict]:
        return read_jsonl(self.output_dir / "outputs.jsonl")

    @property
    def labels(self) -> list[dict]:
        return read_jsonl(self.output_dir / "labels.jsonl")

    def prompts(self, held_out: bool = False) -> list[str]:
        return list((self.trainer.eval_dataset if held_out else self.trainer.train_dataset)["prompt"])

    def widest(self, role: str) -> int:
        """Tokens of the longest prompt that the teacher or student has read."""
        return max(shape[1] for shape in self.shapes[role])

    def most_rows(self, role: str) -> int:
        """Prompts of its largest batch."""
        return max(shape[0] for shape in self.shapes[role])

    def has_revision(self, role: str, revision: str | None) -> bool:
        """Whether model and tokenizer were loaded at it only, and a config too, of which transformers loads more."""
        revisions = defaultdict(set)
        for call in self.loads[role]:
            revisions[call["what"]].add(call.get("revision"))
        return revision in revisions["config"] and revisions["model"] == revisions["tokenizer"] == {revision}

    def of_model(self, role: str, argument: str) -> object:
        (call,) = [call for call in self.loads[role] if call["what"] == "model"]
        return call[argument]


@pytest.fixture
def observe(files, tmp_path, monkeypatch):
    """Runs a command; what was seen of it."""
    numbers = iter(range(100))

    def observed(command: str) -> Seen:
        seen = Seen(tmp_path / f"out{next(numbers)}")
        original = {
            "load_dataset": datasets.load_dataset,
            "auto": transformers.AutoModelForSeq2SeqLM.from_pretrained.__func__,
            "config": transformers.AutoConfig.from_pretrained,
            "tokenizer": transformers.AutoTokenizer.from_pretrained,
            "teacher": Teacher.from_pretrained.__func__,
            "panel": TeacherPanel.__init__,
        }

        def role(checkpoint) -> str:
            return next((name for name, path in files.items() if str(path) == str(checkpoint)), str(checkpoint))

        def load_dataset(path, name=None, **kwargs):
            if path != HUB_ID:
                return original["load_dataset"](path, name, **kwargs)
            seen.datasets.append({"name": name, **kwargs})
            return Dataset.from_list(HUB_ROWS)

        def load_config(name, *args, **kwargs):
            seen.loads[role(name)].append({"what": "config", **kwargs})
            return original["config"](name, *args, **{k: v for k, v in kwargs.items() if k != "revision"})

        def load_model(cls, name, *args, **kwargs):
            seen.loads[role(name)].append({"what": "model", **kwargs})
            loaded = original["auto"](cls, name, *args, **{k: v for k, v in kwargs.items() if k != "revision"})
            model = seen.models[role(name)] = loaded[0] if isinstance(loaded, tuple) else loaded
            body = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
            body.register_forward_pre_hook(lambda _, inputs: seen.shapes[role(name)].append(inputs[0].shape))
            return loaded

        def load_tokenizer(name, *args, **kwargs):
            seen.loads[role(name)].append({"what": "tokenizer", **kwargs})
            return original["tokenizer"](name, *args, **{k: v for k, v in kwargs.items() if k != "revision"})

        def load_teacher(cls, name, **kwargs):
            seen.teachers.append(kwargs)
            kept = {**kwargs, "placement": "replicated", "offload_path": None}
            return original["teacher"](cls, name, **kept)

        def make_panel(panel, *args, **kwargs):
            original["panel"](panel, *args, **kwargs)
            seen.panels.append(panel)

        def train(trainer, resume_from_checkpoint=None, **kwargs):
            seen.trainer, seen.resumed_from = trainer, resume_from_checkpoint
            return TrainOutput(0, 0.0, {"train_loss": 0.0})

        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)  # the Hub is not asked for it
            patch.setattr(checks, "_check_revisions", lambda settings: None)  # local files stand for those of the Hub
            patch.setattr(datasets, "load_dataset", load_dataset)
            patch.setattr(transformers.AutoModelForSeq2SeqLM, "from_pretrained", classmethod(load_model))
            patch.setattr(transformers.AutoConfig, "from_pretrained", load_config)
            patch.setattr(transformers.AutoTokenizer, "from_pretrained", load_tokenizer)
            patch.setattr(Teacher, "from_pretrained", classmethod(load_teacher))
            patch.setattr(TeacherPanel, "__init__", make_panel)
            patch.setattr(transformers.Trainer, "train", train)
            code = run(command.replace("OUT", str(seen.output_dir)))
        assert code == 0
        return seen

    return observed


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, object]:
    """Data, templates, and models of one layer, the fewest there are: each command makes, reads and asks them anew."""
    directory = tmp_path_factory.mktemp("flags")
    rows, held_out = (
        [
            {**row, "better": f"{row['ref']} w3", "expert": ("teacher", "other")[i % 2], "ask": ("one", "two")[i % 2]}
            for i, row in enumerate(made)
        ]
        for made in (word_rows(30), word_rows(8, seed=1))
    )
    words = word_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<triplet>"]})
    for seed, role in enumerate(Pair._fields):
        tiny_t5(tied=False, seed=seed, layers=1).save_pretrained(directory / role)
        words.save_pretrained(directory / role)
    return {
        **{role: directory / role for role in Pair._fields},
        "train": write_csv(directory / "train.csv", rows),
        "test": write_csv(directory / "test.csv", held_out),
        "templates": write_templates(directory / "t.yaml", one="w3 w4 w5 w6 {{ mr }}", two="{{ mr }} w7"),
        "chat": write_chat_template(directory / "chat.jinja"),
        "renaming": write_templates(directory / "r.yaml", one="w3 {{ meaning }} {{ longer }}"),
    }


def write_chat_template(path: Path) -> Path:
    """Three words before what is said, each time, and `more` behind it all."""
    path.write_text("{% for m in messages %}w3 w4 w5 {{ m.content }} {% endfor %}{{ more }}")
    return path


DISTILLING = ("ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd")
BASE = {
    **dict.fromkeys(
        DISTILLING,
        f"--teacher {{teacher}} --student {{student}} --dataset {{train}} --eval_dataset {{test}} {COLUMNS} "
        "--max_completion_length 6 --num_generations 2 --per_device_train_batch_size 8 --max_steps 1 --output_dir OUT",
    ),
    "sft": f"--student {{student}} --dataset {{train}} {COLUMNS} --max_steps 1 --output_dir OUT",
    "new": f"--dataset {{train}} {COLUMNS} --max_steps 1 --d_model 16 --num_heads 2 --output_dir OUT",
    "pseudo_label": "--teacher {teacher} --dataset {test} --source_column mr --max_completion_length 6 "
    "--output OUT/labels.jsonl",
    "evaluate": f"--teacher {{teacher}} --student {{student}} --dataset {{test}} {COLUMNS} --max_completion_length 6 "
    "--output_dir OUT",
}
WITH_REWARDS = ("ppo_kd", "rloo_kd", "reinforce_kd", "evaluate")
WITH_TEACHERS = (*DISTILLING, "pseudo_label", "evaluate")
WITH_STUDENTS = (*DISTILLING, "sft", "evaluate")


def panel(seen: Seen) -> TeacherPanel:
    """How teachers are weighed, and which examples are whose."""
    (only,) = seen.panels
    return only


def reward(seen: Seen) -> float:
    return next(iter(seen.metrics.values()))["reward"]


def texts(recipe: str, seen: Seen) -> list[str]:
    """The inputs that the recipe works on."""
    if recipe == "pseudo_label":
        return [line["mr"] for line in seen.labels]
    return [line["prompt"] for line in seen.outputs] if recipe == "evaluate" else seen.prompts()


def worked_on(recipe: str, seen: Seen) -> list[str]:
    return answers(seen) if recipe == "pseudo_label" else texts(recipe, seen)


def answers(seen: Seen) -> list[str]:
    return [line["pseudo_label"] for line in seen.labels]


def said(seen: Seen) -> list[str]:
    return [line["student"] for line in seen.outputs]


def read_by_student(recipe: str, seen: Seen) -> int:
    """Tokens of the longest prompt."""
    return seen.batch()["input_ids"].shape[1] if recipe == "sft" else seen.widest("student")


def targets(recipe: str, seen: Seen) -> list:
    if recipe == "evaluate":
        return [line["references"] for line in seen.outputs]
    return list(seen.trainer.train_dataset["target" if recipe == "sft" else "references"])


HUB = f"--dataset {HUB_ID}"
HUB_TEST = f"--eval_dataset {HUB_ID}"
ASKED = "--templates {templates}"
STREAMED = "--streaming --max_steps 1"

ADAPTED = ("rloo_kd", "sft")


def lora(seen: Seen):
    """The config of the adapters that are trained."""
    model = seen.model if isinstance(seen.model, PeftModel) else seen.model.model
    return model.active_peft_config


# Flag: (recipes, the command line with it, whether it is seen, beside what). `base` is the command without it.
ARRIVES = {
    "DataArguments.dataset": (
        BASE,
        HUB,
        lambda r, seen, base: texts(r, seen)[:5] == [row["mr"] for row in HUB_ROWS[:5]],
    ),
    "DataArguments.dataset_split": (BASE, f"{HUB} --dataset_split dev", lambda r, seen, _: seen.hub("split") == "dev"),
    "DataArguments.dataset_config": (BASE, f"{HUB} --dataset_config c", lambda r, seen, _: seen.hub("name") == "c"),
    "DataArguments.dataset_revision": (
        BASE,
        f"{HUB} --dataset_revision v2",
        lambda r, seen, _: seen.hub("revision") == "v2",
    ),
    "DataArguments.source_column": (
        BASE,
        "--source_column ref{target}",
        lambda r, seen, base: worked_on(r, seen) != worked_on(r, base),
    ),
    "DataArguments.target_column": (
        (*DISTILLING, "evaluate", "sft"),
        "--target_column better",
        lambda r, seen, base: targets(r, seen) != targets(r, base),
    ),
    "DataArguments.max_rows": (
        BASE,
        "--max_rows 5",
        lambda r, seen, _: len(texts(r, seen)) == 5 and (r not in DISTILLING or len(seen.prompts(True)) == 8),
    ),  # the held-out data are whole
    "StreamingArguments.streaming": (
        ("ppo_kd", "kd", "sft"),
        STREAMED,
        lambda r, seen, _: isinstance(seen.trainer.train_dataset, RowStream),
    ),
    "StreamingArguments.shuffle_buffer_size": (
        ("ppo_kd", "sft"),
        f"{STREAMED} --shuffle_buffer_size 7",
        lambda r, seen, _: seen.trainer.train_dataset.order[0] == 7,
    ),
    "HeldOutArguments.eval_dataset": (DISTILLING, HUB_TEST, lambda r, seen, _: len(seen.prompts(True)) == 40),
    "HeldOutArguments.eval_split": (
        DISTILLING,
        f"{HUB_TEST} --eval_split dev",
        lambda r, seen, _: seen.hub("split") == "dev",
    ),
    "HeldOutArguments.eval_target_column": (
        DISTILLING,
        "--eval_target_column better",
        lambda r, seen, base: seen.metrics["teacher"]["length_ratio"] != base.metrics["teacher"]["length_ratio"],
    ),
    "PromptArguments.templates": (
        WITH_TEACHERS,
        ASKED,
        lambda r, seen, base: seen.widest("teacher") > base.widest("teacher"),
    ),
    "PromptArguments.template": (
        WITH_TEACHERS,
        "--template 'w3 w4 w5 {{{{ mr }}}}'",
        lambda r, seen, base: seen.widest("teacher") == base.widest("teacher") + 3,
    ),
    "PromptArguments.template_names": (
        WITH_TEACHERS,
        f"{ASKED} --template_names two",
        lambda r, seen, base: seen.widest("teacher") == base.widest("teacher") + 1,
    ),
    "PromptArguments.rename_columns": (
        WITH_TEACHERS,
        "--templates {renaming} --rename_columns mr=meaning better=longer",
        lambda r, seen, base: seen.widest("teacher") == base.widest("teacher") + 1 + 5,
    ),
    "PromptArguments.student_template": (
        WITH_STUDENTS,
        "--student_template 'w9 {{{{ mr }}}}'",
        lambda r, seen, _: all(t.startswith("w9 ") for t in texts(r, seen)),
    ),
    "TeacherArguments.teacher": (
        WITH_TEACHERS,
        "--teacher {other}",
        lambda r, seen, base: "other" in seen.loads and "teacher" not in seen.loads,
    ),
    "TeacherArguments.teacher_revision": (
        WITH_TEACHERS,
        "--teacher_revision v1",
        lambda r, seen, _: (
            seen.has_revision("teacher", "v1") and (r == "pseudo_label" or seen.has_revision("student", None))
        ),
    ),
    "TeacherArguments.teacher_dtype": (
        WITH_TEACHERS,
        "--teacher_dtype bfloat16",
        lambda r, seen, _: seen.of_model("teacher", "dtype") is torch.bfloat16,
    ),
    "TeacherArguments.teacher_quantization": (
        WITH_TEACHERS,
        "--teacher_quantization int8",
        lambda r, seen, _: seen.of_model("teacher", "quantization_config").load_in_8bit,
    ),
    "TeacherArguments.teacher_placement": (
        WITH_TEACHERS,
        "--teacher_placement zero3",
        lambda r, seen, _: seen.teachers[0]["placement"] == "zero3",
    ),
    "TeacherArguments.teacher_offload_path": ((), "", None),  # needs libaio: tests/teachers/test_placement.py
    "TeacherArguments.teacher_max_prompt_length": (
        WITH_TEACHERS,
        "--teacher_max_prompt_length 3 --max_completion_length 2",
        lambda r, seen, base: seen.widest("teacher") == 3 < base.widest("teacher"),
    ),
    "TeacherArguments.teacher_batch_tokens": (
        (*DISTILLING, "evaluate"),
        "--teacher_batch_tokens 1",
        lambda r, seen, base: len(seen.shapes["teacher"]) > len(base.shapes["teacher"]),
    ),
    "TeacherArguments.teacher_chat_template": (
        WITH_TEACHERS,
        "--teacher_chat_template {chat}",
        lambda r, seen, base: seen.widest("teacher") == base.widest("teacher") + 2,  # w3 w4 w5, and no EOS
    ),
    # these two are of one object with the template
    "TeacherArguments.teacher_system_prompt": (
        ("pseudo_label",),
        "--teacher_chat_template {chat} --teacher_system_prompt 'w6 w7'",
        lambda r, seen, base: seen.widest("teacher") == base.widest("teacher") + 2 + 5,
    ),
    "TeacherArguments.teacher_chat_template_kwargs": (
        ("pseudo_label",),
        """--teacher_chat_template {chat} --teacher_chat_template_kwargs '{{"more": "w6 w7 w8 w9"}}'""",
        lambda r, seen, base: seen.widest("teacher") == base.widest("teacher") + 2 + 4,
    ),
    "AbsentTeacherArguments.teacher_cache": ((), "", None),  # and those of a cache: test_cached_teacher.py
    **{  # test_served_teacher.py
        f"{kind}.{name}": ((), "", None)
        for kind in ("AbsentTeacherArguments", "ServerArguments")
        for name in (
            *("teacher_server", "teacher_tokenizer", "teacher_server_model", "teacher_api_key_env"),
            *("teacher_server_timeout", "teacher_server_patience", "teacher_server_concurrency"),
        )
    },
    "CacheArguments.output": ((), "", None),
    "CacheArguments.k": ((), "", None),
    "CacheArguments.dtype": ((), "", None),
    "CacheArguments.distillation_temperature": ((), "", None),
    "CacheArguments.ensemble": ((), "", None),
    "CacheArguments.max_completion_length": ((), "", None),
    "CacheArguments.batch_size": ((), "", None),
    "CacheArguments.rows_per_shard": ((), "", None),
    "CacheArguments.max_prompt_length": ((), "", None),
    "CacheArguments.overwrite_output_dir": ((), "", None),
    **{  # test_generate_data.py
        f"GeneratedDataArguments.{name}": ((), "", None)
        for name in (
            *("output", "schema", "num_rows", "keep_share", "temperature", "max_input_length"),
            *("batch_size", "seed", "overwrite_output_dir"),
        )
    },
    "PanelArguments.teacher_weights": (
        DISTILLING,
        "--teacher {teacher} {other} --teacher_weights 3 1",
        lambda r, seen, _: panel(seen).weights == pytest.approx([0.75, 0.25]),
    ),
    "PanelArguments.template_weights": (
        DISTILLING,
        f"{ASKED} --template_weights 1 4",
        lambda r, seen, _: panel(seen).weights == pytest.approx([0.2, 0.8]),
    ),
    "PanelArguments.teacher_weighting": (
        (*DISTILLING, "evaluate"),
        f"{ASKED} --teacher_weighting per_example",
        lambda r, seen, _: panel(seen).weighting == "per_example",
    ),
    "PanelArguments.teacher_column": (
        (*DISTILLING, "evaluate"),
        "--teacher {teacher} {other} --teacher_column expert",
        lambda r, seen, base: (
            seen.metrics["teacher"]["teacher_nll_per_token"] != base.metrics["teacher"]["teacher_nll_per_token"]
            and panel(seen).routing.teacher_column == "expert"
        ),
    ),
    "PanelArguments.template_column": (
        (*DISTILLING, "evaluate"),
        f"{ASKED} --template_column ask",
        lambda r, seen, base: (
            seen.widest("teacher") > base.widest("teacher") and panel(seen).routing.template_column == "ask"
        ),
    ),
    "RoutingArguments.teacher_column": (
        ("pseudo_label",),
        "--teacher {teacher} {other} --teacher_column expert",
        lambda r, seen, base: set(answers(seen)) - set(answers(base)) and len(seen.labels) == len(base.labels),
    ),
    "RoutingArguments.template_column": (
        ("pseudo_label",),
        f"{ASKED} --template_column ask",
        lambda r, seen, _: {line["template"] for line in seen.labels} == {line["ask"] for line in seen.labels},
    ),
    "StudentArguments.student": (
        WITH_STUDENTS,
        "--student {other}",
        lambda r, seen, _: "other" in seen.loads and "student" not in seen.loads,
    ),
    "StudentArguments.student_revision": (
        WITH_STUDENTS,
        "--student_revision v1",
        lambda r, seen, _: seen.has_revision("student", "v1") and (r == "sft" or seen.has_revision("teacher", None)),
    ),
    "StudentArguments.student_dtype": (
        WITH_STUDENTS,
        "--student_dtype bfloat16",
        lambda r, seen, _: seen.of_model("student", "dtype") is torch.bfloat16,
    ),
    "StudentArguments.student_chat_template": (
        WITH_STUDENTS,
        "--student_chat_template {chat}",
        lambda r, seen, base: read_by_student(r, seen) == read_by_student(r, base) + 2,
    ),
    "StudentArguments.student_system_prompt": (
        ("sft", "evaluate"),
        "--student_chat_template {chat} --student_system_prompt 'w6 w7'",
        lambda r, seen, base: read_by_student(r, seen) == read_by_student(r, base) + 2 + 5,
    ),
    "StudentArguments.student_chat_template_kwargs": (
        ("sft", "evaluate"),
        """--student_chat_template {chat} --student_chat_template_kwargs '{{"more": "w6 w7 w8 w9"}}'""",
        lambda r, seen, base: read_by_student(r, seen) == read_by_student(r, base) + 2 + 4,
    ),
    "StudentArguments.load_in_8bit": (
        ("evaluate",),  # where it is trained with adapters: test_adapters.py
        "--load_in_8bit",
        lambda r, seen, _: seen.of_model("student", "quantization_config").load_in_8bit,
    ),
    "StudentArguments.load_in_4bit": (
        ("evaluate",),
        "--load_in_4bit",
        lambda r, seen, _: seen.of_model("student", "quantization_config").load_in_4bit,
    ),
    "AdapterArguments.use_peft": (
        (*DISTILLING, "sft"),
        "--use_peft",
        lambda r, seen, _: (
            (lora(seen).r, lora(seen).lora_alpha, lora(seen).lora_dropout) == (16, 32, 0.05 if r == "sft" else 0.0)
        ),
    ),
    "AdapterArguments.lora_r": (ADAPTED, "--use_peft --lora_r 3", lambda r, seen, _: lora(seen).r == 3),
    "AdapterArguments.lora_alpha": (
        ADAPTED,
        "--use_peft --lora_alpha 5",
        lambda r, seen, _: lora(seen).lora_alpha == 5,
    ),
    "AdapterArguments.lora_dropout": (
        ("sft",),
        "--use_peft --lora_dropout 0.3",
        lambda r, seen, _: lora(seen).lora_dropout == 0.3,
    ),
    "AdapterArguments.lora_target_modules": (
        ADAPTED,
        "--use_peft --lora_target_modules '.*decoder.*[.]wo'",  # one text that is a regular expression
        lambda r, seen, _: (
            {name.rpartition(".lora_A")[0] for name, _ in seen.model.named_parameters() if "lora_A" in name}
            == {name for name, _ in seen.model.named_modules() if "decoder" in name and name.endswith(".wo")}
        ),
    ),
    "AdapterArguments.lora_modules_to_save": (
        ADAPTED,
        "--use_peft --lora_modules_to_save wo",
        lambda r, seen, _: any("wo.modules_to_save" in n for n, w in seen.model.named_parameters() if w.requires_grad),
    ),
    "AdapterArguments.use_rslora": (ADAPTED, "--use_peft --use_rslora", lambda r, seen, _: lora(seen).use_rslora),
    "AdapterArguments.use_dora": (ADAPTED, "--use_peft --use_dora", lambda r, seen, _: lora(seen).use_dora),
    "AdapterArguments.merge_adapters": ((), "", None),  # test_adapters.py
    "CodeArguments.trust_remote_code": ((), "", None),  # test_remote_code
    "RewardArguments.reward": (WITH_REWARDS, "--reward length", lambda r, seen, base: reward(seen) != reward(base)),
    "RewardArguments.value": (WITH_REWARDS, "--value expected", lambda r, seen, base: reward(seen) > reward(base)),
    "RewardArguments.k": (
        WITH_REWARDS,
        "--k 3{k_step}",
        lambda r, seen, base: reward(seen) != reward(base),
    ),
    "RewardArguments.tau": (
        WITH_REWARDS,
        "--value soft --tau 0.01",
        lambda r, seen, base: reward(seen) == pytest.approx(reward(base), rel=1e-2),
    ),
    "TeacherArguments.allowed_special_tokens": (
        WITH_TEACHERS,
        "--allowed_special_tokens '<triplet>'",
        lambda r, seen, base: (
            [allowed_special_tokens(model) for model in seen.models.values()] == [["<triplet>"]] * len(base.models)
        ),
    ),
    "RunArguments.overwrite_output_dir": ((), "", None),  # these three: where their refusal is tested
    "PseudoLabelArguments.overwrite_output_dir": ((), "", None),
    "EvaluationArguments.overwrite_output_dir": ((), "", None),
    "EvaluationArguments.align_tokenizers": ((), "", None),  # test_other_tokenizers
    "RunArguments.resume": (
        (),
        "",
        None,  # tests/recipes: resuming equals not stopping, for every recipe
    ),
    "NewModelArguments.architecture": (
        ("new",),
        "--architecture llama",
        lambda r, seen, _: type(seen.model).__name__ == "LlamaForCausalLM",
    ),
    "NewModelArguments.d_model": (("new",), "--d_model 24", lambda r, seen, _: seen.model.config.d_model == 24),
    "NewModelArguments.num_layers": (("new",), "--num_layers 3", lambda r, seen, _: seen.model.config.num_layers == 3),
    "NewModelArguments.num_heads": (("new",), "--num_heads 4", lambda r, seen, _: seen.model.config.num_heads == 4),
    "NewModelArguments.d_ff": (("new",), "--d_ff 40", lambda r, seen, _: seen.model.config.d_ff == 40),
    "NewModelArguments.dropout": (
        ("new",),
        "--dropout 0.25",
        lambda r, seen, _: (
            {module.p for module in seen.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
        ),
    ),
    "NewModelArguments.tokenizer": (
        ("new",),
        "--tokenizer {teacher}",
        lambda r, seen, _: "tokenizer" in {call["what"] for call in seen.loads["teacher"]},
    ),
    "NewModelArguments.vocab_size": (
        ("new",),
        "--vocab_size 108",
        lambda r, seen, base: len(seen.trainer.processing_class) < len(base.trainer.processing_class),
    ),
    "PseudoLabelArguments.output": (("pseudo_label",), "", lambda r, seen, _: len(seen.labels) == 8),
    "PseudoLabelArguments.strategy": (
        ("pseudo_label",),
        "--strategy sample",
        lambda r, seen, base: answers(seen) != answers(base),
    ),
    # Beams and seed: test_pseudo_label, by what plain `generate` says and by two seeds.
    "PseudoLabelArguments.num_beams": ((), "", None),
    "PseudoLabelArguments.seed": ((), "", None),
    "PseudoLabelArguments.interpolate": (
        ("pseudo_label",),
        "--strategy beam --interpolate --target_column ref",
        lambda r, seen, _: "candidate" in seen.labels[0],
    ),
    "PseudoLabelArguments.temperature": (
        ("pseudo_label",),
        "--strategy sample --temperature 1e-4",
        lambda r, seen, base: answers(seen) == answers(base),
    ),
    "PseudoLabelArguments.max_completion_length": (
        ("pseudo_label",),
        "--max_completion_length 2",
        lambda r, seen, base: max(len(t.split()) for t in answers(seen)) == 2,
    ),
    "PseudoLabelArguments.batch_size": (
        ("pseudo_label",),
        "--batch_size 3",
        lambda r, seen, base: seen.most_rows("teacher") == 3 < base.most_rows("teacher"),
    ),
    "EvaluationArguments.output_dir": (("evaluate",), "", lambda r, seen, _: len(seen.outputs) == 8),
    "EvaluationArguments.max_prompt_length": (
        ("evaluate",),
        "--max_prompt_length 3 --max_completion_length 2",
        lambda r, seen, base: seen.widest("student") == 3,
    ),
    "EvaluationArguments.max_completion_length": (
        ("evaluate",),
        "--max_completion_length 2",
        lambda r, seen, _: seen.metrics["student"]["tokens"] <= 2,
    ),
    "EvaluationArguments.batch_size": (
        ("evaluate",),
        "--batch_size 5",
        lambda r, seen, base: seen.most_rows("student") == 5 < base.most_rows("student"),
    ),
    "EvaluationArguments.sample": (("evaluate",), "--sample", lambda r, seen, base: said(seen) != said(base)),
    "EvaluationArguments.temperature": (
        ("evaluate",),
        "--sample --temperature 1e-4",
        lambda r, seen, base: said(seen) == said(base),
    ),
    "EvaluationArguments.seed": (("evaluate",), "", None),  # test_distillation: test_evaluate_samples_by_its_seed
    "EvaluationArguments.ibleu": (
        ("evaluate",),
        "--ibleu",
        lambda r, seen, base: "ibleu" in seen.metrics["student"].keys() - base.metrics["student"].keys(),
    ),
    "EvaluationArguments.gamma": (("evaluate",), "--gamma 0.5", lambda r, seen, base: reward(seen) > reward(base)),
    "EvaluationArguments.reward_weights": (
        ("evaluate",),
        "--reward_weights 2.5",
        lambda r, seen, base: reward(seen) == pytest.approx(2.5 * reward(base)),
    ),
    # of the trainers' own settings, what a recipe hands on besides
    "OnPolicyConfig.gamma": (
        ("ppo_kd", "rloo_kd", "reinforce_kd"),
        "--gamma 0.5",
        lambda r, seen, base: reward(seen) > reward(base),
    ),
    "OnPolicyConfig.reward_weights": (
        ("ppo_kd", "rloo_kd", "reinforce_kd"),
        "--reward_weights 2.5",
        lambda r, seen, base: reward(seen) == pytest.approx(2.5 * reward(base)),
    ),
    "RolloutConfig.max_prompt_length": (
        DISTILLING,
        "--max_prompt_length 3",
        lambda r, seen, base: seen.metrics["before"] != base.metrics["before"],
    ),
    "RolloutConfig.max_completion_length": (
        DISTILLING,
        "--max_completion_length 2",
        lambda r, seen, _: max(row["tokens"] for row in seen.metrics.values()) <= 2,
    ),
    "SupervisedConfig.max_prompt_length": (
        ("sft",),
        "--max_prompt_length 3",
        lambda r, seen, _: seen.batch()["input_ids"].shape[1] == 3,
    ),
    "SupervisedConfig.max_completion_length": (
        ("sft",),
        "--max_completion_length 2",
        lambda r, seen, _: seen.batch()["labels"].shape[1] == 2,
    ),
}
# Those of encoder distillation: test_encoder_flags.py.
OF_ENCODERS = {"GeneralDataArguments", "TaskDataArguments"}
GROUPS = [
    kind
    for name, kind in vars(arguments).items()
    if dataclasses.is_dataclass(kind) and not name.startswith("Encoder") and name not in OF_ENCODERS
]


@pytest.mark.parametrize("kind", GROUPS, ids=lambda kind: kind.__name__)
def test_every_flag_has_its_line(kind):
    missing = {f"{kind.__name__}.{option.name}" for option in dataclasses.fields(kind)} - ARRIVES.keys()
    assert not missing, "say in ARRIVES where they are seen"


QUICK = ("ppo_kd", "pseudo_label")
# Each run's flags, of which each recipe takes those it has; of one that two of them set, the last counts.
TOGETHER = {
    "training data": (
        *("DataArguments.dataset", "DataArguments.dataset_split", "DataArguments.dataset_config"),
        *("DataArguments.dataset_revision", "RolloutConfig.max_prompt_length", "TeacherArguments.teacher_revision"),
        *("SupervisedConfig.max_prompt_length", "SupervisedConfig.max_completion_length"),
        *("EvaluationArguments.max_prompt_length", "EvaluationArguments.batch_size"),
        "PseudoLabelArguments.batch_size",
    ),
    "held-out data": (
        *("HeldOutArguments.eval_dataset", "HeldOutArguments.eval_split", "DataArguments.source_column"),
        *("TeacherArguments.teacher_placement", "StudentArguments.load_in_8bit"),
    ),
    "student": (
        *("StudentArguments.student", "AdapterArguments.use_peft", "HeldOutArguments.eval_target_column"),
        *("TeacherArguments.teacher_batch_tokens", "DataArguments.max_rows", "EvaluationArguments.ibleu"),
        *("NewModelArguments.architecture", "NewModelArguments.tokenizer", "PseudoLabelArguments.interpolate"),
        *("AdapterArguments.lora_modules_to_save", "AdapterArguments.use_dora"),
    ),
    "new model": tuple(
        f"NewModelArguments.{name}" for name in ("d_model", "num_layers", "num_heads", "d_ff", "dropout", "vocab_size")
    ),
    "adapters": tuple(
        f"AdapterArguments.{name}"
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")
    ),
    "streaming": ("StreamingArguments.streaming", "StreamingArguments.shuffle_buffer_size"),
    "template_names": (
        *("PromptArguments.template_names", "StudentArguments.student_revision", "StudentArguments.student_dtype"),
        "TeacherArguments.allowed_special_tokens",
    ),
    "template_weights": (
        *("PromptArguments.templates", "PanelArguments.template_weights"),
        "DataArguments.target_column",
    ),
    "teacher_weighting": (
        *("PanelArguments.teacher_weighting", "PromptArguments.student_template"),
        "EvaluationArguments.output_dir",
    ),
    "template_column": (
        *("PanelArguments.template_column", "RoutingArguments.template_column"),
        "StudentArguments.load_in_4bit",
    ),
    "rename_columns": ("PromptArguments.rename_columns", "StudentArguments.student_chat_template"),
    "teacher_weights": (
        *("PromptArguments.template", "PanelArguments.teacher_weights"),
        "StudentArguments.student_chat_template_kwargs",
    ),
    "teacher": (
        *("TeacherArguments.teacher", "RolloutConfig.max_completion_length"),
        *("EvaluationArguments.max_completion_length", "PseudoLabelArguments.max_completion_length"),
    ),
    "teacher_quantization": (
        *("TeacherArguments.teacher_max_prompt_length", "TeacherArguments.teacher_dtype"),
        "TeacherArguments.teacher_quantization",
    ),
    "teacher_chat_template": ("TeacherArguments.teacher_chat_template", "StudentArguments.student_system_prompt"),
}


def runs() -> dict[str, tuple[str, ...]]:
    """Those of `TOGETHER`, and one for each flag that is in none of them."""
    shared = [name for names in TOGETHER.values() for name in names]
    assert len(shared) == len(set(shared)) and set(shared) <= ARRIVES.keys()
    alone = [name for name, (_, _, is_seen) in ARRIVES.items() if is_seen is not None and name not in shared]
    return {**TOGETHER, **{name: (name,) for name in alone}}


def cases() -> list:
    """Quick are those of every other run, with the recipes of `QUICK`."""
    return [
        pytest.param(
            recipe,
            flags,
            marks=() if number % 2 == 0 and recipe in QUICK else pytest.mark.slow(0.25),
            id=f"{recipe}-{run_of}",
        )
        for number, (run_of, names) in enumerate(runs().items())
        for recipe in BASE
        if (flags := [name for name in names if recipe in ARRIVES[name][0]])
    ]


_BASES: dict[str, Seen] = {}


@pytest.mark.parametrize(("recipe", "names"), cases())
def test_every_flag_arrives(recipe, names, files, observe):
    command = f"{'sft' if recipe == 'new' else recipe} {BASE[recipe]}"
    if recipe not in _BASES:
        _BASES[recipe] = observe(command.format(**files))
    target = "" if recipe == "pseudo_label" else " --target_column mr"
    # What K-step returns go with.
    k_step = {"ppo_kd": " --lam 1 --average_reward none", "rloo_kd": " --average_reward none"}.get(recipe, "")
    flags = " ".join(ARRIVES[name][1] for name in names)
    seen = observe(f"{command} {flags}".format(**files, k_step=k_step, target=target))
    for name in names:
        is_seen = ARRIVES[name][2]
        assert is_seen(recipe, seen, _BASES[recipe]), name
