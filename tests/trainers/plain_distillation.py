"""Updates of KD and all-actions in loops written from the papers, in float64, on plain forward passes."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlkd_trl import TeacherForcingReward
from rlkd_trl.prompts import PromptTemplate, PromptTemplates
from rlkd_trl.teachers import Teacher, TeacherPanel
from tests.students.plain_forward import ALLOWED, plain_forward
from tests.tiny_models import MODELS, UNK, word_tokenizer
from tests.trainers.plain_update import Sample, average_rewards


@dataclass
class Asked:
    """A teacher, how it is asked, and its share."""

    model: PreTrainedModel
    template: str = "{}"
    share: float = 1.0

    def question(self, sample: Sample) -> list[int]:
        tokenizer = word_tokenizer()
        text = tokenizer.decode(sample.prompt, skip_special_tokens=True)
        return tokenizer(self.template.format(text))["input_ids"]

    @torch.no_grad()
    def logits(self, sample: Sample) -> Tensor:
        """`[T, V]` float64, padding rows included."""
        return plain_forward(self.model, self.question(sample), sample.completion)[0][:-1].double()


def asked_twice(family: str) -> tuple[TeacherForcingReward, list[Asked]]:
    """Two teachers of shares ¼ and ¾, each asked through two templates; the same for the trainer and the loops."""
    templates = PromptTemplates(
        [PromptTemplate("before", "w9 {{ source }}"), PromptTemplate("after", "{{ source }} w10")]
    )
    teachers = [Teacher(MODELS[family](seed=seed), word_tokenizer()) for seed in (5, 6)]
    asked = [
        Asked(MODELS[family](seed=seed), template, share / 2)
        for seed, share in ((5, 0.25), (6, 0.75))
        for template in ("w9 {}", "{} w10")
    ]
    return TeacherForcingReward(TeacherPanel(teachers, templates, teacher_weights=[1.0, 3.0])), asked


def log_probs(model: PreTrainedModel, sample: Sample, temperature: float) -> Tensor:
    """log π over the ids that may be sampled, `[T, A]`, differentiable."""
    logits = plain_forward(model, sample.prompt, sample.completion)[0][:-1].double()
    return torch.log_softmax(logits[:, ALLOWED] / temperature, dim=-1)


def ensemble_log_probs(args, teachers: list[Asked], sample: Sample, temperature: float) -> Tensor:
    """log p of the teachers together, `[T, A]`."""
    scaled = [(asked.share, asked.logits(sample)[:, ALLOWED] / temperature) for asked in teachers]
    if args.ensemble == "logits":
        return torch.log_softmax(sum(share * z for share, z in scaled), dim=-1)
    return sum(share * torch.softmax(z, dim=-1) for share, z in scaled).log()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(dim=-1)


def divergence(args, p: Tensor, q: Tensor) -> Tensor:
    """Of the teacher's and the student's probabilities, `[T]`."""
    settings = args.divergence_settings
    if args.divergence == "forward_kl":
        return kl(p, q)
    if args.divergence == "reverse_kl":
        return kl(q, p)
    if args.divergence == "tvd":
        return (p - q).abs().sum(dim=-1) / 2
    if args.divergence == "jsd":
        beta = settings["beta"]
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    skew = settings["skew"]
    if args.divergence == "skew_kl":
        return kl(p, skew * p + (1 - skew) * q)
    assert args.divergence == "skew_reverse_kl"
    return kl(q, (1 - skew) * p + skew * q)


def in_loss(args, sample: Sample) -> bool:
    return sample.ended or not args.mask_truncated_completions


def kd_loss(
    args, samples: list[Sample], teachers: list[Asked], student: PreTrainedModel, *, from_data: bool
) -> Tensor:
    """Σ_t ( α T² D(p_T, q_T) − (1−α) log q_1(y_t) ) per token; of data, tokens that are unknown do not count."""
    total, tokens, T = 0.0, 0, args.distillation_temperature
    for sample in samples:
        counts = [in_loss(args, sample) and not (from_data and y == UNK) for y in sample.completion]
        if args.alpha > 0:
            p, q = ensemble_log_probs(args, teachers, sample, T).exp(), log_probs(student, sample, T).exp()
            soft = divergence(args, p, q)
        hard = log_probs(student, sample, 1.0)
        for t, y in enumerate(sample.completion):
            if not counts[t]:
                continue
            if args.alpha > 0:
                total = total + args.alpha * T**2 * soft[t]
            total = total - (1 - args.alpha) * hard[t, ALLOWED.index(y)]
            tokens += 1
    return total / tokens


def signals(args, teachers: list[Asked], sample: Sample) -> Tensor:
    """The teacher's part of g for every id that may be sampled, `[T, A]`."""
    if args.signal == "log_ratio":
        return ensemble_log_probs(args, teachers, sample, 1.0)
    total = 0.0
    for asked in teachers:
        z = asked.logits(sample)
        values = {
            "max": z.max(dim=-1).values,
            "expected": (torch.softmax(z, dim=-1) * z).sum(dim=-1),
            "soft": torch.logsumexp(z, dim=-1),
        }
        total = total + asked.share * (z - values[args.value][:, None])[:, ALLOWED]
    return total


def futures(args, samples: list[Sample], signals_of: list[Tensor], old_logps: list[Tensor]) -> list[list[float]]:
    """F_t − b_t of each token, with g of the policy that sampled."""
    earned = []
    for sample, g, logps in zip(samples, signals_of, old_logps, strict=True):
        if args.signal == "log_ratio":
            g = g - logps
        if args.future == "expected":
            earned.append((logps.exp() * g).sum(dim=-1).tolist())
        else:
            earned.append([float(g[t, ALLOWED.index(y)]) for t, y in enumerate(sample.completion)])
    averages = average_rewards(args, earned, [0.0] * len(samples))
    K, found = args.num_generations, []
    for i in range(len(samples)):
        group = range(i // K * K, i // K * K + K)
        rows = {j: _futures_of([g - averages[i] for g in earned[j]], args) for j in group}
        others = [rows[j] for j in group if j != i and args.baseline != "none"]
        found.append(
            [f - sum(other[t] for other in others if t < len(other)) / max(1, K - 1) for t, f in enumerate(rows[i])]
        )
    return found


def _futures_of(earned: list[float], args) -> list[float]:
    n, row = len(earned), []
    for t in range(n):
        later = sum(args.gamma ** (i - t) * earned[i] for i in range(t + 1, n))
        row.append(later / max(1, n - 1 - t) if args.length_normalization else later)
    return row


def all_actions_loss(
    args, samples: list[Sample], teachers: list[Asked], student: PreTrainedModel, at_rollout: PreTrainedModel
) -> Tensor:
    """−Σ_t ( Σ_a π(a|s_t) g(s_t, a) + the surrogate of w (F_t − b_t) ) per token."""
    total, tokens = 0.0, 0
    signals_of = [signals(args, teachers, sample) for sample in samples]
    with torch.no_grad():
        old_logps = [log_probs(at_rollout, sample, args.temperature) for sample in samples]
    advantages = futures(args, samples, signals_of, old_logps)
    for sample, g, old, row in zip(samples, signals_of, old_logps, advantages, strict=True):
        if not in_loss(args, sample):
            continue
        logps = log_probs(student, sample, args.temperature)
        if args.signal == "log_ratio":
            g = g - logps
        for t, y in enumerate(sample.completion):
            a = ALLOWED.index(y)
            ratio, weighted = (logps[t, a] - old[t, a]).exp(), args.future_weight * row[t]
            future = ratio * weighted
            if args.epsilon is not None:
                future = torch.minimum(future, ratio.clamp(1 - args.epsilon, 1 + args.epsilon) * weighted)
            total = total - (logps[t].exp() * g[t]).sum() - future
            tokens += 1
    return total / tokens


def assert_gradients(recorder, step: int, loss: Tensor, student: PreTrainedModel) -> None:
    """The step's logged loss, gradient norm and gradients against those of `loss`."""
    assert abs(recorder.logs[step]["loss"] - float(loss.detach())) < 1e-5 + 1e-4 * abs(float(loss.detach()))
    parameters = dict(student.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    norm = float(torch.cat([gradient.flatten() for gradient in expected if gradient is not None]).norm())
    assert norm > 1e-2
    assert abs(recorder.logs[step]["grad_norm"] - norm) < 1e-3 * norm
    for name, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(
                recorder.gradients[step][f"model.{name}"],
                gradient,
                rtol=1e-3,
                atol=2e-5 * norm,
                msg=lambda m, name=name: f"{name}: {m}",
            )
