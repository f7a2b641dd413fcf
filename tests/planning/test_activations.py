"""Estimated activations against what torch's allocator hands out for the same work.

The profiler sees the CPU's real allocations in `Teacher.score`, in a trainer's own update, in a policy's pass without
gradients and in sampling; the estimate has run the model on fake tensors. Shapes and models are chosen so that once
the encoder, once the decoder, once the cache, and once the LM head takes most.
"""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, Trainer

from rlkd_trl import TeacherForcingReward
from rlkd_trl.models.generation import Completions
from rlkd_trl.ops.lm_head import MAX_SLICE_ELEMENTS
from rlkd_trl.planning.activations import (
    Workload,
    counted,
    log_prob_bytes,
    sampling_bytes,
    scoring_bytes,
    update_bytes,
)
from rlkd_trl.planning.adapters import Adapters, adapted
from rlkd_trl.planning.skeletons import CopyingSkeletons
from rlkd_trl.students import Policy
from rlkd_trl.teachers import Teacher
from tests.planning.measured import peak_bytes
from tests.planning.models import MODELS, checkpoint_of, t5
from tests.tiny_models import word_tokenizer
from tests.trainers.tiny_runs import build

# (prompts P, prompt tokens S, completions per prompt K, completion tokens T)
SHAPES = {
    "long-prompts": (16, 200, 2, 8),
    "long-completions": (3, 20, 8, 50),
    "both": (6, 100, 4, 40),
    "one-completion": (4, 250, 1, 4),
}
# Scoring and update differ by at most 7 % here, sampling by 2 %.
TOLERANCE, DECODING_TOLERANCE = 0.1, 0.04


def workload(shape: tuple[int, int, int, int], teacher_batch_tokens: int = 4000) -> Workload:
    P, S, K, T = shape
    return Workload(
        prompt_tokens=S,
        completion_tokens=T,
        num_generations=K,
        micro_batch=P * K,
        micro_batches=1,
        teacher_batch_tokens=teacher_batch_tokens,
    )


@pytest.fixture(autouse=True)
def models_are_not_verified(monkeypatch):
    """Whoever reads a model compares with its own pass first, which takes longer here than what is measured."""
    monkeypatch.setattr("rlkd_trl.students.policy.verify", lambda backbone: None)
    monkeypatch.setattr("rlkd_trl.teachers.teacher.verify", lambda backbone: None)


ON_CPU = {"fused_attention": False, "max_slice_elements": None}


def prompt_texts(shape: tuple[int, int, int, int]) -> list[str]:
    """S tokens each with the EOS, but for the last, which is a token shorter: batches have padding."""
    P, S, _, _ = shape
    return [" ".join(f"w{3 + (p + s) % 24}" for s in range(S - 1 - (p == P - 1))) for p in range(P)]


def assert_close(estimated: int, measured: int, tolerance: float = TOLERANCE) -> None:
    assert abs(estimated / measured - 1) < tolerance, f"{estimated:,} bytes estimated, {measured:,} measured"


@pytest.mark.slow(0.5)
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("t5-tied", "long-prompts", torch.float32),
        ("t5-tied", "one-completion", torch.bfloat16),
        ("t5-untied", "both", torch.bfloat16),
        ("t5-deep-encoder", "long-completions", torch.float32),
        ("t5-large-vocabulary", "long-completions", torch.float32),
        ("llama", "long-completions", torch.bfloat16),
        ("llama-deep", "long-prompts", torch.float32),
    ],
)
def test_scoring(name, shape, dtype, tmp_path):
    P, _, K, T = SHAPES[shape]
    model, wanted = MODELS[name]().to(dtype), workload(SHAPES[shape])
    teacher = Teacher(model, word_tokenizer(), max_batch_tokens=wanted.teacher_batch_tokens)
    ids_BT = torch.full((P * K, T), 3)
    arguments = (
        prompt_texts(SHAPES[shape]),
        torch.arange(P).repeat_interleave(K),
        ids_BT,
        torch.ones_like(ids_BT, dtype=torch.bool),
        torch.zeros(P * K, dtype=torch.bool),
    )
    measured = peak_bytes(lambda: teacher.score(*arguments))
    skeleton = checkpoint_of(model, tmp_path).build(dtype)
    assert_close(scoring_bytes(skeleton, wanted, **ON_CPU), measured)


@pytest.mark.slow(0.6)
@pytest.mark.parametrize("measure", [log_prob_bytes, update_bytes])
def test_log_probs_and_updates_take_the_blocks_of_a_gpu(measure, tmp_path):
    """Of 4 · 200 tokens and 8,000 ids a block of 16 MiB holds 524, one of 2 MiB 65: 2 blocks in place of 13 a pass."""
    model = t5(tied=False, layers=1, decoder_layers=1, vocab_size=8000)
    counts = []
    for elements in (MAX_SLICE_ELEMENTS, None):
        operations = []
        skeleton = checkpoint_of(model, tmp_path).build(torch.float32)
        measure(skeleton, workload((1, 4, 4, 200)), max_slice_elements=elements, operations=operations)
        counts.append(len(operations))
    assert counts[1] - counts[0] >= 11 * 3, "at least three operations a block"


@pytest.mark.slow(0.9)
def test_the_teachers_questions_may_be_longer_than_prompts(tmp_path):
    skeleton = checkpoint_of(t5(tied=True, layers=1, decoder_layers=1), tmp_path).build(torch.float32)
    longer = replace(workload((4, 8, 2, 6)), question_tokens=40)
    assert scoring_bytes(skeleton, longer) == scoring_bytes(skeleton, workload((4, 40, 2, 6)))
    assert log_prob_bytes(skeleton, longer) == log_prob_bytes(skeleton, workload((4, 8, 2, 6)))
    few = replace(workload((4, 8, 2, 6), teacher_batch_tokens=100), question_tokens=40)
    assert (few.scored_prompts, replace(few, question_tokens=None).scored_prompts) == (1, 3)


@pytest.mark.slow(0.4)
def test_scoring_takes_the_slices_of_a_gpu(tmp_path):
    """2^24 float32 logits are 64 MiB, and their log-softmax as much; everything else of this model is below 5 MiB."""
    skeleton = checkpoint_of(MODELS["t5-large-vocabulary"](), tmp_path).build(torch.float32)
    estimated = scoring_bytes(skeleton, workload((4, 8, 8, 80), teacher_batch_tokens=4000))
    assert 2 * 64 * 2**20 < 1.001 * estimated < 1.05 * 2 * 64 * 2**20


def full_length(prompt_ids_PS, prompt_mask_PS, prompt_index_B, *, length: int, **kwargs) -> Completions:
    """In place of sampling: truncated completions."""
    ids_BT = torch.full((len(prompt_index_B), length), 3)
    return Completions(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.zeros(len(ids_BT), dtype=torch.bool))


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("name", "shape", "critic"),
    [
        ("t5-tied", "long-prompts", "shared"),
        ("t5-tied", "one-completion", "shared"),
        ("t5-untied", "both", "separate"),
        ("t5-deep-encoder", "long-completions", "shared-bf16"),
        ("t5-large-vocabulary", "long-completions", "none"),
        ("llama", "long-prompts", "shared-bf16"),
        ("llama-deep", "both", "shared"),
    ],
)
def test_update(name, shape, critic, tmp_path, monkeypatch):
    critic, _, bf16 = critic.partition("-")
    model = MODELS[name]()
    measured = measured_update(model, shape, tmp_path, monkeypatch, critic=critic, bf16=bool(bf16))
    skeleton = checkpoint_of(model, tmp_path / "config").build(torch.float32)
    estimated = update_bytes(skeleton, workload(SHAPES[shape]), critic=critic, bf16=bool(bf16), **ON_CPU)
    assert_close(estimated, measured)


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("name", "shape", "critic", "adapters", "recomputed"),
    [
        ("t5-deep-encoder", "long-prompts", "shared", None, True),
        ("llama-deep", "both", "none", None, True),
        ("t5-tied", "both", "separate", Adapters(lora_r=4), False),
        ("llama", "long-completions", "shared", Adapters(8, ["all-linear"], use_dora=True), False),
        ("llama-deep", "both", "none", Adapters(8, ["all-linear"]), True),
    ],
)
def test_update_of_adapters_and_of_recomputed_layers(name, shape, critic, adapters, recomputed, tmp_path, monkeypatch):
    model = MODELS[name]()
    skeleton = checkpoint_of(model, tmp_path / "config").build(torch.float32)
    config = None
    if adapters is not None:
        skeleton = adapted(skeleton, adapters)
        modules = adapters.lora_target_modules
        config = LoraConfig(
            r=adapters.lora_r,
            target_modules="all-linear" if modules == ["all-linear"] else modules,
            use_dora=adapters.use_dora,
        )
    how = {"critic": critic, "gradient_checkpointing": recomputed}
    measured = measured_update(model, shape, tmp_path, monkeypatch, peft_config=config, **how)
    estimated = update_bytes(skeleton, workload(SHAPES[shape]), **how, **ON_CPU)
    assert_close(estimated, measured)


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", ["t5-tied", "llama"])
def test_layers_are_recomputed_with_the_attention_of_a_gpu(name, tmp_path):
    """With adapters, as the command does; they save memory there, too."""
    skeleton = checkpoint_of(MODELS[name](), tmp_path).build(torch.float32)
    student, load = adapted(skeleton, Adapters(lora_r=4)), workload(SHAPES["both"])
    assert 0 < update_bytes(student, load, gradient_checkpointing=True) < 0.8 * update_bytes(student, load)


def measured_update(
    model: PreTrainedModel, shape: str, directory: Path, monkeypatch, *, critic: str, **settings
) -> int:
    """Of the second of two accumulated micro-batches: the gradients, which are not counted, exist by then."""
    P, _, K, T = SHAPES[shape]
    measured = []
    train_step = Trainer.training_step

    def measured_step(*args, **kwargs):
        results = []
        measured.append(peak_bytes(lambda: results.append(train_step(*args, **kwargs))))
        return results[0]

    monkeypatch.setattr(Trainer, "training_step", measured_step)
    trainer = build(
        "rloo-token" if critic == "none" else "ppo",
        directory,
        model=model,
        reward=TeacherForcingReward(MODELS["llama"](), word_tokenizer()),
        data=Dataset.from_list([{"prompt": text} for text in 2 * prompt_texts(SHAPES[shape])]),
        per_device_train_batch_size=P * K,
        gradient_accumulation_steps=2,
        num_generations=K,
        max_completion_length=T,
        max_steps=1,
        **({} if critic == "none" else {"critic": critic}),
        **settings,
    )
    trainer.model.sample = partial(full_length, length=T)
    trainer.train()
    assert len(measured) == 2
    return measured[1]


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(
    ("name", "shape", "critic", "bf16"),
    [
        ("t5-tied", "long-prompts", "shared", False),
        ("t5-untied", "both", "separate", True),
        ("t5-deep-encoder", "long-completions", "separate", False),
        ("t5-large-vocabulary", "long-completions", "none", False),
        ("llama", "long-prompts", "shared", True),
        ("llama-deep", "both", "separate", False),
    ],
)
def test_log_probs(name, shape, critic, bf16, tmp_path):
    P, S, K, T = SHAPES[shape]
    model = MODELS[name]()
    policy = Policy(model, word_tokenizer(), critic=critic)
    ids_PS, ids_BT = torch.full((P, S), 3), torch.full((P * K, T), 3)
    mask_PS = torch.ones_like(ids_PS)
    mask_PS[-1, -1 if policy.backbone.padding_side == "right" else 0] = 0
    index_B = torch.arange(P).repeat_interleave(K)
    inputs = (ids_PS, mask_PS, index_B, ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        measured = peak_bytes(lambda: policy(*inputs, with_entropy=False))
    skeleton = checkpoint_of(model, tmp_path).build(torch.float32)
    assert_close(log_prob_bytes(skeleton, workload(SHAPES[shape]), bf16=bf16, **ON_CPU), measured)


def sampled(name: str, shape: tuple[int, int, int, int], directory: Path) -> tuple[int, int, int]:
    """Estimated bytes, those of them that are the cache's, and measured ones."""
    P, S, K, T = shape
    model = MODELS[name]()
    policy = Policy(model, word_tokenizer())
    ids_PS = torch.full((P, S), 3)
    mask_PS = torch.ones_like(ids_PS)
    mask_PS[-1, -1 if policy.backbone.padding_side == "right" else 0] = 0
    index_B = torch.arange(P).repeat_interleave(K)
    policy.eos_ids = [-1]  # nobody finishes early
    arguments = {"max_completion_length": T, "uniforms_BT": torch.full((P * K, T), 0.5)}
    measured = peak_bytes(lambda: policy.sample(ids_PS, mask_PS, index_B, **arguments))
    skeleton = checkpoint_of(model, directory).build(torch.float32)
    return *sampling_bytes(skeleton, workload(shape), fused_attention=False), measured


@pytest.mark.slow(0.6)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("t5-tied", "long-prompts"),
        ("t5-deep-encoder", "long-completions"),
        ("t5-large-vocabulary", "long-completions"),
        ("llama", "long-completions"),
        ("llama-deep", "both"),
    ],
)
def test_sampling(name, shape, tmp_path):
    estimated, cache, measured = sampled(name, SHAPES[shape], tmp_path)
    assert_close(estimated, measured, DECODING_TOLERANCE)
    assert 0 < cache < estimated


@pytest.mark.parametrize("name", ["t5-deep-encoder", pytest.param("llama-deep", marks=pytest.mark.slow(0.8))])
def test_reading_tokens_at_once_stands_for_sampling_them(name, tmp_path):
    """`sampling_bytes` is held to `Policy.sample`, token by token, where both see the same fake tensors."""
    P, S, K, T = 3, 6, 4, 5
    skeleton = checkpoint_of(MODELS[name](), tmp_path).build(torch.float32)
    estimated, _ = sampling_bytes(skeleton, workload((P, S, K, T)), fused_attention=False)
    with skeleton.mode:
        policy = Policy(skeleton.model, word_tokenizer())
        policy.eos_ids = [-1]  # nobody finishes early
        ids_PS, index_B = torch.full((P, S), 3), torch.arange(P).repeat_interleave(K)
        mask_PS = torch.ones_like(ids_PS)
        mask_PS[-1, -1 if policy.backbone.padding_side == "right" else 0] = 0
        uniforms_BT = torch.full((P * K, T), 0.5)
        known = [*policy.parameters(), *policy.buffers(), ids_PS, mask_PS, index_B, uniforms_BT]
        with counted(known, fused_attention=False) as live:
            policy.sample(ids_PS, mask_PS, index_B, max_completion_length=T, uniforms_BT=uniforms_BT)
    assert_close(estimated, live.peak, DECODING_TOLERANCE)


def test_sampling_where_the_draw_takes_most(tmp_path):
    """128 rows of 8,000 logits are 4 MB; two tokens' cache is little beside them."""
    estimated, cache, measured = sampled("t5-large-vocabulary", (2, 4, 64, 2), tmp_path)
    assert measured > 3 * 128 * 8000 * 4 and cache < 0.1 * measured
    assert_close(estimated, measured)


@pytest.mark.filterwarnings("error::UserWarning")  # torch warns where the bytes of a fake tensor are touched
def test_a_copied_skeleton_has_weights_of_its_own(tmp_path):
    skeleton = checkpoint_of(MODELS["t5-tied"](), tmp_path).build(torch.float32)
    with skeleton.mode, CopyingSkeletons():
        copied = copy.deepcopy(skeleton.model)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (skeleton.model, copied)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 10
    assert copied.lm_head.weight is copied.shared.weight, "tied weights stay tied"
    assert all(p is not q for p, q in zip(skeleton.model.parameters(), copied.parameters(), strict=True))
