"""Flags for what a command writes: a run, pseudo-labels, a cache, generated data, an evaluation."""

from dataclasses import dataclass, field

from rlkd_trl.settings.files import (
    JsonPath,
    OutputPath,
)
from rlkd_trl.settings.ranges import (
    Count,
    CountFromZero,
    Length,
    PositiveShare,
    Seed,
    Share,
    Temperature,
    Weight,
    check_ranges,
)


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
