"""Runs a template's Jinja text, which may come from anywhere, in a sandbox and only as far as it is needed.

The sandbox keeps templates away from Python's internals, files and the network. It also refuses the simplest ways to
exhaust the machine (huge ranges, repetitions, powers and outputs), so that there is an error message for them. What
really bounds time and memory is the process in which this runs, `prompts.renderer`.
"""

from __future__ import annotations

import itertools
import math
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context, Undefined, missing
from jinja2.sandbox import SandboxedEnvironment

WRITTEN_SEPARATOR = "|||"
# Stands for a template's own "|||" while it renders. Data cannot contain it, so a "|||" in the data remains plain
# text. It has no letters and no spaces, so that filters such as `upper` and `trim` do not change it.
SEPARATOR = f"\ue000{secrets.randbelow(10**18):018d}\ue001"

# Names of filters, which no template can write.
_OUTCOME, _LOOP = "outcome of a condition", "step of a loop"

MAX_CHARACTERS = 10_000_000  # in one rendering; also the largest number of elements that a `*` may make
MAX_POWER_BITS = 10_000

_random: ContextVar[random.Random] = ContextVar("_random")
_branches: ContextVar[Branches] = ContextVar("_branches")
_numbers = itertools.count()  # of conditions and loops


class Branches:
    """The outcomes of a template's conditions, so that a second rendering takes the same branches.

    They are known by the condition and the rounds of the loops around it, of which the second rendering may have
    fewer. A condition about a loop itself (`loop.last`) is not among them for this reason.
    """

    def __init__(self) -> None:
        self._outcomes: dict[tuple, list[bool]] = defaultdict(list)  # by the condition's number and place
        self._expected: dict[tuple, Iterator[bool]] = {}
        self._begin()

    def _begin(self) -> None:
        self._loops: list[tuple[int, int, int]] = []  # those around: its number, which time it runs there, the round
        self._times: Counter[tuple] = Counter()  # that a loop has run, by its number and place

    def repeat(self) -> None:
        """From now on conditions have the outcomes so far, and their own where they are asked more often."""
        self._expected = {place: iter(outcomes) for place, outcomes in self._outcomes.items()}
        self._begin()

    def outcome(self, value: object, condition: int, chooses_items: bool) -> bool:
        """What the condition with this number and value is taken for. chooses_items: it is that of a loop itself."""
        is_true = bool(value)
        # Jinja chooses items before their rounds begin, so that the innermost loop's round says nothing then.
        place = (condition, *(self._loops[:-1] if chooses_items else self._loops))
        self._outcomes[place].append(is_true)
        return next(self._expected.get(place, iter(())), is_true)

    def step(self, loop: int, what: str) -> None:
        """A loop is to "begin", begins its "next" round, or is at its "end"."""
        if what == "begin":
            place = (loop, *self._loops)
            self._loops.append((loop, self._times[place], -1))
            self._times[place] += 1
        else:
            loop, time, round_ = self._loops.pop()
            if what == "next":
                self._loops.append((loop, time, round_ + 1))

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside it these are the branches of all templates."""
        token = _branches.set(self)
        try:
            yield
        finally:
            _branches.reset(token)


class MissingColumn(jinja2.UndefinedError):
    """A template used a variable that the row does not have. `str()` of it is the variable's name."""


class _Undefined(jinja2.StrictUndefined):
    """A missing value, which raises on every use, also inside a printed list (`repr`): no prompt can hide a gap."""

    __slots__ = ()
    __repr__ = Undefined._fail_with_undefined_error

    def __init__(self, hint=None, obj=missing, name=None, exc=jinja2.UndefinedError):
        if hint is None and obj is missing:
            hint, exc = name, MissingColumn
        super().__init__(hint, obj, name, exc)


class _PromptEnvironment(SandboxedEnvironment):
    """Jinja's sandbox, which also refuses huge repetitions and powers."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left, right):
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_POWER_BITS:
                raise OverflowError(f"** gives a number of more than {MAX_POWER_BITS} bits")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if not isinstance(sequence, str | bytes | list | tuple) or not isinstance(times, int):
                    continue
                if len(sequence) * times > MAX_CHARACTERS:
                    raise OverflowError(f"* repeats to more than {MAX_CHARACTERS} elements")
        return super().call_binop(context, operator, left, right)


# Since it takes the context, Jinja evaluates nothing when it compiles a template, only when it renders it.
@jinja2.pass_context
def _printable(context: Context, value: object) -> object:
    """A value that the template prints; raises for None and NaN, which are columns without a value."""
    if isinstance(value, Undefined) or not _is_empty(value):
        return value
    empty = sorted(str(name) for name, column in context.get_all().items() if _is_empty(column))
    raise ValueError(f"it prints None or NaN; columns without a value in this row: {', '.join(empty) or 'none'}")


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _choice(options: Sequence):
    """promptsource's random `choice`, made reproducible: `seeded_choice` fixes the draws of one rendering."""
    return _random.get().choice(options)


def _most_frequent(items: Iterable) -> list:
    """All items that occur the most often, in the order of their first occurrence."""
    counts = Counter(items)
    highest = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == highest]


def _make_environment() -> _PromptEnvironment:
    environment = _PromptEnvironment(undefined=_Undefined, finalize=_printable, optimized=False)
    environment.globals["zip"] = zip
    del environment.globals["lipsum"]  # draws at random
    environment.filters.update(choice=_choice, random=_choice, most_frequent=_most_frequent)
    environment.filters[_OUTCOME] = lambda value, *arguments: _branches.get().outcome(value, *arguments)
    environment.filters[_LOOP] = lambda loop, what: _branches.get().step(loop, what)
    return environment


_ENVIRONMENT = _make_environment()


@contextmanager
def seeded_choice(seed: str) -> Iterator[None]:
    """Inside it, the filters `choice` and `random` draw from a generator that depends only on `seed`."""
    token = _random.set(random.Random(seed))
    try:
        yield
    finally:
        _random.reset(token)


@dataclass(frozen=True)
class CompiledJinja:
    """A parsed Jinja text. variables: the columns that it reads. input_variables: those it may read before `|||`."""

    template: jinja2.Template
    variables: frozenset[str]
    input_variables: frozenset[str]

    def input_part(self, values: Mapping[str, object]) -> str:
        """The text before `|||`. What comes after it is not run, so it may use columns that the row lacks."""
        return self._render(values, until_separator=True).partition(SEPARATOR)[0]

    def parts(self, values: Mapping[str, object]) -> list[str]:
        """The whole text, split at the template's own `|||`."""
        return self._render(values, until_separator=False).split(SEPARATOR)

    def _render(self, values: Mapping[str, object], until_separator: bool) -> str:
        pieces, length = [], 0
        for piece in self.template.generate(values):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise OverflowError(f"it renders more than {MAX_CHARACTERS} characters")
            if until_separator and SEPARATOR in piece:
                break
        return "".join(pieces)


@lru_cache(maxsize=4096)
def compile_jinja(source: str) -> CompiledJinja:
    """Parse and compile, running nothing. Raises what jinja and Python's compiler raise."""
    tree = _ENVIRONMENT.parse(source)
    _mark_separators(tree)
    input_tree = _ENVIRONMENT.parse(source)
    _mark_separators(input_tree)
    input_tree.body, _ = _before_separator(input_tree.body)
    _number_conditions(tree)
    return CompiledJinja(
        variables=frozenset(meta.find_undeclared_variables(tree)),
        input_variables=frozenset(meta.find_undeclared_variables(input_tree)),
        template=_ENVIRONMENT.from_string(tree),
    )


def _mark_separators(parent: nodes.Node) -> None:
    """Replaces each `|||` that the template prints by SEPARATOR: in its text, and in literals as in `join("|||")`.

    A literal that is compared or passed to a method (`text.split("|||")`) is about the data, and is kept.
    """
    for node in parent.iter_child_nodes():
        if isinstance(node, nodes.TemplateData):
            node.data = node.data.replace(WRITTEN_SEPARATOR, SEPARATOR)
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            is_printed = not isinstance(parent, nodes.Call | nodes.Compare | nodes.Operand)
            node.value = node.value.replace(WRITTEN_SEPARATOR, SEPARATOR) if is_printed else node.value
        _mark_separators(node)


def _number_conditions(parent: nodes.Node) -> None:
    """Passes the outcome of each condition through `Branches.outcome`, and tells `Branches.step` of each loop."""
    for name, value in list(parent.iter_fields()):
        if isinstance(value, list):
            setattr(parent, name, [part for node in value for part in _numbered_loop(node)])
    if isinstance(parent, nodes.If | nodes.CondExpr):
        _number_condition(parent)
    for node in parent.iter_child_nodes():
        _number_conditions(node)


def _numbered_loop(node: object) -> list:
    """A loop with its steps; anything else as it is."""
    if not isinstance(node, nodes.For):
        return [node]
    loop = nodes.Const(next(_numbers))
    begin, following, end = (
        nodes.ExprStmt(nodes.Filter(loop, _LOOP, [nodes.Const(what)], [], None, None, lineno=node.lineno))
        for what in ("begin", "next", "end")
    )
    if node.test is not None:
        _number_condition(node)
    node.body.insert(0, following)
    return [begin, node, end]


def _number_condition(node: nodes.If | nodes.CondExpr | nodes.For) -> None:
    if all(name.name != "loop" for name in node.test.find_all(nodes.Name)):
        arguments = [nodes.Const(next(_numbers)), nodes.Const(isinstance(node, nodes.For))]
        node.test = nodes.Filter(node.test, _OUTCOME, arguments, [], None, None, lineno=node.lineno)


def _before_separator(body: list[nodes.Node]) -> tuple[list[nodes.Node], bool]:
    """The statements that can run before a separator in the text, and whether they always reach one.

    It looks into `{% if %}`; other kinds of statements are kept whole, so it may keep too much but never too little.
    Changes `body`.
    """
    statements = []
    for node in body:
        statements.append(node)
        ended = False
        if isinstance(node, nodes.Output):
            texts = [isinstance(child, nodes.TemplateData) and SEPARATOR in child.data for child in node.nodes]
            ended = any(texts)
            node.nodes = node.nodes[: texts.index(True)] if ended else node.nodes
        elif isinstance(node, nodes.If):
            branches = [node, *node.elif_]
            endings = []
            for branch in branches:
                branch.body, branch_ended = _before_separator(branch.body)
                endings.append(branch_ended)
            node.else_, else_ended = _before_separator(node.else_)
            ended = else_ended and all(endings)
        if ended:
            return statements, True
    return statements, False


def missing_value(column: str) -> Undefined:
    """A value that raises `MissingColumn` for `column` when it is used."""
    return _ENVIRONMENT.undefined(name=column)


def unusable_value(reason: str) -> Undefined:
    """A value that raises with this reason when it is used."""
    return _ENVIRONMENT.undefined(reason)
