"""Teachers and students sharded by ZeRO-3: `main(OUTPUT_DIR)` writes what each process saw.

On one process it trains the same cases, on the same global batch, for the others to be compared with.
"""

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import rlkd_trl.students.policy as policy_module
import rlkd_trl.teachers.teacher as teacher_module
import rlkd_trl.trainers.all_actions as all_actions_module
import rlkd_trl.trainers.kd as kd_module
from rlkd_trl import TeacherForcingReward
from rlkd_trl.models.answers import answer_prompts, joined
from rlkd_trl.models.memory import held_bytes
from rlkd_trl.ops.lm_head import map_head_slices, slices_needed
from rlkd_trl.teachers import Teacher
from tests.distributed.worker import COMMON, GLOBAL_BATCH
from tests.models.reference import pad_completions
from tests.teachers.test_teacher import COMPLETIONS, ENDED, INDEX, NAMES, PROMPTS, score
from tests.tiny_models import EOS, MODELS, PADDED_VOCAB, word_tokenizer
from tests.trainers.test_peft import lora_student
from tests.trainers.tiny_runs import build, pairs, samples_instead

# Communication would begin with a minute of compiling a kernel that none of this uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TEACHERS = ("t5-tied", "t5-untied", "llama")
FEW_ROWS = 3  # of logits in a slice, so that the processes need different numbers of slices
SLICED_LOSSES = (
    (kd_module, "sliced_divergence"),
    (all_actions_module, "sliced_all_actions_loss"),
    (all_actions_module, "expected_signals"),
    (all_actions_module, "chosen_signals"),
)


LONGER = ([4, 5, EOS], [6, EOS], [7, 8, 9, 3], [EOS])


@dataclass(frozen=True)
class Case:
    """`modes` are the student's; its teacher is always sharded. `forced`: what the student "samples"."""

    method: str
    modes: tuple = ("ddp", "zero2", "zero3")
    family: str = "t5-untied"
    settings: tuple = ()
    lora: bool = False
    forced: tuple = ()


CASES = {
    "ppo": Case("ppo", family="t5-tied", settings=(("beta", 0.2),)),
    # DDP with a sharded teacher is tried with PPO; of the other methods, with a whole one, in test_two_ranks.py.
    # The first process needs no decoder pass over tokens, the second one does.
    "rloo-uneven": Case("rloo-token", ("zero3",), "llama", forced=([EOS],) * 4 + LONGER),
    "ppo-lora": Case("ppo", ("zero3",), "t5-tied", lora=True),
    # Tied embeddings get a gradient from the head and elsewhere.
    "kd-student": Case("kd", ("zero3",), family="t5-tied"),
    "kd-lora-teacher": Case(
        "kd", ("zero3",), "t5-tied", (("sequences", "teacher"), ("lmbda", 0.0), ("alpha", 0.5)), lora=True
    ),
    # The first process has one slice of positions, the second one five.
    "all-actions-uneven": Case(
        "all-actions",
        ("zero3",),
        "llama",
        settings=(("future", "expected"),),
        forced=([EOS],) * 3 + ([4, EOS],) + ([4, 5, EOS], [6, EOS], [7, 8, 9, 3], [4, 5, 6, 7, 8, EOS]),
    ),
    "all-actions-mixed": Case("all-actions", ("zero3",), settings=(("teacher_mix", 0.5),)),
    "reinforce-lagging": Case("reinforce", ("zero3",), settings=(("behaviour_sync_steps", 2),)),
}
RESUMED = ("ppo", "reinforce-lagging")


def save_checkpoints(directory: Path) -> None:
    for family in TEACHERS:
        MODELS[family](seed=5).save_pretrained(directory / family)
        word_tokenizer().save_pretrained(directory / family)


def read_by(teacher: Teacher, rank: int) -> dict[str, torch.Tensor]:
    """Scores, states and answers, of which each process wants others: the first has fewer rows, and shorter ones."""
    rows = slice(0, 2) if rank == 0 else slice(0, 7)
    found = {}
    for time in range(4):  # DeepSpeed learns the order of calls in the first two, and gathers ahead in the others
        part = slice(0, 1) if time == 2 and rank == 1 else rows
        scores = score(teacher, index=INDEX[part], completions=COMPLETIONS[part], ended=ENDED[part])
        found |= {f"{name}{time}": getattr(scores, name) for name in NAMES}
    ids_BT, mask_BT = pad_completions([[EOS]] if rank == 0 else COMPLETIONS, 0)
    found["states"] = teacher.states(PROMPTS, torch.tensor([0] if rank == 0 else INDEX), ids_BT, mask_BT)
    found["scores after"] = score(teacher).chosen
    for strategy in ("greedy", "sample", "beam"):
        # transformers' beam search decodes the same prompts everywhere.
        prompts = PROMPTS[:1] if rank == 0 and strategy != "beam" else PROMPTS
        answers = answer_prompts(
            teacher.model, teacher.processing_class, prompts, strategy=strategy, max_completion_length=4
        )
        found[strategy] = joined(answers, pad_id=0).ids_BT
    found["scores at last"] = score(teacher).logsumexp
    return found


def check_teacher(family: str, directory: Path, rank: int, largest_gathered: list[int]) -> dict:
    """What a sharded teacher answers, what the whole one does, and the bytes of both."""
    largest_gathered[0] = 0
    sharded = Teacher.from_pretrained(str(directory / family), placement="zero3", max_batch_tokens=20)
    gathered_at_load = largest_gathered[0]
    whole = Teacher(MODELS[family](seed=5), word_tokenizer(), max_batch_tokens=20)
    held = [held_bytes(sharded.model)]
    found = read_by(sharded, rank)
    held.append(held_bytes(sharded.model))
    gathered = []
    for _ in range(4):  # DeepSpeed takes the answer for a part of the pass, and gathers for it ahead
        score(sharded, PROMPTS[:1], index=[0], completions=[[4, EOS]], ended=[True])
        held.append(held_bytes(sharded.model))
        # On its way counts too: DeepSpeed has then made room for it.
        gathered.append(sum(p.ds_status.name != "NOT_AVAILABLE" for p in sharded.model.parameters()))
        list(answer_prompts(sharded.model, sharded.processing_class, PROMPTS[:1], max_completion_length=3))
    return {
        "found": found,
        "expected": read_by(whole, rank),
        "held": held,
        "gathered": gathered,
        "whole": held_bytes(whole.model),
        "gathered at load": gathered_at_load * 4,
        "said": sharded.describe(),
    }


def watch_gathering() -> list[int]:
    """The largest number of weights that one context has gathered since the entry was set to 0."""
    largest, enter = [0], deepspeed.zero.GatheredParameters.__enter__

    def watched(context) -> None:
        enter(context)
        largest[0] = max(largest[0], sum(p.numel() for p in context.params) if context.enabled else 0)

    deepspeed.zero.GatheredParameters.__enter__ = watched
    return largest


def deepspeed_settings(stage: int) -> dict:
    zero = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def new_trainer(case: Case, mode: str, teacher: Teacher, output_dir: Path, world: int, **settings):
    # The last trainer's kind of parallelism.
    AcceleratorState._reset_state(True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    return build(
        case.method,
        output_dir,
        family=case.family,
        model=lora_student(case.family) if case.lora else None,
        reward=TeacherForcingReward(teacher),
        data=pairs(32, seed=1),
        eval_data=pairs(6, seed=2),
        per_device_train_batch_size=GLOBAL_BATCH // world,
        deepspeed={"zero2": deepspeed_settings(2), "zero3": deepspeed_settings(3)}.get(mode),
        **{**COMMON, "max_completion_length": 6, **dict(case.settings), **settings},
    )


def train(case: Case, mode: str, teacher: Teacher, output_dir: Path, rank: int, world: int) -> dict:
    trainer = new_trainer(case, mode, teacher, output_dir, world)
    if case.forced:
        count = GLOBAL_BATCH // world
        samples_instead(trainer, *case.forced[rank * count : (rank + 1) * count])
    trainer.train()
    evaluation = trainer.evaluate()
    trainer.save_model()
    return {
        "kind": trainer.accelerator.distributed_type.value,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "evaluation": evaluation,
        "saved": str(output_dir),
        "held": held_bytes(trainer.model),
        "lengths": trainer.rollout_state.rollout.completion_mask_BT.sum(dim=1).tolist(),
    }


def resume(case: Case, mode: str, teacher: Teacher, output_dir: Path, world: int) -> list[str]:
    """Where a run and one that went on from the first one's checkpoint have saved their students."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    if case.method == "reinforce":
        settings["behaviour_sync_steps"] = 3  # the checkpoint has a copy that is two steps old
    directories = [output_dir / "whole", output_dir / "resumed"]
    for directory, checkpoint in zip(directories, (None, str(directories[0] / "checkpoint-2")), strict=True):
        trainer = new_trainer(case, mode, teacher, directory, world, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    return [str(directory) for directory in directories]


def load_best(mode: str, teacher: Teacher, output_dir: Path, world: int) -> dict:
    """Where the best checkpoint is, of which step, and where the student that was then loaded from it."""
    trainer = new_trainer(
        CASES["ppo"],
        mode,
        teacher,
        output_dir,
        world,
        **{f"{kind}_strategy": "steps" for kind in ("eval", "save")},
        **{f"{kind}_steps": 1 for kind in ("eval", "save")},
        load_best_model_at_end=True,
        metric_for_best_model="reward",
    )
    # With this learning rate it rises. By the lowest, which a config would refuse, the best is not the last.
    trainer.args.greater_is_better = False
    trainer.train()
    evaluation = trainer.evaluate()
    trainer.save_model()
    return {
        "best": trainer.state.best_model_checkpoint,
        "best metric": trainer.state.best_metric,
        "metric": evaluation["eval_reward"],
        "last": str(output_dir / f"checkpoint-{COMMON['max_steps']}"),
        "saved": str(output_dir),
    }


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    largest_gathered = watch_gathering()
    state = PartialState(cpu=True)
    rank, world = state.process_index, state.num_processes
    if rank == 0:
        save_checkpoints(output_dir)
    state.wait_for_everyone()
    results = {"teachers": {}, "runs": {}}
    for module in (policy_module, teacher_module):
        module.map_head_slices = functools.partial(map_head_slices, max_elements=FEW_ROWS * PADDED_VOCAB)
    policy_module.slices_needed = functools.partial(slices_needed, max_elements=FEW_ROWS * PADDED_VOCAB)
    for module, name in SLICED_LOSSES:
        setattr(module, name, functools.partial(getattr(module, name), max_elements=FEW_ROWS * PADDED_VOCAB))
    if world > 1:
        for family in TEACHERS:
            results["teachers"][family] = check_teacher(family, output_dir, rank, largest_gathered)
    teacher = Teacher.from_pretrained(str(output_dir / "t5-untied"), placement="zero3", max_batch_tokens=45)
    for name, case in CASES.items():
        for mode in case.modes if world > 1 else ("one",):
            results["runs"][name, mode] = train(case, mode, teacher, output_dir / f"{mode}-{name}", rank, world)
    if world > 1:
        results["resumed"] = {
            name: resume(CASES[name], "zero3", teacher, output_dir / f"resumed-{name}", world) for name in RESUMED
        }
        results["best"] = load_best("zero3", teacher, output_dir / "best", world)
    torch.distributed.barrier()  # all has been saved
    torch.save(results, output_dir / f"rank{rank}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed with gloo may abort in its teardown
