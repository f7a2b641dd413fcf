"""Distillation of encoders: the student learns the teacher's hidden states, attention and logits."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from rlkd_trl.data.streams import RowStream, known_rows
from rlkd_trl.errors import InputError, is_first_process
from rlkd_trl.evaluation.encoders import Seen
from rlkd_trl.evaluation.not_finite import NOT_FINITE, count_not_finite
from rlkd_trl.models.generation_config import completion_start_ids
from rlkd_trl.models.layer_tensors import LayerReader, LayerTensors, Wanted
from rlkd_trl.models.private_apis import whole_shape
from rlkd_trl.models.vocabulary import base_of
from rlkd_trl.students.encoder import EncoderStudent
from rlkd_trl.students.joint_encoders import JointEncoders, mean_logits
from rlkd_trl.trainers.budget import Spent
from rlkd_trl.trainers.checks import check_endless, check_evaluated, check_sharding
from rlkd_trl.trainers.distillation_trainer import DistillationTrainer
from rlkd_trl.trainers.encoder_checks import (
    check_rows,
)
from rlkd_trl.trainers.encoder_config import EncoderKDConfig
from rlkd_trl.trainers.encoder_data import ROW, NumberedRows, NumberedStream, TextCollator, masked_tokens
from rlkd_trl.trainers.encoder_losses import Teachings, count_units, logits_of, token_mask
from rlkd_trl.trainers.encoder_preparation import prepare_encoders
from rlkd_trl.trainers.encoder_teachers import (
    SeveralTeachings,
    merged,
)
from rlkd_trl.trainers.finite import MicroBatch
from rlkd_trl.trainers.rollout_metrics import RunningMeans
from rlkd_trl.trainers.run_record import architecture_record, model_record
from rlkd_trl.trainers.signatures import whole_signature


class EncoderKDTrainer(DistillationTrainer):
    """Trains one stage of encoder distillation on a weighted sum of losses, `args.losses`.

    Losses of layers and of a language model's logits are averaged over the real tokens of the global batch, `hard_ce`
    and losses of class logits over its texts, `mlm_ce` over its masked tokens. Losses on a layer map are summed over
    the map's pairs. The update does not depend on how the batch is divided into micro-batches and processes.

    Args:
        model: The student, with the head that the stage trains (`models.encoders.HEADS`), or the name of a checkpoint,
            to which a missing head is added. `students.from_teacher.smaller_student` makes new students.
        teacher: The teacher, or the name of a checkpoint; None if no loss needs one.
        train_dataset: Rows with `text`, or `input_ids`; optional are `text_pair` (an encoder-decoder's target),
            `label` (a class's number, or a float in regression) and `next_sentence_label`. Or a `RowStream` of them.
        data_collator: Replaces the trainer's own, for instance by one of transformers' for tokenised rows.
        peft_config: Adapters to train in place of the model's weights, as in TRL.
        more_teachers: More teachers; each loss is summed over all (see `PanelLosses`).
        weigh_teachers: With several in a task: whether `logits_kl` is weighed per text by each teacher's own error
            (MT-BERT).
        trained_along: More encoders, trained on labels together with `model`, under its head (see `JointEncoders`).

    Raises:
        InputError: The losses do not fit the models or the data; tokenizers or labels differ; `args` has more than one
            stage (`args.of_stage(0)` is the first).
    """

    args: EncoderKDConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher: PreTrainedModel | PeftModel | str | None,
        args: EncoderKDConfig,
        train_dataset: Dataset | RowStream,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        data_collator=None,
        peft_config: PeftConfig | None = None,
        more_teachers: Sequence[PreTrainedModel | str] = (),
        weigh_teachers: bool = True,
        trained_along: Sequence[PreTrainedModel] = (),
        **kwargs,
    ):
        if len(args.stages) > 1:
            raise InputError(f"args has {len(args.stages)} stages, and a trainer is for one: give args.of_stage(0).")
        self.objective = objective = args.objective(0)
        check_sharding(args)
        known = known_rows(train_dataset)
        if isinstance(train_dataset, RowStream):
            check_endless(args)
        check_rows(known, objective, "training data")
        check_evaluated(args, eval_dataset)
        if eval_dataset is not None:
            check_rows(eval_dataset, objective, "evaluation data")
        encoders = prepare_encoders(
            model,
            [] if teacher is None else [teacher, *more_teachers],
            args,
            objective,
            [known] if eval_dataset is None else [known, eval_dataset],
            processing_class,
            peft_config=peft_config,
            weigh_teachers=weigh_teachers,
            trained_along=trained_along,
        )
        model, student, teachers = encoders.model, encoders.student, encoders.teachers
        processing_class = encoders.processing_class
        self._teachers_readers, self._losses = encoders.readers, encoders.losses
        self.teacher = next(iter(teachers), None)
        self.teachers_reader = next(iter(self._teachers_readers), None)
        self._wanted, self._wanted_of_teachers = self._wanted_layers(student.reader)
        self._means = RunningMeans()
        self._step_metrics: dict[str, float] = defaultdict(float)
        self.spent = Spent()
        self.sample_table: list[dict[str, object]] = []
        self.only_class: str | None = None
        # The tokenizer puts a forced BOS into the target itself, so only the first of the start ids is given.
        start_id = completion_start_ids(model)[0] if base_of(model).config.is_encoder_decoder else None
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator
            or TextCollator(
                processing_class,
                args.max_length,
                start_id=start_id,
                of_task=objective.stage == "task",
            ),
            **kwargs,
        )
        is_stream = isinstance(train_dataset, RowStream)
        self.train_dataset = NumberedStream(train_dataset) if is_stream else NumberedRows(train_dataset)
        self.loss_is_scaled_for_ga = True  # the counts that losses are divided by are those of the whole step
        for frozen in teachers:
            frozen.to(self.accelerator.device)
        self.run_record |= {
            "student": architecture_record(model),
            "teacher": model_record(teachers[0]) if teachers else None,
        }
        if len(teachers) > 1:
            more = [model_record(other) for other in teachers[1:]]
            self.run_record["more_teachers"] = {"models": more, "weighed_per_text": weigh_teachers}
        if trained_along:
            self.run_record["trained_along"] = [type(encoder).__name__ for encoder in trained_along]
        if objective.reads_maps and is_first_process():
            print(
                f"Attention maps are read: {self._mapped_layers()} run eager attention, all others SDPA.", flush=True
            )

    @property
    def student(self) -> EncoderStudent:
        """The student as it is now, out of its distributed wrapper."""
        return self.accelerator.unwrap_model(self.model_wrapped)

    # Layers and inputs of the two models

    def _wanted_layers(self, student: LayerReader) -> tuple[Wanted, list[Wanted]]:
        """By stack and kind of tensor, the layers whose tensors the losses read: the student's, each teacher's."""
        of_student, of_teachers = [], []
        for teacher in self._teachers_readers:
            of_stacks = {
                stack: self.objective.wanted(student.num_layers(stack), teacher.num_layers(stack))
                for stack in student.stacks
            }
            of_student.append({stack: pair[0] for stack, pair in of_stacks.items()})
            of_teachers.append({stack: pair[1] for stack, pair in of_stacks.items()})
        return merged(of_student), of_teachers

    def _mapped_layers(self) -> str:
        """The layers whose attention maps are read, in words."""
        parts = []
        for who, wanted in (("the student", self._wanted), ("the teacher", merged(self._wanted_of_teachers))):
            layers = sorted({layer for of_stack in wanted.values() for layer in of_stack.get("scores", ())})
            parts.append(f"layers {', '.join(map(str, layers))} of {who}")
        return " and ".join(parts)

    def _model_inputs(self, model: PreTrainedModel | PeftModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a batch that this model's `forward` takes, without labels."""
        known = inspect.signature(base_of(model).forward).parameters
        names = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")
        return {name: batch[name] for name in names if name in batch and name in known}

    @torch.no_grad()
    def _teachings(self, batch: Mapping[str, Tensor]) -> Teachings | SeveralTeachings | None:
        if not self._teachers_readers or not self.objective.needs_teacher:
            return None
        each = []
        for reader, wanted in zip(self._teachers_readers, self._wanted_of_teachers, strict=True):
            outputs, layers = reader.read(self._model_inputs(reader.model, batch), wanted)
            each.append(Teachings(logits_of(outputs), layers))
        return each[0] if len(each) == 1 else SeveralTeachings(each)

    # The loss

    def compute_loss(self, model, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the global batch's loss; the shares' gradients sum to that of the whole batch."""
        shares = self._shares(model, inputs, num_items_in_batch)
        shown = [share.detach().float() if self.contributes else torch.zeros(()) for share in shares.values()]
        means = self.accelerator.reduce(torch.stack(shown).to(self.args.device), reduction="mean")
        for name, mean in zip(shares, means.tolist(), strict=True):
            self._step_metrics[f"losses/{name}"] += mean
        return self.checked_loss(self._weighted_sum(shares))

    def _shares(self, model, batch: dict[str, Tensor], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By ingredient, a micro-batch's loss divided by the global batch's count of tokens or texts.

        It is multiplied by the number of processes, since gradients are averaged over processes.
        """
        inputs = self._model_inputs(self.student.model, batch)
        losses_B = model(inputs, self._wanted, partial(self._losses, batch=batch, teachings=self._teachings(batch)))
        world = self.accelerator.num_processes
        return {
            name: sum(loss_B.sum() / counts[unit] for unit, loss_B in by_unit.items()) * world
            for name, by_unit in losses_B.items()
        }

    def _weighted_sum(self, shares: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.objective.weights[name] * share for name, share in shares.items()]).sum()

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of a step, with masked tokens in a general stage, and the counts losses are divided by.

        The counts are over all micro-batches and processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # A stream's rows have numbers of their own in each pass; its epoch is the share of `max_steps`.
        epoch = 0 if isinstance(self.train_dataset, NumberedStream) else int(self.state.epoch or 0)
        batches = [self._with_masked_tokens(batch, epoch) for batch in batches]
        return batches, self._global_counts(batches) if batches else None

    def _global_counts(self, batches: Iterable[dict[str, Tensor]], units: Iterable[str] = ()) -> dict[str, Tensor]:
        """How many tokens, texts and labels all processes' batches have, by unit; at least 1 each.

        units: names of all units, for a process without any batch.
        """
        counts: dict[str, float] = defaultdict(float, dict.fromkeys(units, 0.0))
        for batch in batches:
            for unit, count in count_units(batch, self.student.reader.stacks).items():
                counts[unit] += count
        totals = torch.tensor(list(counts.values()), device=self.accelerator.device)
        totals = self.accelerator.reduce(totals, reduction="sum").clamp(min=1)
        return dict(zip(counts, totals, strict=True))

    def _with_masked_tokens(self, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        """The batch with some tokens masked in a general stage, unless the collator has masked them."""
        probability = self.args.mlm_probability
        if self.objective.stage != "general" or probability == 0 or "labels" in batch or ROW not in batch:
            return batch
        if self.processing_class.mask_token_id is None:
            return batch
        ids_BS, labels_BS = masked_tokens(
            batch,
            self.processing_class,
            probability=probability,
            seed=self.args.seed,
            epoch=epoch,
        )
        return {**batch, "input_ids": ids_BS, "labels": labels_BS}

    def training_step(self, model, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if not self.step_is_skipped:
                self._means.record(self._step_metrics)
            self._step_metrics.clear()
        return loss

    # Texts that are not finite

    def sample_loss(self, model, micro_batch: MicroBatch, b: int) -> Tensor:
        inputs, counts = micro_batch
        return self._weighted_sum(self._shares(model, {k: tensor[b : b + 1] for k, tensor in inputs.items()}, counts))

    def prompt_of(self, micro_batch: MicroBatch, b: int) -> str:
        inputs, _ = micro_batch
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool()]
        return self.processing_class.decode(ids, skip_special_tokens=True)

    def samples_in(self, micro_batch: MicroBatch) -> Tensor:
        return torch.ones(len(micro_batch[0]["input_ids"]), dtype=torch.bool, device=self.args.device)

    def keeping(self, micro_batches: list[MicroBatch], kept: list[Tensor]) -> list[MicroBatch]:
        parts, counted = [], []
        for (inputs, _), kept_B in zip(micro_batches, kept, strict=True):
            # A micro-batch without any text left is computed as it is, and its loss is not used.
            rows_B = kept_B if kept_B.any() else torch.ones_like(kept_B)
            parts.append({name: tensor[rows_B.to(tensor.device)] for name, tensor in inputs.items()})
            counted += [parts[-1]] if kept_B.any() else []
        counts = self._global_counts(counted, units=micro_batches[0][1])
        return [(part, counts) for part in parts]

    def forget_step(self) -> None:
        self._step_metrics.clear()

    # Logging

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Logs as Trainer does, with each ingredient's mean since the last log, before its weight."""
        if "loss" in logs:
            logs = {**logs, **self._means.take()}
        super().log(logs, *args, **kwargs)

    # Evaluation

    def _losses_and_logits(self, outputs: ModelOutput, layers: dict[str, LayerTensors], **of_batch):
        return self._losses(outputs, layers, **of_batch), [logits_of(outputs)]

    @torch.no_grad()
    def measured(self, dataset: Dataset) -> dict[str, float]:
        """Each loss before its weight, the number of the student's parameters, and how well it does.

        In a task these are accuracy and F1, or correlations in regression, and agreement with the teacher; where other
        encoders are trained along, the losses are sums over all, and `ensemble_accuracy` and so on are of all
        together. In a general stage, how like the first teacher's its last hidden states and its similarities of texts
        are (see `Seen.likeness`). `samples_not_finite` counts the texts for which a number is NaN, infinite or too
        large; if there are any, a warning names one of them, and how well it does is NaN. See `check_finite`.
        """
        was_training = self.student.training
        self.student.eval()
        sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        counts: dict[str, float] = defaultdict(float)
        seen = Seen()
        for batch in self._evaluation_batches(dataset):
            masked_batch = self._with_masked_tokens(batch, epoch=0)
            teachings = self._teachings(masked_batch)
            losses = partial(self._losses_and_logits, batch=masked_batch, teachings=teachings)
            inputs = self._model_inputs(self.student.model, masked_batch)
            losses_B, logits = self.student(inputs, self._wanted, losses)
            for name, by_unit in losses_B.items():
                for unit, of_stack_B in by_unit.items():
                    sums[name][unit] += float(of_stack_B.sum())
            seen.add_losses(loss_B for by_unit in losses_B.values() for loss_B in by_unit.values())
            for unit, count in count_units(batch | masked_batch, self.student.reader.stacks).items():
                counts[unit] += float(count)
            if self.objective.stage == "task":
                of_teacher = None if teachings is None else teachings.logits
                of_all = mean_logits(logits) if len(logits) > 1 else None
                seen.add_outputs(logits[0], of_teacher, batch.get("labels"), of_all)
            elif self.teachers_reader is not None:
                seen.add_states(*(self._last_states(reader, batch) for reader in self._readers), token_mask(batch))
        self.student.train(was_training)
        self.sample_table = seen.samples(dataset, self.student.config) if self.objective.stage == "task" else []
        only = seen.only_class()
        self.only_class = None if only is None else str(self.student.config.id2label.get(only, only))
        losses = {
            f"losses/{name}": sum(total / max(counts[unit], 1) for unit, total in by_unit.items())
            for name, by_unit in sums.items()
        }
        return {**self._metrics_of(seen, dataset), **losses, "parameters": float(_num_parameters(self.student.model))}

    def _metrics_of(self, seen: Seen, dataset: Dataset) -> dict[str, float]:
        """What the outputs for all rows come to; NaN, if the numbers of some are not finite."""
        metrics = (
            seen.metrics(is_regression=self._losses.is_regression)
            if self.objective.stage == "task"
            else seen.likeness()
        )
        count = count_not_finite(seen.is_usable, dataset, "text")
        return {**(dict.fromkeys(metrics, math.nan) if count else metrics), NOT_FINITE: count}

    @property
    def _readers(self) -> tuple[LayerReader, LayerReader]:
        return self.student.reader, self.teachers_reader

    def _last_states(self, reader: LayerReader, batch: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states of the encoder, or of a model's only stack, `[B, S, D]`."""
        stack = reader.stacks[0]
        last = reader.num_layers(stack)
        inputs = self._model_inputs(reader.model, batch)
        return reader.read(inputs, {stack: {"hidden_states": [last]}})[1][stack].hidden_states[last]

    def _evaluation_batches(self, dataset: Dataset) -> Iterator[dict[str, Tensor]]:
        rows, size = NumberedRows(dataset), self.args.per_device_eval_batch_size
        for start in range(0, len(rows), size):
            batch = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            yield {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            self.stop_if_asked()

    def evaluate_teacher(self) -> dict[str, float]:
        """The teacher's metrics on the evaluation data; {} in a general stage, or if no loss reads its classes.

        Of several teachers they are those of their mean.
        """
        if self.teachers_reader is None or self.objective.stage != "task" or self.objective.teachers_head != "classes":
            return {}
        seen = Seen()
        for batch in self._evaluation_batches(self.eval_dataset):
            teachings = self._teachings(batch)
            seen.add_outputs(teachings.logits, None, batch.get("labels"))
        parameters = sum(_num_parameters(reader.model) for reader in self._teachers_readers)
        return {**self._metrics_of(seen, self.eval_dataset), "parameters": float(parameters)}

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As the base class; encoders that are trained along are checkpoints with a tokenizer, too."""
        super()._save(output_dir, state_dict)
        student = self.accelerator.unwrap_model(self.model)
        if self.args.should_save and isinstance(student, JointEncoders):
            for directory in student.directories(output_dir or self.args.output_dir, len(student.companions)):
                self.processing_class.save_pretrained(directory)

    def run_state(self) -> dict[str, object]:
        """Adds metrics that are not logged yet, and the cost of the run."""
        return {**super().run_state(), "unlogged_metrics": self._means.sums, "seconds": vars(self.spent)}

    def load_run_state(self, state: dict[str, object]) -> None:
        super().load_run_state(state)
        self._means.sums = state["unlogged_metrics"]
        self.spent = Spent(**state["seconds"])


EncoderKDTrainer.__signature__ = whole_signature(EncoderKDTrainer)


def _num_parameters(model: PreTrainedModel | PeftModel) -> int:
    return sum(whole_shape(parameter).numel() for parameter in model.parameters())
