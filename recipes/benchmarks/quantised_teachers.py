r"""What does a teacher in bfloat16, int8 or nf4 cost in reward, and in the student that is trained on it?

    python recipes/benchmarks/quantised_teachers.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --templates templates.yaml --test_dataset test.csv --eval_target_column ref --max_steps 150

Rewards: the student's samples (`--num_prompts` inputs, `--num_generations` each) are scored by the same teacher with
its weights as float32, bfloat16, int8 and nf4, the last two with the rest in float32. The reward is teacher-forcing
with V = max and γ = 1, per token r_t and per sequence Σ_t r_t. Against float32: Spearman's rank correlation over all
of them, and within the completions of a prompt, which is all that leave-one-out methods see (its mean over prompts);
and the mean |difference| as a share of float32's standard deviation.

Students, with `--max_steps`: PPO with each of these teachers and every seed through `recipes/compare.py`, at one
learning rate, judged by the float32 teacher. Writes `quantised_teachers.json` and `.md` to `--results_dir`.
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from result_files import RESULTS, write_results

from rlkd_trl.commands.arguments import DataArguments, PromptArguments, StudentArguments, TeacherArguments
from rlkd_trl.commands.checks import check_checkpoints, require
from rlkd_trl.commands.comparison.arguments import as_flags
from rlkd_trl.commands.data import load_prompts, load_templates
from rlkd_trl.commands.loading import load_panel, load_student
from rlkd_trl.commands.parser import RecipeParser
from rlkd_trl.commands.prompt_lengths import fit_rows
from rlkd_trl.errors import InputError, run
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.settings.ranges import AtLeastTwo, Count, LearningRate, Length, Seed, check_ranges

COMPARE = Path(__file__).resolve().parents[1] / "compare.py"
# The first is what the others are compared with.
WEIGHTS = {
    "float32": {"teacher_dtype": "float32"},
    "bfloat16": {"teacher_dtype": "bfloat16"},
    "int8": {"teacher_quantization": "int8"},
    "nf4": {"teacher_quantization": "nf4"},
}
REWARD_COLUMNS = {
    "bytes": "teacher, bytes",
    "token_rank_correlation": "tokens: ρ",
    "token_error": "error / sd",
    "sequence_rank_correlation": "sequences: ρ",
    "within_prompt_rank_correlation": "ρ within prompts",
    "sequence_error": "error / sd",
}
STUDENT_COLUMNS = {
    "bleu": "BLEU",
    "teacher_nll_per_sequence": "NLL / sequence",
    "teacher_nll_per_token": "NLL / token",
    "reward": "reward",
    "length_words": "words",
}


@dataclass
class QuantisationArguments:
    """Measurement"""

    num_prompts: Count = field(
        default=100, metadata={"help": "Inputs whose samples are scored, the first of the data."}
    )
    num_generations: AtLeastTwo = field(default=8, metadata={"help": "Completions sampled per input."})
    max_prompt_length: Length = field(default=512, metadata={"help": "Student prompts are cut at this many tokens."})
    max_completion_length: Length = field(default=64, metadata={"help": "Cap on sampled tokens, EOS included."})
    batch_size: Count = field(default=25, metadata={"help": "Prompts at a time."})
    seed: Seed = field(default=0, metadata={"help": "Seed of the samples that are scored."})
    max_steps: Count | None = field(default=None, metadata={"help": "Optimizer steps of each student; default: none."})
    learning_rate: LearningRate = field(default=1e-4, metadata={"help": "Of every student."})
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of every student."})
    test_dataset: str | None = field(default=None, metadata={"help": "The students are tested on this."})
    eval_target_column: str | None = field(default=None, metadata={"help": "Its column with references."})
    common: list[str] | None = field(default=None, metadata={"help": "More flags for every run, as name=value."})
    jobs: Count = field(default=1, metadata={"help": "Students trained at a time."})
    output_dir: str = field(default="runs/quantised_teachers", metadata={"help": "Where the students go."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Where the two result files go."})

    def __post_init__(self):
        check_ranges(self)
        if self.max_steps is not None and self.test_dataset is None:
            raise InputError("--max_steps trains students, and --test_dataset, to test them on, is missing.")


def rank_correlation(x_N, y_N) -> float:
    """Spearman's ρ: Pearson's of the ranks, tied values sharing their mean rank. NaN where either is constant."""
    import torch

    def ranks(values_N):
        _, place_N, count_G = torch.unique(values_N, return_inverse=True, return_counts=True)
        last_G = count_G.cumsum(dim=0)
        return (last_G - (count_G - 1) / 2.0)[place_N]

    return float(torch.corrcoef(torch.stack([ranks(x_N.double()), ranks(y_N.double())]))[0, 1])


def error_columns(rewards_BT, exact_BT, mask_BT, num_generations: int) -> dict[str, float]:
    """The table's row for one kind of weights, all but their bytes."""
    import torch

    tokens_N, exact_N = rewards_BT[mask_BT].double(), exact_BT[mask_BT].double()
    sequences_B, exact_B = ((values_BT * mask_BT).double().sum(dim=1) for values_BT in (rewards_BT, exact_BT))
    within_P = torch.tensor(
        [
            rank_correlation(x_K, y_K)
            for x_K, y_K in zip(sequences_B.split(num_generations), exact_B.split(num_generations), strict=True)
        ]
    )
    return {
        "token_rank_correlation": rank_correlation(tokens_N, exact_N),
        "token_error": float((tokens_N - exact_N).abs().mean() / exact_N.std()),
        "sequence_rank_correlation": rank_correlation(sequences_B, exact_B),
        "within_prompt_rank_correlation": float(within_P.nanmean()),  # a prompt whose samples agree has no order
        "sequence_error": float((sequences_B - exact_B).abs().mean() / exact_B.std()),
    }


def compare_rewards(teacher: TeacherArguments, templates, inputs, num_generations: int) -> dict[str, dict]:
    """The columns of every kind of weights."""
    from rlkd_trl.models.memory import held_bytes
    from rlkd_trl.rewards import RewardModel, TeacherForcingReward

    columns_of_weights, exact_BT = {}, None
    for name, settings in WEIGHTS.items():
        panel = load_panel(dataclasses.replace(teacher, **settings), templates)
        model = RewardModel([TeacherForcingReward(panel)])
        rewards_BT = model.rewards(inputs, model.score(inputs)).rewards_BT
        exact_BT = rewards_BT if exact_BT is None else exact_BT
        num_bytes = sum(held_bytes(teacher.model) for teacher in {scorer.teacher for scorer in panel.scorers})
        columns = error_columns(rewards_BT, exact_BT, inputs.completion_mask_BT, num_generations)
        columns_of_weights[name] = {"bytes": num_bytes, **columns}
    return columns_of_weights


def compare_students(groups: list[object], args: QuantisationArguments) -> dict[str, dict]:
    """By kind of weights, the test metrics of the students as mean and half-width of the 95 % interval over seeds."""
    output_dir = Path(args.output_dir)
    presets = output_dir / "presets" / "ppo_kd"  # named for the recipe
    presets.mkdir(parents=True, exist_ok=True)
    for name, settings in WEIGHTS.items():
        settings = {"num_generations": 4, **settings}
        (presets / f"{name}.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    command = [sys.executable, COMPARE, *as_flags(*groups), "--output_dir", output_dir]
    command += ["--methods", *(presets / f"{name}.yaml" for name in WEIGHTS), "--max_steps", args.max_steps]
    command += ["--learning_rates", args.learning_rate, "--seeds", *args.seeds, "--jobs", args.jobs]
    command += ["--test_dataset", args.test_dataset, "--max_completion_length", args.max_completion_length]
    command += ["--eval_target_column", args.eval_target_column] if args.eval_target_column else []
    command += ["--common", *args.common] if args.common else []
    subprocess.run([str(word) for word in command], check=True)
    comparison = json.loads((output_dir / "comparison.json").read_text(encoding="utf-8"))
    ((rows,),) = (budgets.values() for budgets in comparison["tests"].values())
    columns = ("mean", "half_width")
    return {
        row["model"]: {
            name: {column: row["greedy"][name][column] for column in columns}
            for name in STUDENT_COLUMNS
            if name in row["greedy"]
        }
        for row in rows
    }


def tables(rewards: dict[str, dict], students: dict[str, dict]) -> str:
    """Markdown: rewards, and students where there are some."""
    rows = [
        [name, *(f"{columns[key]:,}" if key == "bytes" else f"{columns[key]:.4f}" for key in REWARD_COLUMNS)]
        for name, columns in rewards.items()
    ]
    parts = [markdown_table(["weights", *REWARD_COLUMNS.values()], rows)]
    if students:
        known = [key for key in STUDENT_COLUMNS if all(key in columns for columns in students.values())]
        rows = [[name, *(_with_interval(**columns[key]) for key in known)] for name, columns in students.items()]
        parts.append(markdown_table(["student of", *(STUDENT_COLUMNS[key] for key in known)], rows))
    return "\n\n".join(parts)


def _with_interval(mean: float, half_width: float | None) -> str:
    return f"{mean:.2f}" if half_width is None else f"{mean:.2f} ± {half_width:.2f}"


def main() -> None:
    # Parse.
    parser = RecipeParser(
        DataArguments,
        PromptArguments,
        TeacherArguments,
        StudentArguments,
        QuantisationArguments,
        description=__doc__,
    )
    *groups, args = parser.parse()
    data, prompts, teacher, student = groups
    require(**{"--dataset": data.dataset, "--teacher": teacher.teacher, "--student": student.student})
    if given := [flag for flag in as_flags(teacher) if flag in ("--teacher_dtype", "--teacher_quantization")]:
        raise InputError(f"{given[0]} is what this compares: leave it out.")
    templates = load_templates(prompts)
    rows = load_prompts(data, prompts, templates)
    check_checkpoints(teacher, student)
    lengths = {name: getattr(args, name) for name in ("max_prompt_length", "max_completion_length")}
    rows = list(fit_rows(rows, "Data", prompts, templates, student, teacher, **lengths))
    rows = rows[: args.num_prompts]

    # Sample and score.
    from rlkd_trl.evaluation.samples import sampled_inputs
    from rlkd_trl.models.loading import default_device
    from rlkd_trl.students import Policy

    model, writer = load_student(student)
    tokenizer = writer.processing_class
    inputs = sampled_inputs(
        Policy(model.to(default_device()), tokenizer, writer=writer),
        tokenizer,
        rows,
        num_generations=args.num_generations,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    rewards = compare_rewards(teacher, templates, inputs, args.num_generations)

    # Train.
    students = {} if args.max_steps is None else compare_students(groups, args)

    # Save.
    text = (
        f"Rewards of {len(rows)} inputs × {args.num_generations} samples of the student; {Path(data.dataset).name}.\n"
    )
    if students:
        seeds = ", ".join(map(str, args.seeds))
        text += f"Students after {args.max_steps} PPO steps (learning rate {args.learning_rate:g}), greedy outputs on "
        text += (
            f"{Path(args.test_dataset).name}, judged by the float32 teacher; mean ± half-width of the 95 % interval "
        )
        text += f"over seeds {seeds}.\n"
    text += f"\n{tables(rewards, students)}\n"
    write_results(args.results_dir, "quantised_teachers", {"rewards": rewards, "students": students}, text)


if __name__ == "__main__":
    run(main)
