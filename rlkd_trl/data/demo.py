"""The embedded demo task: describe a hiking trail from its attributes. English, small, and written for this package.

A source lists a trail's name and 2 to 4 other attributes; a reference is one or more sentences that state each of
them exactly once, in the source's order. References differ in the wording of every attribute and in what is joined
into one sentence, so a model has to learn content and form separately: a weak one omits, repeats or invents
attributes.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import TYPE_CHECKING

from rlkd_trl.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_SIZES = {"train": 2000, "validation": 60, "test": 100}
MIN_REFERENCES, MAX_REFERENCES = 3, 4
MIN_ATTRIBUTES, MAX_ATTRIBUTES = 3, 5  # the name included

NAME_FIRST = (
    "Amber", "Badger", "Copper", "Eagle", "Fox", "Maple", "Otter", "Silver",
)  # fmt: skip
NAME_SECOND = ("Creek", "Glen", "Meadow", "Ridge", "Valley")

# Attribute -> value in the source -> the words for it in a reference. In source order; `name` comes before them all.
WORDS = {
    "type": {
        "loop": ("loop trail",),
        "coast": ("coastal path",),
        "forest": ("forest walk",),
        "mountain": ("mountain route",),
    },
    "distance": {f"{km} km": (f"{km} km",) for km in (3, 5, 9, 12, 20)},
    "difficulty": {
        "easy": ("easy", "gentle"),
        "moderate": ("moderate", "medium"),
        "hard": ("hard", "tough"),
        "expert": ("very demanding", "very steep"),
    },
    "highlight": {
        "waterfall": ("a tall waterfall",),
        "castle": ("an old castle",),
        "lake": ("a clear blue lake",),
        "bridge": ("a stone bridge",),
        "cave": ("a deep cave",),
        "wildflowers": ("fields of wildflowers",),
    },
    "dogs": {  # whole predicates; DOG_CLAUSES has the clauses
        "welcome": ("welcomes dogs", "is open to dogs"),
        "on a lead": ("requires dogs to stay on a lead", "accepts dogs on a lead"),
        "no": ("does not allow dogs", "is closed to dogs"),
    },
    "season": {season: (season,) for season in ("spring", "summer", "autumn", "winter")},
    "start": {
        place: (place,)
        for place in (
            "Pine Lodge", "Harbour Inn", "Oak Station", "Mill Farm", "North Gate",
        )
    },
}  # fmt: skip
# The labels of `demo_sentences`; one of them for texts that leave the attribute out.
_NOT_SAID = "not said"
DIFFICULTIES = sorted([*WORDS["difficulty"], _NOT_SAID])
DOG_CLAUSES = {
    "welcome": ("dogs are welcome", "you may bring your dog"),
    "on a lead": ("dogs must be kept on a lead", "you may bring your dog on a lead"),
    "no": ("dogs are not allowed", "you have to leave your dog at home"),
}

# Attribute -> verb phrases whose subject is the trail, and sentences with a subject of their own.
PREDICATES = {
    "distance": ("is {} long", "covers {}", "runs for {}", "stretches over {}"),
    "difficulty": ("is {}", "is {} to walk"),
    "highlight": ("passes {}", "leads to {}", "is famous for {}", "takes you past {}"),
    "dogs": ("{}",),
    "season": ("is best in {}", "looks its best in {}", "should be walked in {}"),
    "start": ("starts at {}", "begins near {}", "sets off from {}", "can be reached from {}"),
}
CLAUSES = {
    "distance": ("the total distance is {}", "you will walk {}", "you can expect a walk of {}"),
    "difficulty": ("the walking is {}", "most hikers find it {}", "the climb is {}"),
    "highlight": ("you can see {}", "visitors enjoy {}", "along the way you pass {}", "you should not miss {}"),
    "dogs": ("{}",),
    "season": ("{} is the best time to go", "the ideal season is {}"),
    "start": ("the start is at {}", "you set off from {}", "you can park your car at {}"),
}


def demo_dataset(split: str, seed: int = 0) -> Dataset:
    """One split of the demo task: 2000 rows of "train", 60 of "validation" or 100 of "test".

    Columns: `source` (str, "name[Fox Ridge], type[loop], ..."), `target` (str, the first reference) and
    `references` (3 or 4 distinct strings). No source occurs twice, or in two splits, whatever their seeds. The same
    split and seed give the same rows everywhere.

    Raises:
        InputError: `split` is none of the three.
    """
    from datasets import Dataset

    if split not in SPLIT_SIZES:
        raise InputError(f"The demo task has no split {split!r}; its splits are: {', '.join(SPLIT_SIZES)}.")
    # Of `random`, only Random(int) and random() promise the same numbers in every Python version.
    rng = random.Random(seed * len(SPLIT_SIZES) + list(SPLIT_SIZES).index(split))
    rows: dict[str, list[str]] = {}
    while len(rows) < SPLIT_SIZES[split]:
        trail = _draw_trail(rng)
        source = ", ".join(f"{attribute}[{value}]" for attribute, value in trail.items())
        if source not in rows and _split_of(source) == split:
            rows[source] = _draw_references(rng, trail)
    references = list(rows.values())
    return Dataset.from_dict(
        {"source": list(rows), "target": [refs[0] for refs in references], "references": references}
    )


def demo_sentences(split: str) -> Dataset:
    """The references of one split of the demo task, for encoders: how hard is the trail that a text describes?

    Columns: `text` (str, the first reference) and `label` (str, one of `DIFFICULTIES`).

    Raises:
        InputError: As `demo_dataset`.
    """
    from datasets import Dataset

    rows = []
    for row in demo_dataset(split):
        stated = re.search(r"difficulty\[(\w+)\]", row["source"])
        rows.append({"text": row["target"], "label": stated.group(1) if stated else _NOT_SAID})
    return Dataset.from_list(rows)


def _split_of(source: str) -> str:
    """The split a source belongs to, from a checksum of its text: the same for every seed."""
    bucket = zlib.crc32(source.encode()) % 100
    return "train" if bucket < 70 else "validation" if bucket < 80 else "test"


def _draw_trail(rng: random.Random) -> dict[str, str]:
    """A name and 2 to 4 other attributes, in source order."""
    trail = {"name": f"{_choice(rng, NAME_FIRST)} {_choice(rng, NAME_SECOND)}"}
    num_others = _choice(rng, range(MIN_ATTRIBUTES - 1, MAX_ATTRIBUTES))
    chosen = _shuffled(rng, WORDS)[:num_others]
    trail.update({attribute: _choice(rng, list(WORDS[attribute])) for attribute in WORDS if attribute in chosen})
    return trail


def _draw_references(rng: random.Random, trail: dict[str, str]) -> list[str]:
    num_references = _choice(rng, range(MIN_REFERENCES, MAX_REFERENCES + 1))
    references: dict[str, None] = {}  # a set that keeps order
    while len(references) < num_references:
        references[_describe(rng, trail)] = None
    return list(references)


def _describe(rng: random.Random, trail: dict[str, str]) -> str:
    """One reference: an opening sentence about the name, then the other attributes, one or two to a sentence."""
    attributes = [attribute for attribute in trail if attribute != "name"]
    opening, stated = _opening(rng, trail, attributes)
    attributes = [attribute for attribute in attributes if attribute not in stated]
    sentences = [opening]
    while attributes:
        pair, attributes = (attributes[:2], attributes[2:]) if rng.random() < 0.7 else (attributes[:1], attributes[1:])
        sentences.append(_following(rng, trail, pair))
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _opening(rng: random.Random, trail: dict[str, str], attributes: list[str]) -> tuple[str, set[str]]:
    """The first sentence and the attributes it states: type and difficulty, often the one that comes next."""
    name = trail["name"]
    if "type" not in trail and "difficulty" not in trail:
        stated = attributes[:2]  # "Fox Ridge covers 5 km and passes a stone bridge"
        return f"{name} {' and '.join(_predicate(rng, a, trail[a]) for a in stated)}", set(stated)

    stated = {"type"} & set(attributes)
    noun = _choice(rng, WORDS["type"][trail["type"]]) if stated else _choice(rng, ("trail", "hike"))
    if "difficulty" in trail and (not stated or rng.random() < 0.6):
        stated.add("difficulty")
        noun = f"{_choice(rng, WORDS['difficulty'][trail['difficulty']])} {noun}"
    noun = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

    remaining = [attribute for attribute in attributes if attribute not in stated]
    if remaining and rng.random() < 0.5:
        return f"{name} is {noun} that {_predicate(rng, remaining[0], trail[remaining[0]])}", stated | {remaining[0]}
    return _choice(rng, ("{} is {}", "{} is known as {}")).format(name, noun), stated


def _following(rng: random.Random, trail: dict[str, str], attributes: list[str]) -> str:
    """A later sentence about one or two attributes, with the trail as its subject or without."""
    first, *more = attributes
    if rng.random() < 0.5:
        subject = _choice(rng, ("it", "the trail", "this route"))
        sentence = f"{subject} {_predicate(rng, first, trail[first])}"
        joined = [f" and {_predicate(rng, a, trail[a])}" for a in more]
    else:
        sentence = _clause(rng, first, trail[first])
        joined = [_choice(rng, (", and ", ", while ")) + _clause(rng, a, trail[a]) for a in more]
    return sentence + "".join(joined)


def _predicate(rng: random.Random, attribute: str, value: str) -> str:
    """A verb phrase about the trail: "covers 5 km"."""
    return _choice(rng, PREDICATES[attribute]).format(_choice(rng, WORDS[attribute][value]))


def _clause(rng: random.Random, attribute: str, value: str) -> str:
    """A sentence of its own, without the final stop: "the total distance is 5 km"."""
    words = DOG_CLAUSES[value] if attribute == "dogs" else WORDS[attribute][value]
    return _choice(rng, CLAUSES[attribute]).format(_choice(rng, words))


def _choice(rng: random.Random, options):
    return options[int(rng.random() * len(options))]


def _shuffled(rng: random.Random, items) -> list:
    return [item for _, item in sorted((rng.random(), item) for item in items)]
