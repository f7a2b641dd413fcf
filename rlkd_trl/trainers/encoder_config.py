"""Settings of encoder distillation, stage by stage."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeVar

from rlkd_trl.errors import InputError
from rlkd_trl.settings.ranges import Count, LearningRate, Length, Range, ShareBelowOne, Temperature
from rlkd_trl.trainers.base_config import BaseConfig
from rlkd_trl.trainers.encoder_objective import INGREDIENTS, STAGES, Objective, parse_losses
from rlkd_trl.trainers.inherited_settings import REFUSED, REFUSED_ON_LAYERS

Value = TypeVar("Value")
_PER_STAGE = ("losses", "layer_map", "temperature", "stage_max_steps", "stage_epochs", "stage_learning_rates")


@dataclass
class EncoderKDConfig(BaseConfig):
    """Settings of encoder distillation in one stage or in several, one after the other.

    A setting with one value per stage may also have a single value, for all of them.
    """

    refused = REFUSED | REFUSED_ON_LAYERS

    learning_rate: float = field(default=5e-5, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Texts per device and micro-batch."})
    logging_steps: float = field(default=50, metadata={"help": "Log every this many optimizer steps."})
    stages: list[str] = field(
        default_factory=lambda: ["task"],
        metadata={"help": "One after the other: 'general' (unlabelled text) or 'task' (labelled)."},
    )
    losses: list[str] = field(
        default_factory=lambda: ["logits_kl + hard_ce"],
        metadata={"help": f"Per stage, a sum as '5*logits_kl + 2*mlm_ce + cosine' of: {', '.join(INGREDIENTS)}."},
    )
    layer_map: list[str] = field(
        default_factory=lambda: ["uniform"],
        metadata={
            "help": "Per stage, which layer learns from which: uniform, top, bottom (TinyBERT), skip, last (PKD), "
            "single (the last by the last), single=9 (by the teacher's 9th; MiniLMv2), or pairs as 1:2,2:4."
        },
    )
    temperature: list[Temperature] = field(
        default_factory=lambda: [1.0], metadata={"help": "Per stage, T of logits_kl, which is times T² (Hinton 2015)."}
    )
    relation_heads: Count | None = field(
        default=None,
        metadata={"help": "Heads of the relations (MiniLMv2: 48 for BERT-base); default: the teacher's heads."},
    )
    mlm_probability: ShareBelowOne = field(
        default=0.15, metadata={"help": "Share of tokens that are masked in the general stage, as in BERT; 0: none."}
    )
    max_length: Length = field(default=128, metadata={"help": "Texts are cut at this many tokens."})
    stage_max_steps: list[Count] | None = field(
        default=None, metadata={"help": "Optimizer steps per stage; default: --max_steps in each."}
    )
    stage_epochs: list[Annotated[float, Range(0, 1e6, above=True)]] | None = field(
        default=None, metadata={"help": "Epochs per stage, without steps; default: --num_train_epochs in each."}
    )
    stage_learning_rates: list[LearningRate] | None = field(
        default=None, metadata={"help": "Learning rate per stage; default: --learning_rate in each."}
    )

    def __post_init__(self):
        for name in ("stages", *_PER_STAGE):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list | tuple):
                setattr(self, name, [value])
        self._choose_metric({"task": "accuracy"}.get(self.stages[-1] if self.stages else "", "similarity_spearman"))
        if self.train_sampling_strategy == "group_by_length":
            raise InputError("train_sampling_strategy = group_by_length: texts have no length yet; choose random.")
        super().__post_init__()
        if self.remove_unused_columns:
            raise InputError("remove_unused_columns must stay False: the collator reads the texts.")
        if not self.stages:
            raise InputError(f"stages is empty: name one or several of {', '.join(STAGES)}.")
        for stage in self.stages:
            if stage not in STAGES:
                raise InputError(f"stages = {' '.join(self.stages)}: choose 'general' or 'task', not {stage!r}.")
        for name in _PER_STAGE:
            values = getattr(self, name)
            if values is not None and len(values) not in (1, len(self.stages)):
                raise InputError(
                    f"{name} has {len(values)} values, and there are {len(self.stages)} stages: give one for each, or "
                    "one for all."
                )
        if len(self.stages) > 1 and (self.load_best_model_at_end or self.metric_for_best_model is not None):
            raise InputError(
                "The best checkpoint is one of a stage, and there are "
                f"{len(self.stages)}: run the stages one by one, with --stages and the student of the one before."
            )
        for number in range(len(self.stages)):
            self._check_objective(self.objective(number), number)

    def _check_objective(self, objective: Objective, number: int) -> None:
        for name in objective.weights:
            if objective.stage not in INGREDIENTS[name].stages:
                raise InputError(
                    f"losses of stage {number + 1}: {name} is for a {INGREDIENTS[name].stages[0]} stage, and this is "
                    f"a {objective.stage} stage: leave it out there."
                )
        if "mlm_ce" in objective.weights and self.mlm_probability == 0:
            raise InputError("mlm_probability = 0 with mlm_ce in the losses: no token would be masked.")

    def objective(self, number: int) -> Objective:
        """The losses of the stage with this number, counted from 0."""
        return Objective(
            self.stages[number],
            parse_losses(_of(self.losses, number)),
            _of(self.layer_map, number),
            _of(self.temperature, number),
            self.relation_heads,
        )

    def of_stage(self, number: int) -> "EncoderKDConfig":
        """The settings of one stage alone, counted from 0, with its steps, epochs, learning rate and directory.

        The last stage's directory is `output_dir`; those of the earlier ones are in it, as `stage1-general`. The last
        student alone goes to the Hub.
        """
        is_last = number == len(self.stages) - 1
        directory = Path(self.output_dir) / f"stage{number + 1}-{self.stages[number]}"
        own = {name: [_of(getattr(self, name), number)] for name in ("stages", "losses", "layer_map", "temperature")}
        steps_epochs_rate = {
            inherited: _of(values, number)
            for inherited, values in (
                ("max_steps", self.stage_max_steps),
                ("num_train_epochs", self.stage_epochs),
                ("learning_rate", self.stage_learning_rates),
            )
            if values is not None
        }
        nothing = dict.fromkeys(("stage_max_steps", "stage_epochs", "stage_learning_rates"))
        return replace(
            self,
            output_dir=self.output_dir if is_last else str(directory),
            push_to_hub=self.push_to_hub and is_last,
            **own,
            **steps_epochs_rate,
            **nothing,
        )


def _of(values: Sequence[Value], number: int) -> Value:
    """The stage's value, of one for each stage or one for all."""
    return values[number] if len(values) > 1 else values[0]
