"""What the trainers that distil have in common: evaluation data, cost, and a student in a module of the package."""

import json
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled

from rlkd_trl.errors import InputError
from rlkd_trl.trainers.budget import Clock, Cost
from rlkd_trl.trainers.curves import keep_curves_together
from rlkd_trl.trainers.progress import show_run_progress
from rlkd_trl.trainers.resumable import ResumableTrainer


class DistillationTrainer(ResumableTrainer):
    """Base of trainers whose model is a module around the student, with `save_pretrained` and `load_pretrained`.

    Attributes:
        spent: What the run has spent so far, with the fields of `Spent`.
    """

    clock_class: type[Clock] = Clock

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:  # which moves the model only when training begins
            self.model.to(self.accelerator.device)
        self._clock = self.clock_class(self)
        self.add_callback(self._clock)
        keep_curves_together(self.args, self.callback_handler.callbacks)
        show_run_progress(self)

    def measured(self, dataset: Dataset) -> dict[str, float]:
        """The student's metrics on these rows, by names without a prefix; each process reads all rows."""
        raise NotImplementedError

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The metrics of `measured` on the evaluation data, with the prefix before their names; they are logged, too.

        Of several sets of data, a dict, each has its name in the prefix, as `eval_NAME_...`.

        Raises:
            InputError: There is no evaluation data.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("There is nothing to evaluate on: give `eval_dataset`.")
        if isinstance(dataset, dict):
            metrics = {}
            for name, rows in dataset.items():
                metrics |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        with self.mixed_precision():
            result = self.measured(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def mixed_precision(self) -> AbstractContextManager:
        """A context for forward passes outside of a training step, which Accelerate's own autocast does not cover."""
        return self.accelerator.autocast()

    # Cost

    def cost(self) -> Cost:
        """The cost of the run until its last optimizer step, also before it was resumed."""
        return self._clock.cost()

    def uncounted(self) -> AbstractContextManager:
        """What is done within, while the run goes on, is not part of its cost."""
        return self._clock.stopped()

    def save_cost(self, path: Path) -> None:
        """Writes `cost` as JSON. All processes call it together."""
        cost = asdict(self.cost())
        if self.is_world_process_zero():
            path.write_text(json.dumps(cost, indent=2) + "\n", encoding="utf-8")

    # Checkpoints

    def merge_adapters(self) -> None:
        """After training: makes the adapters' changes part of the student, which is then saved as a whole checkpoint.

        Raises `InputError` as `models.adapters.merged`.
        """
        self.accelerator.unwrap_model(self.model).merge_adapters()

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes Trainer's generic card before a push to the Hub, unless there is one that a recipe has written."""
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
        if is_deepspeed_zero3_enabled():  # only DeepSpeed's engine can load weights into their shards
            super()._load_best_model()
            return
        self.accelerator.unwrap_model(self.model).load_pretrained(self.state.best_model_checkpoint)
