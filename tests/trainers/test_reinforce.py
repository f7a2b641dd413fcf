"""REINFORCE as the papers do it: its update, its lagging behaviour policy, top-k sampling, its checkpoints."""

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from rlkd_trl import ReinforceKDConfig
from rlkd_trl.errors import InputError
from rlkd_trl.rewards import LogRatioReward
from tests.students.plain_forward import ALLOWED, plain_forward
from tests.tiny_models import EOS, MODELS
from tests.trainers.plain_update import Sample, samples_of
from tests.trainers.tiny_runs import (
    Recorder,
    assert_same_weights,
    build,
    largest_difference,
    prompts,
    run,
    samples_instead,
    snapshot,
    teacher_reward,
)

# ---- the update in loops


def plain_returns(args, k: int, teacher: PreTrainedModel, sample: Sample) -> list[float]:
    """G_t = Σ_j γ^{jk} (q_{t+jk} − γ^m V_{t+jk+m}), m = k or what is left; a truncated end is worth its V."""
    with torch.no_grad():
        f = plain_forward(teacher, sample.prompt, sample.completion)[0].double()
    f = f - f.mean(dim=-1, keepdim=True)
    n, gamma = len(sample.completion), args.gamma
    q = [float(f[t, y]) for t, y in enumerate(sample.completion)]
    values = [float(row.max()) for row in f]
    if sample.ended:
        values[n] = 0.0
    returns = []
    for t in range(n):
        g = 0.0
        for start in range(t, n, k):
            m = min(k, n - start)
            g += gamma ** (start - t) * (q[start] - gamma**m * values[start + m])
        g += gamma ** (n - t) * values[n]
        if args.teacher_baseline:
            g -= values[t]
        returns.append(g / args.return_denom)
    return returns


def supports(args, behaviour: PreTrainedModel, sample: Sample) -> list[list[int]]:
    """The ids that each token was sampled from."""
    if not args.top_k:
        return [ALLOWED] * len(sample.completion)
    with torch.no_grad():
        logits = plain_forward(behaviour, sample.prompt, sample.completion)[0]
    return [sorted(ALLOWED, key=lambda v, row=row: -float(row[v]))[: args.top_k] for row in logits[:-1]]


def log_probs(args, model: PreTrainedModel, sample: Sample, over: list[list[int]]) -> tuple[Tensor, Tensor]:
    """log π(y_t) and entropy over the given ids, `[T]`, differentiable, float64."""
    logits = plain_forward(model, sample.prompt, sample.completion)[0].double() / args.temperature
    logps, entropies = [], []
    for t, y in enumerate(sample.completion):
        row = torch.log_softmax(logits[t, over[t]], dim=-1)
        logps.append(row[over[t].index(y)])
        entropies.append(-(row.exp() * row).sum())
    return torch.stack(logps), torch.stack(entropies)


def plain_loss(args, k: int, samples: list[Sample], teacher, student, at_rollout, behaviour) -> Tensor:
    """The scalar that an optimizer step descends: `student` is differentiated, the other two are what they were."""
    kept = [s for s in samples if s.ended or not args.mask_truncated_completions]
    returns = [plain_returns(args, k, teacher, s) for s in kept]
    if args.average_reward != "none":  # γ = 1: the first return is the sum of rewards
        totals = [plain_returns(args, k, teacher, s)[0] for s in samples]
        average = sum(totals) / sum(len(s.completion) for s in samples)
        returns = [[g - average * (len(row) - t) for t, g in enumerate(row)] for row in returns]
    over = [supports(args, behaviour, s) for s in kept]
    sampled = [log_probs(args, behaviour, s, ids)[0].tolist() for s, ids in zip(kept, over, strict=True)]
    before = [log_probs(args, at_rollout, s, ids)[0].tolist() for s, ids in zip(kept, over, strict=True)]
    cap = args.ratio_cap or math.inf
    triples = [(g, p, b) for rows in zip(returns, before, sampled, strict=True) for g, p, b in zip(*rows, strict=True)]
    weight = {
        "none": lambda p, b: 0.0,
        "mean": lambda p, b: 1.0,
        "min_variance": lambda p, b: (min(math.exp(p - b), cap) * (1 - math.exp(p))) ** 2,
    }[args.baseline]
    weights = [weight(p, b) for _, p, b in triples]
    baseline = sum(w * g for w, (g, _, _) in zip(weights, triples, strict=True)) / (sum(weights) or 1.0)
    loss = 0.0
    for s, ids, g, b in zip(kept, over, returns, sampled, strict=True):
        logps, entropy = log_probs(args, student, s, ids)
        for t in range(len(g)):
            w = min(math.exp(float(logps[t]) - b[t]), cap) * (g[t] - baseline)
            if args.reward_clip is not None:
                w = max(-args.reward_clip, min(args.reward_clip, w))
            loss = loss - w * logps[t] - args.entropy_coef * entropy[t]
    return loss / len(triples)


# (family, k of the reward, settings): two optimizer steps a rollout, or a copy that lags behind by several rollouts.
CASES = {
    "LLMR": ("t5-tied", 1, {"teacher_baseline": False, "baseline": "none", "return_denom": 10.0}),
    "mean baseline": ("llama", 1, {"baseline": "mean", "gamma": 0.9}),
    "KETCHUP": ("t5-tied", 3, {"baseline": "min_variance", "teacher_baseline": False}),
    "lagging": ("t5-tied", 1, {"baseline": "min_variance", "behaviour_sync_steps": 3, "num_iterations": 1}),
    "average reward": ("llama", 1, {"average_reward": "rollout", "baseline": "none", "return_denom": 10.0}),
    "average reward, truncated completions masked": (
        "t5-tied",
        1,
        {"average_reward": "rollout", "mask_truncated_completions": True, "num_generations": 4},
    ),
    "top k": ("llama", 2, {"top_k": 4, "baseline": "mean", "entropy_coef": 0.5}),
    "every option": (
        "t5-untied",
        2,
        {
            "gamma": 0.9,
            "temperature": 0.7,
            "top_k": 5,
            "return_denom": 5.0,
            "reward_clip": 1.0,
            "ratio_cap": 1.05,
            "baseline": "min_variance",
            "behaviour_sync_steps": 3,
            "num_iterations": 1,
            "entropy_coef": 0.2,
            "num_generations": 4,
            "mask_truncated_completions": True,
        },
    ),
}


QUICK = ("KETCHUP", "top k", "every option", "average reward")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_gradients_are_those_of_the_papers_loops(case, tmp_path):
    family, k, settings = CASES[case]
    trainer = build(
        "reinforce",
        tmp_path,
        family=family,
        reward=teacher_reward(family, gamma=settings.get("gamma", 1.0), k=k),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        optim="sgd",
        max_steps=3,
        **{"num_iterations": 3, "learning_rate": 0.03, **settings},
    )
    policies = [copy.deepcopy(trainer.model.model)]
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    for weights in recorder.weights[:2]:
        policy = copy.deepcopy(trainer.model)
        policy.load_state_dict(weights)
        policies.append(policy.model)
    args, teacher = trainer.args, MODELS[family](seed=5)
    lags = args.behaviour_sync_steps > 0
    assert (trainer.behaviour is not None) == lags
    for step, student in enumerate(policies):
        # Three passes over one rollout, or three rollouts of one old policy: either way the third is the farthest.
        samples = samples_of(recorder.rollouts[step])
        assert (recorder.rollouts[step] is recorder.rollouts[0]) == (not lags or step == 0)
        at_rollout = student if lags else policies[0]
        loss = plain_loss(args, k, samples, teacher, student, at_rollout, behaviour=policies[0])
        assert recorder.logs[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
        parameters = dict(student.named_parameters())
        expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        norm = torch.cat([g.flatten() for g in expected if g is not None]).norm()
        assert norm > 1e-2
        for name, gradient in zip(parameters, expected, strict=True):
            if gradient is not None:
                actual = recorder.gradients[step][f"model.{name}"]
                torch.testing.assert_close(
                    actual, gradient, rtol=1e-3, atol=2e-5 * float(norm), msg=lambda m, name=name: f"{name}: {m}"
                )
    assert recorder.logs[0]["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert recorder.logs[2]["approx_kl"] > 1e-5, "the last step must not be at ratio 1 for this test to mean much"
    if args.reward_clip is not None:
        assert 0 < recorder.logs[2]["clip_fraction"] < 1


LAGGING = {"behaviour_sync_steps": 2, "top_k": 5, "baseline": "min_variance", "reward_clip": 3.0, "ratio_cap": 2.0}


def test_update_does_not_depend_on_how_the_batch_is_cut(tmp_path):
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "entropy_coef": 0.1, **LAGGING}
    whole = run("reinforce", tmp_path / "whole", **settings)
    parts = run(
        "reinforce", tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings
    )
    for ours, theirs in zip(parts.rollouts, whole.rollouts, strict=True):
        assert torch.equal(ours.completion_ids_BT, theirs.completion_ids_BT)
        mask_BT = theirs.completion_mask_BT
        assert torch.equal(ours.support_BTk[mask_BT], theirs.support_BTk[mask_BT])
    for ours, theirs in zip(parts.logs, whole.logs, strict=True):
        for name in ("loss", "grad_norm", "ratio", "clip_fraction", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert_same_weights(parts.weights[-1], whole.weights[-1], rtol=1e-3, atol=1e-5)
    assert largest_difference(whole.weights[-1], whole.weights[0]) > 1e-2


# ---- the lagging behaviour policy


class BehaviourRecorder(TrainerCallback):
    """The copy's weights while each step's rollout was in use."""

    def __init__(self, trainer):
        self.trainer, self.weights = trainer, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.weights.append(snapshot(self.trainer.behaviour))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_copy_is_set_to_the_student_after_every_n_optimizer_steps(accumulation, tmp_path):
    trainer = build(
        "reinforce",
        tmp_path,
        behaviour_sync_steps=2,
        max_steps=5,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    student, copies = Recorder(trainer), BehaviourRecorder(trainer)
    initial = snapshot(trainer.model)
    trainer.add_callback(student)
    trainer.add_callback(copies)
    trainer.train()
    after = [initial, *student.weights]
    # Steps 0 and 1 are on samples of the initial student, 2 and 3 of the student after two steps, 4 after four.
    for step, synced in enumerate([0, 0, 2, 2, 4]):
        assert_same_weights(copies.weights[step], after[synced])
    assert [entry["behaviour_lag"] for entry in student.logs] == [0, 1, 0, 1, 0]
    ratios = [abs(entry["approx_kl"]) > 1e-5 for entry in student.logs]
    assert ratios == [False, True, False, True, False], "on-policy right after the exchange, and then not"
    assert not any(p.requires_grad for p in trainer.behaviour.parameters())


def test_the_copy_is_exchanged_between_rollouts_of_several_steps(tmp_path):
    recorder = run("reinforce", tmp_path, behaviour_sync_steps=4, num_iterations=2, max_steps=6)
    assert [e.get("behaviour_lag") for e in recorder.logs] == [0, None, 2, None, 0, None]


@pytest.mark.parametrize(
    "settings", [{}, {"behaviour_sync_steps": 1}, {"behaviour_sync_steps": 2, "num_iterations": 2}]
)
def test_without_a_lag_the_student_samples(settings, tmp_path):
    """A copy that would be exchanged before every rollout is not made."""
    recorder = run("reinforce", tmp_path, **settings)
    assert recorder.trainer.behaviour is None
    assert "behaviour_lag" not in recorder.logs[0]
    assert not ReinforceKDConfig(str(tmp_path), **settings).samples_from_a_copy


def test_the_second_of_two_steps_is_on_samples_of_the_policy_before_the_first(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.5}  # AdamW would make whole steps of ratios' rounding
    lagging = run("reinforce", tmp_path / "two", behaviour_sync_steps=2, **settings)
    current = run("reinforce", tmp_path / "one", **settings)
    assert_same_weights(lagging.weights[0], current.weights[0], rtol=1e-4, atol=1e-6)
    assert not torch.equal(lagging.rollouts[1].completion_ids_BT, current.rollouts[1].completion_ids_BT)


# ---- top k


@pytest.mark.parametrize("family", ["t5-tied", "llama"])
def test_top_k_is_exactly_on_policy_in_the_first_pass(family, tmp_path):
    recorder = run("reinforce", tmp_path, family=family, top_k=3, temperature=0.8, num_iterations=2, max_steps=6)
    assert len(recorder.logs) == 6
    for entry, rollout in zip(recorder.logs[::2], recorder.rollouts[::2], strict=True):
        assert entry["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert entry["approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert 0 < entry["entropy"] < math.log(3)
        inside_BT = (rollout.support_BTk == rollout.completion_ids_BT[..., None]).sum(dim=-1)
        assert (inside_BT[rollout.completion_mask_BT] == 1).all()
    assert largest_difference(recorder.weights[-1], recorder.weights[0]) > 1e-3


def test_top_k_over_every_token_is_plain_sampling(tmp_path):
    plain = run("reinforce", tmp_path / "plain", optim="sgd", entropy_coef=0.1)
    every = run("reinforce", tmp_path / "every", optim="sgd", entropy_coef=0.1, top_k=len(ALLOWED))
    for ours, theirs in zip(every.rollouts, plain.rollouts, strict=True):
        assert torch.equal(ours.completion_ids_BT, theirs.completion_ids_BT)
    assert_same_weights(every.weights[-1], plain.weights[-1], rtol=1e-4, atol=1e-6)


def test_more_than_every_token_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"top_k = {len(ALLOWED) + 1}, but the student has {len(ALLOWED)} tokens"):
        build("reinforce", tmp_path, top_k=len(ALLOWED) + 1)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"behaviour_sync_steps": 3}])
def test_log_ratio_is_refused_where_the_student_does_not_sample(settings, tmp_path):
    reward = LogRatioReward(teacher_reward().panel)
    with pytest.raises(InputError, match="log_ratio goes with neither top_k nor behaviour_sync_steps"):
        build("reinforce", tmp_path, reward=[teacher_reward(), reward], **settings)
    build("reinforce", tmp_path, reward=reward)


# ---- advantages


def test_baselines_worked_out_by_hand(tmp_path):
    """Rewards of 1 and 3 on the last token of completions of 2 and 4 tokens, denominator 2: returns ½ ½, 1½ × 4."""

    def reward(prompts, completions, completion_ids, **columns):
        return [{2: 1.0, 4: 3.0}[len(ids)] for ids in completion_ids]

    expected = {"none": 0.0, "mean": (2 * 0.5 + 4 * 1.5) / 6}
    for baseline, value in expected.items():
        trainer = build(
            "reinforce",
            tmp_path,
            reward=reward,
            data=prompts(1),
            per_device_train_batch_size=2,
            baseline=baseline,
            return_denom=2.0,
        )
        samples_instead(trainer, [5, EOS], [4, 4, 7, EOS])
        advantages_BT = trainer.make_rollout(list(prompts(1))).advantages_BT
        torch.testing.assert_close(advantages_BT[0], torch.tensor([0.5 - value, 0.5 - value, 0.0, 0.0]))
        torch.testing.assert_close(advantages_BT[1], torch.full((4,), 1.5 - value))


# ---- checkpoints


@pytest.mark.parametrize("family", ["t5-tied", pytest.param("llama", marks=pytest.mark.slow)])
def test_resumed_run_goes_on_with_the_policy_that_sampled(family, tmp_path):
    """A checkpoint between two exchanges; the resumed run starts from another student, and as another copy."""
    settings = {"family": family, "max_steps": 5, "behaviour_sync_steps": 3, "learning_rate": 5e-2}
    whole = run("reinforce", tmp_path / "whole", save_strategy="steps", save_steps=2, **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = build("reinforce", tmp_path / "resumed", model=MODELS[family](seed=3), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    entries = [
        [e["behaviour_lag"] for e in trainer.state.log_history if "behaviour_lag" in e]
        for trainer in (whole.trainer, resumed)
    ]
    assert entries[0] == entries[1] == [0, 1, 2, 0, 1]
    assert_same_weights(snapshot(resumed.model), whole.weights[-1], rtol=1e-4, atol=1e-5)
    assert_same_weights(snapshot(resumed.behaviour), whole.weights[2], rtol=1e-4, atol=1e-5)


def test_a_run_without_a_copy_is_not_continued_with_one(tmp_path):
    run("reinforce", tmp_path / "first", max_steps=2, save_strategy="steps", save_steps=2)
    assert not (tmp_path / "first" / "checkpoint-2" / "behaviour").exists()
    resumed = build("reinforce", tmp_path / "resumed", behaviour_sync_steps=3, max_steps=3)
    with pytest.raises(InputError, match="behaviour_sync_steps was 0 and is 3"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))


def test_the_saved_student_has_no_copy_beside_it(tmp_path):
    recorder = run("reinforce", tmp_path, behaviour_sync_steps=3)
    recorder.trainer.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student" / "behaviour").exists()
