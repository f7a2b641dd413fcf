"""Settings of supervised training."""

from dataclasses import dataclass, field

from rlkd_trl.errors import InputError
from rlkd_trl.settings.ranges import Length
from rlkd_trl.trainers.base_config import BaseConfig


@dataclass
class SupervisedConfig(BaseConfig):
    """`transformers.TrainingArguments` and the lengths at which texts are cut."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs per device and micro-batch."})
    logging_steps: float = field(default=50, metadata={"help": "Log every this many optimizer steps."})
    max_prompt_length: Length = field(default=512, metadata={"help": "Prompts are cut at this many tokens."})
    max_completion_length: Length = field(
        default=64, metadata={"help": "Targets are cut at this many tokens, EOS included."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.eval_strategy != "no" or self.load_best_model_at_end:
            raise InputError("Supervised training does not evaluate as it goes: measure its checkpoints afterwards.")
        if self.remove_unused_columns:
            raise InputError("remove_unused_columns must stay False: the collator reads the texts.")
        if self.label_smoothing_factor:
            raise InputError("label_smoothing_factor is not supported: the loss is plain cross-entropy.")
