"""The YAML files that ship: presets of recipes, and ways to launch them."""

import dataclasses
import pkgutil
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.presets import read_preset
from rlkd_trl.commands.settings import DistillationSettings, RewardedSettings, groups_of
from rlkd_trl.errors import InputError
from rlkd_trl.planning import advice
from rlkd_trl.prompts import PromptTemplates
from tests.recipes.command_lines import (
    COLUMNS,
    RECIPES,
    ROOT,
    TWO_STEPS,
    metrics_of,
    parsed,
    run,
    word_rows,
    write_csv,
    write_templates,
)
from tests.trainers.tiny_runs import largest_difference

PRESETS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
REAL_PAIRS = [path for path in PRESETS if not path.stem.startswith("demo_")]
METHOD_PRESETS = sorted((ROOT / "recipes" / "configs" / "methods").glob("*/*.yaml"))
OF_LANGUAGE_MODELS = [path for path in METHOD_PRESETS if path.parent.name != "encoder_kd"]
METHOD_PRESETS_BY_NAME = {path.stem: path for path in METHOD_PRESETS}
LAUNCH_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
of_all = pytest.mark.parametrize("preset", [*PRESETS, *METHOD_PRESETS], ids=lambda path: path.stem)


def recipes_of(preset: Path) -> list[str]:
    """Those that it has a section for or names in its comment, or whose text names it; a method's is its folder."""
    if preset in METHOD_PRESETS:
        return [preset.parent.name]
    text = preset.read_text()
    named = {recipe for recipe in RECIPES if re.search(rf"^{recipe}:", text, re.MULTILINE)}
    named |= {*re.findall(r"recipes/(\w+)\.py", "\n".join(re.findall("^#.*$", text, re.MULTILINE)))}
    named |= {path.stem for path in (ROOT / "recipes").glob("*.py") if preset.name in path.read_text()}
    return sorted(named - {"pseudo_label", "sft"})  # named as the makers of the student


def test_there_are_presets_to_test():
    assert len(PRESETS) >= 4 and len(LAUNCH_CONFIGS) >= 3 and len(OF_LANGUAGE_MODELS) >= 18
    assert len(METHOD_PRESETS) >= 27
    assert recipes_of(ROOT / "recipes/configs/demo_ppo.yaml") == ["ppo_kd"]
    assert len(REAL_PAIRS) == 12
    for path in REAL_PAIRS:
        assert recipes_of(path) == ["kd", "ppo_kd", "reinforce_kd", "rloo_kd"], path


@of_all
def test_every_value_of_a_preset_arrives(preset):
    assert recipes_of(preset)
    for recipe in recipes_of(preset):
        settings = parsed(f"{recipe} --config {preset}")
        written = yaml.safe_load(preset.read_text())
        of_recipes = {name: written.pop(name) for name in RECIPES if name in written}
        for key, value in (written | of_recipes.get(recipe, {})).items():
            assert settings[key] == value, (recipe, key)


@pytest.mark.parametrize("recipe", ["ppo_kd", "rloo_kd", "reinforce_kd", "kd"])
@pytest.mark.parametrize(
    "preset", [path for path in PRESETS if not path.stem.startswith("demo_")], ids=lambda path: path.stem
)
def test_the_trainers_settings_accept_a_real_pairs_preset(preset, recipe):
    """Not only the sketch of them that the flags are read with: what goes together, too."""
    path, kind = {
        "ppo_kd": ("rlkd_trl.trainers.config:PPOKDConfig", RewardedSettings),
        "rloo_kd": ("rlkd_trl.trainers.config:RLOOKDConfig", RewardedSettings),
        "reinforce_kd": ("rlkd_trl.trainers.config:ReinforceKDConfig", RewardedSettings),
        "kd": ("rlkd_trl.trainers.full_vocabulary_config:KDConfig", DistillationSettings),
    }[recipe]
    groups = groups_of(kind, pkgutil.resolve_name(path))
    flags = ["--config", str(preset), "--bf16", "false"]  # which this machine need not have
    settings = dict(
        zip(groups, RecipeParser(*groups.values(), description="", recipe=recipe).parse(flags), strict=True)
    )
    assert settings["teacher"].teacher and settings["student"].student
    assert settings["args"].learning_rate == yaml.safe_load(preset.read_text())["learning_rate"]


# What a run with stand-ins has in place of a preset's own: sizes, and what this machine need not have.
SMALL = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False}
SMALL |= {"teacher_dtype": "float32", "max_prompt_length": 32, "max_completion_length": 6, "disable_tqdm": True}
SMALL |= {"save_strategy": "no"}
OF_THE_HUB = ("dataset_config", "dataset_split", "eval_dataset", "eval_split", "eval_target_column")


@pytest.mark.parametrize(
    "preset",
    [pytest.param(p, id=p.stem, marks=() if "qwen" in p.stem else pytest.mark.slow) for p in REAL_PAIRS],
)
def test_a_real_pair_runs_a_step_with_stand_ins(preset, checkpoints, tmp_path):
    """By the recipe that its comment's command names, on the tests' models, data and templates, else as it stands."""
    written = yaml.safe_load(preset.read_text())
    recipe = re.search(r"^#   accelerate launch .*?recipes/(\w+)\.py", preset.read_text(), re.M | re.S)[1]
    family = {"qwen3": "chat", "glm": "glm"}.get(preset.stem.split("_")[0], "t5-tied")
    columns = {"mr": written["source_column"], "ref": written.get("target_column")}
    rows = [{columns[name]: text for name, text in row.items() if columns[name]} for row in word_rows(40)]
    names = written.get("template_names")
    if names and not written["templates"].startswith("builtin:"):
        written["templates"] = str(
            write_templates(tmp_path / "templates.yaml", **dict.fromkeys(names, "Say: {{ source }}"))
        )
    for key in OF_THE_HUB:
        written.pop(key, None)
    written |= {"teacher": [str(checkpoints[family].teacher)], "student": str(checkpoints[family].student)}
    written |= {"dataset": str(write_csv(tmp_path / "data.csv", rows))}
    written[recipe] |= SMALL | {"output_dir": str(tmp_path / "run")}
    stand_in = tmp_path / "stand_in.yaml"
    stand_in.write_text(yaml.safe_dump(written))
    assert run(f"{recipe} --config {stand_in}") == 0
    assert metrics_of(tmp_path / "run").keys() == {"teacher", "before", "after"}


def test_presets_of_a_real_pair_give_each_recipe_its_own_directory():
    for preset in PRESETS:
        written = yaml.safe_load(preset.read_text())
        directories = [section["output_dir"] for name, section in written.items() if name in RECIPES]
        assert len(directories) == len(set(directories))


# What a demo's preset sets beside the method: sizes, and REINFORCE's cap, which no preset could take back.
OF_THE_DEMO = {"output_dir", "templates", "template_names", "max_steps", "learning_rate", "warmup_steps", "seed"}
OF_THE_DEMO |= {"per_device_train_batch_size", "per_device_eval_batch_size", "num_generations", "ratio_cap"}
OF_THE_DEMO |= {"max_completion_length", "logging_steps", "save_strategy"}


@pytest.mark.parametrize("preset", METHOD_PRESETS, ids=lambda path: path.stem)
def test_a_method_is_the_same_on_the_demo(preset):
    """Without a teacher, the demo's preset stands under the method's: what they both decide, the method must say."""
    demo = ROOT / "recipes" / "configs" / f"demo_{preset.parent.name.removesuffix('_kd')}.yaml"
    method = yaml.safe_load(preset.read_text())
    assert not yaml.safe_load(demo.read_text()).keys() - OF_THE_DEMO - method.keys()


@pytest.mark.parametrize(
    "preset",
    [pytest.param(p, id=p.stem, marks=() if p.stem == "hinton" else pytest.mark.slow) for p in OF_LANGUAGE_MODELS],
)
def test_every_method_runs_two_steps(preset, checkpoints, train_csv, tmp_path):
    pair = checkpoints["t5-tied"]
    models = f"--teacher {pair.teacher} --student {pair.student} --dataset {train_csv} {COLUMNS}"
    command = f"{preset.parent.name} --config {preset} {models} {TWO_STEPS}"
    assert run(f"{command} --max_completion_length 6 --output_dir {tmp_path}") == 0
    start, after = (load_file(directory / "model.safetensors") for directory in (pair.student, tmp_path))
    assert largest_difference(after, start) > 1e-3, "nothing was learnt"


@pytest.mark.parametrize("name", ["demo_ppo", "llmr_t0_3b_t5_base", "minillm", "tinybert"])
def test_a_misspelt_key_of_a_preset_fails(name, tmp_path):
    """One at the top, the name of each section, and one in every section: unknown are all keys that are not known."""
    (preset,) = (path for path in (*PRESETS, *METHOD_PRESETS) if path.stem == name)
    lines = preset.read_text().splitlines()
    misspelt = tmp_path / "misspelt.yaml"
    section, tried = None, set()
    for number, line in enumerate(lines):
        if not (written := re.match(r"( *)(\w+):(.*)", line)):
            continue
        indent, key, value = written.groups()
        section = section if indent else key
        place = section if indent else "the top" if value else f"the name {key}"
        if place in tried:
            continue
        tried.add(place)
        misspelt.write_text("\n".join([*lines[:number], line.replace(key, f"{key}x", 1), *lines[number + 1 :]]))
        recipe, where = (section, f", under {section}") if indent else (recipes_of(preset)[0], "")
        with pytest.raises(InputError, match=f"{misspelt}{where}: unknown key {key}x"):
            parsed(f"{recipe} --config {misspelt}")
    assert tried


@by_name
def test_the_built_in_templates_of_a_preset_exist(preset):
    settings = yaml.safe_load(preset.read_text())
    if settings.get("templates", "").startswith("builtin:"):
        names = settings.get("template_names", "all")
        templates = PromptTemplates.load(settings["templates"], names)
        assert templates.source_variable == "source"


@pytest.mark.parametrize("name", ["llmr_t0_3b_t5_base", "t0_3b_t5_base_dailydialog"])
def test_the_presets_of_llmr_ask_and_reward_as_its_published_files_do(name):
    settings = yaml.safe_load((ROOT / f"recipes/configs/{name}.yaml").read_text())
    assert [settings[recipe]["value"] for recipe in ("ppo_kd", "rloo_kd", "reinforce_kd")] == ["expected"] * 3
    (template,) = PromptTemplates.load(settings["templates"], settings["template_names"])
    assert template.render({"source": "How are you?"}) == "The dialogue response of How are you? is:"


@pytest.mark.parametrize("name", ["llmr_t0_3b_t5_base", "methods/reinforce_kd/llmr"])
def test_llmrs_own_presets_have_no_entropy_bonus(name):
    settings = read_preset(ROOT / f"recipes/configs/{name}.yaml").values_for("reinforce_kd")
    assert settings["entropy_coef"] == 0.0, "LLMR's script has none"


def test_the_template_of_one_paper_is_not_among_all():
    """Whoever asks for `builtin:dialogue` gets the questions that a person would ask."""
    assert "dialogue_response" not in PromptTemplates.load("builtin:dialogue").names


def test_minillms_preset_names_where_the_authors_code_differs():
    comment = " ".join(line.lstrip("# ") for line in (METHOD_PRESETS_BY_NAME["minillm"].read_text()).splitlines())
    for difference in (
        "gamma: 0.95",
        "reward scaling 0.5",
        "whitens",
        "own reward r_t in its return",
        "inside of the clip",
    ):
        assert difference in comment


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_launch_configs(path):
    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert {field.name for field in dataclasses.fields(config)} >= written.keys()
    for key, value in written.items():
        read = getattr(config, key)
        assert getattr(read, "value", read) == value, key
    assert (config.num_machines > 1) == (path.stem == "zero3_multi_node")
    assert (config.num_processes == 1) == (written["distributed_type"] == "NO")


def test_the_planner_names_launch_configs_that_exist():
    named = {*advice.ACCELERATE_CONFIGS.values(), advice.ONE_GPU_CONFIG, advice.SEVERAL_NODES_CONFIG}
    assert named <= {path.stem for path in LAUNCH_CONFIGS}


@pytest.mark.parametrize("path", [*PRESETS, *LAUNCH_CONFIGS], ids=lambda path: path.stem)
def test_the_command_in_a_comment_names_files_that_exist(path):
    comment = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    named = re.findall(r"(?:recipes|accelerate_configs)/[\w/]+\.(?:py|yaml)", comment)
    assert named or path.stem.startswith("demo_")
    assert all((ROOT / name).is_file() for name in named)
