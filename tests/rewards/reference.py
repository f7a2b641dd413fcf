"""The teacher-forcing reward as slow float64 loops over one completion's own logits, written from the papers."""

import math

import torch

from tests.models.reference import own_logits


@torch.no_grad()
def logits_of(model, tokenizer, prompt: str, ids: list[int]) -> list[list[float]]:
    """z_1 .. z_{T+1} as Python floats, of the pair alone, from the model's own forward pass."""
    return own_logits(model, tokenizer(prompt)["input_ids"], ids).double().tolist()


def value(z: list[float], kind: str, tau: float = 1.0) -> float:
    """V of one state, on centred logits."""
    mean = sum(z) / len(z)
    f = [x - mean for x in z]
    top = max(f)
    if kind == "max":
        return top
    if kind == "expected":
        weights = [math.exp(x - top) for x in f]
        return sum(w * x for w, x in zip(weights, f, strict=True)) / sum(weights)
    return top + tau * math.log(sum(math.exp((x - top) / tau) for x in f))


def teacher_forcing(z_TV, ids, *, ended, kind="max", gamma=1.0, k=1, tau=1.0) -> list[float]:
    """r_t. For k > 1, from KETCHUP's K-step returns G_t as r_t = G_t − γ G_{t+1}."""
    n = len(ids)
    q = [z_TV[t][ids[t]] - sum(z_TV[t]) / len(z_TV[t]) for t in range(n)]
    v = [value(z, kind, tau) for z in z_TV[: n + 1]]
    if ended:
        v[n] = 0.0
    if k == 1:
        return [q[t] - gamma * v[t + 1] for t in range(n)]

    def k_step_return(t: int) -> float:
        total, start = 0.0, t
        while start < n:
            end = min(start + k, n)
            total += gamma ** (start - t) * (q[start] - gamma ** (end - start) * v[end])
            start = end
        return total

    return [k_step_return(t) - gamma * k_step_return(t + 1) for t in range(n)]


def teacher_forcing_sum(z_TV, ids, *, ended, kind="max", gamma=1.0, tau=1.0, k=1) -> float:
    """Σ r_t, and γ V of the state after a completion that was cut off: what TRL is given."""
    rewards = teacher_forcing(z_TV, ids, ended=ended, kind=kind, gamma=gamma, k=k, tau=tau)
    return sum(rewards) + (0.0 if ended else gamma * value(z_TV[len(ids)], kind, tau))


def log_probability(z: list[float], token: int) -> float:
    top = max(z)
    return z[token] - top - math.log(sum(math.exp(x - top) for x in z))
