"""The checkpoints whose own Python code the user lets run: those that flags name, with --trust_remote_code."""

from collections.abc import Collection

from rlkd_trl.settings.hub import split_revision

_trusted: frozenset[str] = frozenset()


def trust_code_of(names: Collection[str]) -> None:
    """From here on the code in these checkpoints, directories or Hub ids, may run; that of all others may not."""
    global _trusted
    _trusted = frozenset(split_revision(name)[0] for name in names)


def trusted_checkpoints() -> frozenset[str]:
    """The names that were given last, those on the Hub without their revisions."""
    return _trusted
