"""One update of PPO or RLOO in loops written from the papers, in float64, on plain forward passes of the models."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlkd_trl.trainers.rollout import Rollout
from tests.students.plain_forward import chosen_log_probs, entropies, plain_forward, plain_values
from tests.tiny_models import EOS


@dataclass
class Sample:
    prompt: list[int]
    completion: list[int]
    ended: bool


@dataclass
class Targets:
    """Per sample: log π_old per token, the critic's output per state s_1 .. s_{T+1}, advantage and target per token.

    The critic's output and its targets are normalised returns: (G − mean) / standard deviation.
    """

    old_logps: list[list[float]]
    old_values: list[list[float]] | None
    advantages: list[list[float]]
    returns: list[list[float]] | None


def samples_of(rollout: Rollout) -> list[Sample]:
    """What was sampled, as lists; nothing else is taken from the rollout."""
    samples = []
    for b, p in enumerate(rollout.prompt_index_B.tolist()):
        prompt = rollout.prompt_ids_PS[p][rollout.prompt_mask_PS[p].bool()].tolist()
        completion = rollout.completion_ids_BT[b][rollout.completion_mask_BT[b]].tolist()
        samples.append(Sample(prompt, completion, completion[-1] == EOS))
    return samples


@torch.no_grad()
def teacher_rewards(
    teacher: PreTrainedModel, sample: Sample, gamma: float, k: int = 1
) -> tuple[list[float], list[float]]:
    """r_t and Φ_t = max f_t, with f the logits minus their mean; V after EOS is 0.

    r_t = f_t[y_t] − γ max f_{t+1}; for k > 1 that whose return-to-go is the K-step return, G_t − γ G_{t+1}, where G_t
    = f_t[y_t] − γ^m V_{t+m} + γ^m G_{t+m} with m = k, or to the end if that is nearer.
    """
    f = plain_forward(teacher, sample.prompt, sample.completion)[0].double()
    f = f - f.mean(dim=-1, keepdim=True)
    values = [float(row.max()) for row in f]
    if sample.ended:
        values[-1] = 0.0
    if k == 1:
        return [float(f[t, y]) - gamma * values[t + 1] for t, y in enumerate(sample.completion)], values
    n = len(sample.completion)
    returns = [0.0] * (n + 1)
    for t in reversed(range(n)):
        m = min(k, n - t)
        returns[t] = float(f[t, sample.completion[t]]) + gamma**m * (returns[t + m] - values[t + m])
    return [returns[t] - gamma * returns[t + 1] for t in range(n)], values


def targets_of(
    args,
    method: str,
    samples: list[Sample],
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    critic: PreTrainedModel | None,
    head: nn.Linear | None,
    return_moments: tuple[float, float] | None = None,
    k: int = 1,
) -> Targets:
    """Advantages and returns of a rollout that `student` (with `critic` and `head`) sampled.

    `return_moments`: the running mean and variance of earlier rollouts' returns; without any, values
    count as they are.
    """
    gamma = args.gamma
    rewards, earned_once, old_logps, old_values = [], [], [], []
    for s in samples:
        r, phi = teacher_rewards(teacher, s, gamma, k)
        earned_once.append(0.0)
        if args.missing_eos_penalty is not None and not s.ended:
            r[-1] -= args.missing_eos_penalty
            earned_once[-1] = -args.missing_eos_penalty
        if args.teacher_baseline and (method != "rloo-sequence" or args.average_reward != "none"):
            r = [r[t] + gamma * phi[t + 1] - phi[t] for t in range(len(r))]
        elif method != "ppo" and not s.ended:  # the teacher's value stands for what was cut off
            r[-1] += gamma * phi[-1]
        rewards.append(r)
        old_logps.append(chosen_log_probs(student, s.prompt, s.completion, args.temperature).tolist())
        if head is not None:
            old_values.append(plain_values(critic, head, s.prompt, s.completion).tolist())
    averages = average_rewards(args, rewards, earned_once)

    returns = None
    if method == "ppo":
        advantages, returns = [], []
        mean, variance = return_moments or (0.0, 1.0)
        for s, r, average, normalised in zip(samples, rewards, averages, old_values, strict=True):
            r = [x - average for x in r]
            v = [mean + variance**0.5 * value for value in normalised]
            if s.ended:
                v[-1] = 0.0
            a, following = [0.0] * len(r), 0.0
            for t in reversed(range(len(r))):
                following = r[t] + gamma * v[t + 1] - v[t] + gamma * args.lam * following
                a[t] = following
            advantages.append(a)
            returns.append([a[t] + v[t] for t in range(len(r))])
        # The first rollout's moments, or 9/10 of the old first and second moment and 1/10 of the new.
        every = [g for i in range(len(samples)) if _in_loss(args, samples[i]) for g in returns[i]]
        first, second = sum(every) / len(every), sum(g**2 for g in every) / len(every)
        if return_moments is not None:
            first, second = 0.9 * mean + 0.1 * first, 0.9 * (variance + mean**2) + 0.1 * second
        returns = [[(g - first) / (second - first**2) ** 0.5 for g in row] for row in returns]
    else:
        advantages = []
        K = args.num_generations
        for i in range(len(samples)):
            group = range(i // K * K, i // K * K + K)
            to_go = {j: returns_to_go([x - averages[i] for x in rewards[j]], gamma) for j in group}
            a = []
            for t in range(len(rewards[i])):
                at = 0 if method == "rloo-sequence" else t
                others = [to_go[j][at] if at < len(to_go[j]) else 0.0 for j in group if j != i]
                a.append(to_go[i][at] - sum(others) / (K - 1))
            advantages.append(a)

    if args.baseline != "none":  # its weight for a token: 1, or about the squared norm of ∂ log π / ∂ logits
        weights, weighted = 0.0, 0.0
        for i in range(len(samples)):
            for a, logp in zip(advantages[i], old_logps[i], strict=True) if _in_loss(args, samples[i]) else ():
                w = 1.0 if args.baseline == "mean" else (1 - math.exp(logp)) ** 2
                weights, weighted = weights + w, weighted + w * a
        advantages = [[a - weighted / weights for a in row] for row in advantages]
    if args.normalize_advantages:
        kept = [a for i in range(len(samples)) if _in_loss(args, samples[i]) for a in advantages[i]]
        mean = sum(kept) / len(kept)
        deviation = (sum((a - mean) ** 2 for a in kept) / len(kept)) ** 0.5
        advantages = [[(a - mean) / deviation for a in row] for row in advantages]
    return Targets(old_logps, old_values or None, advantages, returns)


def returns_to_go(rewards: list[float], gamma: float) -> list[float]:
    returns, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * following
        returns[t] = following
    return returns


def average_rewards(args, rewards: list[list[float]], earned_once: list[float]) -> list[float]:
    """Each sample's ρ: reward per token of all samples, or of its prompt's others, without what is earned once."""
    K, averages = args.num_generations, []
    for i in range(len(rewards)):
        if args.average_reward == "none":
            averages.append(0.0)
            continue
        counted = range(len(rewards))
        if args.average_reward == "prompt":
            counted = [j for j in range(i // K * K, i // K * K + K) if j != i]
        total = sum(sum(rewards[j]) - earned_once[j] for j in counted)
        averages.append(total / sum(len(rewards[j]) for j in counted))
    return averages


def _in_loss(args, sample: Sample) -> bool:
    return sample.ended or not args.mask_truncated_completions


def plain_loss(
    args,
    method: str,
    samples: list[Sample],
    targets: Targets,
    student: PreTrainedModel,
    critic: PreTrainedModel | None,
    head: nn.Linear | None,
) -> Tensor:
    """The scalar that the optimizer step descends, differentiable in the student, critic and head."""
    kept = [i for i in range(len(samples)) if _in_loss(args, samples[i])]
    tokens = sum(len(samples[i].completion) for i in kept)
    policy, value, entropy = 0.0, 0.0, 0.0
    for i in kept:
        s = samples[i]
        old = torch.tensor(targets.old_logps[i], dtype=torch.float64)
        log_ratio = chosen_log_probs(student, s.prompt, s.completion, args.temperature) - old
        advantages = torch.tensor(targets.advantages[i], dtype=torch.float64)
        if method == "rloo-sequence":
            log_ratio, advantages = log_ratio.sum()[None], advantages[:1]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
        policy = policy + torch.minimum(ratio * advantages, clipped * advantages).sum()
        entropy = entropy + entropies(student, s.prompt, s.completion, args.temperature).sum()
        if head is not None:
            v = plain_values(critic, head, s.prompt, s.completion)[:-1]
            v_old = torch.tensor(targets.old_values[i][: len(s.completion)], dtype=torch.float64)
            goal = torch.tensor(targets.returns[i], dtype=torch.float64)
            error = (v - goal) ** 2
            if args.cliprange_value is not None:
                c = args.cliprange_value
                error = torch.maximum(error, (torch.clamp(v, v_old - c, v_old + c) - goal) ** 2)
            value = value + 0.5 * error.sum()
    denominator = len(kept) if method == "rloo-sequence" else tokens
    loss = -policy / denominator - args.entropy_coef * entropy / tokens
    return loss + args.vf_coef * value / tokens if head is not None else loss
