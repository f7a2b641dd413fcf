"""Whether a higher or a lower value of each metric is better, in one table."""

from rlkd_trl.errors import InputError

# True: higher is better. False: lower is better. None: neither, as a text can be too long or too short.
HIGHER_IS_BETTER: dict[str, bool | None] = {
    "bleu": True,
    "rouge1": True,
    "rouge2": True,
    "rougeL": True,
    "ibleu": True,
    "self_bleu": False,
    "distinct1": True,
    "distinct2": True,
    "distinct_outputs": True,
    "length_words": None,
    "length_ratio": None,
    "tokens": None,
    "eos_rate": True,
    "reward": True,
    "teacher_nll_per_token": False,
    "teacher_nll_per_sequence": False,
    "student_nll_of_teacher_per_token": False,
    "nll_of_teacher_samples_per_token": False,
    # of encoders
    "accuracy": True,
    "f1": True,
    "pearson": True,
    "spearman": True,
    "agreement": True,
    "similarity_spearman": True,
    "hidden_cosine": True,
}


def base_metric(name: str) -> str:
    """The metric that a name in a log stands for: `bleu` for `bleu`, `eval_bleu` and `eval_dev_bleu`.

    In the last one, `dev` is the name of one of several evaluation sets.

    Raises:
        InputError: The name stands for none of `HIGHER_IS_BETTER`.
    """
    stripped = name.removeprefix("eval_")
    if stripped in HIGHER_IS_BETTER:
        return stripped
    endings = [metric for metric in HIGHER_IS_BETTER if stripped.endswith(f"_{metric}")]
    if not endings:
        raise InputError(f"Unknown metric {name!r}; evaluation measures: {', '.join(HIGHER_IS_BETTER)}.")
    return max(endings, key=len)


def greater_is_better(name: str, given: bool | None = None) -> bool:
    """Whether a higher value of the metric is better. given: the user's own answer, if there is one.

    Raises:
        InputError: The metric is unknown; `given` contradicts its direction; or it has no direction, and the user has
            given none.
    """
    direction = HIGHER_IS_BETTER[base_metric(name)]
    if direction is None and given is None:
        raise InputError(f"{name!r} is neither better when it is higher nor when it is lower: set greater_is_better.")
    if direction is not None and given not in (None, direction):
        raise InputError(
            f"greater_is_better = {given} would keep the worst checkpoint by {name!r}, of which "
            f"{'more' if direction else 'less'} is better: leave greater_is_better out."
        )
    return given if direction is None else direction
