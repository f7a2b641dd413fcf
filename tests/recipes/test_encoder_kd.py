"""encoder_kd.py as a user runs it: presets, stages one after the other, what a run leaves and what it goes on from."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlkd_trl.commands.presets import shipped_presets
from rlkd_trl.trainers.encoder import EncoderKDTrainer
from tests.models.encoders import encoder_tokenizer, make
from tests.recipes.command_lines import ROOT, metrics_of, parsed, run, write_csv
from tests.recipes.forks import fork_recipes
from tests.trainers.tiny_runs import assert_same_weights, largest_difference

PRESETS = {path.stem: path for path in shipped_presets() if path.parent.name == "encoder_kd"}
STEPS = (
    "--max_steps 2 --per_device_train_batch_size 8 --learning_rate 1e-2 --lr_scheduler_type constant "
    "--logging_steps 1 --disable_tqdm True --max_length 32"
)
GENERAL, TASK = ["general"], ["task"]
# The table of the methods: preset, stages, the losses of each, and the layer map.
TABLE = {
    "kd": (TASK, [{"logits_kl", "hard_ce"}]),
    "pkd": (TASK, [{"cls_mse", "logits_kl", "hard_ce"}]),
    "distilbert": (GENERAL, [{"cosine", "logits_kl", "mlm_ce"}]),
    "minilm": (GENERAL, [{"attention_kl", "value_relation_kl"}]),
    "minilmv2": (GENERAL, [{"query_relation_kl", "key_relation_kl", "value_relation_kl"}]),
    "tinybert": (
        ["general", "task", "task"],
        [*[{"embedding_mse", "attention_mse", "hidden_mse"}] * 2, {"logits_kl"}],
    ),
    "soft_only": (TASK, [{"logits_kl"}]),
    "mt_bert": (TASK, [{"logits_kl", "hidden_mse", "hard_ce"}]),
}
LAYERS = {"embedding_mse", "hidden_mse"}
ATTENTION = {"attention_mse", "attention_kl", "query_relation_kl", "key_relation_kl", "value_relation_kl"}
TABLE["mix"] = (
    ["general", "task", "task"],
    [LAYERS | ATTENTION | {"logits_kl", "mlm_ce"}, *[LAYERS | ATTENTION | {"logits_kl", "hard_ce"}] * 2],
)
TABLE["mix_no_attention"] = (
    ["general", "task", "task"],
    [LAYERS | {"logits_kl", "mlm_ce"}, *[LAYERS | {"logits_kl"}] * 2],
)


def command(encoders, output_dir, stages: str = "both") -> str:
    """Teachers and data of general stages, of task stages, or of both."""
    general = f"--teacher {encoders.general} --dataset {encoders.train}"
    task = f"--task_teacher {encoders.task} --task_dataset {encoders.train} --label_column label"
    flags = {"general": general, "task": task, "both": f"{general} {task}"}[stages]
    return f"encoder_kd {flags} {STEPS} --output_dir {output_dir}"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


# Presets


def test_the_table_is_of_all_presets():
    assert PRESETS.keys() == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_what_the_table_says(name, tmp_path):
    from rlkd_trl.trainers.encoder_config import EncoderKDConfig

    settings = parsed(f"encoder_kd --config {name} --output_dir {tmp_path}")
    own = {key: settings[key] for key in ("stages", "losses", "layer_map", "temperature", "mlm_probability")}
    config = EncoderKDConfig(str(tmp_path), **own)
    stages, losses = TABLE[name]
    assert config.stages == stages
    assert [set(config.objective(number).weights) for number in range(len(stages))] == losses


@pytest.mark.parametrize(
    "name",
    [name if name in ("pkd", "minilmv2") else pytest.param(name, marks=pytest.mark.slow) for name in TABLE],
)
def test_every_preset_trains(name, encoders, tmp_path):
    stages = set(TABLE[name][0])
    of_stages = command(encoders, tmp_path / "out", "both" if len(stages) == 2 else stages.pop())
    assert run(f"{of_stages} --config {name} --save_strategy no") == 0
    first = tmp_path / "out" / "stage1-general" if len(TABLE[name][0]) > 1 else tmp_path / "out"
    for directory in (first, tmp_path / "out"):
        metrics = metrics_of(directory)
        assert set(metrics) == {"teacher", "before", "after"}
        losses = {key: value for key, value in metrics["after"].items() if key.startswith("losses/")}
        assert losses and losses != {key: metrics["before"][key] for key in losses}
        assert (directory / "finished.json").is_file() and (directory / "report.html").is_file()
    auto_class = AutoModelForMaskedLM if "mlm_ce" in TABLE[name][1][-1] else AutoModel
    auto_class = AutoModelForSequenceClassification if TABLE[name][0][-1] == "task" else auto_class
    student, info = auto_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and student.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == encoder_tokenizer().get_vocab()


@pytest.mark.slow(0.4)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("minilm", "--hidden_size 8 --num_heads 2"),
        ("minilmv2", "--hidden_size 8 --num_heads 4 --relation_heads 8"),
        ("tinybert", "--hidden_size 12 --num_layers 3"),
        ("mix", "--hidden_size 8 --intermediate_size 20"),
        ("mix_no_attention", "--hidden_size 8 --num_heads 1"),
        ("kd", "--hidden_size 8 --num_heads 4"),
    ],
)
def test_students_of_other_sizes(name, sizes, encoders, tmp_path):
    """As far as the table's last column allows them."""
    if name in ("mix", "tinybert", "mix_no_attention"):
        sizes += " --stage_max_steps 1"
    stages = set(TABLE[name][0])
    of_stages = command(encoders, tmp_path / "out", "both" if len(stages) == 2 else stages.pop())
    assert run(f"{of_stages} --config {name} {sizes} --save_strategy no") == 0
    words = sizes.split()
    wanted = {flag.removeprefix("--"): int(value) for flag, value in zip(words[::2], words[1::2], strict=True)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    for size in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
        if size in wanted:
            assert config[names.get(size, size)] == wanted[size]
    if "intermediate_size" not in wanted:
        assert config["intermediate_size"] == 2 * config["hidden_size"], "in the teacher's proportion"
    assert not (tmp_path / "out" / "adapter_config.json").exists()


# Several teachers


@pytest.mark.slow(1)
def test_teachers_fine_tuned_together_teach_one_student(encoders, tmp_path, capfd):
    labelled = f"--task_dataset {encoders.train} --label_column label {STEPS}"
    together = f"encoder_kd --losses hard_ce --student {encoders.general} --train_along {encoders.task} {labelled}"
    assert run(f"{together} --output_dir {tmp_path / 'teachers'}") == 0
    first, second = weights(tmp_path / "teachers"), weights(tmp_path / "teachers" / "encoder2")
    assert torch.equal(first["classifier.weight"], second["classifier.weight"])
    assert largest_difference(weights(encoders.task), second) > 1e-3
    several = f"--task_teacher {tmp_path / 'teachers'} --more_teachers {tmp_path / 'teachers' / 'encoder2'}"
    assert run(f"encoder_kd --config mt_bert {several} {labelled} --output_dir {tmp_path / 'student'}") == 0
    metrics = metrics_of(tmp_path / "student")
    assert metrics["after"]["losses/hidden_mse"] != metrics["before"]["losses/hidden_mse"]
    assert metrics["teacher"]["parameters"] == sum(w.numel() for w in [*first.values(), *second.values()])
    projections = load_file(tmp_path / "student" / "projections.safetensors")
    assert len(projections) == 2
    whole = weights(tmp_path / "student")
    fixed = f"encoder_kd --config mt_bert {several} {labelled} --teacher_weighting fixed"
    assert run(f"{fixed} --output_dir {tmp_path / 'fixed'}") == 0
    assert largest_difference(whole, weights(tmp_path / "fixed")) > 1e-5


# The student that a run begins with


def begun_with(flags: str, encoders, tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """The weights of a run's student before its first step."""
    seen = {}

    def train(trainer, *args, **kwargs):
        seen.update({name: tensor.clone() for name, tensor in trainer.student.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(EncoderKDTrainer, "train", train)
    assert run(f"{command(encoders, tmp_path / 'out', 'general')} --stages general {flags}") == 130
    return seen


@pytest.mark.slow(0.7)
def test_it_begins_with_the_teachers_layers(encoders, tmp_path, monkeypatch):
    teacher = weights(encoders.general)
    for init, layers in (("uniform", [1, 3]), ("bottom", [0, 1]), ("top", [2, 3]), ("1:1,2:4", [0, 3])):
        student = begun_with(f"--losses hidden_mse+mlm_ce --init {init}", encoders, tmp_path, monkeypatch)
        for m, n in enumerate(layers):
            of_layer = {name for name in student if f".layer.{m}." in name}
            assert len(of_layer) == 16
            for name in of_layer:
                assert torch.equal(student[name], teacher[name.replace(f".layer.{m}.", f".layer.{n}.")]), (init, name)
        for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.transform.dense.weight"):
            assert torch.equal(student[name], teacher[name])


def test_random_weights_depend_on_the_seed(encoders, tmp_path, monkeypatch):
    flags = "--losses hidden_mse --init random --seed"
    one, same, other = (begun_with(f"{flags} {seed}", encoders, tmp_path, monkeypatch) for seed in (1, 1, 2))
    assert_same_weights(one, same)
    assert largest_difference(one, other) > 0.1
    assert (
        largest_difference(
            {"w": one["embeddings.word_embeddings.weight"]},
            {"w": weights(encoders.general)["bert.embeddings.word_embeddings.weight"]},
        )
        > 0.1
    )


def test_a_named_student(encoders, tmp_path, monkeypatch):
    """Also over a preset that says how a new one begins."""
    student = begun_with(f"--config distilbert --student {encoders.student}", encoders, tmp_path, monkeypatch)
    given = weights(encoders.student)
    assert_same_weights({name: student[name] for name in given}, given)


def test_a_student_of_another_architecture(encoders, tmp_path):
    """DistilBERT, which takes no types of tokens, from BERT."""
    make("distilbert", layers=2, head="classes", seed=5).save_pretrained(tmp_path / "student")
    encoder_tokenizer().save_pretrained(tmp_path / "student")
    flags = f"{command(encoders, tmp_path / 'out', 'task')} --losses hidden_mse+attention_kl+logits_kl+hard_ce"
    assert run(f"{flags} --student {tmp_path / 'student'}") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "distilbert"


def with_adapters(source: Path, target: Path) -> Path:
    """Adapters of a classifier, which has its head trained anew, in `adapters`; and the whole model in `merged`."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, ignore_mismatched_sizes=True)
    settings = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(target / "adapters")
    adapted.merge_and_unload().save_pretrained(target / "merged")
    for name in ("adapters", "merged") if target.name == "with_tokenizer" else ("merged",):
        encoder_tokenizer().save_pretrained(target / name)
    return target


@pytest.mark.slow(0.6)
@pytest.mark.parametrize("place", ["with_tokenizer", "without"])
def test_a_teacher_of_adapters_teaches_as_the_merged_model(place, encoders, tmp_path):
    """For a task of two classes, and the model beneath is of three."""
    place = with_adapters(encoders.task, tmp_path / place)
    write_csv(tmp_path / "rows.csv", [{"text": f"w{5 + i} w{6 + i}", "class": i % 2} for i in range(20)])
    data = f"--task_dataset {tmp_path}/rows.csv --label_column class --losses logits_kl+hidden_mse+hard_ce"
    for name in ("adapters", "merged"):
        assert run(f"encoder_kd --task_teacher {place / name} {data} {STEPS} --output_dir {tmp_path / name}") == 0
    assert_same_weights(weights(tmp_path / "adapters"), weights(tmp_path / "merged"), rtol=1e-4, atol=1e-5)
    found, expected = (metrics_of(tmp_path / name) for name in ("adapters", "merged"))
    assert found["teacher"] == pytest.approx(expected["teacher"]) and found["after"] == pytest.approx(
        expected["after"]
    )


def test_a_model_beneath_adapters_is_not_written_over(encoders, tmp_path, capsys):
    place = with_adapters(encoders.task, tmp_path / "with_tokenizer") / "adapters"
    flags = f"--task_teacher {place} --task_dataset {encoders.train} --losses logits_kl --output_dir {encoders.task}"
    assert run(f"encoder_kd {flags} {STEPS}") == 2
    assert f"is what --task_teacher {place} reads, which would be overwritten" in capsys.readouterr().err


# Tasks


@pytest.mark.slow(0.7)
def test_labels_are_the_teachers_classes_by_name_or_number(encoders, tmp_path):
    results = {}
    for column in ("label", "number"):
        flags = f"--task_eval_dataset {encoders.test} --label_column {column} --losses logits_kl+hard_ce"
        assert run(f"{command(encoders, tmp_path / column, 'task')} {flags}") == 0
        results[column] = weights(tmp_path / column), metrics_of(tmp_path / column)
    assert_same_weights(results["label"][0], results["number"][0])
    metrics = results["label"][1]
    assert metrics["after"] == results["number"][1]["after"]
    assert 0 <= metrics["after"]["accuracy"] <= 100 and metrics["teacher"]["accuracy"] >= 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "label")
    assert model.config.id2label == {0: "low", 1: "mid", 2: "high"}
    assert "high" in (tmp_path / "label" / "report.html").read_text(), "samples have the classes' names"


def test_a_task_without_labels_is_learnt_from_the_teacher(encoders, tmp_path):
    task = f"--task_teacher {encoders.task} --task_dataset {encoders.train}"
    assert run(f"encoder_kd {task} {STEPS} --config soft_only --output_dir {tmp_path / 'out'}") == 0
    after = metrics_of(tmp_path / "out")["after"]
    assert "accuracy" not in after and 0 <= after["agreement"] <= 100


def test_a_task_of_pairs_of_texts(encoders, tmp_path, monkeypatch):
    batches = []
    step = EncoderKDTrainer.training_step

    def note(trainer, model, inputs, counts=None):
        batches.append(inputs)
        return step(trainer, model, inputs, counts)

    monkeypatch.setattr(EncoderKDTrainer, "training_step", note)
    assert run(f"{command(encoders, tmp_path / 'out', 'task')} --task_pair_column next") == 0
    assert batches[0]["token_type_ids"].any(), "the second text is of another type"


@pytest.mark.parametrize(
    "losses",
    [
        *(pytest.param(name, marks=pytest.mark.slow(0.3)) for name in ("hard_ce", "logits_kl")),
        "logits_kl+hard_ce+hidden_mse",
    ],
)
def test_regression(losses, encoders, tmp_path):
    task = f"--task_teacher {encoders.regression} --task_dataset {encoders.train} --task_eval_dataset {encoders.test}"
    label = f"--label_column score --losses {losses} --output_dir {tmp_path / 'out'}"
    if losses == "hard_ce":  # without a teacher, floats are what says so
        task = f"--student {encoders.student} --task_dataset {encoders.train} --task_eval_dataset {encoders.test}"
    assert run(f"encoder_kd {task} {STEPS} {label}") == 0
    metrics = metrics_of(tmp_path / "out")
    assert {"pearson", "spearman"} <= metrics["after"].keys() and "accuracy" not in metrics["after"]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 1


def test_a_teacher_is_fine_tuned_by_the_same_recipe(encoders, tmp_path):
    flags = f"--student {encoders.general} --task_dataset {encoders.train} --task_eval_dataset {encoders.test}"
    more = f"--label_column label --losses hard_ce --output_dir {tmp_path / 'teacher'}"
    assert run(f"encoder_kd {flags} {STEPS} {more}") == 0
    metrics = metrics_of(tmp_path / "teacher")
    assert metrics["teacher"] == {} and {"accuracy", "f1", "losses/hard_ce"} <= metrics["after"].keys()
    names = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").config.id2label
    assert names == {0: "high", 1: "low", 2: "mid"}


# General stages


@pytest.mark.slow(0.7)
def test_a_general_student_keeps_the_head_that_it_was_trained_with(encoders, tmp_path):
    for losses, auto_class in (("hidden_mse", AutoModel), ("hidden_mse+mlm_ce", AutoModelForMaskedLM)):
        place = tmp_path / losses
        assert run(f"{command(encoders, place, 'general')} --stages general --losses {losses}") == 0
        _, info = auto_class.from_pretrained(place, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_next_sentences(encoders, tmp_path):
    make(layers=2, head="tokens", seed=4).save_pretrained(tmp_path / "student")
    encoder_tokenizer().save_pretrained(tmp_path / "student")
    flags = "--stages general --losses mlm_ce+nsp_ce+hidden_mse --pair_column next"
    assert run(f"{command(encoders, tmp_path / 'out', 'general')} {flags} --student {tmp_path / 'student'}") == 0
    assert "losses/nsp_ce" in metrics_of(tmp_path / "out")["after"]
    _, info = AutoModelForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.parametrize("kind", ["t5", pytest.param("llama", marks=pytest.mark.slow(0.4))])
def test_other_models_layers(kind, tmp_path, encoders):
    """An encoder-decoder's, of pairs of source and target, and a decoder-only model's."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from tests.models.encoders import CONFIGS

    auto_class = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    torch.manual_seed(0)
    auto_class.from_config(CONFIGS[kind](4)).save_pretrained(tmp_path / "teacher")
    tokenizer = encoder_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "teacher")
    losses = "hidden_mse+value_relation_kl+attention_kl+cosine+logits_kl"
    data = f"--dataset {encoders.train} --pair_column next" if kind == "t5" else f"--dataset {encoders.train}"
    flags = f"encoder_kd --teacher {tmp_path / 'teacher'} {data} --stages general --losses {losses} {STEPS}"
    assert run(f"{flags} --output_dir {tmp_path / 'out'}") == 0
    _, info = auto_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_hidden_layers == 2 and getattr(config, "num_decoder_layers", 2) == 2


# Stages


TWO_STAGES = "--stages general task --losses hidden_mse+mlm_ce logits_kl+hard_ce --init random --save_steps 1"


def test_a_stage_begins_with_the_student_of_the_one_before(encoders, tmp_path, monkeypatch):
    begun = []
    train = EncoderKDTrainer.train

    def note(trainer, *args, **kwargs):
        begun.append({name: tensor.clone() for name, tensor in trainer.student.model.state_dict().items()})
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(EncoderKDTrainer, "train", note)
    out = tmp_path / "out"
    flags = f"{TWO_STAGES} --stage_max_steps 3 2 --stage_learning_rates 1e-2 3e-2"
    assert run(f"{command(encoders, out)} {flags}") == 0
    of_first = weights(out / "stage1-general")
    shared = {name for name in of_first if name.startswith("bert.")} & begun[1].keys()
    assert len(shared) > 30
    assert_same_weights({name: begun[1][name] for name in shared}, {name: of_first[name] for name in shared})
    assert largest_difference({n: of_first[n] for n in shared}, {n: begun[0][n] for n in shared}) > 1e-3
    assert sorted(path.name for path in (out / "stage1-general").glob("checkpoint-*"))[-1] == "checkpoint-3"
    assert sorted(path.name for path in out.glob("checkpoint-*"))[-1] == "checkpoint-2"
    rates = [
        json.loads((place / "trainer_state.json").read_text())["log_history"][0]["learning_rate"]
        for place in (out / "stage1-general" / "checkpoint-3", out / "checkpoint-2")
    ]
    assert rates == [1e-2, 3e-2]


def killed_in(stage: int, step: int, monkeypatch) -> None:
    """A SIGTERM after so many steps of a stage, counted from 1; it is obeyed once."""
    trainers = []
    end = EncoderKDTrainer.training_step

    def kill(trainer, *args, **kwargs):
        if trainer not in trainers:
            trainers.append(trainer)
        loss = end(trainer, *args, **kwargs)
        if len(trainers) == stage and trainer.state.global_step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(EncoderKDTrainer, "training_step", kill)


@pytest.mark.slow(1)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_was_stopped_in_any_stage_ends_as_if_it_had_not_been(
    stage, encoders, tmp_path, monkeypatch, capsys
):
    flags = f"{TWO_STAGES} --max_steps 3 --logging_steps 2"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(f"{command(encoders, whole)} {flags}") == 0
    with monkeypatch.context() as patch:
        killed_in(stage, 2, patch)
        assert run(f"{command(encoders, stopped)} {flags}") == 143
    assert "Stopped after step 2" in capsys.readouterr().err
    first = stopped / "stage1-general"
    assert (first / "finished.json").exists() == (stage == 2)
    assert (stopped / "model.safetensors").exists() is False
    before = (first / "model.safetensors").stat().st_mtime_ns if stage == 2 else None
    assert run(f"{command(encoders, stopped)} {flags}") == 2, "not begun anew without a word"
    assert run(f"{command(encoders, stopped)} {flags} --resume") == 0
    if stage == 2:
        assert (first / "model.safetensors").stat().st_mtime_ns == before, "a stage that is done is left alone"
    for place in ("stage1-general", "."):
        assert_same_weights(weights(stopped / place), weights(whole / place))
        assert metrics_of(stopped / place) == metrics_of(whole / place)
    assert run(f"{command(encoders, stopped)} {flags} --resume") == 0
    assert "is finished, after 3 steps: nothing is left to do" in capsys.readouterr().out


@pytest.mark.slow(0.4)
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--losses cosine+mlm_ce logits_kl+hard_ce", "losses"),
        ("--seed 7", "seed"),
        ("--num_heads 4", "num_heads"),
        ("--teacher {student}", "teacher"),
        ("--dataset {test}", "data was"),
        ("--stage_max_steps 4 3", "max_steps"),
    ],
)
def test_another_run_is_not_continued(changed, named, encoders, tmp_path, monkeypatch, capsys):
    """A first stage that is done is that of the same run, or the chain is not gone on with."""
    flags = f"{command(encoders, tmp_path / 'out')} {TWO_STAGES} --save_steps 5 --max_steps 3"
    with monkeypatch.context() as patch:
        killed_in(2, 1, patch)
        assert run(flags) == 143
    shutil.rmtree(tmp_path / "out" / "stage1-general" / "checkpoint-3")
    changed = changed.format(student=encoders.student, test=encoders.test)
    assert run(f"{flags} {changed} --resume") == 2
    error = capsys.readouterr().err
    assert "is of another run" in error.splitlines()[-1] and named in error


@pytest.mark.slow(0.6)
def test_a_stage_that_was_killed_in_its_first_save_begins_anew(encoders, tmp_path):
    """And the one before it does not."""
    out = tmp_path / "out"
    flags = f"{command(encoders, out)} {TWO_STAGES}"
    assert run(flags) == 0
    whole, of_first = weights(out), (out / "stage1-general" / "model.safetensors").stat().st_mtime_ns
    for path in out.iterdir():
        if path.name != "stage1-general":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / ".unfinished" / "checkpoint-1").mkdir(parents=True)
    (out / ".unfinished" / "checkpoint-1" / "config.json").write_text("{")
    assert run(f"{flags} --resume") == 0
    assert_same_weights(weights(out), whole)
    assert (out / "stage1-general" / "model.safetensors").stat().st_mtime_ns == of_first


@pytest.mark.slow(1)
def test_begun_anew_all_stages_are(encoders, tmp_path, monkeypatch):
    """Also those that a killed attempt to do so has not come to."""
    flags = f"{command(encoders, tmp_path / 'out')} {TWO_STAGES}"
    assert run(flags) == 0
    with monkeypatch.context() as patch:
        killed_in(1, 1, patch)
        assert run(f"{flags} --overwrite_output_dir") == 143
    assert not (tmp_path / "out" / "finished.json").exists() and not list((tmp_path / "out").glob("checkpoint-*"))
    assert run(f"{flags} --resume") == 0
    assert (tmp_path / "out" / "finished.json").is_file()


@pytest.mark.parametrize("way", ["ACCELERATE_USE_DEEPSPEED", "--deepspeed"])
def test_several_stages_under_deepspeed_are_refused(way, encoders, tmp_path, monkeypatch, capsys):
    """Before models are: the second stage's trainer would fail when the first is done."""
    flags = f"{command(encoders, tmp_path / 'out')} {TWO_STAGES} --teacher {tmp_path / 'teacher'}"
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("")
    if way == "--deepspeed":
        (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
        flags += f" --deepspeed {tmp_path / 'zero2.json'}"
    else:
        monkeypatch.setenv(way, "true")
    assert run(flags) == 2
    error = capsys.readouterr().err
    assert "--stages general task: under DeepSpeed a command trains one stage" in error and error.count("\n") == 1


@pytest.mark.slow(1)
def test_one_class_for_all_texts_is_warned_of(encoders, tmp_path, capsys):
    """One class is learnt of one word alone, which is in none of the held-out texts."""
    write_csv(tmp_path / "train.csv", [{"text": f"w{i}", "label": "odd" if i == 3 else "even"} for i in range(3, 23)])
    write_csv(tmp_path / "test.csv", [{"text": f"w{i} w{i}", "label": ("even", "odd")[i % 2]} for i in range(4, 10)])
    task = f"encoder_kd --losses hard_ce --student {encoders.general} --task_dataset {tmp_path / 'train.csv'} {STEPS} "
    task += f"--max_steps 20 --learning_rate 1e-3 --task_eval_dataset {tmp_path / 'test.csv'} --label_column label "
    assert run(f"{task} --output_dir {tmp_path / 'task'}") == 0
    said = capsys.readouterr().out
    assert "Warning: the student gives each of the 6 held-out texts the class 'even', where several are right" in said


def test_maps_are_announced(encoders, tmp_path, capsys):
    assert run(f"{command(encoders, tmp_path / 'out', 'general')} --config minilm") == 0
    said = capsys.readouterr().out
    assert "layers 2 of the student and layers 4 of the teacher run eager attention, all others SDPA" in said


@pytest.mark.slow(0.5)
def test_held_out_texts_that_are_trained_on_are_counted(encoders, tmp_path, capsys):
    general = f"{command(encoders, tmp_path / 'general', 'general')} --config minilm --eval_dataset {encoders.train}"
    assert run(general) == 0
    count = len(encoders.train.read_text().splitlines()) - 1
    assert f"{count} of {count} inputs of --eval_dataset are training inputs too" in capsys.readouterr().out
    pairs = [{"text": "w3 w4", "other": f"w{i}", "label": str(i % 2)} for i in range(3, 23)]
    write_csv(tmp_path / "train.csv", pairs)
    write_csv(tmp_path / "test.csv", [*pairs[:2], {"text": "w3 w4", "other": "w23", "label": "0"}])
    task = f"encoder_kd --losses hard_ce --student {encoders.general} --task_dataset {tmp_path / 'train.csv'} {STEPS} "
    task += f"--task_eval_dataset {tmp_path / 'test.csv'} --label_column label --task_pair_column other "
    assert run(f"{task} --output_dir {tmp_path / 'task'}") == 0
    assert "2 of 3 inputs of --task_eval_dataset are training inputs too" in capsys.readouterr().out


@pytest.mark.slow(25)
def test_the_demo(tmp_path, monkeypatch, capsys):
    """Of five classes, of which the commonest has 56 % of the texts: the student learns all of them."""
    fork_recipes(monkeypatch)
    assert run(f"encoder_kd --output_dir {tmp_path / 'demo'} --disable_tqdm True") == 0
    metrics = metrics_of(tmp_path / "demo")
    assert metrics["teacher"]["accuracy"] > 95
    assert metrics["after"]["accuracy"] > 90 and metrics["after"]["f1"] > 90
    assert "the student gives each of the" not in capsys.readouterr().out
    assert (ROOT / "recipes" / "configs" / "demo_encoder.yaml").is_file()
