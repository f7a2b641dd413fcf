"""Distillation without reinforcement learning: a divergence at every token of data, teacher or student sequences."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers.utils import logging

from rlkd_trl.models.answers import decode
from rlkd_trl.models.generation import Completions
from rlkd_trl.models.prompts import target_token_ids
from rlkd_trl.ops.alignment import span_divergences
from rlkd_trl.ops.divergences import DIVERGENCES, ENSEMBLES, sliced_divergence
from rlkd_trl.ops.finite import usable_rows
from rlkd_trl.ops.masking import completion_mask, masked_sum
from rlkd_trl.ops.sliced_loss import LossAndMetrics
from rlkd_trl.ops.truncated import sliced_truncated_divergence
from rlkd_trl.students import Policy
from rlkd_trl.teachers.cache import CachedPanel
from rlkd_trl.teachers.scores import readable_by_all
from rlkd_trl.trainers.cache_checks import check_cache_settings, check_same_ids
from rlkd_trl.trainers.checks import check_targets
from rlkd_trl.trainers.full_vocabulary import FullVocabularyTrainer
from rlkd_trl.trainers.full_vocabulary_config import KDConfig
from rlkd_trl.trainers.rollout import Rollout
from rlkd_trl.trainers.rollout_metrics import completion_metrics, sample_table

logger = logging.get_logger(__name__)

_SOURCE_STREAM = 1  # of the rollout's random numbers


class KDTrainer(FullVocabularyTrainer):
    """Word-level and sequence-level distillation (Kim & Rush 2016), GKD (Agarwal et al. 2024), f-distill (Wen et al.
    2023), DistiLLM's skewed divergences (Ko et al. 2024) and Hinton et al. 2015, by settings.

    A rollout's sequences are the student's own samples with probability `lmbda`, else those of `args.sequences`:
    targets of the data (the column `references`, a list of texts per row, of which one is drawn each time), or fresh
    samples of a teacher, the scorers taking turns. The student's log-probabilities get all the gradient: where
    sequences come from is not differentiated through, as in all of these papers.

    With `align_tokenizers` a teacher with another tokenizer is compared with the student on the common spans of their
    tokens, by the probability of each span's text (`ops.alignment.span_divergences`).

    Where this differs from the papers: GKD draws student or data per batch, here per rollout, the same on all devices;
    f-distill pairs its divergences with sequences (KL: teacher, reverse KL: student, JS and TVD: both), which presets
    do here; the adaptive part of DistiLLM's sampling (a replay buffer and a threshold) is left out.

    A `CachedPanel` in place of teachers has their distributions along the data's targets in files; nothing of them is
    loaded, and evaluations have no teacher.

    Raises:
        InputError: As `FullVocabularyTrainer`; data sequences are asked for, and `references` is missing or empty.
    """

    args: KDConfig

    def __init__(self, model, teacher, args: KDConfig, train_dataset, *positional, **kwargs):
        check_targets(train_dataset, args)
        super().__init__(model, teacher, args, train_dataset, *positional, **kwargs)
        self._samplers = {
            id(scorer.teacher): Policy(
                scorer.teacher.model,
                self.processing_class,
                temperature=args.temperature,
                writer=self.policy.writer,
            )
            for scorer in (self.panel.scorers if args.sequences == "teacher" else [])
        }
        self._divergence = partial(DIVERGENCES[args.divergence], **args.divergence_settings)
        if args.align_tokenizers and args.alpha > 0 and self.is_world_process_zero():
            logger.warning(
                "The divergence over common spans is least near the student that agrees with the teacher, not at it, "
                "where tokens begin alike, and on one answer per input it says little of what else the teacher might "
                "write (docs/limits.md): compare with alpha = 0 and with RLOO on held-out data."
            )
        if isinstance(self.panel, CachedPanel):
            policy = self.policy
            check_same_ids(self.panel.cache.header, policy.forbidden_V, policy.eos_ids, self.processing_class)

    def _check_panel(self, args: KDConfig) -> None:
        if not isinstance(self.panel, CachedPanel):
            super()._check_panel(args)
            return
        check_cache_settings(self.panel.cache.header, args)

    @torch.no_grad()
    def make_rollout(self, rows: list[dict]) -> Rollout:
        """Sequences for this device's prompts, and the teachers' states along them."""
        args, timer = self.args, self._timer
        draw = torch.rand((), generator=self.sampling.generator(self._rollout_number, stream=_SOURCE_STREAM))
        source = "student" if draw < args.lmbda else args.sequences
        prompt_PS = self.sampling.student_prompts(self.policy, rows)
        with timer.phase("sample"):
            if source == "data":
                completions = self._targets(rows)
            elif source == "teacher":  # in its own precision
                completions = self._teacher_samples(rows)
            else:
                with self.mixed_precision(), self.whole_student():
                    completions = self.sampling.completions(self.policy, *prompt_PS, self._rollout_number)
        rollout = self.sampling.rollout_of(prompt_PS, completions).with_(old_logps_BT=None)  # no ratio is taken
        if source == "data":
            rollout = rollout.with_(loss_mask_BT=rollout.loss_mask_BT & self._to_learn(rollout.completion_ids_BT))
        with timer.phase("score"):
            if args.alpha > 0 and args.align_tokenizers:
                rollout, usable_B, readable_B = self._with_span_log_probs(rollout, rows)
                rollout = self._dropping(rollout, rows, usable_B, readable_B=readable_B)
            elif args.alpha > 0:
                rollout = self._with_teacher_states(rollout, rows, are_references=source == "data")
                rollout = self._dropping(rollout, rows, self._usable_states(rollout))
            if self.rollout_state.lost:
                return rollout
        self._metrics.record(
            {**completion_metrics(rollout, self._sum_over_ranks), "student_samples": source == "student"}
        )
        if source == "student":
            self._guard(rollout, {})
        self.sample_table = sample_table(
            rows, decode(completions, self.processing_class), rollout, args.num_completions_to_print
        )
        return rollout

    def _with_span_log_probs(
        self, rollout: Rollout, rows: list[dict]
    ) -> tuple[Rollout, dict[str, Tensor], Tensor | None]:
        """The rollout with the teachers' log-probabilities of common spans; what is usable and readable, `[B]`."""
        mask_BT = rollout.completion_mask_BT
        scores = self.panel.score(
            rows,
            rollout.prompt_index_B,
            rollout.completion_ids_BT,
            mask_BT,
            rollout.ended_B,
            tokenizer=self.processing_class,
            forbidden_V=self.policy.forbidden_V,
        )
        each_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)
        logps = [of_scorer.allowed_log_likelihood(mask_BT) for of_scorer in scores]
        rollout = rollout.with_(
            span_logps=logps,
            span_ends=[each_BT if s.alignment is None else s.alignment.last_BT for s in scores],
            teacher_shares=[s.weight for s in scores] if self.panel.differs_by_example else None,
        )
        usable_B = torch.stack([usable_rows(logps_BT, mask_BT) for logps_BT in logps]).all(dim=0)
        return rollout, {"the teacher's log-probabilities": usable_B}, readable_by_all(scores)

    def _targets(self, rows: list[dict]) -> Completions:
        """`num_generations` of each row's targets, drawn with replacement."""
        K, device = self.args.num_generations, self.accelerator.device
        draws_B = self.sampling.uniforms(len(rows) * K, self._rollout_number)[:, 0].tolist()
        texts = [row["references"] for row in rows for _ in range(K)]
        drawn = [targets[int(draw * len(targets))] for targets, draw in zip(texts, draws_B, strict=True)]
        ids = [
            target_token_ids(self.processing_class, text, max_length=self.args.max_completion_length) for text in drawn
        ]
        ids_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in ids], batch_first=True, padding_value=-1
        ).to(device)
        mask_BT, ended_B = completion_mask(ids_BT, self.policy.eos_ids)
        mask_BT = mask_BT & (ids_BT >= 0)
        return Completions(torch.where(mask_BT, ids_BT, self.policy.pad_id), mask_BT, ended_B)

    def _to_learn(self, ids_BT: Tensor) -> Tensor:
        """False on tokens of targets that the student must not learn: ids that are never sampled, e.g. <unk>."""
        return ~self.policy.forbidden_V[ids_BT]

    def _teacher_samples(self, rows: list[dict]) -> Completions:
        number = self._rollout_number % len(self.panel.scorers)
        scorer = self.panel.scorers[number]
        sampler, tokenizer = self._samplers[id(scorer.teacher)], scorer.teacher.processing_class
        texts = scorer.prompts([self.panel.questions(row) for row in rows])
        prompt_PS = self.sampling.tokenized(sampler.backbone, texts, scorer.teacher.max_prompt_length, tokenizer)
        return self.sampling.completions(sampler, *prompt_PS, self._rollout_number)

    def micro_batch_loss(
        self, model, batch: Rollout, *, tokens: Tensor, sequences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        args, mask_BT = self.args, batch.completion_mask_BT
        if args.align_tokenizers:
            return self._loss_of_spans(model, batch, tokens=tokens)
        loss_of_states = partial(
            self._loss_of_teachers(batch),
            weights_N=batch.loss_mask_BT[mask_BT].float() / tokens,
            labels_N=batch.completion_ids_BT[mask_BT],
            divergence=self._divergence,
            vocab_size=self.policy.backbone.vocab_size,
            temperature=args.distillation_temperature,
            alpha=args.alpha,
            forbidden_V=self.policy.forbidden_V,
        )
        work = partial(model, **batch.policy_inputs(), function_of_states=loss_of_states)
        return work() if isinstance(self.panel, CachedPanel) else self._with_teachers_heads(work)

    def _loss_of_teachers(self, batch: Rollout) -> Callable[..., LossAndMetrics]:
        """The loss of the student's states, with what the teachers say about the batch's real tokens bound to it."""
        if isinstance(self.panel, CachedPanel):
            logps_BTk1, ids_BTk = batch.teacher_states
            mask_BT = batch.completion_mask_BT
            return partial(
                sliced_truncated_divergence, top_ids_Nk=ids_BTk[mask_BT], teacher_logps_Nk1=logps_BTk1[mask_BT]
            )
        teachers = self._teachers_at(batch) if self.args.alpha > 0 else []
        return partial(sliced_divergence, teachers=teachers, ensemble=ENSEMBLES[self.args.ensemble])

    def _loss_of_spans(self, model, batch: Rollout, *, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with teachers of other tokenizers: over the common spans of each, and on hard labels."""
        args, mask_BT, learnt_BT = self.args, batch.completion_mask_BT, batch.loss_mask_BT
        outputs = model(**batch.policy_inputs(), with_entropy=False, with_final_value=False, precise=True)
        logps_BT = outputs.logps_BT
        parts = {}
        if args.alpha > 0:
            shares = batch.teacher_shares or self.panel.weights
            divergences = (
                span_divergences(
                    of_teacher_BT,
                    logps_BT,
                    last_BT,
                    mask_BT,
                    learnt_BT,
                    divergence=self._divergence,
                    temperature=args.span_temperature,
                )
                for of_teacher_BT, last_BT in zip(batch.span_logps, batch.span_ends, strict=True)
            )
            weighted = (share * of_spans_BT for share, of_spans_BT in zip(shares, divergences, strict=True))
            parts["divergence"] = sum(weighted).sum() / tokens
        if args.alpha < 1:
            parts["cross_entropy"] = -masked_sum(logps_BT, learnt_BT) / tokens
        weights = {"divergence": args.alpha, "cross_entropy": 1 - args.alpha}
        loss = sum(weights[name] * part for name, part in parts.items())
        return loss, {name: part.detach() for name, part in parts.items()}
