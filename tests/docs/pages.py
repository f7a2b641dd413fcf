"""The pages that users read, and what stands in them: snippets by language, commands, links."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "yaml", "json", "text"}


class Snippet(NamedTuple):
    """A fenced block: its page, the line it begins on, its language, and what it holds."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """All fenced blocks of a page, in order."""
    blocks, lines = [], page.read_text(encoding="utf-8").splitlines()
    begin = None
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin = number
        else:
            blocks.append(Snippet(page, begin, lines[begin - 1][3:], "\n".join(lines[begin : number - 1]) + "\n"))
            begin = None
    assert begin is None, f"{page.name}:{begin} opens a block that nothing closes"
    return blocks


def commands(snippet: Snippet) -> list[list[str]]:
    """The words of each command of a shell snippet: lines joined, comments dropped, `a && b` taken apart."""
    text = snippet.text.replace("\\\n", " ")
    return [
        words
        for line in text.splitlines()
        for part in line.split(" && ")
        if (words := shlex.split(part, comments=True))
    ]


def recipe_command(words: list[str]) -> list[str] | None:
    """["ppo_kd", "--seed", "1"] of a command that runs a recipe, in whichever way; None of any other."""
    if words[0] in ("pip", "pytest"):
        return None
    for number, word in enumerate(words):
        if match := re.fullmatch(r"recipes/(\w+)\.py", word):
            return [match.group(1), *words[number + 1 :]]
    if words[0] == "rlkd-trl":
        return words[1:]
    return None


def links(page: Path) -> list[str]:
    """Targets of the page's links to files of the project, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target.partition("#")[0] for target in targets if "://" not in target]
