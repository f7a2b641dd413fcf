"""Layer maps: which layer of the student learns from which layer of the teacher, g(m) in the papers.

Layers are counted from 1; the student has M, the teacher L.
"""

import re
from collections.abc import Callable

Pairs = list[tuple[int, int]]


def uniform(M: int, L: int) -> Pairs:
    """g(m) = m · L / M, rounded down: every (L / M)th layer, the last by the last (Jiao et al. 2020, TinyBERT)."""
    return [(m, m * L // M) for m in range(1, M + 1)]


def top(M: int, L: int) -> Pairs:
    """g(m) = m + L − M: the teacher's last layers (Jiao et al. 2020, "top-strategy")."""
    return [(m, m + L - M) for m in range(1, M + 1)]


def bottom(M: int, L: int) -> Pairs:
    """g(m) = m: the teacher's first layers (Jiao et al. 2020, "bottom-strategy")."""
    return [(m, m) for m in range(1, M + 1)]


def skip(M: int, L: int) -> Pairs:
    """As `uniform`, without the last layer: for 6 of 12 layers 2, 4, … 10 (Sun et al. 2019, PKD-Skip)."""
    return uniform(M, L)[:-1]


def last(M: int, L: int) -> Pairs:
    """As `top`, without the last layer: for 6 of 12 layers 7, 8, … 11 (Sun et al. 2019, PKD-Last)."""
    return top(M, L)[:-1]


def single(M: int, L: int) -> Pairs:
    """The last layer from the teacher's last (Wang et al. 2020, MiniLM); `single=9`: its 9th (Wang et al. 2021)."""
    return [(M, L)]


NAMED: dict[str, Callable[[int, int], Pairs]] = {
    "uniform": uniform,
    "top": top,
    "bottom": bottom,
    "skip": skip,
    "last": last,
    "single": single,
}
FORMS = f"{', '.join(NAMED)}, single=9 (a layer of the teacher) or pairs of student and teacher, as 1:2,2:4"


def layer_pairs(layer_map: str, M: int, L: int) -> Pairs:
    """The pairs (student's layer, teacher's layer) of a map: a name in `NAMED`, `single=9`, or pairs as `1:2,2:4`.

    Raises:
        ValueError: The map is none of these, has a number outside of the M or L layers, names a student's layer twice,
            or has no pair at all.
    """
    if layer_map in NAMED:
        pairs = NAMED[layer_map](M, L)
    elif re.fullmatch(r"single=\d+", layer_map):
        pairs = [(M, int(layer_map.partition("=")[2]))]
    elif re.fullmatch(r"\d+:\d+(,\d+:\d+)*", layer_map):
        pairs = [tuple(map(int, pair.split(":"))) for pair in layer_map.split(",")]
    else:
        raise ValueError(f"choose one of {FORMS}")
    if not pairs:
        raise ValueError(f"of a student with {M} layers it leaves none")
    students = [m for m, _ in pairs]
    if twice := [m for m in students if students.count(m) > 1]:
        raise ValueError(f"the student's layer {twice[0]} is there twice")
    for who, number, layers in (*(("student", m, M) for m, _ in pairs), *(("teacher", n, L) for _, n in pairs)):
        if not 1 <= number <= layers:
            raise ValueError(f"it leads to layer {number} of the {who}, which has layers 1 to {layers}")
    return pairs
