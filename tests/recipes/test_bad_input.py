"""What a user gets wrong: one line that says so, exit code 2, before a model is loaded and anything is written."""

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.conftest import word_tokenizer
from tests.recipes.command_lines import COLUMNS, RECIPES, ROOT, SAMPLING, TWO_STEPS, main_of, run, word_rows, write_csv
from tests.recipes.command_lines import write_templates as templates

PRESETS = ROOT / "recipes" / "configs" / "methods"
# Commands with nothing wrong in them; a case below adds to one of them, and the last flag of a name counts.
DATA = f"--dataset data.csv {COLUMNS}"
GOOD = {
    "sft": f"--student student {DATA} {TWO_STEPS} --output_dir out",
    "sft (new model)": f"{DATA} {TWO_STEPS} --output_dir out",
    "pseudo_label": f"--teacher teacher {DATA} --output out",
    "ppo_kd": f"--teacher teacher --student student {DATA} {TWO_STEPS} {SAMPLING} --output_dir out",
    "rloo_kd": f"--teacher teacher --student student {DATA} {TWO_STEPS} {SAMPLING} --output_dir out",
    "reinforce_kd": f"--teacher teacher --student student {DATA} {TWO_STEPS} {SAMPLING} --output_dir out",
    "kd": f"--teacher teacher --student student {DATA} {TWO_STEPS} {SAMPLING} --output_dir out",
    "all_actions_kd": f"--teacher teacher --student student {DATA} {TWO_STEPS} {SAMPLING} --output_dir out",
    "evaluate": f"--teacher teacher --student student {DATA} --output_dir out",
}
ALL = tuple(GOOD)
ON_POLICY = ("ppo_kd", "rloo_kd", "reinforce_kd")
REWARDED = (*ON_POLICY, "evaluate")
DISTILLED = (*ON_POLICY, "kd", "all_actions_kd")
COMPARED = (*DISTILLED, "evaluate")  # the recipes with a teacher and a student
ASKED = ("pseudo_label", *COMPARED)
TRAINED = ("sft", *DISTILLED)
UNLABELLED = f"--teacher teacher --student student --dataset data.csv --source_column mr {TWO_STEPS} --output_dir out"

# (recipes, what is wrong, a part of the message)
DATA_CASES = [
    (
        ("sft", "sft (new model)"),
        "--dataset empty_targets.jsonl",
        "All 2 targets are empty: there is nothing to learn",
    ),
    (ALL, "--source_column text", "`--source_column text` is not in the data; its columns are: mr, ref."),
    (ALL, "--target_column text", "`--target_column text` is not in the data; its columns are: mr, ref."),
    (ALL, "--dataset empty.csv", "empty.csv is empty"),
    (ALL, "--dataset header.csv", "header.csv has no rows"),
    (ALL, "--dataset nowhere.csv", "nowhere.csv does not exist"),
    (ALL, "--dataset data.txt", "extension that is not known; use one of: .csv"),
    (ALL, "--dataset ragged.csv", "more fields than its header"),
    (ALL, "--dataset broken.jsonl", "broken.jsonl could not be read"),
    (ALL, "--dataset_split test", "Split 'test' is not in data.csv"),
    (ALL, "--dataset no_source.csv", "Row 3: column `mr` is empty"),
    (ALL, "--dataset no_target.csv", "Row 3: column `ref` is empty"),
    (ALL, "--dataset numbers.csv", "column `ref` holds 0 (int), not text"),
    (ALL, "--max_rows 0", "max_rows"),
    (DISTILLED, "--eval_dataset nowhere.csv", "nowhere.csv does not exist"),
    (DISTILLED, "--max_rows 5", "5 distinct inputs are too few to hold some out: give --eval_dataset."),
    (DISTILLED, "--per_device_train_batch_size 80", "A rollout takes 40 prompts"),
    (DISTILLED, "--eval_target_column ref", "--eval_target_column names a column of --eval_dataset: give that too"),
]
PROMPT_CASES = [
    (ALL, "--templates nowhere.yaml", "no prompt template file nowhere.yaml"),
    (ALL, "--templates builtin:poetry", "no built-in templates for 'poetry'; tasks: data_to_text"),
    (ALL, "--templates good.yaml --template_names best", "has no template 'best'; it has: one"),
    (ALL, "--templates not_jinja.yaml", "is not valid jinja, line 1"),
    (ALL, "--templates fails.yaml", "fails on a row: ZeroDivisionError"),
    (ALL, "--templates two_columns.yaml", "asks for column 'kind'; the row has:"),
    (ALL, "--templates shows_reference.yaml", "asks for column 'ref'"),
    (ALL, "--templates blank.yaml", "renders an empty prompt"),
    (ALL, "--templates evil.yaml", "does what the sandbox forbids"),
    (ALL, "--templates good.yaml --rename_columns mr", "'mr' is not of the form old=new"),
    (ALL, "--templates good.yaml --rename_columns kind=mr", "the row has no column 'kind'"),
    (ALL, "--templates good.yaml --rename_columns mr=kind", "have no variable 'kind'; theirs are: mr"),
    (ALL, "--template_names one", "need --templates"),
    (ALL, "--student_template '{{ kind }}'", "asks for column 'kind'"),
]
MODEL_CASES = [
    (("sft", *COMPARED), "--student without_eos", "The tokenizer of 'without_eos' has no EOS token"),
    (ASKED, "--teacher without_eos", "The tokenizer of 'without_eos' has no EOS token"),
    (("sft (new model)",), "--tokenizer without_eos", "The tokenizer of 'without_eos' has no EOS token"),
    (ASKED, "--teacher ./nowhere", "nowhere` is not a directory"),
    (ASKED, "--teacher files", "is a directory without config.json"),
    (ASKED, "--teacher without_tokenizer", "holds no tokenizer"),
    (COMPARED, "--teacher teacher ./nowhere", "nowhere` is not a directory"),
    (COMPARED, "--student ./nowhere", "nowhere` is not a directory"),
    (COMPARED, "--teacher other_tokenizer", "Teacher and student have different tokenizers (30 and 29 tokens"),
    (COMPARED, "--teacher other_eos", "EOS is 5 for the teacher, 1 for the student"),
    (ASKED, "--teacher_dtype float8", "Unknown dtype 'float8'; choose one of: auto, float32"),
    (ASKED, "--teacher_quantization int4", "Unknown quantisation 'int4'; choose one of: none, int8, nf4"),
    (ASKED, "--teacher_placement zero4", "Unknown teacher placement 'zero4'; choose one of: replicated, zero3"),
    (ASKED, "--teacher_placement zero3 --teacher_quantization int8", "quantised to int8 cannot be sharded (zero3)"),
    (ASKED, "--teacher_placement offload --teacher_dtype auto", "sharded teacher's dtype has to be named"),
    (ASKED, "--teacher_placement zero3 --teacher_offload_path .", "needs the placement 'offload'; it is 'zero3'"),
    (ASKED, "--teacher_placement offload --teacher_offload_path x", "path x is not a directory: make one"),
    (("sft", *COMPARED), "--student_dtype float8", "Unknown dtype 'float8'; choose one of: auto, float32"),
    (("sft",), "--student ./nowhere", "nowhere` is not a directory"),
    (("sft (new model)",), "--architecture gpt", "Unknown architecture 'gpt'; choose one of: t5, llama"),
    (("sft (new model)",), "--d_model 30 --num_heads 4", "d_model 30 is not divisible by num_heads 4"),
    (("sft (new model)",), "--vocab_size 50", "vocab_size 50"),
    (("sft (new model)",), "--tokenizer ./nowhere", "nowhere` is not a directory"),
    (TRAINED, "--resume_from_checkpoint files", "--resume_from_checkpoint files is no checkpoint of a run"),
    (TRAINED, "--resume --resume_from_checkpoint files", "are two checkpoints: give one of them"),
    (TRAINED, "--resume", "no checkpoint in out; save some with --save_steps"),
]
REWARD_CASES = [
    (REWARDED, "--reward kindness", "Unknown reward 'kindness'; choose one of: teacher_forcing"),
    (REWARDED, "--reward nowhere.py:f", "there is no file nowhere.py"),
    (REWARDED, "--reward rewards.py", "Unknown reward 'rewards.py'"),
    (REWARDED, "--reward rewards.py:g", "rewards.py defines no function 'g'; it has: f"),
    (REWARDED, "--reward fails.py:f", "fails.py failed: ValueError: first line"),
    (REWARDED, "--reward_weights 1 2", "2 --reward_weights for 1 rewards: give one each"),
    (REWARDED, "--reward length repetition --reward_weights 1", "1 --reward_weights for 2 rewards"),
    (REWARDED, "--value mean", "--value mean: choose one of max, expected, soft"),
    (REWARDED, "--k 0", "--k 0 is out of range"),
    (REWARDED, "--value soft --tau 0", "--tau 0.0 is out of range"),
    (REWARDED, "--gamma 1.5", "gamma"),
]
SETTING_CASES = [
    (("rloo_kd",), "--num_generations 1", "num_generations = 1"),
    (("rloo_kd",), "--level word", "level = 'word': choose 'sequence' or 'token'"),
    (("ppo_kd",), "--critic none", "critic = 'none': choose 'shared' or 'separate'"),
    (("ppo_kd",), "--lam 1.1", "lam = 1.1 is out of range"),
    (("ppo_kd",), "--k 2", "k = 2 gives K-step returns, which PPO can only use whole: set lam to 1 (it is 0.95)"),
    (("ppo_kd",), "--baseline mean", "baseline = 'mean' has no effect with normalize_advantages"),
    (("rloo_kd",), "--baseline mean", "baseline = 'mean' is not for level 'sequence'"),
    (DISTILLED, "--num_generations 3", "8 completions per device"),
    (("ppo_kd", "rloo_kd", "kd", "all_actions_kd"), "--top_k 5", "top_k=5"),
    (("reinforce_kd",), "--top_k 1", "top_k = 1: 0 samples from all tokens"),
    (("reinforce_kd",), "--top_k -3", "top_k = -3"),
    (("reinforce_kd",), "--top_k 5 --beta 0.1", "beta = 0.1 goes with neither top_k nor behaviour_sync_steps"),
    (("reinforce_kd",), "--behaviour_sync_steps 5 --beta 0.1", "beta = 0.1 goes with neither"),
    (("reinforce_kd",), "--top_k 5 --reward log_ratio", "log_ratio goes with neither top_k nor"),
    (("reinforce_kd",), "--behaviour_sync_steps 5 --reward length log_ratio", "log_ratio goes with neither"),
    (("reinforce_kd",), "--behaviour_sync_steps 5 --num_iterations 2", "not a multiple of the 2 optimizer steps"),
    (("reinforce_kd",), "--behaviour_sync_steps -1", "behaviour_sync_steps = -1 is out of range"),
    (ON_POLICY, "--baseline median", "baseline = 'median': choose 'none', 'mean' or 'min_variance'"),
    (("reinforce_kd",), "--return_denom 0", "return_denom = 0.0 is out of range"),
    (("reinforce_kd",), "--reward_clip 0", "reward_clip = 0.0 is out of range"),
    (("reinforce_kd",), "--ratio_cap 0.5", "ratio_cap = 0.5 is out of range"),
    (("reinforce_kd",), "--normalize_advantages True --return_denom 9", "normalize_advantages undoes return_denom"),
    (("reinforce_kd",), "--epsilon 0.1", "unknown flag --epsilon"),
    (("kd",), "--divergence hellinger", "divergence = 'hellinger': choose one of forward_kl, reverse_kl"),
    (("kd",), "--divergence jsd --beta 1.5", "beta = 1.5 is out of range"),
    (
        ("kd",),
        "--divergence reverse_kl --beta 0.5",
        "beta = 0.5 is a setting of divergence 'jsd', not of 'reverse_kl'",
    ),
    (("kd",), "--divergence jsd --skew 0.1", "skew = 0.1 is a setting of the skewed KLs, not of 'jsd'"),
    (("kd",), "--alpha 0.5 --lmbda 0.5", "lmbda = 0.5 with alpha = 0.5: the student's own samples"),
    (("kd",), f"--config {PRESETS}/kd/seq_kd.yaml --lmbda 0.5", "lmbda = 0.5 with alpha = 0.0"),
    (("kd",), "--sequences student", "sequences = 'student': choose one of data, teacher"),
    (("kd", "all_actions_kd"), "--ensemble median", "ensemble = 'median': choose one of probabilities, logits"),
    (("kd", "all_actions_kd"), "--reward length", "unknown flag --reward"),
    (("all_actions_kd",), "--signal kindness", "signal = 'kindness': choose one of log_ratio, teacher_forcing"),
    (("all_actions_kd",), "--value mean", "value = 'mean': choose one of max, expected, soft"),
    (("all_actions_kd",), "--num_generations 1", "num_generations = 1: leave-one-out compares"),
    (("all_actions_kd",), "--future_weight -1", "future_weight = -1.0 is out of range"),
    (DISTILLED, "--top_p 0.9", "top_p=0.9"),
    (ON_POLICY, "--kl_target 3", "kl_target"),
    (DISTILLED, "--temperature 0", "temperature = 0.0 is out of range"),
    (TRAINED, "--learning_rate nan", "learning_rate = nan is out of range: 0 or more, up to 10"),
    (TRAINED, "--learning_rate 1e30", "learning_rate = 1e+30 is out of range: 0 or more, up to 10"),
    (TRAINED, "--weight_decay inf", "weight_decay = inf is out of range: 0 or more, up to 100"),
    (TRAINED, "--adam_epsilon 0", "adam_epsilon = 0.0 is out of range: 1e-20 or more, up to 1"),
    (TRAINED, "--max_grad_norm nan", "max_grad_norm = nan is out of range"),
    (TRAINED, "--num_train_epochs nan", "num_train_epochs = nan is out of range: above 0"),
    (TRAINED, "--per_device_eval_batch_size 0", "per_device_eval_batch_size = 0 is out of range: 1 or more"),
    (TRAINED, "--seed -1", "seed = -1 is out of range: 0 or more, up to 4294967295"),
    (REWARDED, "--tau inf", "--tau inf is out of range"),
    (ON_POLICY, "--reward_weights nan", "reward_weights = [nan] is out of range"),
    (ON_POLICY, "--kl_target nan --beta 0.1", "kl_target = nan is out of range"),
    (DISTILLED, "--remove_unused_columns True", "remove_unused_columns must stay False"),
    (TRAINED, "--fp16 True --bf16 True", "bf16"),
    (TRAINED, "--report_to swanlab", "report_to = swanlab needs a package that is not installed"),
    (TRAINED, "--neftune_noise_alpha 5", "neftune_noise_alpha = 5.0 is not supported"),
    (TRAINED, "--optim adamw_torch_npu_fused", "torch_npu"),
    (DISTILLED, "--eval_strategy steps --metric_for_best_model bleau", "Unknown metric 'bleau'"),
    (DISTILLED, "--load_best_model_at_end True --eval_strategy steps --save_strategy no", "load_best_model_at_end"),
    (("sft",), "--load_best_model_at_end True", "load_best_model_at_end = True is not supported: supervised training"),
    (("evaluate",), "--sample --temperature 0", "temperature"),
    (("pseudo_label",), "--strategy best", "Unknown strategy 'best'; choose one of: greedy, sample, beam"),
    (("pseudo_label",), "--interpolate", "it needs --strategy beam and --target_column with the references"),
    (("pseudo_label",), "--interpolate --strategy sample", "it needs --strategy beam and --target_column"),
    (("pseudo_label", "evaluate"), "--batch_size 0", "batch_size"),
    (("pseudo_label", "evaluate", *TRAINED), "--max_completion_length 0", "max_completion_length"),
]
PARSER_CASES = [
    (ALL, "--sorce_column mr", "unknown flag --sorce_column; did you mean --source_column"),
    (ALL, "--sorce_column=mr", "unknown flag --sorce_column; did you mean --source_column"),
    (ALL, "--source_colum mr", "source_colum"),
    (ALL, "--max_rows many", "invalid int value: 'many'"),
    (ALL, "--config", "--config needs the path of a YAML file"),
    (ALL, "--config nowhere.yaml", "Cannot read the preset nowhere.yaml"),
    (ALL, "--config misspelt_key.yaml", "misspelt_key.yaml: unknown key sorce_column; did you mean source_column"),
    (ALL, "--config=misspelt_key.yaml", "misspelt_key.yaml: unknown key sorce_column; did you mean source_column"),
    (ALL, "--conf misspelt_key.yaml", "conf"),
    (ALL, "--config not_yaml.yaml", "Cannot read the preset not_yaml.yaml"),
    (ALL, "--config list.yaml", "list.yaml is not a YAML mapping"),
    (ALL, "--config word_for_number.yaml", "max_rows has the value 'many'"),
    (ALL, "--config list_for_number.yaml", "max_rows has the value [1, 2]"),
    (ALL, "--config yes_for_number.yaml", "max_rows has the value True"),
    (REWARDED, "--config null_for_list.yaml", "reward"),
    (TRAINED, "--save_strategy sometimes", "invalid choice: 'sometimes'"),
    (TRAINED, "--config unknown_choice.yaml", "sometimes"),
]


def cases(table: list[tuple]) -> list:
    return [
        pytest.param(recipe, flags, message, id=f"{recipe} {flags}")
        for recipes, flags, message in table
        for recipe in recipes
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoints) -> Path:
    """The directory in which the commands run."""
    here = tmp_path_factory.mktemp("bad input")
    for role in ("teacher", "student"):
        shutil.copytree(getattr(checkpoints["t5-tied"], role), here / role)

    shutil.copytree(here / "teacher", here / "other_tokenizer")
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained(here / "other_tokenizer")
    shutil.copytree(here / "teacher", here / "other_eos")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "w5"
    tokenizer.save_pretrained(here / "other_eos")
    shutil.copytree(here / "teacher", here / "without_eos")
    tokenizer = word_tokenizer(append_eos=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(here / "without_eos")
    shutil.copytree(here / "teacher", here / "without_tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    (here / "files").mkdir()

    rows = word_rows(30)
    write_csv(here / "data.csv", rows)
    write_csv(here / "no_source.csv", [*rows[:2], {"mr": "", "ref": "w3"}, *rows[2:]])
    write_csv(here / "no_target.csv", [*rows[:2], {"mr": "w3", "ref": ""}, *rows[2:]])
    write_csv(here / "numbers.csv", [{"mr": row["mr"], "ref": str(i)} for i, row in enumerate(rows)])
    templates(here / "good.yaml", one="w9 {{ mr }}")
    templates(here / "not_jinja.yaml", one="w9 {{ mr")
    templates(here / "fails.yaml", one="{{ 1 / 0 }} {{ mr }}")
    templates(here / "two_columns.yaml", one="{{ mr }} {{ kind }}")
    templates(here / "shows_reference.yaml", one="{{ mr }} {{ ref }}")
    templates(here / "blank.yaml", one="{% if mr == 'w3' %}{{ mr }}{% endif %}")
    templates(here / "evil.yaml", one="{{ mr.__class__ }}")
    texts = {
        "empty.csv": "",
        "header.csv": "mr,ref\n",
        "data.txt": "w3\n",
        "ragged.csv": "mr,ref\n" + "w3 w4,w5,w6\n" * 30,
        "empty_targets.jsonl": '{"mr": "w3", "ref": ""}\n{"mr": "w4", "ref": ""}\n',
        "broken.jsonl": '{"mr": "w3", "ref"\n',
        "rewards.py": "def f(completions):\n    return [0.0 for _ in completions]\n",
        "fails.py": 'raise ValueError("first line\\nsecond line")\n',
        "misspelt_key.yaml": "sorce_column: mr\n",
        "not_yaml.yaml": "a: [\n",
        "list.yaml": "- max_rows\n",
        "word_for_number.yaml": "max_rows: many\n",
        "list_for_number.yaml": "max_rows: [1, 2]\n",
        "yes_for_number.yaml": "max_rows: yes\n",
        "null_for_list.yaml": "reward: null\n",
        "unknown_choice.yaml": "save_strategy: sometimes\n",
    }
    for name, text in texts.items():
        (here / name).write_text(text)
    return here


class ModelMade(BaseException):
    """No recipe catches it."""


@pytest.fixture
def workplace(files, monkeypatch) -> Path:
    """The current directory, where making a model, by loading or from scratch, ends the test."""

    def refuse(*args, **kwargs):
        raise ModelMade

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
    monkeypatch.chdir(files)
    return files


@pytest.mark.parametrize("recipe", ALL)
def test_the_commands_are_good_without_what_is_wrong(recipe, workplace):
    """They come as far as the first model, so that a case below fails for its own reason."""
    with pytest.raises(ModelMade):
        run(f"{recipe.split()[0]} {GOOD[recipe]}")


def check_refusal(command: str, message: str, workplace: Path, capsys) -> None:
    before = sorted(workplace.rglob("*"))
    code = run(command)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.endswith("\n") and err.count("\n") == 1, "one line"
    assert message in err
    assert sorted(workplace.rglob("*")) == before, "nothing is written"


TABLE = DATA_CASES + PROMPT_CASES + MODEL_CASES + REWARD_CASES + SETTING_CASES + PARSER_CASES


@pytest.mark.parametrize("recipe, flags, message", cases(TABLE))
def test_one_line_and_exit_code_2(recipe, flags, message, workplace, capsys):
    check_refusal(f"{recipe.split()[0]} {GOOD[recipe]} {flags}", message, workplace, capsys)


@pytest.mark.parametrize(
    "command, message",
    [
        (f"sft --dataset data.csv --source_column mr {TWO_STEPS} --output_dir out", "--target_column is needed"),
        (f"pseudo_label {DATA} --output out", "--teacher is needed"),
        ("pseudo_label --teacher teacher --output out", "--dataset is needed"),
        (f"pseudo_label --teacher teacher {DATA}", "--output is needed"),
        (
            "pseudo_label --teacher teacher --dataset data.csv --source_column mr --output out "
            "--strategy beam --interpolate",
            "--interpolate takes the teacher's beam that is nearest to the references: it needs --strategy beam and",
        ),
        (f"evaluate {DATA}", "--student is needed"),
        ("evaluate --student student", "--dataset is needed"),
        (f"ppo_kd {DATA} {TWO_STEPS} {SAMPLING}", "--teacher and --student missing"),
        (f"ppo_kd {DATA} --student student {TWO_STEPS} {SAMPLING}", "--teacher missing"),
        (f"rloo_kd {DATA} --teacher teacher {TWO_STEPS} {SAMPLING}", "--student missing"),
        (f"rloo_kd --teacher teacher --student student {TWO_STEPS} {SAMPLING}", "--dataset missing"),
        (f"all_actions_kd {DATA} --student student {TWO_STEPS} {SAMPLING}", "--teacher missing"),
        (f"kd {UNLABELLED}", "Distillation on data needs targets, but row 1 has none: name their column"),
        (f"kd {UNLABELLED} --config {PRESETS}/kd/gkd.yaml", "but row 1 has none: name their column"),
    ],
)
def test_something_is_missing(command, message, workplace, capsys):
    check_refusal(command, message, workplace, capsys)


@pytest.mark.parametrize("recipe", DISTILLED)
def test_launched_with_fsdp(recipe, workplace, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_refusal(f"{recipe} {GOOD[recipe]}", "The student cannot be sharded by FSDP", workplace, capsys)


@pytest.mark.parametrize("settings", ["--lmbda 1", "--sequences teacher"])
def test_without_data_sequences_no_targets_are_needed(settings, workplace):
    with pytest.raises(ModelMade):
        run(f"kd {UNLABELLED} {settings}")


def test_every_recipe_is_in_the_table():
    assert {name.split()[0] for name in ALL} == set(RECIPES)
    assert all(callable(main_of(recipe)) for recipe in RECIPES)
