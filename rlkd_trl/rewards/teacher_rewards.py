"""Rewards from a teacher's scores, one number per token.

Each class stands for one equation of `rlkd_trl.ops.rewards` and names the statistics that it reads. An instance is
also a TRL reward function: `GRPOTrainer(reward_funcs=[TeacherForcingReward(...)])` gets each completion's sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.vocabulary import eos_token_ids, require_eos
from rlkd_trl.ops.rewards import (
    VALUES,
    bootstrap_truncated,
    centre,
    k_step_return,
    log_likelihood,
    log_ratio,
    rewards_from_returns,
    sequence_sum,
    teacher_forcing_reward,
)
from rlkd_trl.prompts import ChatFormat, Message, PromptTemplates, is_conversation
from rlkd_trl.rewards.inputs import RewardInputs
from rlkd_trl.settings.ranges import Count, Share, Temperature, check_values
from rlkd_trl.teachers.absent import AbsentTeacher
from rlkd_trl.teachers.panel import TeacherPanel
from rlkd_trl.teachers.scores import TeacherScores, weighted_mean
from rlkd_trl.teachers.teacher import Teacher


class TeacherReward:
    """A per-token reward computed from a teacher's scores, averaged over teachers and templates.

    Args:
        model: A `Teacher`, a loaded model, a checkpoint's directory or Hub id, a list of any of these, or a
            `TeacherPanel`.
        processing_class: The teacher's tokenizer; needed only for a loaded model.
        templates: How the teacher is asked; without templates it is asked what the student is.
        chat: Whether the teacher is asked through a chat template; by default, if its tokenizer has one (see
            `PromptWriter`). A `Teacher` has a `chat` of its own.
        student_tokenizer: That of the completions that this is called with, where a teacher may have another one: its
            rewards are then summed over the text that both tokenizers have read. A completion for which the teacher
            has no tokens gets NaN. (The trainers here have `align_tokenizers` instead.)

    Raises:
        InputError: As `Teacher` and `TeacherPanel`; a loaded model comes without its tokenizer, or a `Teacher` or
            `TeacherPanel` with `chat`.
    """

    # Whether `rewards` reads `RewardInputs.student_logps_BT`; False can save the trainers a forward pass.
    reads_student_log_probs = True
    # Whether it reads `TeacherScores.allowed_logsumexp`.
    reads_allowed_logsumexp = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "rewards" in vars(cls):  # a subclass's `rewards` may read what its base's does not
            cls.reads_student_log_probs = vars(cls).get("reads_student_log_probs", True)

    def __init__(
        self,
        model: "TeacherPanel | Teacher | PreTrainedModel | str | Sequence",
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        templates: PromptTemplates | None = None,
        chat: ChatFormat | None = None,
        student_tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.student_tokenizer = student_tokenizer
        if isinstance(model, TeacherPanel):
            if chat is not None:
                raise InputError("The teachers of a `TeacherPanel` have their chat format: give `chat` to `Teacher`.")
            self.panel = model
        else:
            self.panel = _panel(model, processing_class, templates, chat)

    @property
    def __name__(self) -> str:  # TRL logs a reward function under this name
        return type(self).__name__

    def wanted_statistics(self) -> dict[str, object]:
        """The statistics that `rewards` reads beyond the default: `expected` and `tau` of `Teacher.score`."""
        return {}

    def rewards(self, scores: TeacherScores, inputs: RewardInputs) -> Tensor:
        """`[B, T]` rewards from one scorer's scores, 0 behind the mask."""
        raise NotImplementedError

    def potentials(self, scores: TeacherScores) -> Tensor:
        """Φ(s_t) for potential-based shaping, `[B, T+1]`; 0 if the reward implies no potential."""
        return torch.zeros_like(scores.logsumexp)

    def score_tokens(self, prompts: list[str] | list[list[Message]], completions_ids: list[list[int]]) -> list[Tensor]:
        """The reward of every token: one float32 tensor `[T_i]` per completion.

        `prompts[i]` is the source text, or the conversation, that completion i answers; equal ones are read once. A
        completion whose last id is not EOS counts as truncated.

        Raises:
            InputError: The numbers of prompts and completions differ, a prompt is neither text nor a conversation, a
                completion has ids that the teacher does not have, or is too long for its positions.
        """
        _require_one_each(prompts, completions_ids)
        if not prompts:
            return []
        inputs = self._inputs([{"prompt": _checked(prompt, i)} for i, prompt in enumerate(prompts)], completions_ids)
        rewards_BT = self.mean_over_scorers(score_panel(self.panel, inputs, [self]), inputs)
        return [rewards_T[: len(ids)] for rewards_T, ids in zip(rewards_BT, completions_ids, strict=True)]

    def __call__(self, prompts, completions=None, completion_ids=None, **kwargs) -> list[float]:
        """TRL's reward-function protocol: one sum per completion. Extra columns reach the templates.

        A completion without EOS at its end was cut off. Then γ Φ(s_{n+1}) is added to its last token's reward, as the
        trainers here do it (`ops.rewards.bootstrap_truncated`). For the teacher-forcing reward this cancels the
        −γ V(s_{n+1}), which would punish a completion for reaching the length cap. `score_tokens` returns the rewards
        without this correction.

        Raises:
            InputError: There are no `completion_ids`; or as `score_tokens`.
        """
        if completion_ids is None:
            raise InputError(f"{self.__name__} scores token ids: call it with `completion_ids`, as TRL 1.x does.")
        _require_one_each(prompts, completion_ids)
        columns = {name: v for name, v in kwargs.items() if isinstance(v, list) and len(v) == len(prompts)}
        rows = [
            {**{name: values[i] for name, values in columns.items()}, "prompt": _checked(prompt, i)}
            for i, prompt in enumerate(prompts)
        ]
        if not rows:
            return []
        inputs = self._inputs(rows, completion_ids)
        mask_BT, scores = inputs.completion_mask_BT, score_panel(self.panel, inputs, [self])
        rewards_BT = bootstrap_truncated(
            self.mean_over_scorers(scores, inputs),
            self.mean_potentials(scores),
            mask_BT,
            inputs.ended_B,
            gamma=getattr(self, "gamma", 1.0),
        )
        return sequence_sum(rewards_BT, mask_BT).tolist()

    def _inputs(self, rows: list[dict], completions_ids: list[list[int]]) -> RewardInputs:
        """The `RewardInputs` of one completion per row; without EOS at its end a completion counts as truncated."""
        teacher = self.panel.scorers[0].teacher
        if self.student_tokenizer is None:
            eos_ids = set(eos_token_ids(teacher.model, teacher.processing_class))
        else:
            require_eos(self.student_tokenizer)
            eos_ids = {self.student_tokenizer.eos_token_id}
        lengths = [len(ids) for ids in completions_ids]
        ids_BT = torch.zeros(len(rows), max([1, *lengths]), dtype=torch.long)
        for row_T, ids in zip(ids_BT, completions_ids, strict=True):
            row_T[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        if self.student_tokenizer is None and teacher.model is not None:
            vocab_size, least, most = teacher.backbone.vocab_size, int(ids_BT.min()), int(ids_BT.max())
            if least < 0 or most >= vocab_size:
                raise InputError(
                    f"A completion has the token id {least if least < 0 else most}, and the teacher has ids from 0 to "
                    f"{vocab_size - 1}: if they are of another tokenizer, name it (student_tokenizer)."
                )
        return RewardInputs(
            rows=rows,
            prompt_index_B=torch.arange(len(rows)),
            completion_ids_BT=ids_BT,
            completion_mask_BT=torch.arange(ids_BT.shape[1])[None, :] < torch.tensor(lengths)[:, None],
            ended_B=torch.tensor([bool(ids) and ids[-1] in eos_ids for ids in completions_ids]),
            tokenizer=self.student_tokenizer,
        )

    def mean_over_scorers(self, scores: list[TeacherScores], inputs: RewardInputs) -> Tensor:
        """The weighted mean of `rewards` over teachers and templates, `[B, T]`."""
        return weighted_mean((self.on_students_tokens(of_scorer, inputs) for of_scorer in scores), scores)

    def on_students_tokens(self, scores: TeacherScores, inputs: RewardInputs) -> Tensor:
        """`rewards` of one scorer; of a teacher with another tokenizer, summed over common spans (see `Alignment`).

        Each completion's sum stays what it is in the teacher's tokens.
        """
        if scores.alignment is None:
            return self.rewards(scores, inputs)
        return scores.on_students_tokens(self.rewards(scores, inputs.of_teacher(scores.alignment)))

    def mean_potentials(self, scores: list[TeacherScores]) -> Tensor:
        """The weighted mean of `potentials`, `[B, T+1]`."""
        return weighted_mean((s.at_students_states(self.potentials(s)) for s in scores), scores)


class TeacherForcingReward(TeacherReward):
    """r_t = q_t − γ V_{t+1} (Hao, Liu & Mou 2022; Li, Hao & Mou 2024, "LLMR").

    Args:
        value: V is the "max" of the centred logits f (Hao 2022), their "expected" value under the teacher's softmax
            (LLMR), or "soft", τ logsumexp(f/τ), with which the reward is a shaped log-likelihood at τ = 1.
        gamma: The discount γ, 0 to 1; use that of the trainer.
        k: The number of steps in KETCHUP's K-step return (Fan et al. 2026); 1 is the one-step reward.
        tau: The temperature τ of value="soft".

    Raises:
        InputError: Unknown `value`; `k`, `tau` or `gamma` out of range, NaN or infinite.
    """

    reads_student_log_probs = False

    def __init__(
        self,
        model,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        templates: PromptTemplates | None = None,
        chat: ChatFormat | None = None,
        student_tokenizer: PreTrainedTokenizerBase | None = None,
        value: str = "max",
        gamma: float = 1.0,
        k: int = 1,
        tau: float = 1.0,
    ):
        if value not in VALUES:
            raise InputError(f"Unknown value {value!r} for the teacher-forcing reward; choose one of {VALUES}.")
        check_values({"k": k, "tau": tau, "gamma": gamma}, {"k": Count, "tau": Temperature, "gamma": Share}, prefix="")
        super().__init__(model, processing_class, templates=templates, chat=chat, student_tokenizer=student_tokenizer)
        self.value, self.gamma, self.k, self.tau = value, gamma, k, tau

    def wanted_statistics(self) -> dict[str, object]:
        return {"expected": self.value == "expected", "tau": self.tau if self.value == "soft" else None}

    def score_tokens(self, prompts: list[str] | list[list[Message]], completions_ids: list[list[int]]) -> list[Tensor]:
        """As `TeacherReward.score_tokens`.

        Raises:
            InputError: The teacher's mean logits are not known, which the reward of a single token depends on.
        """
        if self._lacks_mean():
            raise InputError(
                "The teacher-forcing reward of a single token depends on the teacher's mean logit, and a server tells "
                "log-probabilities only: train with PPO, RLOO or REINFORCE of this package, where shaping cancels it, "
                "take LogLikelihoodReward, or give the teacher itself."
            )
        return super().score_tokens(prompts, completions_ids)

    def __call__(self, prompts, completions=None, completion_ids=None, **kwargs) -> list[float]:
        """As `TeacherReward.__call__`.

        Raises:
            InputError: As there; or gamma is below 1, and the teacher's mean logits are not known.
        """
        if self.gamma < 1 and self._lacks_mean():
            raise InputError(
                f"With gamma = {self.gamma} the sum of teacher-forcing rewards depends on the teacher's mean logits, "
                "and a server tells log-probabilities only: set gamma to 1, where all sums of a prompt differ by one "
                "constant, or give the teacher itself."
            )
        return super().__call__(prompts, completions, completion_ids, **kwargs)

    def _lacks_mean(self) -> bool:
        return any(scorer.teacher.model is None for scorer in self.panel.scorers)

    def rewards(self, scores: TeacherScores, inputs: RewardInputs) -> Tensor:
        q_BT = centre(scores.chosen, scores.centre_BT1[:, :-1])
        values_BT1 = self.potentials(scores)
        mask_BT, ended_B = inputs.completion_mask_BT, inputs.ended_B
        if self.k == 1:
            return teacher_forcing_reward(q_BT, values_BT1, mask_BT, ended_B, gamma=self.gamma)
        returns_BT = k_step_return(q_BT, values_BT1, mask_BT, ended_B, k=self.k, gamma=self.gamma)
        return rewards_from_returns(returns_BT, gamma=self.gamma)

    def potentials(self, scores: TeacherScores) -> Tensor:
        return centre(getattr(scores, self.value), scores.centre_BT1)


class LogLikelihoodReward(TeacherReward):
    """log p_teacher(y_t | s_t), in nats. Its sum is minus the teacher's NLL of the completion."""

    reads_student_log_probs = False

    def rewards(self, scores: TeacherScores, inputs: RewardInputs) -> Tensor:
        return log_likelihood(scores.chosen, scores.logsumexp[:, :-1], inputs.completion_mask_BT)


class LogRatioReward(TeacherReward):
    """log p_teacher − log p_student, whose expectation is minus the reverse KL (MiniLLM; on-policy distillation).

    Both distributions are over the ids that the student may sample. The teacher's temperature is 1, so for a student
    that equals its teacher and is sampled at temperature 1 the ratio is 0.
    """

    reads_allowed_logsumexp = True

    def rewards(self, scores: TeacherScores, inputs: RewardInputs) -> Tensor:
        return self.on_students_tokens(scores, inputs)

    def on_students_tokens(self, scores: TeacherScores, inputs: RewardInputs) -> Tensor:
        """The teacher's log-probabilities less those of the student's tokens.

        Those of a teacher with another tokenizer are summed over common spans, so that the completion's sum is the
        ratio of two probabilities of its text, each in its model's own tokens; 0 on tokens that the teacher has not
        read.
        """
        if inputs.student_logps_BT is None:
            raise InputError("log_ratio needs the student's log-probabilities, which only the trainers here have.")
        logps_BT = scores.allowed_log_likelihood(inputs.completion_mask_BT)
        return log_ratio(logps_BT, inputs.student_logps_BT, scores.read_mask(inputs.completion_mask_BT))


def _require_one_each(prompts: Sequence, completions_ids: Sequence) -> None:
    """Raises `InputError` unless there are a list of prompts and as many completions."""
    if isinstance(prompts, str):
        raise InputError(f"The prompts are one text, {prompts[:40]!r}: give a list of them, one for each completion.")
    if len(prompts) != len(completions_ids):
        raise InputError(f"{len(prompts)} prompts for {len(completions_ids)} completions: give one each.")


def _checked(prompt: object, index: int) -> str | list[Message]:
    """The prompt, if it is a text or a conversation; else raises `InputError`."""
    if not isinstance(prompt, str) and not is_conversation(prompt):
        kind = type(prompt).__name__
        raise InputError(
            f"Prompt {index + 1} is {prompt!r} ({kind}), not text and not a conversation (a list of messages): "
            "convert it, or leave it out."
        )
    return prompt


def score_panel(panel: TeacherPanel, inputs: RewardInputs, terms: Sequence[TeacherReward]) -> list[TeacherScores]:
    """The panel's scores with every statistic that one of `terms` reads.

    Raises:
        InputError: Two terms need different `tau`; or as `TeacherPanel.score`.
    """
    statistics: dict[str, object] = {"expected": False, "tau": None}
    for term in terms:
        for name, value in term.wanted_statistics().items():
            if value:
                if name == "tau" and statistics["tau"] not in (None, value):
                    raise InputError(f"Two reward terms want different tau: {statistics['tau']} and {value}.")
                statistics[name] = value
    return panel.score(
        inputs.rows,
        inputs.prompt_index_B,
        inputs.completion_ids_BT,
        inputs.completion_mask_BT,
        inputs.ended_B,
        tokenizer=inputs.tokenizer,
        forbidden_V=inputs.forbidden_V if any(term.reads_allowed_logsumexp for term in terms) else None,
        **statistics,
    )


def _panel(model, processing_class, templates: PromptTemplates | None, chat: ChatFormat | None = None) -> TeacherPanel:
    def teacher(model_or_name) -> Teacher:
        if isinstance(model_or_name, Teacher | AbsentTeacher):
            if chat is not None:
                raise InputError("A loaded `Teacher` has its chat format: give `chat` where it is made.")
            return model_or_name
        if isinstance(model_or_name, str):
            return Teacher.from_pretrained(model_or_name, chat=chat)
        if processing_class is None:
            raise InputError("A loaded teacher model needs its tokenizer: pass `processing_class`.")
        return Teacher(model_or_name, processing_class, chat=chat)

    return TeacherPanel([teacher(m) for m in (model if isinstance(model, list | tuple) else [model])], templates)
