r"""How the variance of the K-step return falls with K (Fan, Luo, Bowling & Mou 2026, "KETCHUP"), on real rollouts.

    python recipes/benchmarks/return_variance.py                           # the embedded demo's teacher and warm start
    python recipes/benchmarks/return_variance.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --templates templates.yaml

The student samples several completions for each prompt, and the teacher scores them once; from these scores come the
returns of all tokens for each K. Three variances are given, each as a mean over prompts, or positions:

- of the first token's return among the completions of a prompt, which a baseline of the prompt does not remove;
- of every token's return among the completions of a prompt that have that position;
- of a token's part of the policy gradient in the chosen token's logit, (1 − π(y)) (G_t − b), over all tokens, with b
  the min-variance baseline of the rollout.

A larger K also raises the mean return: with V = max it leaves out maxima that would be subtracted. So the second
variance is also given as a share of the squared mean return. Completions that hit the length cap are bootstrapped. The
script writes `return_variance.json` and `return_variance.md` to `--results_dir`.
"""

from dataclasses import dataclass, field

from given_or_demo import GivenOrDemo
from result_files import RESULTS, write_results

from rlkd_trl.commands.arguments import (
    RewardArguments,
)
from rlkd_trl.commands.checks import checked_rewards
from rlkd_trl.commands.loading import load_panel, load_student
from rlkd_trl.commands.prompt_lengths import fit_rows
from rlkd_trl.commands.settings import parse_settings
from rlkd_trl.errors import InputError, run
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.settings.files import OutputPath
from rlkd_trl.settings.ranges import Count, Length, Seed, check_ranges

COLUMNS = {
    "mean_return": "mean return",
    "first_token_variance": "variance, first token",
    "token_variance": "variance, all tokens",
    "relative_token_variance": "the same / mean²",
    "gradient_variance": "variance, gradient",
}


@dataclass
class VarianceArguments:
    """Measurement"""

    steps: list[Count] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "The K to compare."})
    num_prompts: Count = field(default=64, metadata={"help": "Prompts, the first of the data."})
    num_generations: Count = field(default=16, metadata={"help": "Completions sampled per prompt."})
    max_prompt_length: Length = field(default=512, metadata={"help": "Student prompts are cut at this many tokens."})
    max_completion_length: Length = field(default=48, metadata={"help": "Cap on sampled tokens, EOS included."})
    batch_size: Count = field(default=8, metadata={"help": "Prompts at a time."})
    seed: Seed = field(default=0, metadata={"help": "Seed of the samples, and of the demo's models."})
    output_dir: OutputPath = field(default="runs/return_variance", metadata={"help": "Where the demo's models go."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Where the two result files go."})

    def __post_init__(self):
        if self.num_generations < 2 or min(self.steps) < 1:
            raise InputError("A variance needs --num_generations of 2 or more, and --steps of 1 or more.")
        check_ranges(self)


@dataclass
class VarianceSettings(GivenOrDemo):
    """All flags."""

    reward: RewardArguments
    args: VarianceArguments


def measure(policy, tokenizer, panel, rows: list[dict], reward: RewardArguments, args: VarianceArguments):
    """The columns of the table for each K."""
    from rlkd_trl.evaluation.samples import sampled_inputs
    from rlkd_trl.rewards import TeacherForcingReward

    # 1 sample
    inputs = sampled_inputs(
        policy,
        tokenizer,
        rows,
        num_generations=args.num_generations,
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
        seed=args.seed,
    )

    # 2 score: once, for every K
    terms = {k: TeacherForcingReward(panel, value=reward.value, k=k, tau=reward.tau) for k in args.steps}
    first = next(iter(terms.values()))
    scores = panel.score(
        rows,
        inputs.prompt_index_B,
        inputs.completion_ids_BT,
        inputs.completion_mask_BT,
        inputs.ended_B,
        **first.wanted_statistics(),
    )
    return {k: columns_of(term, scores, inputs, args.num_generations) for k, term in terms.items()}


def columns_of(term, scores, inputs, num_generations: int) -> dict[str, float]:
    """The table's row for one K, from the shared scores."""
    import torch

    from rlkd_trl.ops.advantages import min_variance_baseline, return_to_go
    from rlkd_trl.ops.masking import masked_moments
    from rlkd_trl.ops.rewards import bootstrap_truncated

    mask_BT, ended_B, logps_BT = inputs.completion_mask_BT, inputs.ended_B, inputs.student_logps_BT
    rewards_BT = bootstrap_truncated(
        term.mean_over_scorers(scores, inputs), term.mean_potentials(scores), mask_BT, ended_B
    )
    returns_BT = return_to_go(rewards_BT, mask_BT)
    returns_PKT = returns_BT.unflatten(0, (-1, num_generations)).double()
    mask_PKT = mask_BT.unflatten(0, (-1, num_generations))
    count_PT = mask_PKT.sum(dim=1)
    mean_PT = (returns_PKT * mask_PKT).sum(dim=1) / count_PT.clamp(min=1)
    squares_PT = ((returns_PKT - mean_PT[:, None]) ** 2 * mask_PKT).sum(dim=1)
    variance_PT = squares_PT / (count_PT - 1).clamp(min=1)
    # Positions count as often as completions reach them.
    weights_PT = torch.where(count_PT > 1, count_PT, 0).double()
    token_variance = (variance_PT * weights_PT).sum() / weights_PT.sum()
    mean_square = (mean_PT**2 * weights_PT).sum() / weights_PT.sum()
    advantages_BT = returns_BT - min_variance_baseline(returns_BT, logps_BT, mask_BT)
    _, gradient_variance = masked_moments(-torch.expm1(logps_BT) * advantages_BT, mask_BT)
    return {
        "mean_return": float(returns_PKT[:, :, 0].mean()),
        "first_token_variance": float(variance_PT[:, 0].mean()),
        "token_variance": float(token_variance),
        "relative_token_variance": float(token_variance / mean_square),
        "gradient_variance": float(gradient_variance),
    }


def table(per_k: dict[int, dict[str, float]]) -> str:
    """One row per K, in Markdown; in brackets, variances as a share of the first row's."""
    rows = []
    start = next(iter(per_k.values()))
    for k, columns in per_k.items():
        cells = [
            f"{columns[name]:.4g}" + (f" ({columns[name] / start[name]:.0%})" if "variance" in name else "")
            for name in COLUMNS
        ]
        rows.append([str(k), *cells])
    return markdown_table(["K", *COLUMNS.values()], rows)


def main() -> None:
    # Parse.
    settings = parse_settings(VarianceSettings, description=__doc__)
    data, prompts, teacher = settings.data, settings.prompts, settings.teacher
    reward, args = settings.reward, settings.args
    checked_rewards(reward, None)
    if reward.reward != ["teacher_forcing"] or reward.k != 1:
        raise InputError("This measures the teacher-forcing reward at several K: give --steps, no --reward, no --k.")
    templates, rows = settings.load_data()
    settings.check_models(args.output_dir, seed=args.seed)
    lengths = {name: getattr(args, name) for name in ("max_prompt_length", "max_completion_length")}
    rows = list(fit_rows(rows, "Data", prompts, templates, settings.student, teacher, **lengths))
    rows = rows[: args.num_prompts]

    # Load.
    from rlkd_trl.models.loading import default_device
    from rlkd_trl.students import Policy

    panel = load_panel(teacher, templates)
    model, writer = load_student(settings.student)
    tokenizer = writer.processing_class
    policy = Policy(model.to(default_device()), tokenizer, writer=writer)

    # Measure.
    per_k = measure(policy, tokenizer, panel, rows, reward, args)

    # Save.
    sizes = f"{len(rows)} prompts × {args.num_generations} completions, V = {reward.value}"
    text = f"Returns of {sizes}; {data.dataset or 'the embedded demo'}. In brackets: of the first row.\n\n"
    text += table(per_k) + "\n"
    write_results(args.results_dir, "return_variance", per_k, text)


if __name__ == "__main__":
    run(main)
