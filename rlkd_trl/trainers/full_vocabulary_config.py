"""Settings of the methods whose loss reads the teacher's whole distribution at every state."""

from dataclasses import dataclass, field

from rlkd_trl.errors import InputError
from rlkd_trl.ops.divergences import DIVERGENCES, ENSEMBLES
from rlkd_trl.ops.rewards import VALUES
from rlkd_trl.settings.ranges import Coefficient, Count, Positive, Share, ShareBelowOne, Temperature
from rlkd_trl.trainers.config import RolloutConfig

SEQUENCES = ("data", "teacher")


@dataclass
class FullVocabularyConfig(RolloutConfig):
    """The settings that `KDConfig` and `AllActionsKDConfig` share."""

    can_align = False

    ensemble: str = field(
        default="probabilities",
        metadata={
            "help": "Several teachers or templates as one: mean of their 'probabilities' or of their 'logits' "
            "(Hinton 2015)."
        },
    )

    @property
    def samples_from_teachers(self) -> str:
        """The setting by which completions are sampled from the teachers, who take turns; empty if none is."""
        return ""

    def _check(self) -> None:
        super()._check()
        self._check_choice("ensemble", ENSEMBLES)
        if self.align_tokenizers and not self.can_align:
            raise InputError(
                "align_tokenizers does not go with this method, which compares teacher and student over all tokens of "
                "one vocabulary: leave it out, or use PPO, RLOO, REINFORCE or kd."
            )


@dataclass
class KDConfig(FullVocabularyConfig):
    """Distillation by a divergence between teacher and student at every token, and by hard labels.

    Sequences come from `sequences`, or, with probability `lmbda` for each rollout, from the student.
    """

    can_align = True

    num_generations: Count = field(default=1, metadata={"help": "K, completions per input, drawn or sampled."})
    divergence: str = field(
        default="forward_kl",
        metadata={"help": f"Between teacher and student: {', '.join(DIVERGENCES)}."},
    )
    beta: Share | None = field(
        default=None,
        metadata={"help": "Of divergence jsd: 0 is forward KL, 1 reverse KL (GKD); 0.5 by default."},
    )
    skew: ShareBelowOne | None = field(
        default=None,
        metadata={"help": "Of the skewed KLs: share of the first distribution in the mixture (DistiLLM); 0.1."},
    )
    distillation_temperature: Temperature = field(
        default=1.0, metadata={"help": "T of both distributions in the divergence, which is times T² (Hinton 2015)."}
    )
    span_temperature: Temperature = field(
        default=100.0,
        metadata={"help": "With align_tokenizers: τ, to compare P^(1/τ) of a span's probability P (ALM; 100)."},
    )
    alpha: Share = field(
        default=1.0,
        metadata={
            "help": "Share of the divergence; 1 − alpha is that of the cross-entropy with the sequence's tokens."
        },
    )
    sequences: str = field(
        default="data",
        metadata={"help": "Off-policy sequences: 'data', each input's --target_column; or 'teacher', fresh samples."},
    )
    lmbda: Share = field(
        default=0.0,
        metadata={"help": "Probability that a rollout is the student's own samples instead (GKD); 1: on-policy."},
    )

    @property
    def samples_from_teachers(self) -> str:
        return "sequences = 'teacher'" if self.sequences == "teacher" and self.lmbda < 1 else ""

    @property
    def divergence_settings(self) -> dict[str, float]:
        """The keyword arguments of the divergence: `beta` or `skew`, or none."""
        if self.divergence == "jsd":
            return {"beta": 0.5 if self.beta is None else self.beta}
        if self.divergence.startswith("skew"):
            return {"skew": 0.1 if self.skew is None else self.skew}
        return {}

    def _check(self) -> None:
        super()._check()
        self._refuse_unused("kd, which reads no completions before its updates", "local_rollout_forward_batch_size")
        self._check_choice("divergence", DIVERGENCES)
        self._check_choice("sequences", SEQUENCES)
        if self.beta is not None and self.divergence != "jsd":
            raise InputError(f"beta = {self.beta} is a setting of divergence 'jsd', not of {self.divergence!r}.")
        if self.skew is not None and not self.divergence.startswith("skew"):
            raise InputError(f"skew = {self.skew} is a setting of the skewed KLs, not of {self.divergence!r}.")
        if self.alpha == 0:
            self._refuse_unused("alpha = 0", "divergence", "distillation_temperature", "ensemble", "span_temperature")
        if self.lmbda == 1:
            self._refuse_unused("lmbda = 1", "sequences")
        if self.align_tokenizers:
            self._check_aligned()
        else:
            self._refuse_unused("teachers of the student's tokenizer", "span_temperature")
        if self.alpha < 1 and self.lmbda > 0:
            raise InputError(
                f"lmbda = {self.lmbda} with alpha = {self.alpha}: the student's own samples would be its hard labels. "
                "Set lmbda to 0 (sequence-level distillation learns from data or the teacher), or alpha to 1."
            )

    def _check_aligned(self) -> None:
        """Raises `InputError` for settings that need teacher and student to have one vocabulary."""
        for name, only in (("distillation_temperature", 1.0), ("temperature", 1.0), ("ensemble", "probabilities")):
            if getattr(self, name) != only:
                raise InputError(
                    f"{name} = {getattr(self, name)!r} does not go with align_tokenizers, which compares the "
                    f"probabilities of texts, not whole distributions: leave it at {only!r}."
                )
        if self.samples_from_teachers:
            raise InputError(
                f"{self.samples_from_teachers} does not go with align_tokenizers: write the teacher's pseudo-labels "
                "beforehand (pseudo_label.py), and learn from these as data."
            )


@dataclass
class AllActionsKDConfig(FullVocabularyConfig):
    """The policy gradient with its immediate term over all actions; see `ops.all_actions`."""

    signal: str = field(
        default="log_ratio",
        metadata={
            "help": "g that the student earns per token: 'log_ratio', log p − log π, or 'teacher_forcing', f − V."
        },
    )
    value: str = field(default="max", metadata={"help": "V of signal teacher_forcing: max, expected or soft."})
    future_weight: Coefficient = field(
        default=0.1,
        metadata={"help": "w of the sampled future; 0: each token for itself (on-policy divergence), 1: in full."},
    )
    future: str = field(
        default="sampled",
        metadata={
            "help": "What it sums: g of the 'sampled' tokens, or its 'expected' value over all tokens in their states."
        },
    )
    gamma: Share = field(default=1.0, metadata={"help": "Discount γ of the future, the other way to weigh it."})
    length_normalization: bool = field(
        default=False, metadata={"help": "Divide the future by the number of its tokens (MiniLLM)."}
    )
    average_reward: str = field(
        default="none",
        metadata={
            "help": "Learn g per token instead of its sum, which prefers short texts: subtract from each token of the "
            "future the average g of the 'rollout', or of the other completions of the 'prompt'; or 'none'."
        },
    )
    baseline: str = field(
        default="leave_one_out",
        metadata={"help": "Subtracted from the future: 'leave_one_out', the prompt's other samples' mean, or 'none'."},
    )
    teacher_mix: ShareBelowOne = field(
        default=0.0,
        metadata={"help": "Share of the teacher in the distribution that tokens are sampled from (MiniLLM: 0.2)."},
    )
    epsilon: Positive | None = field(
        default=None,
        metadata={
            "help": "Clip range of the policy ratio in the future's term, for num_iterations > 1 (MiniLLM: 0.2)."
        },
    )

    @property
    def samples_from_teachers(self) -> str:
        return f"teacher_mix = {self.teacher_mix}" if self.teacher_mix else ""

    def _check(self) -> None:
        super()._check()
        self._check_choice("signal", ("log_ratio", "teacher_forcing"))
        self._check_choice("value", VALUES)
        self._check_choice("future", ("sampled", "expected"))
        self._check_choice("baseline", ("leave_one_out", "none"))
        if self.signal == "log_ratio":
            self._refuse_unused("signal 'log_ratio'", "value")
        else:
            self._refuse_unused("signal 'teacher_forcing', of which the mean is taken", "ensemble")
        if self.future_weight == 0:
            self._refuse_unused(
                "future_weight = 0", "future", "gamma", "length_normalization", "average_reward", "epsilon"
            )
        self._check_average_reward()
        if self.average_reward != "none" and self.length_normalization:
            raise InputError(
                f"average_reward = {self.average_reward!r} and length_normalization both take the preference for "
                "short texts away: use one of them."
            )
        if self.average_reward != "none" and self.teacher_mix > 0:
            raise InputError(
                f"average_reward = {self.average_reward!r} does not go with teacher_mix = {self.teacher_mix}: the "
                "average would be that of the mixture, not of the student."
            )
        if self.future == "expected" and (self.length_normalization or self.teacher_mix > 0):
            other = "length_normalization" if self.length_normalization else f"teacher_mix = {self.teacher_mix}"
            raise InputError(
                f"future = 'expected' with {other} would be the gradient of something else (see ops.all_actions): use "
                "one of them."
            )
        if self.teacher_mix > 0 and self.temperature != 1:
            raise InputError(
                f"teacher_mix = {self.teacher_mix} needs temperature 1 (it is {self.temperature}): the importance "
                "weights are taken there."
            )
        if self.baseline == "leave_one_out":
            self._check_leave_one_out("; or set baseline to 'none'")
