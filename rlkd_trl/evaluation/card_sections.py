"""The sections of a model card that say how a student was trained."""

import re
from collections.abc import Mapping, Sequence

from rlkd_trl.evaluation.citations import CITATIONS
from rlkd_trl.evaluation.tables import markdown_table

CURVES_FILE = "curves.png"
_TEMPLATES_SHOWN = 10
_LONGEST = 300  # characters of a value


def templates_section(templates: Mapping[str, str]) -> str:
    """How the teacher was asked. templates: each one's Jinja text by its name; none if it read the bare source."""
    if not templates:
        return "## Templates\n\nThe teacher read what the student reads."
    shown = list(templates.items())[:_TEMPLATES_SHOWN]
    parts = [f"`{name.replace('`', '')}`:\n\n{_block(text)}" for name, text in shown]
    if len(templates) > len(shown):
        parts.append(f"And {len(templates) - len(shown)} more.")
    return "\n\n".join(["## Templates\n\nHow the teacher was asked, in Jinja:", *parts])


def settings_section(settings: Mapping[str, object]) -> str:
    """The settings as a table."""
    rows = [[name, _cell(value)] for name, value in settings.items()]
    return (
        "## Training\n\nAll settings that are not at their defaults, but for those that say where and how often "
        "things are written or measured; and the usual ones:\n\n"
        f"{markdown_table(['setting', 'value'], rows)}"
    )


def curves_section() -> str:
    return f"## Curves\n\n![What was logged in training, by optimizer step]({CURVES_FILE})"


def citations_section(papers: Sequence[str]) -> str:
    """papers: keys of `CITATIONS`."""
    return "## Citations\n\n" + "\n".join(f"- {CITATIONS[paper]}" for paper in papers)


def _cell(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join(text.split()).replace("`", "'")
    return f"`{text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}`"


def _block(text: str) -> str:
    """A block of code, between more backticks than the text has in a row."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"
