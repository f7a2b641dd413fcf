"""Names that the library `datasets` gives only in the texts of its errors."""

import re


def splits_named_in(error: Exception) -> str:
    """The splits listed in the error about an unknown split ("train, test"); "" for other errors."""
    return _listed(r"Unknown split .* Should be one of \[(.*)\]", error)


def configurations_named_in(error: Exception) -> str:
    """The configurations listed in the error about one that has to be chosen; "" for other errors."""
    return _listed(r"available configs: \[(.*)\]", error)


def _listed(pattern: str, error: Exception) -> str:
    match = re.search(pattern, str(error))
    return match.group(1).replace("'", "") if match else ""
