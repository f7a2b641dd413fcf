r"""The winner of `method_search.py` against what it is to beat, on the test inputs, with seeds the search had not.

    python recipes/benchmarks/method_confirmation.py --work_dir runs/e2e_comparison \
        --templates promptsource/e2e_nlg_cleaned/templates.yaml --winner "imitation, exact"

Each candidate has the learning rate that is first in the search's order, on validation inputs at the search's seed.
All have the same number of steps of 32 completions; the tokens that this took, those read from data included, are in
the table. Means over seeds ± half-width of their 95 % interval by Student's t; differences are paired by seed, in bold
where the interval leaves out 0, and not corrected for the number of comparisons. A finished stage is not run again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from e2e import RESULTS
from method_search import CANDIDATES, directory_name, evaluate, measured, rank, run_candidate
from result_files import made_by
from warm_start_tables import with_interval

from rlkd_trl.evaluation.tables import markdown_table

RIVALS = ["seq_kd", "gkd", "llmr", "ketchup", "ppo", "rloo_token", "all_actions_expected"]
TESTS = {"in_distribution": "Inputs distributed as in training", "official": "The shifted test set"}
# Name, kind of output, metric, digits.
COLUMNS = [
    ("BLEU", "greedy", "bleu", 1),
    ("NLL / token", "greedy", "teacher_nll_per_token", 3),
    ("sampled BLEU", "sampled", "bleu", 1),
    ("sampled NLL / token", "sampled", "teacher_nll_per_token", 3),
    ("NLL of the teacher's greedy answers", "greedy", "student_nll_of_teacher_per_token", 3),
    ("words", "greedy", "length_words", 1),
    ("distinct outputs", "greedy", "distinct_outputs", 2),
]
DIFFERENCES = 5  # of the columns, from the left
Measures = dict[str, dict[str, float]]


def best_rate(search: Path, candidate: str, seed: str) -> str:
    """The learning rate that comes first in the search's order.

    Raises:
        SystemExit: The search has not finished this candidate with this seed at any rate.
    """
    ranks, before = {}, measured(search / "before")
    for here in sorted((search / directory_name(candidate)).glob(f"seed{seed}-lr*")):
        if (here / "sampled" / "metrics.json").is_file():
            ranks[here.name.split("-lr")[1]] = rank(measured(here), before)
    if not ranks:
        raise SystemExit(f"method_search.py has not tried {candidate!r} with seed {seed}: nothing in {search}.")
    return min(ranks, key=ranks.__getitem__)


def generated_tokens(here: Path) -> int:
    return sum(
        json.loads(path.read_text(encoding="utf-8"))["generated_tokens"] for path in here.glob("stage*/cost.json")
    )


def tables(
    measures: dict[str, list[Measures]], rates: dict[str, str], tokens: dict[str, float], before: Measures
) -> str:
    """The table of all candidates, and that of the first one's differences from the others.

    measures: by candidate, those of each seed; rates, tokens: of each candidate; before: of the warm start.
    """

    def cells(rows: Sequence[Measures]) -> list[str]:
        return [with_interval([row[kind][metric] for row in rows], digits) for _, kind, metric, digits in COLUMNS]

    winner, *rivals = measures
    lines = [["warm start", "", "", *cells([before])]]
    lines += [[f"`{name}`", rates[name], f"{tokens[name]:,.0f}", *cells(rows)] for name, rows in measures.items()]
    heads = [name for name, *_ in COLUMNS]
    text = markdown_table(["candidate", "rate", "tokens", *heads], lines)
    lines = []
    for name in rivals:
        pairs = list(zip(measures[winner], measures[name], strict=True))
        differences = [
            with_interval([ours[kind][metric] - theirs[kind][metric] for ours, theirs in pairs], digits, signed=True)
            for _, kind, metric, digits in COLUMNS[:DIFFERENCES]
        ]
        lines.append([f"less `{name}`", *differences])
    return f"{text}\n\n{markdown_table([f'`{winner}`', *heads[:DIFFERENCES]], lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/e2e_comparison"))
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--warm_start", default="middling")
    parser.add_argument("--winner", required=True, choices=list(CANDIDATES))
    parser.add_argument("--rivals", nargs="+", default=RIVALS, choices=list(CANDIDATES), help="without the winner")
    parser.add_argument("--search_seed", default="0")
    parser.add_argument("--seeds", nargs="+", default=["10", "11", "12"])
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--results", type=Path, default=RESULTS / "method_confirmation.md")
    args = parser.parse_args()

    place = f"{args.warm_start}_{args.max_steps}"
    search, confirmed = args.work_dir / f"search_{place}", args.work_dir / f"confirmed_{place}"
    names = [args.winner, *args.rivals]
    if len(set(names)) < len(names):
        raise SystemExit(f"--rivals: each once, and not the --winner, {args.winner!r}.")
    if args.search_seed in args.seeds:
        raise SystemExit(f"--seeds: the search has had seed {args.search_seed}, by which the winner was chosen.")
    rates = {name: best_rate(search, name, args.search_seed) for name in names}
    runs = {}
    for seed in args.seeds:
        for name in names:
            here = confirmed / directory_name(name) / f"seed{seed}-lr{rates[name]}"
            student = run_candidate(args, CANDIDATES[name], rates[name], seed, here)
            for test in TESTS:
                evaluate(args, student, args.work_dir / f"{test}.csv", here / test)
            runs.setdefault(name, []).append(here)
    tokens = {name: sum(map(generated_tokens, places)) / len(places) for name, places in runs.items()}
    text = f"{args.max_steps} steps from the {args.warm_start} warm start, seeds {', '.join(args.seeds)}.\n"
    for test, title in TESTS.items():
        evaluate(args, args.work_dir / f"warm_{args.warm_start}", args.work_dir / f"{test}.csv", confirmed / test)
        measures = {name: [measured(here / test) for here in places] for name, places in runs.items()}
        text += f"\n## {title}\n\n{tables(measures, rates, tokens, measured(confirmed / test))}\n"
    text += f"\n{made_by()}\n"
    args.results.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
