r"""How noisy is each method's gradient? The same prompts sampled again and again, at the warm start.

    python recipes/benchmarks/gradient_variance.py                         # the embedded demo's teacher and warm start
    python recipes/benchmarks/gradient_variance.py --teacher runs/teacher --student runs/warm --dataset train.csv \
        --source_column mr --templates templates.yaml

Nothing is trained. The trainer of each method makes `--num_rollouts` rollouts of the same prompts and takes the
gradient of its loss. With g_r the flattened gradient of rollout r, and ḡ their mean over R rollouts, the columns are:

- variance: Σ_r ‖g_r − ḡ‖² / (R − 1), the trace of the covariance;
- signal: ‖ḡ‖² − variance / R, an unbiased estimate of ‖E g‖²;
- noise to signal: variance / signal. Methods with different losses can only be compared by this ratio.

`RLOO, sequence, log ratio` and `all actions, w = 1` estimate the same gradient, of the sequences' reverse KL, so their
variances compare directly. To make this so, every loss is a sum over tokens divided by the number of sequences here;
the trainers of token-level methods divide by the sampled number of tokens. Two rows have RLOO's default, reward per
token (`average_reward`); all others have the sum of rewards. The script writes `gradient_variance.json` and `.md` to
`--results_dir`.
"""

from dataclasses import dataclass, field

from given_or_demo import GivenOrDemo
from result_files import RESULTS, made_by, write_results

from rlkd_trl.commands.arguments import StudentArguments
from rlkd_trl.commands.loading import load_panel, load_student
from rlkd_trl.commands.settings import parse_settings
from rlkd_trl.errors import InputError, run
from rlkd_trl.evaluation.tables import markdown_table
from rlkd_trl.settings.files import OutputPath
from rlkd_trl.settings.ranges import AtLeastTwo, Count, Length, Seed, check_ranges

# The trainer of each method, its settings, and the reward with its settings; None for methods without rewards.
SUM = {"average_reward": "none"}
METHODS = {
    "RLOO, sequence": ("RLOOKD", {"level": "sequence"}, ("TeacherForcingReward", {})),
    "RLOO, token": ("RLOOKD", {"level": "token"}, ("TeacherForcingReward", {})),
    "RLOO, sequence, sum of rewards": ("RLOOKD", {"level": "sequence", **SUM}, ("TeacherForcingReward", {})),
    "RLOO, token, sum of rewards": ("RLOOKD", {"level": "token", **SUM}, ("TeacherForcingReward", {})),
    "REINFORCE, K = 1": ("ReinforceKD", {"teacher_baseline": False}, ("TeacherForcingReward", {"k": 1})),
    "KETCHUP, K = 4": ("ReinforceKD", {"teacher_baseline": False}, ("TeacherForcingReward", {"k": 4})),
    "KETCHUP, K = 8": ("ReinforceKD", {"teacher_baseline": False}, ("TeacherForcingReward", {"k": 8})),
    "RLOO, sequence, log ratio": ("RLOOKD", {"level": "sequence", **SUM}, ("LogRatioReward", {})),
    "RLOO, token, log ratio": ("RLOOKD", {"level": "token", **SUM}, ("LogRatioReward", {})),
    "all actions, w = 1": ("AllActionsKD", {"future_weight": 1.0}, None),
    "all actions, w = 1, expected future": ("AllActionsKD", {"future_weight": 1.0, "future": "expected"}, None),
    "all actions, w = 0.1": ("AllActionsKD", {"future_weight": 0.1}, None),
    "all actions, w = 0 (on-policy reverse KL)": ("AllActionsKD", {"future_weight": 0.0}, None),
    "all actions, discount 0.5": ("AllActionsKD", {"future_weight": 1.0, "gamma": 0.5}, None),
    "all actions, discount 0.5, expected future": (
        "AllActionsKD",
        {"future_weight": 1.0, "gamma": 0.5, "future": "expected"},
        None,
    ),
    "all actions, length-normalised": (
        "AllActionsKD",
        {"future_weight": 1.0, "length_normalization": True, "baseline": "none"},
        None,
    ),
}


@dataclass
class VarianceArguments:
    """Measurement"""

    num_rollouts: AtLeastTwo = field(default=40, metadata={"help": "R, gradients per method."})
    num_prompts: Count = field(default=16, metadata={"help": "Prompts of a rollout, the first of the data."})
    num_generations: AtLeastTwo = field(default=4, metadata={"help": "Completions per prompt."})
    max_completion_length: Length = field(default=64, metadata={"help": "Cap on sampled tokens, EOS included."})
    seed: Seed = field(default=0, metadata={"help": "Seed of the samples, and of the demo's models."})
    output_dir: OutputPath = field(default="runs/gradient_variance", metadata={"help": "Where the demo's models go."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Where the two result files go."})

    def __post_init__(self):
        check_ranges(self)


@dataclass
class VarianceSettings(GivenOrDemo):
    """All flags."""

    args: VarianceArguments


def gradients(trainer, rows: list[dict], num_rollouts: int):
    """The gradient of each rollout's loss per sequence, flattened, `[R, number of parameters]`."""
    import torch

    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    per_rollout = []
    for number in range(num_rollouts):
        trainer.rollout_state.micro_step = number  # which determines the rollout's random numbers
        rollout = trainer.make_rollout(rows)
        sequences = torch.tensor(float(len(rollout.loss_mask_BT)))
        loss, _ = trainer.micro_batch_loss(trainer.model, rollout, tokens=sequences, sequences=sequences)
        per_rollout.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(per_rollout)


def columns_of(gradients_RN) -> dict[str, float]:
    """The table's row for one method."""
    gradients_RN = gradients_RN.double()
    R, mean_N = len(gradients_RN), gradients_RN.mean(dim=0)
    variance = float(((gradients_RN - mean_N) ** 2).sum() / (R - 1))
    signal = float((mean_N**2).sum()) - variance / R
    return {"variance": variance, "signal": signal, "noise_to_signal": variance / signal}


def table(per_method: dict[str, dict[str, float]]) -> str:
    """One row per method, in Markdown. There is no ratio if the estimate of the signal is not above 0."""
    rows = []
    for name, columns in per_method.items():
        ratio = f"{columns['noise_to_signal']:.3g}" if columns["signal"] > 0 else "–"
        rows.append([name, f"{columns['variance']:.3g}", f"{columns['signal']:.3g}", ratio])
    return markdown_table(["method", "variance", "signal ‖E g‖²", "noise / signal"], rows)


def measure(panel, student: StudentArguments, rows: list[dict], args: VarianceArguments) -> dict:
    """The columns of every method, each from a trainer on a fresh copy of the student."""
    from datasets import Dataset

    import rlkd_trl
    from rlkd_trl import rewards

    batch = args.num_prompts * args.num_generations
    common = {"per_device_train_batch_size": batch, "num_generations": args.num_generations, "seed": args.seed}
    common |= {"max_completion_length": args.max_completion_length, "output_dir": args.output_dir}
    per_method = {}
    for name, (kind, settings, reward) in METHODS.items():
        model, writer = load_student(student)
        config = getattr(rlkd_trl, f"{kind}Config")(**common, **settings)
        signal = panel if reward is None else getattr(rewards, reward[0])(panel, **reward[1])
        trainer = getattr(rlkd_trl, f"{kind}Trainer")(
            model, signal, config, Dataset.from_list(rows), processing_class=writer.processing_class, chat=writer.chat
        )
        per_method[name] = columns_of(gradients(trainer, rows, args.num_rollouts))
        print(f"{name}: {per_method[name]}", flush=True)
    return per_method


def main() -> None:
    # Parse.
    settings = parse_settings(VarianceSettings, description=__doc__)
    args = settings.args
    templates, rows = settings.load_data()
    rows = list(rows)[: args.num_prompts]
    if len(rows) < args.num_prompts:
        raise InputError(f"--num_prompts {args.num_prompts}, but the data has {len(rows)} distinct inputs.")
    settings.check_models(args.output_dir, seed=args.seed)

    # Measure.
    per_method = measure(load_panel(settings.teacher, templates), settings.student, rows, args)

    # Save.
    sizes = f"{args.num_rollouts} rollouts of {args.num_prompts} prompts × {args.num_generations} completions"
    text = f"Gradients per sequence at the warm start, {sizes}; {settings.data.dataset or 'the embedded demo'}.\n\n"
    text += f"{table(per_method)}\n\n{made_by()}\n"
    write_results(args.results_dir, "gradient_variance", per_method, text)


if __name__ == "__main__":
    run(main)
