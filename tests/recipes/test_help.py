"""`--help`: grouped, complete, the same flags as the README's, and fast enough to be used."""

import re
import resource
import subprocess
import sys

import pytest
from transformers import PreTrainedModel

from tests.recipes.command_lines import RECIPES, ROOT, run

DATA = "dataset dataset_split dataset_config source_column target_column max_rows"
HELD_OUT = "eval_dataset eval_split"
PROMPTS = "templates template template_names rename_columns student_template"
TEACHER = (
    "teacher teacher_dtype teacher_quantization teacher_placement teacher_offload_path teacher_max_prompt_length "
    "teacher_batch_tokens"
)
STUDENT = "student student_dtype"
PANEL = "teacher_weights template_weights teacher_weighting teacher_column template_column"
SERVER = (
    "teacher_server teacher_tokenizer teacher_server_model teacher_api_key_env teacher_server_timeout "
    "teacher_server_patience teacher_server_concurrency"
)
ABSENT = f"teacher_cache {SERVER}"
REWARD = "reward value k tau"
TRAINING = (
    "output_dir max_steps num_train_epochs seed learning_rate lr_scheduler_type warmup_steps max_grad_norm "
    "per_device_train_batch_size gradient_accumulation_steps bf16 logging_steps save_steps save_strategy report_to"
)
ROLLOUTS = (
    "num_generations max_prompt_length max_completion_length temperature mask_truncated_completions num_iterations "
    "max_generated_tokens max_cpu_seconds"
)
ON_POLICY = (
    f"{ROLLOUTS} top_k reward_weights gamma beta kl_target missing_eos_penalty baseline entropy_coef early_stop_kl"
)
NEW_STUDENT = "num_layers hidden_size num_heads intermediate_size init"
USUAL = "Training (the usual fields of transformers.TrainingArguments)"

# Recipe -> part of a group's heading -> flags that belong there.
GROUPS = {
    "sft": {
        "Data": DATA,
        "Prompts": PROMPTS,
        "Student": STUDENT,
        "New model (without --student)": "architecture d_model num_layers num_heads d_ff dropout tokenizer vocab_size",
        "Run": "resume",
        "lengths at which texts are cut": "max_prompt_length max_completion_length",
        USUAL: TRAINING,
    },
    "pseudo_label": {
        "Data": DATA,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "An expert for each example": "teacher_column template_column",
        "Pseudo-labels": "output strategy num_beams interpolate temperature max_completion_length batch_size seed",
    },
    "cache_teacher": {
        "Data": DATA,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Cache": "output k dtype distillation_temperature ensemble max_completion_length batch_size rows_per_shard",
    },
    "ppo_kd": {
        "Data": DATA,
        "Held-out data": HELD_OUT,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Several teachers or templates": PANEL,
        "A teacher that is not in this process": ABSENT,
        "Student": STUDENT,
        "Reward": REWARD,
        "Run": "resume",
        "PPO with GAE": f"{ON_POLICY} epsilon lam vf_coef critic cliprange_value critic_learning_rate",
        USUAL: TRAINING,
    },
    "rloo_kd": {
        "Data": DATA,
        "Held-out data": HELD_OUT,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Several teachers or templates": PANEL,
        "A teacher that is not in this process": ABSENT,
        "Student": STUDENT,
        "Reward": REWARD,
        "Run": "resume",
        "REINFORCE leave-one-out": f"{ON_POLICY} epsilon level",
        USUAL: TRAINING,
    },
    "reinforce_kd": {
        "Data": DATA,
        "Held-out data": HELD_OUT,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Several teachers or templates": PANEL,
        "A teacher that is not in this process": ABSENT,
        "Student": STUDENT,
        "Reward": REWARD,
        "Run": "resume",
        "REINFORCE as in LLMR": f"{ON_POLICY} behaviour_sync_steps ratio_cap return_denom reward_clip",
        USUAL: TRAINING,
    },
    "kd": {
        "Data": DATA,
        "Held-out data": HELD_OUT,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Several teachers or templates": PANEL,
        "A teacher that is not in this process": ABSENT,
        "Student": STUDENT,
        "Run": "resume",
        "Distillation by a divergence": f"{ROLLOUTS} ensemble divergence beta skew span_temperature alpha sequences "
        "lmbda",
        USUAL: TRAINING,
    },
    "all_actions_kd": {
        "Data": DATA,
        "Held-out data": HELD_OUT,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Several teachers or templates": PANEL,
        "A teacher that is not in this process": ABSENT,
        "Student": STUDENT,
        "Run": "resume",
        "policy gradient": f"{ROLLOUTS} ensemble signal value future_weight length_normalization baseline epsilon",
        USUAL: TRAINING,
    },
    "encoder_kd": {
        "Data of general stages": "dataset dataset_split dataset_config source_column pair_column max_rows",
        "Data of task stages": "task_dataset task_split task_source_column task_pair_column label_column",
        "Held-out data": "eval_dataset eval_split task_eval_dataset task_eval_split",
        "Teacher": "teacher task_teacher teacher_revision teacher_dtype",
        "Several teachers": "more_teachers teacher_weighting train_along",
        "Student: a checkpoint, or a smaller teacher": f"{NEW_STUDENT} student student_revision",
        "Run": "resume",
        "encoder distillation": "stages losses layer_map temperature relation_heads mlm_probability max_length",
        USUAL: TRAINING,
    },
    "encoder_search": {
        "Data of general stages": "dataset source_column",
        "Data of task stages": "task_dataset task_source_column label_column",
        "Held-out data": "task_eval_dataset",
        "Teacher": "teacher task_teacher",
        "Student: a checkpoint, or a smaller teacher": NEW_STUDENT,
        "Search": "smoke base stage sets candidates up_to seeds max_steps learning_rate metric common jobs output_dir",
    },
    "evaluate": {
        "Data": DATA,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Several teachers or templates": PANEL,
        "A teacher behind a server": SERVER,
        "Student": STUDENT,
        "Reward": REWARD,
        "Evaluation": "output_dir max_completion_length batch_size sample temperature seed ibleu reward_weights",
    },
    "assistant_kd": {
        "Data": DATA,
        "Held-out data": HELD_OUT,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Student": STUDENT,
        "Chain": "smoke methods num_assistants assistants dense max_steps learning_rates seed common output_dir",
    },
    "generate_data": {
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Generated data": "output schema num_rows keep_share temperature max_input_length batch_size seed",
    },
    "compare": {
        "Data": DATA,
        "Prompts": PROMPTS,
        "Teacher": TEACHER,
        "Student": STUDENT,
        "Comparison": (
            "smoke methods baseline seeds max_steps max_generated_tokens max_cpu_seconds learning_rates select_on "
            "common jobs output_dir"
        ),
        "Validation and test": (
            "validation_dataset validation_split test_dataset test_split eval_target_column num_samples num_resamples "
            "max_prompt_length max_completion_length batch_size"
        ),
    },
}
for _recipe in ("sft", "ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd", "encoder_kd"):
    GROUPS[_recipe]["Streaming"] = "streaming shuffle_buffer_size"
for _recipe in ("sft", "ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd", "encoder_kd"):
    GROUPS[_recipe]["Adapters on the student"] = (
        "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora use_dora "
        "merge_adapters"
    )
for _recipe in GROUPS:
    GROUPS[_recipe]["Code of checkpoints"] = "trust_remote_code"
WITH_HELP = (*RECIPES, "generate_data", "compare", "encoder_search", "assistant_kd")


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("--help made a model")

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)


def flags_by_group(text: str) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            current = groups.setdefault(line[:-1], set())
        elif (flag := re.match(r"  (?:-h, )?--(\w+)", line)) and groups:
            current.add(flag.group(1))
    return groups


def help_of(recipe: str, capsys, flag: str = "--help") -> str:
    assert run(f"{recipe} {flag}") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("recipe", WITH_HELP)
def test_flags_stand_in_groups_by_concern(recipe, capsys):
    found = flags_by_group(help_of(recipe, capsys))
    assert {"help", "config", "help_all", "debug"} == found.pop("options")
    for heading, flags in GROUPS[recipe].items():
        (matching,) = [group for group in found if heading in group]
        assert set(flags.split()) <= found.pop(matching)
    assert not found, "groups that this test does not know"


@pytest.mark.parametrize("recipe", WITH_HELP)
def test_it_begins_with_what_the_recipe_does_and_a_command_to_run_it(recipe, capsys):
    text = help_of(recipe, capsys)
    assert text.startswith(f"usage: {recipe}.py [flags]\n")
    assert f"recipes/{recipe}.py" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("recipe", ["sft", "ppo_kd", "rloo_kd", "reinforce_kd", "kd", "all_actions_kd", "encoder_kd"])
def test_rare_fields_of_trainingarguments_are_listed_on_request(recipe, capsys):
    assert "--adam_beta1" not in help_of(recipe, capsys)
    full = help_of(recipe, capsys, "--help_all")
    assert "--adam_beta1" in full
    assert "--num_generations" in full or recipe in ("sft", "encoder_kd")


def run_soon(*command: str) -> subprocess.CompletedProcess:
    """A Python program that has to end within two seconds of CPU time, and without an import of what takes so long."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-X", "importtime", *command]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    imports, said = [], []
    for line in finished.stderr.splitlines(keepends=True):
        (imports if line.startswith("import time:") else said).append(line)
    slow = {"torch", "transformers", "datasets", "accelerate"} & {line.split("|")[-1].strip() for line in imports}
    assert len(imports) > 100 and not slow
    finished.stderr = "".join(said)
    return finished


OF_ALL_KINDS = ("ppo_kd", "encoder_kd", "compare")  # of recipes; quick tests time these


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in OF_ALL_KINDS else pytest.mark.slow(0.4)) for name in WITH_HELP]
)
def test_help_takes_two_seconds_at_most(recipe):
    """0.2 to 0.4 s of CPU: neither torch nor transformers is imported. With them it was 4 to 7."""
    finished = run_soon(str(ROOT / "recipes" / f"{recipe}.py"), "--help")
    assert finished.returncode == 0 and finished.stdout.startswith(f"usage: {recipe}.py [flags]")
    assert finished.stderr == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ppo_kd --max_step 2", "unknown flag --max_step"),
        ("ppo_kd --max_steps two", "invalid int value: 'two'"),
        ("ppo_kd --gamma 1.5", "gamma = 1.5 is out of range"),
        ("ppo_kd --learning_rate nan", "learning_rate = nan is out of range"),
        ("ppo_kd --lr_scheduler_type lineer", "invalid choice: 'lineer'"),
        ("ppo_kd --config nowhere.yaml", "Cannot read the preset nowhere.yaml"),
        ("ppo_kd --teacher t", "--dataset and --student missing"),
        ("ppo_kd --templates nowhere.yaml", "nowhere.yaml"),
        ("rloo_kd --dataset nowhere.csv --teacher t --student s", "Dataset nowhere.csv does not exist"),
        ("kd --alpha 2", "alpha = 2.0 is out of range"),
        ("sft --d_model 0", "--d_model 0 is out of range"),
        ("sft --dataset nowhere.csv", "Dataset nowhere.csv does not exist"),
        ("encoder_kd --max_step 2", "unknown flag --max_step; did you mean"),
        ("encoder_kd --task_dataset nowhere.csv", "Dataset nowhere.csv does not exist"),
        ("encoder_kd --max_length 0", "max_length = 0 is out of range"),
        ("evaluate --student s", "--dataset is needed here"),
        ("evaluate --student s --dataset nowhere.csv", "Dataset nowhere.csv does not exist"),
        ("pseudo_label --teacher t --dataset d.csv", "--output is needed here"),
        ("compare --max_steps 3", "missing. To try this on the embedded demo: --smoke"),
        ("compare --smoke --jobs 0", "--jobs 0 is out of range"),
    ],
)
@pytest.mark.slow(0.3)
def test_an_input_error_takes_two_seconds_at_most(command, message):
    recipe, *flags = command.split()
    finished = run_soon(str(ROOT / "recipes" / f"{recipe}.py"), *flags)
    assert finished.returncode == 2
    assert message in finished.stderr and finished.stderr.count("\n") == 1
