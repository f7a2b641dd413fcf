"""Writes completions for the report while a run goes on: of the same held-out prompts, and of rollouts."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from rlkd_trl.data import listed_references
from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.run_log import COMPLETIONS_FILE, append_completions, keep_completions_until
from rlkd_trl.evaluation.samples import completion_log_probs
from rlkd_trl.evaluation.token_details import completion_records, reward_values
from rlkd_trl.models.answers import answer_prompts, decode, joined
from rlkd_trl.models.generation import Completions
from rlkd_trl.prompts import source_text
from rlkd_trl.rewards import RewardInputs
from rlkd_trl.students import Policy

if TYPE_CHECKING:
    from rlkd_trl.trainers.rollout_trainer import RolloutTrainer

logger = logging.get_logger(__name__)

HELD_OUT_PROMPTS = 5
_FIRST_STEP, _GROWTH = 10, 1.5  # held-out answers after 10, 15, 23, ... steps: changes are fastest at first


class SampleLog(TrainerCallback):
    """Appends to `completions.jsonl` in the output directory.

    Held-out: the greedy answers to the first `HELD_OUT_PROMPTS` held-out prompts, the teacher's and the student's
    before training, the student's from time to time and at the end. The teacher's are those that `teacher_answers` of
    the trainer has, or are generated. The time this takes is not the run's. Rollout: the
    samples of the last rollout, whenever it logs. Held-out answers also go to the trackers of `report_to`.
    """

    def __init__(self, trainer: "RolloutTrainer"):
        self._trainer = trainer
        self._rows = list(trainer.eval_dataset.select(range(min(HELD_OUT_PROMPTS, len(trainer.eval_dataset)))))
        self._path = Path(trainer.args.output_dir) / COMPLETIONS_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        if self._writes:
            keep_completions_until(self._path, state.global_step if state.global_step else -1)
        if state.global_step == 0:
            self._log_teacher()
            self._log_student(0)

    def on_step_end(self, args, state, control, **kwargs):
        if _is_due(state.global_step):
            self._log_student(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if _is_due(state.global_step):
            return
        try:
            self._log_student(state.global_step)
        except InputError as error:  # of a reward; the student is still to be saved
            logger.warning(f"The last held-out answers are not in {COMPLETIONS_FILE}: {error}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._writes and "loss" in logs:
            samples = [{"step": state.global_step, **sample} for sample in self._trainer.token_samples()]
            append_completions(self._path, samples)

    @property
    def _writes(self) -> bool:
        return self._trainer.is_world_process_zero()

    def _log_student(self, step: int) -> None:
        """All processes call it together."""
        trainer = self._trainer
        with trainer.uncounted(), trainer.mixed_precision(), trainer.whole_student():
            prompts = trainer.policy.writer.texts([row["prompt"] for row in self._rows])
            records = self._answers(
                trainer.policy, trainer.processing_class, self._rows, prompts, trainer.args.max_prompt_length
            )
        self._append(records, step=step, by="student")

    def _log_teacher(self) -> None:
        """The answers of the first teacher that a row is asked of, if its model is here. All processes call it."""
        if not self._trainer.reward_model.panels:
            return
        panel, records = self._trainer.reward_model.panels[0], []
        owner_P = panel.owned(self._rows).long().argmax(dim=0).tolist()
        for k, scorer in enumerate(panel.scorers):
            indices = [i for i, owner in enumerate(owner_P) if owner == k]
            rows, teacher = [self._rows[i] for i in indices], scorer.teacher
            if not rows or teacher.model is None:
                continue
            known = self._trainer.teacher_answers and self._trainer.teacher_answers.rows(indices)
            policy = Policy(teacher.model, teacher.processing_class, writer=teacher.writer)
            prompts = scorer.prompts([panel.questions(row) for row in rows])
            with self._trainer.uncounted(), self._trainer.mixed_precision():
                records += self._answers(
                    policy, teacher.processing_class, rows, prompts, teacher.max_prompt_length, completions=known
                )
        self._append(records, step=0, by="teacher")

    @torch.no_grad()
    def _answers(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[dict],
        prompts: list[str],
        max_prompt_length: int | None,
        completions: Completions | None = None,
    ) -> list[dict[str, Any]]:
        """Records of a model's greedy answers to what it is asked for each row, with its own log-probabilities.

        completions: the answers, if they are known.
        """
        trainer, reward_model = self._trainer, self._trainer.reward_model
        if completions is None:
            answers = answer_prompts(
                policy.model,
                tokenizer,
                prompts,
                max_prompt_length=max_prompt_length,
                max_completion_length=trainer.args.max_completion_length,
            )
            completions = joined(answers, pad_id=policy.pad_id)
        logps_BT = completion_log_probs(policy, tokenizer, prompts, completions, max_prompt_length=max_prompt_length)
        values = {}
        if all(panel.can_score for panel in reward_model.panels):
            inputs = RewardInputs(
                rows=rows,
                prompt_index_B=torch.arange(len(rows), device=completions.ids_BT.device),
                completion_ids_BT=completions.ids_BT,
                completion_mask_BT=completions.mask_BT,
                ended_B=completions.ended_B,
                completions=decode(completions, tokenizer),
                student_logps_BT=logps_BT,
                forbidden_V=policy.forbidden_V,
                tokenizer=tokenizer,
            )
            scores = reward_model.score(inputs)
            result = reward_model.rewards(inputs, scores, allow_not_finite=True)
            values = reward_values(reward_model, scores, result, completions.mask_BT)
        if policy is trainer.policy:
            values["student_logp"] = logps_BT
        records = completion_records(
            [source_text(row["prompt"]) for row in rows],
            completions,
            tokenizer,
            values,
            kind="held-out",
        )
        references = [listed_references(row.get("references")) for row in rows]
        return [{**record, "references": texts} for record, texts in zip(records, references, strict=True)]

    def _append(self, records: list[dict[str, Any]], **common: object) -> None:
        if self._writes:
            append_completions(self._path, [{**common, **record} for record in records])
        rows = [
            {
                **common,
                "prompt": record["prompt"],
                "completion": record["text"],
                "reward": record.get("total"),
                "references": record["references"],
            }
            for record in records
        ]
        self._trainer.tracker_tables.add("held_out_completions", rows)


def _is_due(step: int) -> bool:
    """Whether the student's held-out answers are written after this step: 10, 15, 23, 34, ..."""
    due = _FIRST_STEP
    while due < step:
        due = math.ceil(due * _GROWTH)
    return due == step
