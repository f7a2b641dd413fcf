"""Settings of the trainers: `transformers.TrainingArguments` plus one block per concern.

Names are TRL's where TRL has one. A wrong combination raises `InputError` at construction, before any model is loaded.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated

from rlkd_trl.errors import InputError
from rlkd_trl.ops.average_reward import AVERAGES
from rlkd_trl.settings.ranges import (
    Coefficient,
    Count,
    CountFromZero,
    LearningRate,
    Length,
    Positive,
    Range,
    Share,
    Temperature,
    Weight,
)
from rlkd_trl.trainers.base_config import BaseConfig
from rlkd_trl.trainers.inherited_settings import REFUSED, REFUSED_ON_ROLLOUTS


@dataclass
class RolloutConfig(BaseConfig):
    """The settings that all trainers on rollouts share: sampling, the update's batches, the run's budget.

    A rollout is `per_device_train_batch_size × steps_per_generation` completions on each device, of
    `num_generations` per prompt. It is cut into `steps_per_generation` micro-batches, and passed over
    `num_iterations` times; every `gradient_accumulation_steps` micro-batches make one optimizer step.
    """

    refused = REFUSED | REFUSED_ON_ROLLOUTS
    can_align = True  # whether there can be `align_tokenizers`

    # Defaults of the base class that do not suit this use.
    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Completions per device and micro-batch."})
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimizer steps."})
    # Sampling
    num_generations: Count = field(default=4, metadata={"help": "K, completions sampled per prompt."})
    max_prompt_length: Length | None = field(
        default=512, metadata={"help": "Student prompts are cut at this many tokens."}
    )
    max_completion_length: Length = field(default=64, metadata={"help": "T, cap on sampled tokens, EOS included."})
    temperature: Temperature = field(
        default=1.0, metadata={"help": "Sampling temperature; log-probabilities are taken at it too."}
    )
    top_k: CountFromZero = field(default=0, metadata={"help": "Refused unless 0: see docs/limits.md."})
    top_p: Share = field(default=1.0, metadata={"help": "Refused unless 1: see docs/limits.md."})
    sampling_batch_size: Count = field(
        default=256, metadata={"help": "Completions decoded at a time on each device; more is faster, in more memory."}
    )
    local_rollout_forward_batch_size: Count = field(
        default=64,
        metadata={"help": "Completions read without gradients, for log-probabilities and values, at a time."},
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave truncated completions out of the loss."}
    )

    align_tokenizers: bool = field(
        default=False,
        metadata={
            "help": "Teachers may have other tokenizers than the student: what they say is summed over the text that "
            "both have read."
        },
    )

    # Update and budget
    steps_per_generation: Count | None = field(
        default=None, metadata={"help": "Micro-batches per rollout; gradient_accumulation_steps by default."}
    )
    num_iterations: Count = field(default=1, metadata={"help": "Passes over each rollout (PPO epochs)."})
    max_generated_tokens: Count | None = field(
        default=None,
        metadata={"help": "Stop after this many completion tokens (of all devices), if before max_steps."},
    )
    max_cpu_seconds: Positive | None = field(
        default=None, metadata={"help": "Stop after this much CPU time (of all processes), if before max_steps."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print some completions at every log, and send them to trackers."}
    )
    guards: bool = field(
        default=True,
        metadata={
            "help": "Warn when length, EOS rate, entropy, repetition or distinct outputs leave the start's range "
            "while the reward rises, and when many prompts get the same text; kd.py: when held-out outputs are worse "
            "in the end while the loss fell."
        },
    )
    num_completions_to_print: CountFromZero = field(default=4, metadata={"help": "How many, with log_completions."})

    def __post_init__(self):
        self._choose_metric("reward")
        super().__post_init__()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        self._check()

    def _check_choice(self, name: str, known: Collection[str]) -> None:
        """Raises `InputError` if the setting is none of those known."""
        if getattr(self, name) not in known:
            raise InputError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(known)}.")

    def _refuse_unused(self, because: str, *names: str) -> None:
        """Raises `InputError` for a setting that differs from its default and would change nothing."""
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise InputError(f"{name} = {getattr(self, name)!r} has no effect with {because}: leave it out.")

    def _check_average_reward(self) -> None:
        """Checks `average_reward`, in the configs that have it."""
        self._check_choice("average_reward", AVERAGES)
        if self.average_reward == "prompt" and self.num_generations < 2:
            raise InputError(
                f"average_reward = 'prompt' with num_generations = {self.num_generations}: the average is over the "
                "other completions of a prompt, so it needs at least 2; or set it to 'rollout'."
            )

    def _check_leave_one_out(self, alternative: str = "") -> None:
        """Raises `InputError` if there are no other completions of a prompt to compare with."""
        if self.num_generations < 2:
            raise InputError(
                f"num_generations = {self.num_generations}: leave-one-out compares the completions of a prompt with "
                f"each other and needs at least 2{alternative}."
            )

    @property
    def completions_per_rollout(self) -> int:
        """B, on each device."""
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def prompts_per_rollout(self) -> int:
        """P, on each device."""
        return self.completions_per_rollout // self.num_generations

    def _check_truncated_sampling(self) -> None:
        """Raises `InputError` for settings of sampling that the method's gradient does not allow."""
        if self.top_k != 0 or self.top_p != 1.0:
            raise InputError(
                f"top_k={self.top_k}, top_p={self.top_p}: truncated sampling changes the support of the policy as it "
                "learns, and the ratio of new to old probabilities is then undefined for tokens that leave it. Use "
                "temperature instead."
            )

    def _check(self) -> None:
        """Raises `InputError` for settings that do not go together; the base class has checked each one's range."""
        completions = self.completions_per_rollout
        if completions % self.num_generations:
            raise InputError(
                f"A rollout of {completions} completions per device (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} × steps_per_generation {self.steps_per_generation}) is not "
                f"divisible by num_generations {self.num_generations}."
            )
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise InputError(
                f"steps_per_generation {self.steps_per_generation} is not a multiple of "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}."
            )
        self._check_truncated_sampling()
        if self.remove_unused_columns:
            raise InputError("remove_unused_columns must stay False: templates and rewards read the data's columns.")


@dataclass
class OnPolicyConfig(RolloutConfig):
    """The settings that PPO, RLOO and REINFORCE share: rewards, baselines, and limits of an update."""

    # Reward
    reward_weights: list[Weight] | None = field(
        default=None, metadata={"help": "One weight per reward; 1.0 each by default."}
    )
    gamma: Share = field(default=1.0, metadata={"help": "Discount γ of returns and of the teacher-forcing reward."})
    beta: Coefficient = field(
        default=0.0, metadata={"help": "KL coefficient to the initial policy, per token; 0 loads no reference."}
    )
    kl_target: Positive | None = field(
        default=None, metadata={"help": "Adapt beta towards this KL, nats per sequence (Ziegler et al. 2019)."}
    )
    kl_horizon: Positive = field(default=10000, metadata={"help": "Adaptive KL: sequences over which beta reacts."})
    missing_eos_penalty: Annotated[float, Range(0, 1e6)] | None = field(
        default=None, metadata={"help": "Subtracted from the last token's reward of a truncated completion."}
    )
    teacher_baseline: bool = field(
        default=True,
        metadata={"help": "Shape token-level rewards by the teacher's V (same optimum, smaller returns)."},
    )
    average_reward: str = field(
        default="none",
        metadata={
            "help": "Learn reward per token instead of its sum, which prefers short texts: subtract from each token's "
            "reward its average over the 'rollout', or over the other completions of the 'prompt'; or 'none'."
        },
    )
    baseline: str = field(
        default="none",
        metadata={
            "help": "A constant subtracted from every advantage: 'none', the rollout's 'mean', or 'min_variance', for "
            "which the gradient varies least."
        },
    )

    # Update
    entropy_coef: Coefficient = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    normalize_advantages: bool = field(
        default=False, metadata={"help": "Whiten advantages over the rollout, all devices."}
    )
    early_stop_kl: Positive | None = field(
        default=None,
        metadata={"help": "Skip the rest of a rollout's updates once KL(old‖new) per token exceeds this, in nats."},
    )

    def _check(self) -> None:
        super()._check()
        self._check_average_reward()
        if self.average_reward != "none" and not self.teacher_baseline:
            raise InputError(
                f"average_reward = {self.average_reward!r} needs teacher_baseline: without shaping, a completion's "
                "rewards hold the teacher's V of its first state, so that their average prefers short texts. Set "
                "average_reward to 'none' for the sum of rewards without shaping."
            )
        self._check_choice("baseline", ("none", "mean", "min_variance"))
        if self.kl_target is not None and self.beta == 0:
            raise InputError("kl_target adapts beta, so beta must start above 0.")
        completions = self.completions_per_rollout * self.world_size
        if self.kl_target is not None and self.kl_horizon < completions:
            raise InputError(
                f"kl_horizon {self.kl_horizon} is shorter than one rollout of {completions} completions, so beta "
                "could turn negative."
            )


@dataclass
class ClippedPolicyConfig(OnPolicyConfig):
    """The settings of the methods with a clipped ratio, PPO and RLOO."""

    average_reward: str = field(
        default="rollout",
        metadata={
            "help": "Learn reward per token instead of its sum, which prefers short texts: subtract from each token's "
            "reward its average over the 'rollout', or over the other completions of the 'prompt'; or 'none'."
        },
    )
    epsilon: Positive = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})

    def _check(self) -> None:
        super()._check()
        if self.baseline != "none" and self.normalize_advantages:
            raise InputError(
                f"baseline = {self.baseline!r} has no effect with normalize_advantages, which takes any constant "
                "away: set normalize_advantages to False."
            )


@dataclass
class PPOKDConfig(ClippedPolicyConfig):
    """PPO with GAE and a value head (Schulman et al. 2017), on the teacher's token rewards."""

    normalize_advantages: bool = field(
        default=True, metadata={"help": "Whiten advantages over the rollout, all devices."}
    )
    lam: Share = field(default=0.95, metadata={"help": "λ of generalised advantage estimation."})
    vf_coef: Coefficient = field(default=0.1, metadata={"help": "Weight of the value loss."})
    critic_learning_rate: LearningRate | None = field(
        default=None, metadata={"help": "Learning rate of the critic's own weights; 10 × learning_rate by default."}
    )
    cliprange_value: Positive | None = field(
        default=None, metadata={"help": "Clip range of the normalised value; None does not clip."}
    )
    critic: str = field(
        default="shared",
        metadata={"help": "'shared': value head on the student's decoder; 'separate': on a copy of the student."},
    )

    def _check(self) -> None:
        super()._check()
        self._check_choice("critic", ("shared", "separate"))


@dataclass
class RLOOKDConfig(ClippedPolicyConfig):
    """REINFORCE leave-one-out (Ahmadian et al. 2024), for whole sequences or token by token."""

    level: str = field(
        default="sequence",
        metadata={
            "help": "'sequence': one reward, ratio and clip per completion, as in TRL; 'token': return-to-go of each "
            "token minus the other completions' at the same position."
        },
    )

    def _check(self) -> None:
        super()._check()
        self._check_choice("level", ("sequence", "token"))
        self._check_leave_one_out()
        if self.level == "sequence":
            self._refuse_unused(
                "level 'sequence', where the teacher's V of a prompt is the same for all its completions",
                "teacher_baseline",
            )
        if self.level == "sequence" and self.baseline == "mean":
            raise InputError(
                "baseline = 'mean' is not for level 'sequence', where the other completions of a prompt are the "
                "baseline: set baseline to 'none' or 'min_variance', or level to 'token'."
            )


@dataclass
class ReinforceKDConfig(OnPolicyConfig):
    """REINFORCE as in LLMR and KETCHUP: a lagging behaviour policy, top-k sampling, simple baselines."""

    top_k: CountFromZero = field(
        default=0,
        metadata={
            "help": "Sample from the k likeliest tokens; ratio, entropy and update are over these k. 0: from all. "
            "Hao 2022: 2."
        },
    )
    return_denom: Positive = field(
        default=1.0, metadata={"help": "Returns are divided by this, before baseline and clip. Hao 2022: 100."}
    )
    reward_clip: Positive | None = field(
        default=None, metadata={"help": "Clip of ratio × advantage, to ± this; None does not clip. Hao 2022: 1."}
    )
    ratio_cap: Annotated[float, Range(1, 1e9)] | None = field(
        default=None, metadata={"help": "Largest importance ratio, at least 1; None (the papers) does not cap."}
    )
    baseline: str = field(
        default="mean",
        metadata={
            "help": "A constant subtracted from every return: 'none' (LLMR), the rollout's 'mean', or 'min_variance', "
            "for which the gradient varies least."
        },
    )
    behaviour_sync_steps: CountFromZero = field(
        default=0,
        metadata={
            "help": "Optimizer steps after which the policy that samples is set to the student; 0 or 1: it is the "
            "student. Hao 2022, LLMR: 5000."
        },
    )

    @property
    def optimizer_steps_per_rollout(self) -> int:
        return self.steps_per_generation // self.gradient_accumulation_steps * self.num_iterations

    @property
    def samples_from_a_copy(self) -> bool:
        """Whether the behaviour policy is used for more than one rollout; otherwise the student itself samples."""
        return self.behaviour_sync_steps > self.optimizer_steps_per_rollout

    def _check_truncated_sampling(self) -> None:
        if self.top_p != 1.0:
            raise InputError(f"top_p={self.top_p} is not supported: use top_k, whose support has one size everywhere.")
        if self.top_k == 1:
            raise InputError(
                f"top_k = {self.top_k}: 0 samples from all tokens, 2 or more from that many; with one token to choose "
                "from, nothing is sampled and nothing learnt."
            )

    def _check(self) -> None:
        super()._check()
        steps = self.optimizer_steps_per_rollout
        if self.behaviour_sync_steps > 1 and self.behaviour_sync_steps % steps:
            raise InputError(
                f"behaviour_sync_steps {self.behaviour_sync_steps} is not a multiple of the {steps} optimizer steps "
                "that each rollout feeds: the policy can only be exchanged between rollouts."
            )
        if self.beta > 0 and (self.top_k or self.samples_from_a_copy):
            raise InputError(
                f"beta = {self.beta} goes with neither top_k nor behaviour_sync_steps: the KL penalty is taken on the "
                "policy that sampled, and that is then not the student."
            )
        if self.average_reward != "none" and self.samples_from_a_copy:
            raise InputError(
                f"average_reward = {self.average_reward!r} does not go with behaviour_sync_steps: the average would "
                "be that of the policy that sampled, which is then not the student."
            )
        if self.normalize_advantages and self.return_denom != 1.0:
            raise InputError("normalize_advantages undoes return_denom: set one of them.")
