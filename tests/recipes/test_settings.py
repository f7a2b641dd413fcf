"""Where a recipe's settings come from, and what they do: presets, data files, column names, rewards."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from rlkd_trl.commands.arguments import DataArguments, HeldOutArguments, PromptArguments, StreamingArguments
from rlkd_trl.commands.data import load_prompts, load_train_and_held_out
from rlkd_trl.commands.settings import DistillationSettings
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.trainers.config import RLOOKDConfig
from tests.recipes.command_lines import (
    COLUMNS,
    METHODS,
    REWARDED_METHODS,
    SAMPLING,
    TWO_STEPS,
    metrics_of,
    parsed,
    read_jsonl,
    run,
    word_rows,
    write_csv,
    write_templates,
)

DISTIL = f"{COLUMNS} {TWO_STEPS} {SAMPLING}"
ONE_STEP = f"{DISTIL} --max_steps 1"


# Presets


@pytest.mark.parametrize("recipe", ["ppo_kd", "rloo_kd", "reinforce_kd"])
@pytest.mark.parametrize(
    "order", ["--config {preset} --gamma 0.5 --k 2", "--gamma 0.5 --k 2 --config={preset}"], ids=["first", "last"]
)
def test_the_command_line_beats_the_preset_which_beats_the_defaults(recipe, order, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        "gamma: 0.7\nk: 5\nlearning_rate: 3.0e-4\ntemplate_names: [a, b]\nbf16: false\noutput_dir: out\n"
    )
    settings = parsed(f"{recipe} {order.format(preset=preset)} --teacher t")
    assert (settings["gamma"], settings["k"]) == (0.5, 2)  # command line
    assert (settings["learning_rate"], settings["template_names"]) == (3e-4, ["a", "b"])  # preset
    assert (settings["temperature"], settings["value"], settings["num_generations"]) == (1.0, "max", 4)  # defaults


def test_a_list_on_the_command_line_replaces_the_presets(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("reward: [length, repetition]\nreward_weights: [1, 2]\nteacher: one\noutput_dir: out\n")
    settings = parsed(f"ppo_kd --config {preset} --reward log_ratio --reward_weights 0.5")
    assert (settings["reward"], settings["reward_weights"]) == (["log_ratio"], [0.5])
    assert settings["teacher"] == ["one"]  # one value stands for a list of one


def test_a_preset_may_hold_the_whole_run(checkpoints, train_csv, tmp_path):
    pair = checkpoints["t5-tied"]
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        f"teacher: [{pair.teacher}]\nstudent: {pair.student}\ndataset: {train_csv}\nsource_column: mr\n"
        "max_steps: 5\nper_device_train_batch_size: 8\nnum_generations: 2\nmax_completion_length: 6\n"
        f"output_dir: {tmp_path / 'out'}\ndisable_tqdm: true\n"
    )
    assert run(f"rloo_kd --config {preset} --max_steps 2") == 0
    assert (tmp_path / "out" / "checkpoint-2").is_dir(), "--max_steps 2 beats the preset's 5"
    assert not (tmp_path / "out" / "checkpoint-5").exists()


@pytest.mark.parametrize("recipe", ["ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd"])
def test_without_a_teacher_the_demos_preset_gives_the_defaults(recipe, tmp_path):
    demo = parsed(f"{recipe} --max_steps 3")
    assert (demo["templates"], demo["max_steps"]) == ("builtin:data_to_text", 3)
    assert demo["output_dir"] == f"runs/demo_{recipe.removesuffix('_kd')}"
    own = parsed(f"{recipe} --teacher t --max_steps 3")
    assert own["templates"] is None
    assert own["max_completion_length"] == 64  # the demo's is 48


# Data


def data_files(directory: Path) -> dict[str, Path]:
    """The same rows in every format."""
    rows = word_rows(30)
    files = {"csv": write_csv(directory / "rows.csv", rows), "jsonl": directory / "rows.jsonl"}
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["json"] = directory / "rows.json"
    files["json"].write_text(json.dumps(rows))
    files["parquet"] = directory / "rows.parquet"
    Dataset.from_list(rows).to_parquet(files["parquet"])
    files["directory"] = directory / "files"
    files["directory"].mkdir()
    write_csv(files["directory"] / "train.csv", rows)
    files["saved to disk"] = directory / "saved"
    Dataset.from_list(rows).save_to_disk(files["saved to disk"])
    return files


@pytest.mark.slow
def test_every_format_of_data_gives_the_same_run(checkpoints, test_csv, tmp_path):
    pair = checkpoints["t5-tied"]
    flags = f"--teacher {pair.teacher} --student {pair.student} --eval_dataset {test_csv} {ONE_STEP}"
    weights = {}
    for name, file in data_files(tmp_path).items():
        output_dir = tmp_path / f"out-{name.replace(' ', '-')}"
        assert run(f"rloo_kd --dataset {file} {flags} --output_dir {output_dir}") == 0
        weights[name] = (output_dir / "model.safetensors").read_bytes()
    assert len(weights) == 6
    assert len(set(weights.values())) == 1


def settings(data: DataArguments, held_out: HeldOutArguments, args: RLOOKDConfig) -> DistillationSettings:
    unread = dict.fromkeys(("teacher", "panel", "absent", "student", "adapters", "code", "run"))
    rest = {"prompts": PromptArguments(), "streaming": StreamingArguments(), **unread}
    return DistillationSettings(data=data, held_out=held_out, args=args, **rest)


def test_a_tenth_is_held_out_without_held_out_data(train_csv):
    data = DataArguments(dataset=str(train_csv), source_column="mr", target_column="ref")

    def split(seed: int) -> tuple[list[str], list[str]]:
        train, held_out = load_train_and_held_out(settings(data, HeldOutArguments(), RLOOKDConfig(seed=seed)), None)
        return train["prompt"][:], held_out["prompt"][:]

    train, held_out = split(seed=0)
    assert (len(train), len(held_out)) == (27, 3)
    assert sorted(train + held_out) == sorted(row["mr"] for row in word_rows(30))
    assert split(seed=0) == (train, held_out)
    assert split(seed=1) != (train, held_out)


@pytest.mark.parametrize(("rank", "is_said"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_says_what_becomes_of_the_data(rank, is_said, tmp_path, monkeypatch, capsys):
    rows = [{"text": f"w{i}", "source": "w3"} for i in range(20)]
    data = DataArguments(dataset=str(write_csv(tmp_path / "data.csv", rows)), source_column="text")
    templates = PromptTemplates([PromptTemplate("one", "w9 {{ tetx }}")])
    args = RLOOKDConfig(str(tmp_path))
    monkeypatch.setenv("RANK", rank)
    load_train_and_held_out(settings(data, HeldOutArguments(), args), templates)
    said = capsys.readouterr().out
    for line in ("data's own column `source` is replaced", "2 of 20 distinct inputs are held out", "read `tetx`"):
        assert (line in said) is is_said


def test_held_out_data_of_its_own_is_used_whole(train_csv, test_csv):
    data = DataArguments(dataset=str(train_csv), source_column="mr", target_column="ref")
    held_out = HeldOutArguments(eval_dataset=str(test_csv))
    train, held_out = load_train_and_held_out(settings(data, held_out, RLOOKDConfig()), None)
    assert train["prompt"][:] == [row["mr"] for row in word_rows(30)]
    assert held_out.to_list()[0] == {
        "mr": word_rows(8, seed=1)[0]["mr"],
        "prompt": word_rows(8, seed=1)[0]["mr"],
        "source": word_rows(8, seed=1)[0]["mr"],
        "references": [word_rows(8, seed=1)[0]["ref"]],
    }


def test_held_out_inputs_that_are_trained_on_are_counted(train_csv, test_csv, tmp_path, capsys):
    data = DataArguments(dataset=str(train_csv), source_column="mr", target_column="ref")
    partly = write_csv(tmp_path / "partly.csv", [*word_rows(8, seed=1), *word_rows(30)[:3]])
    for file, said in ((test_csv, ""), (partly, "3 of 11 inputs of --eval_dataset are training inputs too")):
        load_train_and_held_out(settings(data, HeldOutArguments(eval_dataset=str(file)), RLOOKDConfig()), None)
        printed = capsys.readouterr().out
        assert said in printed and ("training inputs" in printed) is bool(said)


def test_the_reference_is_in_no_column_that_a_template_could_read(train_csv):
    data = DataArguments(dataset=str(train_csv), source_column="mr", target_column="ref")
    assert "ref" not in load_prompts(data, PromptArguments(), None).column_names


# Prompts


def two_column_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`asked` is what the template "w9 {{ meaning }} w10 {{ kind_of }}" makes of `mr` and `kind`."""
    rows = []
    for i, row in enumerate(word_rows(count, seed)):
        kind = f"w{3 + i % 20}"
        rows.append({**row, "kind": kind, "asked": f"w9 {row['mr']} w10 {kind}"})
    return rows


@pytest.mark.slow(1.3)
@pytest.mark.parametrize("method", ["ppo", "rloo-token", "reinforce", "all-actions"])
def test_renamed_columns_reach_the_templates(method, checkpoints, tmp_path):
    pair = checkpoints["t5-tied"]
    train = write_csv(tmp_path / "train.csv", two_column_rows(30))
    test = write_csv(tmp_path / "test.csv", two_column_rows(8, seed=1))
    ready = write_templates(tmp_path / "ready.yaml", one="{{ asked }}")
    renaming = write_templates(tmp_path / "renaming.yaml", one="w9 {{ meaning }} w10 {{ kind_of }}")
    flags = {
        "ready": f"--templates {ready}",
        "renamed": f"--templates {renaming} --rename_columns mr=meaning kind=kind_of",
        "bare": "",
    }
    metrics = {}
    for name, prompts in flags.items():
        command = f"{METHODS[method]} --teacher {pair.teacher} --student {pair.student} --dataset {train} {ONE_STEP}"
        assert run(f"{command} --eval_dataset {test} {prompts} --output_dir {tmp_path / name}") == 0
        metrics[name] = metrics_of(tmp_path / name)
    assert metrics["renamed"] == metrics["ready"]
    assert metrics["renamed"]["before"]["reward"] != metrics["bare"]["before"]["reward"]


def test_the_students_template_makes_its_prompts(checkpoints, test_csv, tmp_path):
    student = checkpoints["t5-tied"].student
    flags = f"--student_template 'w9 {{{{ mr }}}}' --max_completion_length 6 --output_dir {tmp_path}"
    assert run(f"evaluate --student {student} --dataset {test_csv} {COLUMNS} {flags}") == 0
    prompts = [line["prompt"] for line in read_jsonl(tmp_path / "outputs.jsonl")]
    assert prompts == [f"w9 {row['mr']}" for row in word_rows(8, seed=1)]


def test_one_inline_template(checkpoints, test_csv, tmp_path):
    """As a file with the same text, whatever templates the demo or a preset would bring."""
    pair, ready = checkpoints["t5-tied"], write_templates(tmp_path / "ready.yaml", template="w9 {{ mr }} w10")
    preset = tmp_path / "preset.yaml"
    preset.write_text("templates: builtin:dialogue\ntemplate_names: [with_context]\n")
    lines = {}
    for name, flags in {
        "file": f"--templates {ready}",
        "inline": "--template 'w9 {{ mr }} w10'",
        "over a preset": f"--config {preset} --template 'w9 {{{{ mr }}}} w10'",
    }.items():
        output = tmp_path / f"{name}.jsonl"
        command = f"pseudo_label --teacher {pair.teacher} --dataset {test_csv} {COLUMNS} --max_completion_length 3"
        assert run(f"{command} {flags} --output '{output}'") == 0
        lines[name] = read_jsonl(output)
    assert lines["inline"] == lines["over a preset"] == lines["file"] and len(lines["file"]) == 8


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--template 'w9 {{ mr }}' --templates builtin:dialogue", "leave out --templates and --template_names"),
        ("--template 'w9 {{ mr }}' --template_names one", "leave out --templates and --template_names"),
        ("--template 'w9 {{ mr'", "Template 'template' is not valid jinja"),
        ("--template '{{ mr }} {{ text }}'", "asks for column 'text'"),
    ],
)
def test_inline_templates_that_do_not_fit(flags, message, checkpoints, test_csv, tmp_path, capsys):
    command = f"pseudo_label --teacher {checkpoints['t5-tied'].teacher} --dataset {test_csv} {COLUMNS}"
    assert run(f"{command} {flags} --output {tmp_path / 'p.jsonl'}") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("column", ["ref", "references"])
def test_no_template_reads_the_references(column, held_out, train_csv, test_csv):
    """Neither the student's nor a teacher's, under the data's name for them or ours, of training or held-out data."""
    data = DataArguments(dataset=str(train_csv), source_column="mr", target_column="ref")
    files = HeldOutArguments(eval_dataset=str(test_csv)) if held_out else None
    with pytest.raises(InputError, match=column):
        load_prompts(data, PromptArguments(student_template=f"{{{{ mr }}}} {{{{ {column} }}}}"), None, files)
    templates = PromptTemplates([PromptTemplate("leak", f"{{{{ mr }}}} {{{{ {column} }}}}")])
    with pytest.raises(InputError, match=column):
        load_prompts(data, PromptArguments(), templates, files)


# Rewards

OWN_REWARDS = """
def words(completions, **columns):
    return [float(len(text.split())) for text in completions]

def every_token(inputs):
    return inputs.completion_mask_BT.float()
"""


@pytest.fixture
def own_rewards(tmp_path) -> Path:
    """`words` follows TRL's protocol: a number per completion. `every_token` takes RewardInputs: one per token."""
    path = tmp_path / "rewards.py"
    path.write_text(OWN_REWARDS)
    return path


@pytest.mark.slow(0.4)
@pytest.mark.parametrize("method", REWARDED_METHODS)
def test_own_rewards_of_both_protocols(method, own_rewards, checkpoints, train_csv, test_csv, tmp_path):
    pair, output_dir = checkpoints["t5-tied"], tmp_path / "out"
    rewards = f"--reward {own_rewards}:words teacher_forcing {own_rewards}:every_token --reward_weights 1 0 0.5"
    flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} --eval_dataset {test_csv}"
    assert run(f"{METHODS[method]} {flags} {rewards} {DISTIL} --output_dir {output_dir}") == 0
    for row in metrics_of(output_dir).values():
        assert row["reward"] == pytest.approx(1.0 * row["length_words"] + 0.5 * row["tokens"], rel=1e-5)
    state = json.loads((output_dir / "checkpoint-2" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "rewards/words" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["rewards/every_token"] == pytest.approx(entry["completions/mean_length"])
        assert entry["reward"] == pytest.approx(entry["rewards/words"] + 0.5 * entry["rewards/every_token"])


@pytest.mark.slow(1.3)
@pytest.mark.parametrize("method", REWARDED_METHODS)
def test_what_the_reward_is_decides_what_is_learnt(method, own_rewards, checkpoints, train_csv, tmp_path):
    pair, weights = checkpoints["t5-tied"], set()
    for name, reward in (
        ("teacher", "teacher_forcing"),
        ("own", f"{own_rewards}:words"),
        ("both", "log_ratio length"),
    ):
        flags = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} --reward {reward}"
        assert run(f"{METHODS[method]} {flags} {ONE_STEP} --output_dir {tmp_path / name}") == 0
        weights.add((tmp_path / name / "model.safetensors").read_bytes())
    assert len(weights) == 3


def test_evaluate_takes_own_rewards_too(own_rewards, checkpoints, test_csv, tmp_path):
    pair = checkpoints["llama"]
    flags = f"--reward {own_rewards}:words --max_completion_length 6 --output_dir {tmp_path / 'out'}"
    models = f"--teacher {pair.teacher} --student {pair.student}"
    assert run(f"evaluate {models} --dataset {test_csv} {COLUMNS} {flags}") == 0
    outputs = [line["student"] for line in read_jsonl(tmp_path / "out" / "outputs.jsonl")]
    words = sum(len(text.split()) for text in outputs) / len(outputs)
    assert metrics_of(tmp_path / "out")["student"]["reward"] == pytest.approx(words)
