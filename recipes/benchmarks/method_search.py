r"""A search for the best method: combinations of what there is, from one warm start, chosen on validation inputs.

    python recipes/benchmarks/e2e_comparison.py ... --stop_after_minutes 1     # data, teacher and warm starts
    python recipes/benchmarks/method_search.py --work_dir runs/e2e_comparison \
        --templates promptsource/e2e_nlg_cleaned/templates.yaml --stop_after_minutes 60

A candidate is a list of stages, each a recipe with flags and its share of the steps; a stage begins with the student
of the one before. All candidates have the same number of steps of 32 completions, so about the same number of tokens,
those read from data included. What is combined: the exact expectation over the next token, with a differential future;
entropy, in the reward (log_ratio) or as a bonus; a KL penalty to the start; imitation of the teacher's answers, first
or in turn with reinforcement learning (an off-policy share). The learning rate of what is learnt from rewards, or on
the student's own samples, is the candidate's; imitation before it has its own, or, where it is called fast, the rate
that is best for imitation alone.

No test input is read here. Candidates stand in the order of the teacher's NLL per token of sampled outputs, those that
lose greedy BLEU against the warm start last. A finished stage is not run again; the same command goes on.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from e2e import QUIET, RESULTS, TEMPLATE_NAMES, stage
from result_files import made_by
from stages import RECIPES

from rlkd_trl.evaluation.tables import markdown_table, number

IMITATION_RATE, FAST_RATE = "1e-3", "4e-3"
COMMON = ["--per_device_train_batch_size", "32", "--warmup_steps", "5", "--logging_steps", "25"]
COMMON += ["--per_device_eval_batch_size", "100", "--max_completion_length", "64"]
COLUMNS = {"bleu": "BLEU", "teacher_nll_per_token": "NLL / token", "length_words": "words"}
COLUMNS |= {"distinct_outputs": "distinct outputs"}


@dataclass(frozen=True)
class Stage:
    """A recipe with these flags for a share of the steps; with its own learning rate, or the candidate's."""

    recipe: str
    flags: str
    share: float = 1.0
    learning_rate: str | None = None


def imitation(share: float, learning_rate: str = IMITATION_RATE) -> Stage:
    """Maximum likelihood on the teacher's answers: `seq_kd`."""
    return Stage("kd", "--alpha 0 --sequences data --lmbda 0", share, learning_rate)


def preset(recipe: str, name: str) -> Stage:
    """A method as `compare.py` runs it."""
    return Stage(recipe, f"--config {RECIPES / 'configs' / 'methods' / recipe / name}.yaml")


def gkd(share: float) -> Stage:
    return Stage("kd", "--divergence jsd --lmbda 0.5", share)


K = "--num_generations 4"
EXACT = f"{K} --signal log_ratio --future_weight 1 --average_reward rollout"
PPO, RLOO = f"{K} --average_reward rollout", f"{K} --average_reward rollout --level token"

CANDIDATES: dict[str, list[Stage]] = {
    # What is to be beaten.
    "seq_kd": [Stage("kd", "--alpha 0 --sequences data --lmbda 0")],
    "gkd": [gkd(1.0)],
    "ppo": [Stage("ppo_kd", PPO)],
    "rloo_token": [Stage("rloo_kd", RLOO)],
    "llmr": [preset("reinforce_kd", "llmr")],
    "ketchup": [preset("reinforce_kd", "ketchup")],
    "all_actions_expected": [Stage("all_actions_kd", f"{K} --future_weight 1 --gamma 0.5 --future expected")],
    # Exact next token, differential future.
    "exact, expected": [Stage("all_actions_kd", f"{EXACT} --future expected")],
    "exact, expected, discount 0.9": [Stage("all_actions_kd", f"{EXACT} --future expected --gamma 0.9")],
    "exact, expected, discount 0.5": [Stage("all_actions_kd", f"{EXACT} --future expected --gamma 0.5")],
    "exact, teacher forcing": [Stage("all_actions_kd", f"{EXACT} --future expected --signal teacher_forcing")],
    # Entropy in the reward, or beside it; KL to the start.
    "ppo, log ratio": [Stage("ppo_kd", f"{PPO} --reward log_ratio")],
    "rloo_token, log ratio": [Stage("rloo_kd", f"{RLOO} --reward log_ratio")],
    "ppo, half log ratio": [Stage("ppo_kd", f"{PPO} --reward teacher_forcing log_ratio --reward_weights 0.5 0.5")],
    "ppo, entropy": [Stage("ppo_kd", f"{PPO} --entropy_coef 0.02")],
    "ppo, KL": [Stage("ppo_kd", f"{PPO} --beta 0.05")],
    # Imitation first.
    "imitation, ppo": [imitation(0.5), Stage("ppo_kd", PPO, 0.5)],
    "imitation, ppo log ratio": [imitation(0.5), Stage("ppo_kd", f"{PPO} --reward log_ratio", 0.5)],
    "imitation, exact": [imitation(0.5), Stage("all_actions_kd", f"{EXACT} --future expected", 0.5)],
    "gkd, exact": [gkd(0.5), Stage("all_actions_kd", f"{EXACT} --future expected", 0.5)],
    "fast imitation, exact": [
        imitation(0.5, FAST_RATE),
        Stage("all_actions_kd", f"{EXACT} --future expected", 0.5),
    ],
    "fast imitation, exact, discount 0.9": [
        imitation(0.5, FAST_RATE),
        Stage("all_actions_kd", f"{EXACT} --future expected --gamma 0.9", 0.5),
    ],
    "fast imitation, all_actions_expected": [
        imitation(0.5, FAST_RATE),
        Stage("all_actions_kd", f"{K} --future_weight 1 --gamma 0.5 --future expected", 0.5),
    ],
    "fast imitation, ppo log ratio": [
        imitation(0.5, FAST_RATE),
        Stage("ppo_kd", f"{PPO} --reward log_ratio", 0.5),
    ],
    # An off-policy share: imitation and the student's own samples in turn.
    "exact and imitation in turn": [
        *[Stage("all_actions_kd", f"{EXACT} --future expected", 0.2), imitation(0.1)] * 3,
        Stage("all_actions_kd", f"{EXACT} --future expected", 0.1),
    ],
    "ppo and imitation in turn": [
        *[Stage("ppo_kd", f"{PPO} --reward log_ratio", 0.2), imitation(0.1)] * 3,
        Stage("ppo_kd", f"{PPO} --reward log_ratio", 0.1),
    ],
}


def run_candidate(args: argparse.Namespace, stages: list[Stage], rate: str, seed: str, here: Path) -> Path:
    """All stages, each in a directory of its own in `here`; returns the last one's, which holds the student."""
    student = args.work_dir / f"warm_{args.warm_start}"
    template_flags = ["--templates", args.templates, "--template_names", TEMPLATE_NAMES[0]]
    data = ["--dataset", args.work_dir / "pseudo.jsonl", "--source_column", "mr", "--target_column", "pseudo_label"]
    data += ["--eval_dataset", args.work_dir / "validation.csv", "--eval_target_column", "ref"]
    for index, of_stage in enumerate(stages):
        output_dir = here / f"stage{index}"
        steps = max(1, round(of_stage.share * args.max_steps))
        flags = ["--max_steps", str(steps), "--learning_rate", of_stage.learning_rate or rate, *COMMON, *QUIET]
        flags += [*of_stage.flags.split(), "--seed", str(int(seed) + 100 * index), "--output_dir", output_dir]
        models = ["--teacher", args.work_dir / "teacher", "--student", student]
        stage(of_stage.recipe, output_dir / "finished.json", *models, *data, *template_flags, *flags, threads=1)
        student = output_dir
    return student


def evaluate(args: argparse.Namespace, student: Path, dataset: Path, here: Path) -> None:
    """Metrics of a student's greedy and sampled outputs, in `here`/greedy and `here`/sampled."""
    for kind in ("greedy", "sampled"):
        template_flags = ["--templates", args.templates, "--template_names", TEMPLATE_NAMES[0]]
        template_flags += ["--dataset", dataset, "--source_column", "mr", "--target_column", "ref"]
        template_flags += ["--teacher", args.work_dir / "teacher", "--student", student, "--output_dir", here / kind]
        template_flags += ["--sample", "--seed", "1"] if kind == "sampled" else []
        stage("evaluate", here / kind / "metrics.json", *template_flags, threads=1)


def directory_name(candidate: str) -> str:
    return candidate.replace(",", "").replace(" ", "_")


def measured(here: Path) -> dict[str, dict[str, float]]:
    return {
        kind: json.loads((here / kind / "metrics.json").read_text(encoding="utf-8"))["student"]
        for kind in ("greedy", "sampled")
    }


def rank(metrics: dict, before: dict) -> tuple[bool, float]:
    """The least is the best: by NLL per token of sampled outputs, those that lose greedy BLEU behind the others."""
    return metrics["greedy"]["bleu"] < before["greedy"]["bleu"], metrics["sampled"]["teacher_nll_per_token"]


def table(rows: list[tuple[str, str, str, dict]], before: dict) -> str:
    """The best first."""
    heads = ["candidate", "rate", "seed", *COLUMNS.values(), *(f"sampled {name}" for name in COLUMNS.values())]
    lines = []
    for name, rate, seed, found in [
        ("warm start", "–", "–", before),
        *sorted(rows, key=lambda row: rank(row[3], before)),
    ]:
        numbers = [number(found[kind][metric], ".3f") for kind in ("greedy", "sampled") for metric in COLUMNS]
        lines.append([name, rate, seed, *numbers])
    return markdown_table(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/e2e_comparison"))
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--warm_start", default="middling")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--learning_rates", nargs="+", default=["2e-4", "1e-3"])
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--stop_after_minutes", type=float)
    parser.add_argument("--results", type=Path, default=RESULTS / "method_search.md")
    args = parser.parse_args()

    until = None if args.stop_after_minutes is None else time.monotonic() + 60 * args.stop_after_minutes
    search = args.work_dir / f"search_{args.warm_start}_{args.max_steps}"
    evaluate(args, args.work_dir / f"warm_{args.warm_start}", args.work_dir / "validation.csv", search / "before")
    rows, left = [], 0
    for seed in args.seeds:
        for rate in args.learning_rates:
            for name in args.candidates:
                here = search / directory_name(name) / f"seed{seed}-lr{rate}"
                is_done = (here / "sampled" / "metrics.json").is_file()
                if not is_done and until is not None and time.monotonic() >= until:
                    left += 1
                    continue
                student = run_candidate(args, CANDIDATES[name], rate, seed, here)
                evaluate(args, student, args.work_dir / "validation.csv", here)
                rows.append((name, rate, seed, measured(here)))
    text = f"{args.max_steps} steps from the {args.warm_start} warm start; validation inputs.\n\n"
    text += table(rows, measured(search / "before"))
    text += f"\n\n{left} runs are left. {made_by()}\n"
    args.results.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
