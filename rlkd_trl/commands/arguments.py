"""The recipes' flags, one dataclass per concern. The first line of a docstring is its heading in `--help`.

The type of a field says what its value is: a number with its range (`settings.ranges`), the path of something that is
read or written (`settings.files`).
"""

import json
from dataclasses import dataclass, field
from typing import ClassVar

from rlkd_trl.errors import InputError
from rlkd_trl.prompts import chat
from rlkd_trl.settings.files import (
    ChatTemplatePath,
    CheckpointPath,
    DataPath,
    JsonPath,
    OutputPath,
    RewardPath,
    TeacherCachePath,
    TemplatesPath,
)
from rlkd_trl.settings.ranges import (
    Count,
    CountFromZero,
    Length,
    Positive,
    PositiveShare,
    Seed,
    Share,
    ShareBelowOne,
    Temperature,
    Weight,
    check_ranges,
)

_CHAT_TEMPLATE = "auto: the tokenizer's, if it has one; none; or a .jinja file, or a checkpoint with a tokenizer's."
WEIGHTINGS = ("fixed", "validation", "per_example")
ENCODER_WEIGHTINGS = ("per_example", "fixed")
_SYSTEM_PROMPT = "What the system says first, in its chat template."
_CHAT_TEMPLATE_KWARGS = """Variables of its chat template, in JSON: '{"enable_thinking": false}'."""


@dataclass
class DataArguments:
    """Data"""

    dataset: DataPath | None = field(
        default=None,
        metadata={
            "help": "Hub id (or ID@REVISION), a CSV/JSON/JSONL/Parquet file, or a directory. Default: the embedded "
            "demo."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train (or, in evaluate.py, test) on."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    source_column: str = field(default="source", metadata={"help": "Column with the student's input text."})
    target_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the reference text or texts: targets of sft, of kd and --interpolate; metrics."
        },
    )
    max_rows: Count | None = field(
        default=None, metadata={"help": "Use only so many distinct inputs (sft.py: so many rows)."}
    )

    def __post_init__(self):
        check_ranges(self)


@dataclass
class StreamingArguments:
    """Streaming, for data that does not fit"""

    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read --dataset while training goes on, again and again, until --max_steps, which it needs."
        },
    )
    shuffle_buffer_size: CountFromZero = field(
        default=10_000,
        metadata={"help": "With --streaming: rows among which the next one is drawn; 0 leaves them in their order."},
    )

    def __post_init__(self):
        check_ranges(self)


@dataclass
class HeldOutArguments:
    """Held-out data"""

    eval_dataset: DataPath | None = field(
        default=None,
        metadata={
            "help": "For the final table; default: a tenth of the inputs. --dataset_config and _revision apply."
        },
    )
    eval_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    eval_target_column: str | None = field(
        default=None, metadata={"help": "References in --eval_dataset; default: --target_column."}
    )


@dataclass
class PromptArguments:
    """Prompts"""

    # A flag on the command line cancels these flags of a preset.
    REPLACED: ClassVar[dict[str, tuple[str, ...]]] = {
        "template": ("templates", "template_names"),
        "templates": ("template",),
    }
    templates: TemplatesPath | None = field(
        default=None,
        metadata={
            "help": "How the teacher is asked: a YAML file (names and Jinja texts, or promptsource's; also of the "
            "Hub), or builtin:TASK."
        },
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Instead of --templates, one Jinja text over the data's columns: 'Summarise: {{ source }}'."
        },
    )
    template_names: list[str] | None = field(
        default=None, metadata={"help": "Which of them; default: all that are for the original task."}
    )
    rename_columns: list[str] | None = field(
        default=None, metadata={"help": "Data columns under other names for the templates, as column=variable."}
    )
    student_template: str | None = field(
        default=None,
        metadata={"help": "The student's own prompt, as Jinja over the data's columns. Default: the bare source."},
    )


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
    teacher_chat_template: ChatTemplatePath = field(default=chat.AUTO, metadata={"help": _CHAT_TEMPLATE})
    teacher_system_prompt: str | None = field(default=None, metadata={"help": _SYSTEM_PROMPT})
    teacher_chat_template_kwargs: str | None = field(default=None, metadata={"help": _CHAT_TEMPLATE_KWARGS})

    def __post_init__(self):
        check_ranges(self)
        self.chat_format()

    def chat_format(self) -> chat.ChatFormat:
        """Whether and how the teachers are asked through chat templates. Raises `InputError`."""
        return _chat_format(self, "teacher")

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
        """What names the teacher."""
        return self.teacher_cache or self.teacher_server


@dataclass
class CodeArguments:
    """Code of checkpoints"""

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code that checkpoints named here bring along. Read it first."},
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
    student_chat_template: ChatTemplatePath = field(default=chat.AUTO, metadata={"help": _CHAT_TEMPLATE})
    student_system_prompt: str | None = field(default=None, metadata={"help": _SYSTEM_PROMPT})
    student_chat_template_kwargs: str | None = field(default=None, metadata={"help": _CHAT_TEMPLATE_KWARGS})

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
        return _chat_format(self, "student")


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
class RewardArguments:
    """Reward"""

    reward: list[RewardPath] = field(
        default_factory=lambda: ["teacher_forcing"],
        metadata={"help": "One or several, summed with --reward_weights: a name or path/to/file.py:name of yours."},
    )
    value: str = field(default="max", metadata={"help": "V of the teacher-forcing reward: max, expected or soft."})
    k: Count = field(default=1, metadata={"help": "Steps of the K-step return (KETCHUP)."})
    tau: Temperature = field(default=1.0, metadata={"help": "Temperature of --value soft."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class GeneralDataArguments:
    """Data of general stages: unlabelled texts"""

    dataset: DataPath | None = field(
        default=None,
        metadata={"help": "Hub id (or ID@REVISION), a CSV/JSON/JSONL/Parquet file, or a directory, of texts."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    source_column: str = field(default="text", metadata={"help": "Column with the texts."})
    pair_column: str | None = field(
        default=None,
        metadata={"help": "Column with the text that follows, for nsp_ce; an encoder-decoder's target."},
    )
    max_rows: Count | None = field(default=None, metadata={"help": "Use only so many rows."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class TaskDataArguments:
    """Data of task stages: texts with labels"""

    task_dataset: DataPath | None = field(
        default=None,
        metadata={
            "help": "Hub id (or ID@REVISION), a CSV/JSON/JSONL/Parquet file, or a directory. Default: the demo."
        },
    )
    task_split: str = field(default="train", metadata={"help": "Split to train on."})
    task_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    task_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    task_source_column: str = field(default="text", metadata={"help": "Column with the texts."})
    task_pair_column: str | None = field(
        default=None, metadata={"help": "Column with a second text, of tasks on pairs of texts."}
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the labels: the teacher's names or numbers of classes, or numbers to predict. "
            "Without it, a task is learnt from the teacher alone."
        },
    )
    task_max_rows: Count | None = field(default=None, metadata={"help": "Use only so many rows."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class EncoderHeldOutArguments:
    """Held-out data"""

    eval_dataset: DataPath | None = field(
        default=None, metadata={"help": "Texts for the metrics of general stages; default: a tenth of --dataset."}
    )
    eval_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    task_eval_dataset: DataPath | None = field(
        default=None, metadata={"help": "For the metrics of task stages; default: a tenth of --task_dataset."}
    )
    task_eval_split: str = field(default="train", metadata={"help": "Split of --task_eval_dataset."})


@dataclass
class EncoderTeacherArguments:
    """Teacher"""

    teacher: CheckpointPath | None = field(
        default=None, metadata={"help": "Checkpoint directory or Hub id (or ID@REVISION). Default: the demo."}
    )
    task_teacher: CheckpointPath | None = field(
        default=None, metadata={"help": "The teacher of task stages, with a head for the classes; default: --teacher."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub --teacher."})
    task_teacher_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub --task_teacher."})
    teacher_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})


@dataclass
class EncoderPanelArguments:
    """Several teachers"""

    more_teachers: list[CheckpointPath] | None = field(
        default=None,
        metadata={
            "help": "More teachers, beside --task_teacher of task stages or, where there are none, --teacher: each "
            "loss is summed over all."
        },
    )
    teacher_weighting: str = field(
        default="per_example",
        metadata={"help": "per_example: logits_kl of each over 1 + its own loss on the text (MT-BERT); or fixed."},
    )
    train_along: list[CheckpointPath] | None = field(
        default=None,
        metadata={
            "help": "More encoders, fine-tuned together with --student on labels, with one pooler and head for all: "
            "MT-BERT's co-finetuning of teachers. They are saved in OUTPUT_DIR/encoder2, encoder3 …"
        },
    )

    def __post_init__(self):
        if self.teacher_weighting not in ENCODER_WEIGHTINGS:
            known = ", ".join(ENCODER_WEIGHTINGS)
            raise InputError(f"--teacher_weighting {self.teacher_weighting}: choose one of {known}.")


@dataclass
class EncoderStudentArguments:
    """Student: a checkpoint, or a smaller teacher"""

    # Given on the command line, a flag puts these of a preset out of force.
    REPLACED: ClassVar[dict[str, tuple[str, ...]]] = {
        "student": ("num_layers", "hidden_size", "num_heads", "intermediate_size", "init"),
        **dict.fromkeys(("hidden_size", "num_heads", "intermediate_size"), ("init",)),
    }
    student: CheckpointPath | None = field(
        default=None,
        metadata={"help": "Checkpoint directory or Hub id (or ID@REVISION) to start from; default: a new one."},
    )
    student_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub student."})
    num_layers: Length | None = field(default=None, metadata={"help": "Layers of a new student; default: half."})
    hidden_size: Length | None = field(default=None, metadata={"help": "Its width; default: the teacher's."})
    num_heads: Length | None = field(default=None, metadata={"help": "Its attention heads; default: the teacher's."})
    intermediate_size: Length | None = field(
        default=None, metadata={"help": "Its feed-forward width; default: in the teacher's proportion."}
    )
    init: str | None = field(
        default=None,
        metadata={
            "help": "What it begins with: the teacher's layers by a map (uniform, as DistilBERT; bottom, as PKD; "
            "1:2,2:4 …), or 'random'. Default: uniform where the sizes are the teacher's, else random."
        },
    )

    def __post_init__(self):
        check_ranges(self)


@dataclass
class RunArguments:
    """Run"""

    resume: bool = field(
        default=False, metadata={"help": "Continue from the last checkpoint in --output_dir (see --save_steps)."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Begin anew where a run has been: its checkpoints and results are deleted."}
    )


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


@dataclass
class PseudoLabelArguments:
    """Pseudo-labels"""

    output: OutputPath | None = field(default=None, metadata={"help": "JSON-lines file to write."})
    strategy: str = field(default="greedy", metadata={"help": "greedy, beam or sample."})
    num_beams: Count = field(default=4, metadata={"help": "Beams of --strategy beam."})
    interpolate: bool = field(
        default=False,
        metadata={"help": "Of all beams, write the one nearest to --target_column's references, by sentence BLEU."},
    )
    temperature: Temperature = field(default=1.0, metadata={"help": "Temperature of --strategy sample."})
    max_completion_length: Length = field(default=64, metadata={"help": "Cap on generated tokens, EOS included."})
    batch_size: Count = field(default=64, metadata={"help": "Prompts at a time."})
    seed: Seed = field(default=0, metadata={"help": "Seed of --strategy sample."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write over --output, if it is there."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class CacheArguments:
    """Cache"""

    output: OutputPath | None = field(default=None, metadata={"help": "Directory to write."})
    k: CountFromZero = field(
        default=64, metadata={"help": "Ids kept at each token, the most likely; 0: all, for the exact loss."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the log-probabilities kept: float32 or float16."})
    distillation_temperature: Temperature = field(
        default=1.0, metadata={"help": "T of the distributions; that of kd.py, which learns from them."}
    )
    ensemble: str = field(
        default="probabilities",
        metadata={"help": "Several teachers or templates as one: mean of their 'probabilities' or of their 'logits'."},
    )
    max_prompt_length: Length | None = field(
        default=512,
        metadata={"help": "That of kd.py: prompts of --student_template are cut at it, if there are no --templates."},
    )
    max_completion_length: Length = field(default=64, metadata={"help": "Cap on a target's tokens, EOS included."})
    batch_size: Count = field(default=64, metadata={"help": "Targets at a time."})
    rows_per_shard: Count | None = field(
        default=None,
        metadata={
            "help": "Targets in a file: what a stopped run does again, and what is in memory while it is written. "
            "Default: as many as take 256 MB, and 1024 at most."
        },
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write over the cache in --output."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class GeneratedDataArguments:
    """Generated data"""

    output: OutputPath | None = field(default=None, metadata={"help": "JSON-lines file to write."})
    schema: JsonPath | None = field(
        default=None,
        metadata={"help": 'JSON file of slots to recombine: {"slots": {"food": ["Indian", …], …}, "required": […]}.'},
    )
    num_rows: Count = field(default=1000, metadata={"help": "Distinct inputs to write."})
    keep_share: PositiveShare = field(
        default=0.5, metadata={"help": "Share of the candidates that is kept, those likeliest to the teacher; 1: all."}
    )
    temperature: Temperature = field(default=1.0, metadata={"help": "Temperature at which inputs are sampled."})
    max_input_length: Length = field(default=64, metadata={"help": "Cap on an input's tokens, EOS included."})
    batch_size: Count = field(default=64, metadata={"help": "Candidates at a time."})
    seed: Seed = field(default=0, metadata={"help": "Seed of the draws."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write over --output, if it is there."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class EvaluationArguments:
    """Evaluation"""

    output_dir: OutputPath | None = field(default=None, metadata={"help": "Where metrics.json and outputs.jsonl go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write over the results in --output_dir, if there are any."}
    )
    max_prompt_length: Length | None = field(default=512, metadata={"help": "Student prompts are cut at this."})
    max_completion_length: Length = field(default=64, metadata={"help": "Cap on generated tokens, EOS included."})
    batch_size: Count = field(default=64, metadata={"help": "Prompts at a time."})
    sample: bool = field(default=False, metadata={"help": "Sample the student's outputs instead of greedy."})
    temperature: Temperature = field(default=1.0, metadata={"help": "Temperature of --sample."})
    seed: Seed = field(default=0, metadata={"help": "Seed of --sample."})
    align_tokenizers: bool = field(
        default=False,
        metadata={"help": "The teacher may have another tokenizer: it reads the texts in its own tokens."},
    )
    ibleu: bool = field(default=False, metadata={"help": "Also iBLEU against the source, for paraphrase."})
    gamma: Share = field(default=1.0, metadata={"help": "Discount γ of the teacher-forcing reward."})
    reward_weights: list[Weight] | None = field(default=None, metadata={"help": "One weight per reward."})

    def __post_init__(self):
        check_ranges(self)


def _chat_format(arguments: TeacherArguments | StudentArguments, role: str) -> chat.ChatFormat:
    """The chat format of the flags that begin with "teacher" or "student". Raises `InputError` for bad JSON."""
    kwargs = getattr(arguments, f"{role}_chat_template_kwargs")
    try:
        variables = None if kwargs is None else json.loads(kwargs)
    except ValueError as error:
        raise InputError(f"--{role}_chat_template_kwargs {kwargs!r} is not JSON: {error}") from error
    if not isinstance(variables, dict | None):
        raise InputError(f"--{role}_chat_template_kwargs {kwargs} is to be a mapping: '{{\"name\": value}}'.")
    return chat.ChatFormat(
        getattr(arguments, f"{role}_chat_template"), getattr(arguments, f"{role}_system_prompt"), variables
    )
