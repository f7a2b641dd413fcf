"""Flags for teachers: which, how they are kept and asked, and how several count."""

from dataclasses import dataclass, field

from rlkd_trl.commands.arguments import chat_templates
from rlkd_trl.errors import InputError
from rlkd_trl.prompts import chat
from rlkd_trl.settings.files import (
    ChatTemplatePath,
    CheckpointPath,
    RewardPath,
    TeacherCachePath,
)
from rlkd_trl.settings.ranges import (
    Count,
    Length,
    Positive,
    Temperature,
    check_ranges,
)

WEIGHTINGS = ("fixed", "validation", "per_example")


@dataclass
class TeacherArguments:
    """Teacher"""

    teacher: list[CheckpointPath] | None = field(
        default=None,
        metadata={"help": "Checkpoint directory or Hub id (or ID@REVISION); several are averaged. Default: the demo."},
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub teacher."})
    teacher_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})
    teacher_quantization: str = field(
        default="none", metadata={"help": "none, int8 or nf4 (bitsandbytes): what is printed at start, with bytes."}
    )
    teacher_placement: str = field(
        default="replicated",
        metadata={"help": "replicated; zero3: sharded over the processes; offload: shards off the accelerator."},
    )
    teacher_offload_path: str | None = field(
        default=None,
        metadata={"help": "NVMe directory for --teacher_placement offload (needs libaio); default: CPU memory."},
    )
    teacher_max_prompt_length: Length | None = field(
        default=None, metadata={"help": "Cap on a teacher prompt: documents are cut to so many tokens. Default: none."}
    )
    teacher_batch_tokens: Count | None = field(
        default=None, metadata={"help": "Padded tokens per scoring batch. Default: 16384, on a CPU 4096."}
    )
    allowed_special_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Special tokens that teacher and student may write, besides those in targets, e.g. '<triplet>'."
        },
    )
    teacher_chat_template: ChatTemplatePath = field(default=chat.AUTO, metadata={"help": chat_templates.TEMPLATE_HELP})
    teacher_system_prompt: str | None = field(default=None, metadata={"help": chat_templates.SYSTEM_PROMPT_HELP})
    teacher_chat_template_kwargs: str | None = field(default=None, metadata={"help": chat_templates.VARIABLES_HELP})

    def __post_init__(self):
        check_ranges(self)
        self.chat_format()

    def chat_format(self) -> chat.ChatFormat:
        """Whether and how the teachers are asked through chat templates. Raises `InputError`."""
        return chat_templates.chat_format_of(self, "teacher")

    def placement_settings(self) -> dict[str, str | None]:
        """How the teacher's weights are kept: arguments of `Placement` and `Teacher.from_pretrained`."""
        return {
            "placement": self.teacher_placement,
            "quantization": self.teacher_quantization,
            "offload_path": self.teacher_offload_path,
        }


@dataclass
class RoutingArguments:
    """An expert for each example"""

    teacher_column: str | None = field(
        default=None, metadata={"help": "Column that names the one teacher of each example; default: all are asked."}
    )
    template_column: str | None = field(
        default=None, metadata={"help": "Column that names the one template of each example; default: all are asked."}
    )


@dataclass
class PanelArguments(RoutingArguments):
    """Several teachers or templates"""

    teacher_weights: list[Positive] | None = field(
        default=None, metadata={"help": "One weight per teacher, of the mean over teachers; default: equal."}
    )
    template_weights: list[Positive] | None = field(
        default=None, metadata={"help": "One weight per template, of the mean over templates; default: equal."}
    )
    teacher_weighting: str = field(
        default="fixed",
        metadata={
            "help": "fixed: these weights; validation: each over 1 + its loss on held-out references; per_example: "
            "over 1 + its loss on the example's own reference or, without one, its distance from the others (MT-BERT)."
        },
    )

    def __post_init__(self):
        check_ranges(self)
        if self.teacher_weighting not in WEIGHTINGS:
            raise InputError(f"--teacher_weighting {self.teacher_weighting}: choose one of {', '.join(WEIGHTINGS)}.")


@dataclass
class ServerArguments:
    """A teacher behind a server, in place of --teacher"""

    teacher_server: str | None = field(
        default=None,
        metadata={
            "help": "URL of a server of the completions API (vLLM's, for instance) with a decoder-only teacher: PPO, "
            "RLOO, REINFORCE and evaluate.py."
        },
    )
    teacher_tokenizer: CheckpointPath | None = field(
        default=None, metadata={"help": "Checkpoint with the served teacher's tokenizer and chat template."}
    )
    teacher_server_model: str | None = field(
        default=None, metadata={"help": "Its name there; default: the only one that the server has."}
    )
    teacher_api_key_env: str | None = field(
        default=None, metadata={"help": "Name of the environment variable with the server's API key."}
    )
    teacher_server_timeout: Positive = field(default=60.0, metadata={"help": "Seconds that one request may take."})
    teacher_server_patience: Positive = field(
        default=120.0, metadata={"help": "Seconds for which a failing request is repeated before the run ends."}
    )
    teacher_server_concurrency: Count = field(
        default=8, metadata={"help": "Requests at a time, of each process; each has up to 8 texts."}
    )

    def __post_init__(self):
        check_ranges(self)


@dataclass
class AbsentTeacherArguments(ServerArguments):
    """A teacher that is not in this process, in place of --teacher"""

    teacher_cache: TeacherCachePath | None = field(
        default=None,
        metadata={"help": "Directory that cache_teacher.py has written: kd.py learns from it without the teacher."},
    )

    @property
    def named(self) -> str | None:
        """The cache's directory or the server's URL; None where there is a teacher in the process."""
        return self.teacher_cache or self.teacher_server


@dataclass
class CodeArguments:
    """Code of checkpoints"""

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code that checkpoints named here bring along. Read it first."},
    )


@dataclass
class RewardArguments:
    """Reward"""

    reward: list[RewardPath] = field(
        default_factory=lambda: ["teacher_forcing"],
        metadata={"help": "One or several, summed with --reward_weights: a name or path/to/file.py:name of yours."},
    )
    value: str = field(default="max", metadata={"help": "V of the teacher-forcing reward: max, expected or soft."})
    k: Count = field(default=1, metadata={"help": "Steps of the K-step return (KETCHUP); with --average_reward none."})
    tau: Temperature = field(default=1.0, metadata={"help": "Temperature of --value soft."})

    def __post_init__(self):
        check_ranges(self)
