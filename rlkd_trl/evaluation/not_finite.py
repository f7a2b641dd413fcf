"""Numbers that are not finite in an evaluation: counted, with a warning, and refused at the end of a command."""

import textwrap
from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers.utils import logging

from rlkd_trl.errors import TrainingError, is_first_process

logger = logging.get_logger(__name__)


NOT_FINITE = "samples_not_finite"


_PROMPT_WIDTH = 200


def count_not_finite(
    is_usable: Mapping[str, Tensor], rows: Sequence[Mapping[str, object]], column: str = "prompt"
) -> int:
    """The number of rows with a number that is not finite, with a warning that names the first of them.

    is_usable: for each kind of number, by its name, whether it is finite in each row, `[B]`. column: what a row is
    named by; its number, where there is no such column.
    """
    bad = sorted({b for usable_B in is_usable.values() for b in (~usable_B).nonzero()[:, 0].tolist()})
    if bad and is_first_process():
        what = " and ".join(name for name, usable_B in is_usable.items() if not usable_B.all())
        first = textwrap.shorten(str(rows[bad[0]].get(column, f"row {bad[0] + 1}")), _PROMPT_WIDTH)
        logger.warning(f"{what} not finite for {len(bad)} of {len(rows)} {column}s, the first of them {first!r}")
    return len(bad)


def check_finite(results: Mapping[str, Mapping[str, float]], consequence: str = "") -> None:
    """Raises `TrainingError` if evaluations met numbers that are not finite.

    results: each model's metrics by its name. consequence: a sentence for the message about what was saved.
    """
    bad = {name: metrics[NOT_FINITE] for name, metrics in results.items() if metrics.get(NOT_FINITE)}
    if bad:
        listed = ", ".join(f"{count:.0f} samples of {name!r}" for name, count in bad.items())
        raise TrainingError(
            f"The evaluation cannot be relied on: numbers that are not finite in {listed}; the warnings above name "
            f"the first of them. {consequence}".rstrip()
        )
