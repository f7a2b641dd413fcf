"""Settings of supervised training."""

from dataclasses import dataclass, field

from rlkd_trl.errors import InputError
from rlkd_trl.settings.ranges import Length
from rlkd_trl.trainers.base_config import BaseConfig
from rlkd_trl.trainers.inherited_settings import REFUSED, REFUSED_SUPERVISED


@dataclass
class SupervisedConfig(BaseConfig):
    """Settings of `SupervisedTrainer`: `transformers.TrainingArguments`, and the lengths at which texts are cut."""

    refused = REFUSED | REFUSED_SUPERVISED

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs per device and micro-batch."})
    logging_steps: float = field(default=50, metadata={"help": "Log every this many optimizer steps."})
    max_prompt_length: Length = field(default=512, metadata={"help": "Prompts are cut at this many tokens."})
    max_completion_length: Length = field(
        default=64, metadata={"help": "Targets are cut at this many tokens, EOS included."}
    )

    def __post_init__(self):
        if self.save_strategy == "best":
            raise InputError("save_strategy = best: supervised training does not evaluate, so no checkpoint is best.")
        if self.train_sampling_strategy == "group_by_length":
            raise InputError("train_sampling_strategy = group_by_length: texts have no length yet; choose random.")
        super().__post_init__()
        if self.remove_unused_columns:
            raise InputError("remove_unused_columns must stay False: the collator reads the texts.")
