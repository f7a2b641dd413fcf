"""Every field of transformers.TrainingArguments works as documented, or is refused by name."""

import dataclasses
import inspect
import logging
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import TrainingArguments

from rlkd_trl import AllActionsKDConfig, EncoderKDConfig, KDConfig, PPOKDConfig, ReinforceKDConfig, RLOOKDConfig
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.directions import HIGHER_IS_BETTER
from rlkd_trl.trainers import inherited_settings as tables
from rlkd_trl.trainers.supervised import SupervisedTrainer
from rlkd_trl.trainers.supervised_config import SupervisedConfig
from tests.recipes.command_lines import parsed
from tests.tiny_models import MODELS, word_tokenizer
from tests.trainers import test_encoder, tiny_runs
from tests.trainers.tiny_runs import largest_difference, prompts, snapshot

FIELDS = {option.name: option for option in dataclasses.fields(TrainingArguments)}
ON_ROLLOUTS = [PPOKDConfig, RLOOKDConfig, ReinforceKDConfig, KDConfig, AllActionsKDConfig]
REFUSED_BY = {config: tables.REFUSED | tables.REFUSED_ON_ROLLOUTS for config in ON_ROLLOUTS}
REFUSED_BY[EncoderKDConfig] = tables.REFUSED | tables.REFUSED_ON_LAYERS
REFUSED_BY[SupervisedConfig] = tables.REFUSED | tables.REFUSED_SUPERVISED

# A value other than the default, for fields that are not a yes or no.
OTHER_VALUES = {
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "optim_target_modules": ["all-linear"],
    "label_names": ["labels"],
    "length_column_name": "size",
    "parallelism_config": "tensor",
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["loss"],
    "neftune_noise_alpha": 5.0,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "include_num_input_tokens_seen": "all",
    "accelerator_config": {"split_batches": True},
    "train_sampling_strategy": "sequential",
    "debug": "underflow_overflow",
    "dataloader_num_workers": 2,
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "fsdp": "full_shard",
    "fsdp_config": {"xla": False},
    "eval_strategy": "steps",
    "eval_steps": 5.0,
    "eval_delay": 2.0,
    "per_device_eval_batch_size": 3,
    "metric_for_best_model": "bleu",
    "greater_is_better": True,
}


def other_value(name: str):
    return OTHER_VALUES[name] if name in OTHER_VALUES else FIELDS[name].default is not True


def on_the_command_line(name: str) -> str:
    value = other_value(name)
    if isinstance(value, dict):
        return f"--{name}='{str(value).replace(chr(39), chr(34)).replace('True', 'true').replace('False', 'false')}'"
    return f"--{name} {' '.join(value) if isinstance(value, list) else value}"


def refused_fields(configs, quick=lambda name: True):
    return [
        pytest.param(config, name, id=f"{config.__name__}-{name}", marks=() if quick(name) else pytest.mark.slow)
        for config in configs
        for name in REFUSED_BY[config]
        if name in FIELDS
    ]


def test_every_field_of_the_installed_transformers_is_in_one_table():
    """A new version's field fails here until somebody has tried it."""
    names = [*tables.WORKS, *tables.REFUSED, *tables.REFUSED_ON_ROLLOUTS, *tables.REFUSED_SUPERVISED]
    assert sorted(FIELDS) == sorted(names)
    # Each kind of trainer has a table of what it refuses besides, and all else works.
    assert tables.REFUSED_ON_LAYERS.keys() < tables.REFUSED_ON_ROLLOUTS.keys()


@pytest.mark.parametrize(("config", "name"), refused_fields(REFUSED_BY))
def test_what_is_not_supported_is_refused_by_name(config, name, tmp_path):
    with pytest.raises(InputError, match=rf"^{name} = .* is not supported: \w+"):
        config(output_dir=str(tmp_path), **{name: other_value(name)})


# Flags of a yes or no are parsed alike: of them the quick suite tries one.
@pytest.mark.parametrize(
    ("config", "name"),
    refused_fields([PPOKDConfig, SupervisedConfig], quick=lambda name: name in (*OTHER_VALUES, "use_liger_kernel")),
)
def test_it_is_refused_on_the_command_line_too(config, name):
    command = "sft --output_dir out" if config is SupervisedConfig else "ppo_kd --teacher t --output_dir out"
    with pytest.raises(InputError, match=name):
        parsed(f"{command} {on_the_command_line(name)}")


def test_a_zero_where_nothing_is_the_default_is_refused_too(tmp_path):
    with pytest.raises(InputError, match=r"^neftune_noise_alpha = 0 is not supported"):
        PPOKDConfig(output_dir=str(tmp_path), neftune_noise_alpha=0)


@pytest.mark.parametrize("config", REFUSED_BY)
def test_settings_that_are_filled_in_can_be_given_again(config, tmp_path):
    """`dataclasses.replace` constructs with what construction has made of the defaults."""
    args = config(output_dir=str(tmp_path), max_steps=3)
    assert dataclasses.replace(args, max_steps=4).max_steps == 4


@pytest.mark.parametrize("config", [PPOKDConfig, SupervisedConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "wandbb"}, "report_to = wandbb: choose none, all, or some of"),
        ({"report_to": ["none", "swanlab"]}, "report_to = swanlab needs a package that is not installed: pip install"),
        ({"push_to_hub": True}, "push_to_hub needs an account"),
        ({"optim": "galore_adamw"}, "optim = galore_adamw is not supported"),
        ({"optim": "schedule_free_adamw"}, "optim = schedule_free_adamw is not supported"),
        ({"optim": "lomo"}, "optim = lomo is not supported"),
        ({"optim": "adamw_torch_npu_fused"}, "optim = adamw_torch_npu_fused, optim_args = None: .*torch_npu"),
        ({"optim": "adamw_quick"}, "adamw_quick"),
        ({"optim_args": "momentum=0.9"}, "optim_args = momentum=0.9: it has no effect with this optimizer"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args = momentum: write name=value"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type = cosine_with_min_lr, lr_scheduler_kwargs"),
        ({"lr_scheduler_kwargs": {"speed": 2}}, "lr_scheduler_kwargs = {'speed': 2}: .*speed"),
        ({"tf32": True, "use_cpu": True}, "tf32"),
        ({"logging_steps": 1.5}, "logging_steps must be an integer"),
        ({"save_strategy": "best"}, "save_strategy|eval_strategy"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(config, settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "get_token", lambda: None)
    if torch.cuda.is_available() and "tf32" in settings:
        pytest.skip("needs a machine without TF32")
    with pytest.raises(InputError, match=message):
        config(output_dir=str(tmp_path), **settings)


def test_t5_in_float16_is_refused_by_supervised_training(tmp_path):
    args = SupervisedConfig(output_dir=str(tmp_path), fp16=True)
    pair = Dataset.from_list([{"prompt": "w3", "target": "w4"}])
    with pytest.raises(InputError, match="T5 models overflow in float16"):
        SupervisedTrainer(MODELS["t5-tied"](), args, pair, word_tokenizer())


@pytest.mark.parametrize("kind", ["rollouts", "supervised"])
def test_float16_on_a_cpu_is_refused(kind, tmp_path):
    """Accelerate would go on in float32 without a word."""
    with pytest.raises(InputError, match="fp16 would have no effect on a CPU"):
        if kind == "rollouts":
            tiny_runs.build("kd", tmp_path, family="llama", fp16=True, use_cpu=True)
        else:
            args = SupervisedConfig(output_dir=str(tmp_path), fp16=True, use_cpu=True)
            pair = Dataset.from_list([{"prompt": "w3", "target": "w4"}])
            SupervisedTrainer(MODELS["llama"](), args, pair, word_tokenizer())


# What works


def rollout_trainer(output_dir, **settings):
    return tiny_runs.build("rloo-token", output_dir, **{"warmup_steps": 0, **settings})


def supervised_trainer(output_dir, **settings):
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    rows = [{"prompt": f"w{i} w{i + 1}", "target": " ".join(f"w{j}" for j in range(i, 24))} for i in range(3, 19)]
    args = SupervisedConfig(output_dir=str(output_dir), **settings)
    return SupervisedTrainer(MODELS["t5-tied"](), args, Dataset.from_list(rows), word_tokenizer())


def encoder_trainer(output_dir, **settings):
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        **settings,
    }
    settings = {"learning_rate": 1e-2, **settings}
    return test_encoder.build("hidden_mse+attention_kl", output_dir, data=test_encoder.texts(16), **settings)


BUILDERS = {"rollouts": rollout_trainer, "supervised": supervised_trainer, "encoders": encoder_trainer}

# Other weights after the same two steps: (settings of one run, of the other).
CHANGES_THE_WEIGHTS = {
    "per_device_train_batch_size": ({}, {"per_device_train_batch_size": 4}),
    "gradient_accumulation_steps": ({}, {"gradient_accumulation_steps": 2}),
    "num_train_epochs": ({"max_steps": -1, "num_train_epochs": 1}, {"max_steps": -1, "num_train_epochs": 2}),
    "max_steps": ({}, {"max_steps": 3}),
    "learning_rate": ({}, {"learning_rate": 2e-2}),
    "lr_scheduler_type": ({}, {"lr_scheduler_type": "linear"}),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.0}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 9e-3}},
    ),
    "warmup_steps": (
        {"lr_scheduler_type": "constant_with_warmup"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9},
    ),
    "optim": ({}, {"optim": "adagrad"}),
    "optim_args": ({"optim": "sgd"}, {"optim": "sgd", "optim_args": "momentum=0.9"}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "adam_beta1": ({}, {"adam_beta1": 0.1}),
    "adam_beta2": ({}, {"adam_beta2": 0.1}),
    "adam_epsilon": ({}, {"adam_epsilon": 1.0}),
    "max_grad_norm": ({"optim": "sgd"}, {"optim": "sgd", "max_grad_norm": 1e-3}),
    "bf16": ({}, {"bf16": True}),
    "seed": ({}, {"seed": 7}),
    "data_seed": ({}, {"data_seed": 7}),
}


_TRAINED: dict[str, dict[str, torch.Tensor]] = {}  # weights by kind and settings, which several cases share


def trained(kind: str, settings: dict, output_dir: Path) -> dict[str, torch.Tensor]:
    """The weights that these settings lead to."""
    key = f"{kind} {sorted(settings.items())}"
    if key not in _TRAINED:
        trainer = BUILDERS[kind](output_dir, **settings)
        trainer.train()
        _TRAINED[key] = snapshot(trainer.model)
    return _TRAINED[key]


# Where the trainers on rollouts have code of their own; the rest is the base class's for both.
OWN_OF_ENCODERS = ("gradient_accumulation_steps", "num_train_epochs", "seed")
OWN_ON_ROLLOUTS = ("gradient_accumulation_steps", "num_train_epochs", "bf16", "seed", "data_seed", "learning_rate")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param("supervised", name, marks=() if name in OWN_ON_ROLLOUTS else pytest.mark.slow(0.1))
        for name in CHANGES_THE_WEIGHTS
    ]
    + [
        pytest.param("encoders", name, marks=() if name in OWN_OF_ENCODERS else pytest.mark.slow)
        for name in CHANGES_THE_WEIGHTS
    ]
    + [
        pytest.param("rollouts", name, marks=() if name in OWN_ON_ROLLOUTS else pytest.mark.slow)
        for name in CHANGES_THE_WEIGHTS
    ],
)
def test_it_changes_what_is_learnt(kind, name, tmp_path):
    one, other = CHANGES_THE_WEIGHTS[name]
    weights = trained(kind, one, tmp_path / "one"), trained(kind, other, tmp_path / "other")
    assert largest_difference(*weights) > 1e-5


def checkpoints(trainer) -> set[str]:
    return {path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")}


def steps_logged(trainer) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "loss" in entry]


def files_of(trainer) -> set[str]:
    return {path.name for path in next(Path(trainer.args.output_dir).glob("checkpoint-*")).iterdir()}


SAVING = {"save_strategy": "steps", "save_steps": 1}
# What is seen after two steps with these settings, and what it is then.
SEEN = {
    "logging_strategy": ({"logging_strategy": "no"}, steps_logged, []),
    "logging_steps": ({"logging_steps": 2}, steps_logged, [2]),
    "logging_first_step": ({"logging_steps": 5, "logging_first_step": True}, steps_logged, [1]),
    "save_strategy": ({"save_strategy": "steps", "save_steps": 5}, checkpoints, {"checkpoint-2"}),
    "save_steps": (SAVING, checkpoints, {"checkpoint-1", "checkpoint-2"}),
    "save_total_limit": ({**SAVING, "save_total_limit": 1}, checkpoints, {"checkpoint-2"}),
    "save_only_model": (
        {**SAVING, "save_only_model": True},
        lambda trainer: "optimizer.pt" in files_of(trainer),
        False,
    ),
    "use_cache": ({"use_cache": True}, lambda trainer: trainer.model.config.use_cache, True),
    "full_determinism": ({"full_determinism": True}, lambda _: torch.are_deterministic_algorithms_enabled(), True),
    "skip_memory_metrics": (
        {"skip_memory_metrics": False},
        lambda trainer: any("train_mem_cpu_alloc_delta" in entry for entry in trainer.state.log_history),
        True,
    ),
    "log_level": ({"log_level": "error"}, lambda _: transformers.logging.get_verbosity(), logging.ERROR),
    "use_cpu": ({"use_cpu": True}, lambda trainer: trainer.args.device.type, "cpu"),
    "disable_tqdm": (
        {"disable_tqdm": False},
        lambda trainer: any("Progress" in type(c).__name__ for c in trainer.callback_handler.callbacks),
        True,
    ),
    "do_train": ({"do_train": True}, steps_logged, [1, 2]),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "rollouts" else pytest.param(kind, marks=pytest.mark.slow(0.1)) for kind in BUILDERS]
)
@pytest.mark.parametrize("name", SEEN)
def test_it_is_seen_in_what_a_run_leaves(kind, name, tmp_path):
    settings, look, expected = SEEN[name]
    verbosity = transformers.logging.get_verbosity()
    try:
        trainer = BUILDERS[kind](tmp_path, **settings)
        trainer.train()
        assert look(trainer) == expected
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_named_checkpoint_is_where_training_goes_on(kind, tmp_path):
    """By the field, as by the argument of `train`."""
    first = BUILDERS[kind](tmp_path / "first", **SAVING)
    first.train()
    second = BUILDERS[kind](tmp_path / "second", resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert second.state.global_step == 0
    second.train()
    assert second.state.log_history[0] == first.state.log_history[0], "the first step's log comes from the checkpoint"
    torch.testing.assert_close(snapshot(second.model), snapshot(first.model))


# Read by parts of transformers that nothing here overrides: there, and not here, they take effect.
BY_TRANSFORMERS = {
    "output_dir", "fp16", "tf32", "torch_empty_cache_steps", "ignore_data_skip",
    "restore_callback_states_from_checkpoint", "logging_nan_inf_filter", "log_on_each_node", "log_level_replica",
    "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "save_on_each_node",
    "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout",
    "deepspeed", "dataloader_pin_memory",
}  # fmt: skip
ELSEWHERE = {  # the test that shows it
    "report_to": "tests/trainers/test_curves.py",
    "resume_from_checkpoint": "test_a_named_checkpoint_is_where_training_goes_on",
    "remove_unused_columns": "test_settings_that_are_ignored_are_refused",
    "push_to_hub": "test_what_would_fail_later_is_refused_at_once",
    "ddp_backend": "tests/distributed",
    "gradient_checkpointing": "tests/trainers/test_gradient_checkpointing.py",
    "activation_checkpointing": "tests/trainers/test_gradient_checkpointing.py",
    "local_rank": "read by nothing, as in transformers",
}


def test_every_field_that_is_said_to_work_is_tested():
    tested = [*CHANGES_THE_WEIGHTS, *SEEN, *BY_TRANSFORMERS, *ELSEWHERE]
    assert sorted(tested) == sorted(tables.WORKS)


@pytest.mark.parametrize("name", sorted(BY_TRANSFORMERS))
def test_transformers_itself_reads_it(name):
    from transformers import trainer, trainer_callback, training_args
    from transformers.integrations import integration_utils

    modules = (trainer, training_args, trainer_callback, integration_utils)
    assert any(f"args.{name}" in inspect.getsource(m) or f"self.{name}" in inspect.getsource(m) for m in modules)


WORKS_SUPERVISED = {
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "debug": {"debug": "underflow_overflow"},
    "activation_checkpointing": {"activation_checkpointing": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "accelerator_config": {"accelerator_config": {"split_batches": True}},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "dataloader_in_order": {"dataloader_in_order": False},
}


SLOW = ("torch_compile",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in WORKS_SUPERVISED]
)
def test_supervised_training_takes_it(name, tmp_path):
    trainer = supervised_trainer(tmp_path, optim="sgd", **WORKS_SUPERVISED[name])
    trainer.train()
    assert steps_logged(trainer) == [1, 2]
    plain = trained("supervised", {"optim": "sgd"}, tmp_path / "plain")
    differs = largest_difference(snapshot(trainer.model), plain) > 1e-5
    assert differs == (name == "train_sampling_strategy")
    if name == "include_num_input_tokens_seen":
        assert trainer.state.num_input_tokens_seen == 2 * 2 * 3  # steps × pairs × (two words and EOS)


@pytest.mark.slow(0.8)
@pytest.mark.parametrize("name", sorted(tables.REFUSED_ON_ROLLOUTS.keys() - tables.REFUSED_ON_LAYERS.keys()))
def test_encoder_distillation_takes_it(name, tmp_path):
    settings = {
        "dataloader_num_workers": {"dataloader_num_workers": 1},
        "dataloader_persistent_workers": {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
        "dataloader_prefetch_factor": {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
        "dataloader_multiprocessing_context": {
            "dataloader_multiprocessing_context": "fork",
            "dataloader_num_workers": 1,
        },
    }
    trainer = encoder_trainer(tmp_path, **settings.get(name) or WORKS_SUPERVISED[name])
    trainer.train()
    assert steps_logged(trainer) == [1, 2]
    plain = trained("encoders", {}, tmp_path / "plain")
    differs = largest_difference(snapshot(trainer.model), plain) > 1e-5
    assert differs == (name == "train_sampling_strategy")


# The best checkpoint


MORE_IS_BETTER = (
    "bleu rouge1 rouge2 rougeL ibleu distinct1 distinct2 distinct_outputs eos_rate reward "
    "accuracy f1 pearson spearman agreement similarity_spearman hidden_cosine"
).split()
LESS_IS_BETTER = (
    "self_bleu teacher_nll_per_token teacher_nll_per_sequence student_nll_of_teacher_per_token "
    "nll_of_teacher_samples_per_token"
).split()


@pytest.mark.parametrize("metric", HIGHER_IS_BETTER)
def test_the_metric_says_which_way_is_better(metric, tmp_path):
    settings = {"output_dir": str(tmp_path), "eval_strategy": "steps", "load_best_model_at_end": True}
    for name in (metric, f"eval_{metric}"):
        settings |= {"metric_for_best_model": name, "eval_steps": 5, "save_steps": 5}
        if metric not in MORE_IS_BETTER + LESS_IS_BETTER:  # lengths
            assert PPOKDConfig(**settings, greater_is_better=True).greater_is_better
            assert not PPOKDConfig(**settings, greater_is_better=False).greater_is_better
            continue
        is_greater = metric in MORE_IS_BETTER
        assert PPOKDConfig(**settings).greater_is_better is is_greater
        assert PPOKDConfig(**settings, greater_is_better=is_greater).greater_is_better is is_greater
        with pytest.raises(InputError, match=f"greater_is_better = {not is_greater} would keep the worst checkpoint"):
            PPOKDConfig(**settings, greater_is_better=not is_greater)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "blue"}, "Unknown metric 'blue'; evaluation measures: bleu"),
        ({"metric_for_best_model": "loss"}, "Unknown metric 'loss'"),
        ({"metric_for_best_model": "tokens"}, "'tokens' is neither better when it is higher"),
        ({"eval_strategy": "no", "save_strategy": "best"}, "set eval_strategy to steps or epoch"),
    ],
)
def test_metrics_by_which_no_checkpoint_can_be_best(settings, message, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, **settings}
    with pytest.raises(InputError, match=message):
        PPOKDConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("settings", [{"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_the_reward_is_the_default(settings, tmp_path):
    args = RLOOKDConfig(
        output_dir=str(tmp_path), eval_strategy="steps", eval_steps=5, save_steps=5, warmup_steps=0, **settings
    )
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)


@pytest.mark.slow(0.7)
@pytest.mark.parametrize("metric", [None, "teacher_nll_per_token"])
def test_the_best_checkpoint_is_kept_and_the_worst_is_not(metric, tmp_path):
    """`save_strategy best` saves when the metric is better than ever before."""
    trainer = tiny_runs.build(
        "ppo", tmp_path, max_steps=6, learning_rate=0.1, save_strategy="best", metric_for_best_model=metric,
        eval_strategy="steps", eval_steps=1, eval_data=prompts(10, seed=3), load_best_model_at_end=True,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    values = [entry[f"eval_{metric or 'reward'}"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(values) == 6 and len(set(values)) > 2
    best, seen = None, set()
    for step, value in enumerate(values, start=1):
        if best is None or (value > best if metric is None else value < best):
            best = value
            seen.add(f"checkpoint-{step}")
            last = f"checkpoint-{step}"
    assert checkpoints(trainer) >= seen
    assert trainer.state.best_model_checkpoint == str(tmp_path / last)


@pytest.mark.parametrize(
    ("metric", "rows", "message"),
    [
        ("bleu", prompts(4), "compares with references, which not every held-out row has"),
        ("ibleu", prompts(4), "is not measured during training"),
        ("eval_dev_reward", prompts(4), "is not among the metrics here: choose eval_reward"),
        ("reward", {"dev": prompts(4), "test": prompts(4)}, "choose eval_dev_reward, eval_test_reward"),
    ],
)
def test_a_metric_that_will_not_be_measured(metric, rows, message, tmp_path):
    with pytest.raises(InputError, match=message):
        tiny_runs.build("ppo", tmp_path, eval_data=rows, eval_strategy="steps", metric_for_best_model=metric)


def test_one_of_several_evaluation_sets(tmp_path):
    sets = {"dev": prompts(4), "test": prompts(4, seed=1)}
    trainer = tiny_runs.build(
        "rloo-token",
        tmp_path,
        eval_data=sets,
        eval_strategy="steps",
        metric_for_best_model="eval_test_teacher_nll_per_token",
    )
    trainer.train()
    values = [e["eval_test_teacher_nll_per_token"] for e in trainer.state.log_history if "eval_test_reward" in e]
    assert trainer.state.best_metric == min(values)
