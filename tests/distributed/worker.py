"""Trains every case on the processes it was started with, and writes what it saw: `main(OUTPUT_DIR)`."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback

from rlkd_trl import TeacherForcingReward
from rlkd_trl.errors import InputError, TrainingError
from rlkd_trl.teachers import Teacher, TeacherPanel
from rlkd_trl.teachers.routing import Routing
from rlkd_trl.trainers.processes import from_first_process
from tests.models.tokenizers_of_all_kinds import character_tokenizer
from tests.tiny_models import MODELS, PAD, word_tokenizer
from tests.trainers.tiny_runs import METHODS, Recorder, build, pairs, teacher_reward

# Weights of AdamW's first steps move by the learning rate whatever the gradient's size, so an almost-zero gradient
# would show rounding: plain SGD with momentum.
COMMON = {
    "max_completion_length": 8,
    "max_steps": 3,
    "max_grad_norm": 0.5,
    "optim": "sgd",
    "learning_rate": 0.1,
}
REWARDED = {"normalize_advantages": True, "entropy_coef": 0.05}
KL_TARGET = 0.07


@dataclass(frozen=True)
class Case:
    """`gradient_accumulation` is of the distributed run; one process takes the same global batch in one piece."""

    method: str
    family: str = "t5-tied"
    gradient_accumulation: int = 1
    settings: tuple = ()
    rows: int = 32
    has_bad_rewards: bool = False
    of_characters: bool = False  # the teacher's tokens are characters
    is_misread: bool = False  # the student reads some completions as NaN
    panel: str = ""  # of three teachers: "per_example" weights, or "routing" of each example to one


CASES = {
    "ppo-accumulated": Case("ppo", "llama", 2),
    "ppo-two-passes-with-kl": Case("ppo", settings=(("num_iterations", 2), ("beta", 0.2), ("max_steps", 4))),
    "ppo-separate-critic": Case("ppo", settings=(("critic", "separate"),)),
    # The KL of both ranks together is near the target in the second step, and of each alone far above, or far below.
    "rloo-token-adaptive-kl": Case(
        "rloo-token",
        settings=(("beta", 0.2), ("kl_target", KL_TARGET), ("kl_horizon", 50.0), ("learning_rate", 0.5)),
    ),
    # Masked, so that the ranks differ in sequences too.
    "rloo-sequence": Case("rloo-sequence", "llama", settings=(("mask_truncated_completions", True),)),
    "rloo-token-masked": Case("rloo-token", "llama", 2, settings=(("mask_truncated_completions", True),)),
    # The other cases of PPO and RLOO subtract the rollout's average reward, which is over all ranks.
    "ppo-sum": Case("ppo", settings=(("average_reward", "none"),)),
    "rloo-token-average-of-prompts": Case("rloo-token", "llama", 2, settings=(("average_reward", "prompt"),)),
    "ppo-dropped": Case("ppo", settings=(("num_generations", 4),), has_bad_rewards=True),
    "rloo-token-dropped": Case("rloo-token", "llama", 2, settings=(("num_generations", 4),), has_bad_rewards=True),
    "rloo-sequence-misread": Case("rloo-sequence", "llama", 2, is_misread=True),
    "kd-misread": Case("kd", "t5-untied", 4, settings=(("divergence", "reverse_kl"),), is_misread=True),
    "rloo-token-aligned": Case("rloo-token", "llama", 2, settings=(("align_tokenizers", True),), of_characters=True),
    "kd-aligned": Case(
        "kd", "t5-untied", 2, settings=(("align_tokenizers", True), ("divergence", "tvd")), of_characters=True
    ),
    "rloo-token-weighed": Case("rloo-token", gradient_accumulation=2, panel="per_example"),
    "kd-weighed": Case("kd", gradient_accumulation=2, settings=(("max_grad_norm", 0.05),), panel="per_example"),
    "rloo-sequence-routed": Case("rloo-sequence", gradient_accumulation=2, panel="routing"),
    "kd-routed": Case("kd", gradient_accumulation=2, settings=(("max_grad_norm", 0.05),), panel="routing"),
    "reinforce": Case(
        "reinforce",
        settings=(("baseline", "mean"), ("mask_truncated_completions", True), ("average_reward", "rollout")),
    ),
    "reinforce-lagging-top-k": Case(
        "reinforce",
        "llama",
        2,
        settings=(
            ("baseline", "min_variance"),
            ("behaviour_sync_steps", 2),
            ("top_k", 5),
        ),
    ),
    # Two rollouts an epoch, four prompts each: the ranks must agree on the second epoch's order too.
    "rloo-token-two-epochs": Case("rloo-token", settings=(("max_steps", 4),), rows=8),
    # Of four rollouts some are of data, where the ranks draw their own prompts' targets, and some of the student.
    "kd-mixture": Case(
        "kd",
        "t5-untied",
        settings=(("divergence", "reverse_kl"), ("sequences", "data"), ("lmbda", 0.5), ("max_steps", 4)),
    ),
    "kd-teacher-accumulated": Case(
        "kd", "llama", 2, settings=(("sequences", "teacher"), ("lmbda", 0.0), ("alpha", 0.5))
    ),
    "all-actions-average-reward": Case(
        "all-actions", settings=(("future_weight", 1.0), ("average_reward", "rollout"), ("num_generations", 4))
    ),
    "all-actions-accumulated": Case(
        "all-actions", "llama", 2, settings=(("signal", "teacher_forcing"), ("mask_truncated_completions", True))
    ),
}
EXPERTS = ("one", "two", "three")
GLOBAL_BATCH = 8
BUDGETS = (3.0, 3.1, 1e6)


def sometimes_nan(prompts, completion_ids, **columns) -> list[float]:
    return [math.nan if ids[0] % 3 == 0 else 0.0 for ids in completion_ids]


def skip(output_dir: Path, accumulation: int) -> dict:
    """Three steps, of which the second's loss is NaN on the last process only; then as many NaN as stop the run."""
    state, found = PartialState(), {}
    for name, bad_steps in (("skipped", {2}), ("stopped", {2, 3})):
        trainer = build("rloo-token", output_dir / name, max_steps=3, max_skipped_steps=2, num_generations=2,
                        per_device_train_batch_size=4, gradient_accumulation_steps=accumulation)  # fmt: skip
        compute_loss = trainer.compute_loss

        def spoiled(*args, trainer=trainer, compute_loss=compute_loss, bad_steps=bad_steps, **kwargs):
            is_bad = state.process_index == state.num_processes - 1 and trainer.state.global_step + 1 in bad_steps
            return compute_loss(*args, **kwargs) + (math.nan if is_bad else 0.0)

        trainer.compute_loss = spoiled
        recorder = Recorder(trainer)
        trainer.add_callback(recorder)
        try:
            trainer.train()
        except TrainingError as error:
            found["error"] = str(error)
        found[name] = {"weights": recorder.weights, "steps_skipped": trainer.steps_skipped}
    return found


def without_half(method: str, output_dir: Path, accumulation: int) -> dict:
    """Three steps; in the second the student cannot read the last half of the global batch: all of one process's."""
    state, bad = PartialState(), set()
    settings = {**COMMON, "entropy_coef": 0.05} if method in METHODS else COMMON
    trainer = build(method, output_dir, data=pairs(32, seed=1), num_generations=2, **settings,
                    per_device_train_batch_size=GLOBAL_BATCH // state.num_processes // accumulation,
                    gradient_accumulation_steps=accumulation)  # fmt: skip
    make_rollout, backbone = trainer.make_rollout, trainer.model.backbone
    states = backbone.completion_states

    def key(prompt_ids, prompt_mask, completion_ids) -> tuple:
        end = [int(i) for i in completion_ids if i != PAD]
        return tuple(prompt_ids[prompt_mask.bool()].tolist()), tuple(end)

    def made(rows):
        rollout = make_rollout(rows)
        bad.clear()
        for b in range(len(rollout.completion_ids_BT)):
            is_last_half = state.process_index == 1 or (state.num_processes == 1 and b >= GLOBAL_BATCH // 2)
            if trainer.state.global_step == 1 and is_last_half:
                p = rollout.prompt_index_B[b]
                bad.add(key(rollout.prompt_ids_PS[p], rollout.prompt_mask_PS[p], rollout.completion_ids_BT[b]))
        return rollout

    def spoiled(prompt_ids, prompt_mask, completion_ids_BT, prompt_index_B, **kwargs):
        found = states(prompt_ids, prompt_mask, completion_ids_BT, prompt_index_B, **kwargs)
        keys = [key(prompt_ids[p], prompt_mask[p], completion_ids_BT[b]) in bad for b, p in enumerate(prompt_index_B)]
        return found.masked_fill(torch.tensor(keys)[:, None, None], math.nan)

    trainer.make_rollout, backbone.completion_states = made, spoiled
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    logs = [{name: log.get(name) for name in ("loss", "grad_norm", "samples_dropped")} for log in recorder.logs]
    return {"weights": recorder.weights, "logs": logs}


def misread_some(trainer) -> None:
    """The student's states are NaN along completions whose first token's id can be divided by 3."""
    backbone = trainer.model.backbone
    states = backbone.completion_states

    def of_completions(prompt_ids, prompt_mask, completion_ids_BT, prompt_index_B, **kwargs):
        found = states(prompt_ids, prompt_mask, completion_ids_BT, prompt_index_B, **kwargs)
        return found.masked_fill((completion_ids_BT[:, 0] % 3 == 0)[:, None, None], math.nan)

    backbone.completion_states = of_completions


def panel_of(case: Case) -> TeacherPanel:
    teachers = [Teacher(MODELS[case.family](seed=seed), word_tokenizer()) for seed in (5, 6, 7)]
    if case.panel == "routing":
        return TeacherPanel(teachers, routing=Routing("expert", None, EXPERTS))
    return TeacherPanel(teachers, weighting=case.panel)


def data_of(case: Case) -> Dataset:
    """The rows, and for a routing whose each is: three of one expert, then three of the next."""
    data = pairs(case.rows, seed=1)
    if case.panel != "routing":
        return data
    return data.add_column("expert", [EXPERTS[(i // 3) % len(EXPERTS)] for i in range(len(data))])


def reward_of(case: Case) -> TeacherForcingReward | list | None:
    if case.panel:
        return TeacherForcingReward(panel_of(case))
    if case.of_characters:
        return TeacherForcingReward(MODELS[case.family](seed=5), character_tokenizer())
    return [teacher_reward(case.family), sometimes_nan] if case.has_bad_rewards else None


def train(case: Case, output_dir: Path, *, processes: int, gradient_accumulation: int) -> dict:
    trainer = build(
        case.method,
        output_dir,
        family=case.family,
        data=data_of(case),
        reward=reward_of(case),
        per_device_train_batch_size=GLOBAL_BATCH // processes // gradient_accumulation,
        gradient_accumulation_steps=gradient_accumulation,
        **{**COMMON, **(REWARDED if case.method in METHODS else {}), **dict(case.settings)},
    )
    if case.is_misread:
        misread_some(trainer)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    assert recorder.trainer.accelerator.num_processes == processes
    names = (
        "loss",
        "samples_dropped",
        "grad_norm",
        "reward",
        "reward_std",
        "average_reward",
        "completions/mean_length",
        "completions/eos_rate",
    )
    names += ("divergence", "cross_entropy", "student_samples", "immediate", "entropy", "kl", "beta", "teacher_nll")
    names += ("value_loss", "explained_variance", "ratio", "approx_kl", "clip_fraction")
    return {
        "cost": asdict(recorder.trainer.cost()),
        "tokens": [int(rollout.loss_mask_BT.sum()) for rollout in recorder.rollouts],
        "logs": [{name: entry[name] for name in names if name in entry} for entry in recorder.logs],
        "weights": recorder.weights[-1],
        "first_weights": recorder.weights[0],
    }


def spend(output_dir: Path, *, cpu_budget: float) -> dict:
    """Up to five steps that take 2 CPU seconds on the first process and 1 on each other, and 9 by the wall's clock."""
    state = PartialState()
    clocks = {"process_time": 0.0, "perf_counter": 0.0}

    class Clocks(TrainerCallback):
        def on_step_begin(self, *arguments, **kwargs):
            clocks["process_time"] += 2.0 if state.process_index == 0 else 1.0
            clocks["perf_counter"] += 9.0

    batch = GLOBAL_BATCH // state.num_processes
    trainer = build(
        "rloo-token", output_dir, max_steps=5, max_cpu_seconds=cpu_budget, per_device_train_batch_size=batch
    )
    trainer.add_callback(Clocks())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "process_time", lambda: clocks["process_time"])
        patch.setattr(time, "perf_counter", lambda: clocks.update(perf_counter=clocks["perf_counter"] + 1e-9)
                      or clocks["perf_counter"])  # fmt: skip
        trainer.train()
    return asdict(trainer.cost())


def ask_first_process() -> dict:
    """What the first process finds, and what it refuses, and how often this one was asked."""
    calls = []

    def find():
        calls.append(1)
        return Path("found"), {"by": PartialState().process_index}

    def refuse():
        calls.append(2)
        raise InputError("no such checkpoint")

    found = from_first_process(find)
    with pytest.raises(InputError, match="no such checkpoint"):
        from_first_process(refuse)
    return {"found": (str(found[0]), found[1]), "calls": calls}


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    results = {
        name: train(
            case,
            output_dir / "runs",
            processes=state.num_processes,
            gradient_accumulation=case.gradient_accumulation if state.num_processes > 1 else 1,
        )
        for name, case in CASES.items()
    }
    if state.num_processes > 1:
        results["not finite"] = {accumulation: skip(output_dir / "runs", accumulation) for accumulation in (1, 2)}
    results["without half"] = {
        (method, accumulation): without_half(method, output_dir / "runs", accumulation)
        for method in ("rloo-sequence", "kd")
        for accumulation in range(1, state.num_processes + 1)
    }
    results["cost by budget"] = {budget: spend(output_dir / "runs", cpu_budget=budget) for budget in BUDGETS}
    results["asked"] = ask_first_process()
    torch.save(results, output_dir / f"rank{state.process_index}.pt")
    state.wait_for_everyone()
    state.destroy_process_group()
