"""Flags for students: which, with adapters or from scratch."""

from dataclasses import dataclass, field

from rlkd_trl.commands.arguments import chat_templates
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import chat
from rlkd_trl.settings.files import (
    ChatTemplatePath,
    CheckpointPath,
)
from rlkd_trl.settings.ranges import (
    Count,
    Length,
    ShareBelowOne,
    check_ranges,
)


@dataclass
class StudentArguments:
    """Student"""

    student: CheckpointPath | None = field(
        default=None,
        metadata={"help": "Checkpoint directory or Hub id (or ID@REVISION) to start from. Default: the demo."},
    )
    student_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub student."})
    student_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantise its weights to 8 bits (bitsandbytes), beneath adapters."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise its weights to 4 bits (nf4), beneath adapters: QLoRA."}
    )
    student_chat_template: ChatTemplatePath = field(default=chat.AUTO, metadata={"help": chat_templates.TEMPLATE_HELP})
    student_system_prompt: str | None = field(default=None, metadata={"help": chat_templates.SYSTEM_PROMPT_HELP})
    student_chat_template_kwargs: str | None = field(default=None, metadata={"help": chat_templates.VARIABLES_HELP})

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise InputError("--load_in_8bit and --load_in_4bit are two precisions: give one of them.")
        self.chat_format()

    @property
    def quantization(self) -> str:
        """The name of it, as for `models.loading.load_model`."""
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else "none"

    @property
    def quantization_flag(self) -> str:
        """The flag that asks for it."""
        return "--load_in_4bit" if self.load_in_4bit else "--load_in_8bit"

    def chat_format(self) -> chat.ChatFormat:
        """Whether and how the student is spoken to through a chat template. Raises `InputError`."""
        return chat_templates.chat_format_of(self, "student")


@dataclass
class AdapterArguments:
    """Adapters on the student (TRL's names)"""

    use_peft: bool = field(
        default=False, metadata={"help": "Train adapters, LoRA's, in place of the student's weights."}
    )
    lora_r: Count = field(default=16, metadata={"help": "Rank r."})
    lora_alpha: Count = field(default=32, metadata={"help": "The adapters' output is scaled by alpha / r."})
    lora_dropout: ShareBelowOne | None = field(
        default=None,
        metadata={"help": "Dropout of their inputs in sft and encoder_kd, default 0.05; elsewhere there is none."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get them, by name; all-linear; or a regular expression. Default: PEFT's."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers of which copies are trained, and saved with the adapters."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / √r instead (rank-stabilised LoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Train the lengths of weights beside them (DoRA)."})
    merge_adapters: bool = field(
        default=False,
        metadata={"help": "At the end merge them into the student: a whole checkpoint is saved in their place."},
    )

    def __post_init__(self):
        check_ranges(self)


@dataclass
class NewModelArguments:
    """New model (without --student)"""

    architecture: str = field(default="t5", metadata={"help": "t5 (encoder-decoder) or llama (decoder-only)."})
    d_model: Length = field(default=128, metadata={"help": "Width D."})
    num_layers: Length = field(default=2, metadata={"help": "Layers, in encoder and decoder each."})
    num_heads: Length = field(default=4, metadata={"help": "Attention heads."})
    d_ff: Length | None = field(default=None, metadata={"help": "Feed-forward width; 2 × d_model by default."})
    dropout: ShareBelowOne = field(default=0.1, metadata={"help": "Dropout while training."})
    tokenizer: CheckpointPath | None = field(
        default=None, metadata={"help": "Checkpoint whose tokenizer to use; default: train one on the data."}
    )
    vocab_size: Length = field(default=4000, metadata={"help": "At most this many tokens in a new tokenizer."})

    def __post_init__(self):
        check_ranges(self)
