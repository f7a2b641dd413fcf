"""What all distillation trainers have in common: a `Policy` on `transformers.Trainer`, measured and saved."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import print_prompt_completions_sample

from rlkd_trl.errors import InputError
from rlkd_trl.evaluation.evaluate import evaluate_student
from rlkd_trl.models.loading import load_model, load_tokenizer, refuse_t5_in_float16
from rlkd_trl.models.sharding import is_sharded, whole
from rlkd_trl.models.vocabulary import check_same_tokenizer
from rlkd_trl.rewards import RewardModel
from rlkd_trl.students import Policy
from rlkd_trl.trainers.checks import check_held_out, check_sharded_head, check_sharding
from rlkd_trl.trainers.config import RolloutConfig


class PolicyTrainer(Trainer):
    """Trains a `Policy`; `reward_model` is what `evaluate` measures with, and its teachers are kept on the device.

    Raises:
        InputError: Tokenizers differ, a loaded student without its tokenizer, evaluation data without `prompt`, T5
            with fp16.
    """

    critic_kind = "none"

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_model: RewardModel,
        args: RolloutConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        check_held_out(eval_dataset)
        check_sharding(args)
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_model(model)
        if processing_class is None:
            raise InputError("A loaded student needs its tokenizer: pass `processing_class`.")
        if args.fp16:
            refuse_t5_in_float16(model.config, torch.float16)
        check_sharded_head(model)
        self.reward_model = reward_model
        teachers = [scorer.teacher for panel in reward_model.panels for scorer in panel.scorers]
        for teacher in teachers:
            check_same_tokenizer(processing_class, teacher.processing_class)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self.sample_table: list[dict[str, object]] = []
        super().__init__(
            model=Policy(model, processing_class, temperature=args.temperature, critic=self.critic_kind),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=list,
            **kwargs,
        )
        # The losses here are already divided by the global count; Trainer must not divide by its own.
        self.model_accepts_loss_kwargs = False
        if self.is_deepspeed_enabled:  # which moves the model only when training begins
            self.model.to(self.accelerator.device)
        for teacher in teachers:
            teacher.to(self.accelerator.device)

    @property
    def policy(self) -> Policy:
        """The student as it is now, out of its distributed wrapper."""
        return self.accelerator.unwrap_model(self.model_wrapped)

    @contextmanager
    def whole_student(self) -> Iterator[None]:
        """For sampling and evaluation: where ZeRO-3 has sharded the student, every process holds all of it within.

        Otherwise each sampled token would gather every weight anew.
        """
        with whole(self.model_wrapped) if is_sharded(self.model) else nullcontext():
            yield

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of everything recorded since the last log."""
        is_training_log = "loss" in logs
        if is_training_log:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, start_time)
        if self.args.log_completions and is_training_log and self.is_world_process_zero():
            names = [name for name in ("reward",) if self.sample_table and name in self.sample_table[0]]
            print_prompt_completions_sample(
                [row["prompt"] for row in self.sample_table],
                [row["completion"] for row in self.sample_table],
                {name: [row[name] for row in self.sample_table] for name in names},
                None,
                self.state.global_step,
            )

    def _record(self, metrics: dict[str, Tensor | float]) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(float(value))

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _mean_over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        means = self.accelerator.reduce(torch.stack(list(metrics.values())), reduction="mean")
        return dict(zip(metrics, means.tolist(), strict=True))

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Greedy outputs on the evaluation prompts: text metrics, the teacher's NLL and the reward.

        Raises:
            InputError: There is no evaluation data, or it has no column `prompt`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("There is nothing to evaluate on: give `eval_dataset`.")
        check_held_out(dataset)
        if isinstance(dataset, dict):
            metrics = {}
            for name, rows in dataset.items():
                metrics |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        with self.compute_loss_context_manager(), self.whole_student():
            result = evaluate_student(
                self.policy,
                self.processing_class,
                list(dataset),
                self.reward_model,
                max_prompt_length=self.args.max_prompt_length,
                max_completion_length=self.args.max_completion_length,
                batch_size=self.args.per_device_eval_batch_size,
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def create_model_card(self, *args, **kwargs) -> None:
        """Trainer's generic card before a push to the Hub, unless a recipe has left a better one."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, output_dir / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.accelerator.unwrap_model(self.model if model is None else model).load_pretrained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if is_deepspeed_zero3_enabled():  # only the engine can put weights into their shards
            super()._load_best_model()
            return
        self.accelerator.unwrap_model(self.model).load_pretrained(self.state.best_model_checkpoint)
