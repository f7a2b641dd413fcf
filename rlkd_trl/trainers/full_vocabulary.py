"""The base of the trainers whose loss reads the teacher's whole distribution at every state.

A rollout keeps the teachers' hidden states, `[B, T, D']`. Logits of teachers and student exist for one slice of
positions at a time, in the update (see `ops.sliced_loss`).
"""

from collections.abc import Callable
from functools import partial

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlkd_trl.errors import InputError
from rlkd_trl.models.backbone import Result
from rlkd_trl.ops.all_actions import chosen_signals, log_ratio_signal
from rlkd_trl.ops.divergences import TeacherStates
from rlkd_trl.ops.finite import usable_states
from rlkd_trl.prompts import PromptTemplates
from rlkd_trl.rewards import RewardModel, TeacherForcingReward
from rlkd_trl.teachers import Teacher, TeacherPanel
from rlkd_trl.teachers.panel import PER_EXAMPLE
from rlkd_trl.trainers.full_vocabulary_config import FullVocabularyConfig
from rlkd_trl.trainers.rollout import Rollout
from rlkd_trl.trainers.rollout_trainer import RolloutTrainer


class FullVocabularyTrainer(RolloutTrainer):
    """Base of `KDTrainer` and `AllActionsKDTrainer`.

    Args:
        model: The student, loaded, or its directory or Hub id.
        teacher: A `TeacherPanel`; or one teacher or a list of them, each a `Teacher`, a directory or a Hub id.
        args: The method's config.
        train_dataset: Rows with a column `prompt`: what the student reads, texts or conversations. Other columns
            reach the templates.
        eval_dataset: The same, with `references` (lists of strings) for text metrics where the data has them.
        processing_class: The student's tokenizer; loaded with the model when that is a name.
        templates: How the teachers are asked; a `TeacherPanel` has its own.
        peft_config: Adapters to train in place of the student's weights, as in TRL (among the keyword arguments).
        chat: How the student is spoken to (likewise); see `RolloutTrainer`.

    `evaluate` also gives the mean teacher-forcing reward (value="max"), which is not what is trained on.

    Raises:
        InputError: Tokenizers differ, no `prompt` column, fewer prompts than one rollout needs, T5 with fp16.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher: TeacherPanel | Teacher | str | list[Teacher | str],
        args: FullVocabularyConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        templates: PromptTemplates | None = None,
        **kwargs,
    ):
        reward = TeacherForcingReward(teacher, templates=templates)
        self.panel = reward.panel
        self._check_panel(args)
        if self.panel.routing is not None and args.samples_from_teachers:
            raise InputError(
                f"{args.samples_from_teachers} has the teachers take turns, and each example has its own by the "
                "routing's column: write each teacher's pseudo-labels beforehand (pseudo_label.py), and learn from "
                "these as data."
            )
        super().__init__(model, RewardModel([reward]), args, train_dataset, eval_dataset, processing_class, **kwargs)

    def _check_panel(self, args: FullVocabularyConfig) -> None:
        """Raises `InputError` for teachers that do not tell what this method reads."""
        for scorer in self.panel.scorers:
            if scorer.teacher.model is None:
                raise InputError(
                    f"{type(self).__name__} reads the teacher's whole distribution along any completion, which needs "
                    f"its model: {scorer.teacher.describe()} does not tell it."
                )

    def _with_teacher_states(self, rollout: Rollout, rows: list[dict], *, are_references: bool = False) -> Rollout:
        """The rollout with the teachers' states, and with their shares where these differ by example.

        are_references: the completions are what is right (see `TeacherPanel.shares`).
        """
        index_B, mask_BT = rollout.prompt_index_B, rollout.completion_mask_BT
        states = self.panel.states(rows, index_B, rollout.completion_ids_BT, mask_BT)
        rollout = rollout.with_(teacher_states=states)
        if not self.panel.differs_by_example:
            return rollout
        logps_KBT = []
        if self.panel.weighting == PER_EXAMPLE:
            logps_KBT = self._with_teachers_heads(partial(self._teachers_log_probs, rollout))
        shares = self.panel.shares(rows, index_B, logps_KBT, mask_BT, are_references=are_references)
        return rollout.with_(teacher_shares=shares)

    def _teachers_log_probs(self, rollout: Rollout) -> list[Tensor]:
        """Each scorer's log p(y_t | s_t) of the completions' tokens, `[B, T]`."""
        mask_BT, logps_KBT = rollout.completion_mask_BT, []
        for scorer, teacher in zip(self.panel.scorers, self._teachers_at(rollout), strict=True):
            logps_N = chosen_signals(
                [teacher],
                rollout.completion_ids_BT[mask_BT].to(teacher.hidden_ND.device),
                teacher_signal=log_ratio_signal,
                vocab_size=scorer.teacher.backbone.vocab_size,
            )
            zeros_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
            logps_KBT.append(zeros_BT.masked_scatter(mask_BT, logps_N.to(mask_BT.device)))
        return logps_KBT

    def _usable_states(self, rollout: Rollout) -> dict[str, Tensor]:
        """Whether all of the teachers' states along a completion are finite, `[B]`."""
        mask_BT = rollout.completion_mask_BT
        usable = [usable_states(states_BTD, mask_BT).to(mask_BT.device) for states_BTD in rollout.teacher_states]
        return {"the teacher's states": torch.stack(usable).all(dim=0)}

    def _teachers_at(self, rollout: Rollout) -> list[TeacherStates]:
        """The teachers' states at the N real tokens, in the order in which `Policy.of_states` has the student's."""
        mask_BT = rollout.completion_mask_BT
        weights = [scorer.weight for scorer in self.panel.scorers]
        if rollout.teacher_shares is not None:
            weights = [share_B1.expand_as(mask_BT)[mask_BT] for share_B1 in rollout.teacher_shares]
        return [
            TeacherStates(states_BTD[mask_BT], scorer.teacher.backbone.head, weight)
            for scorer, states_BTD, weight in zip(self.panel.scorers, rollout.teacher_states, weights, strict=True)
        ]

    def _with_teachers_heads(self, work: Callable[[], Result]) -> Result:
        """`work()`, inside which also a sharded teacher's head can be applied; all processes call it together."""
        for backbone in dict.fromkeys(scorer.teacher.backbone for scorer in self.panel.scorers):
            work = partial(backbone.with_whole_head, work)
        return work()
