"""The fenced blocks of the README, for the tests that run them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block that was opened with ```` ```language word word ````."""

    line: int  # of its first line of code, from 1
    language: str
    words: tuple[str, ...]
    code: str


def blocks(text: str | None = None) -> list[Block]:
    """All fenced blocks of the README, or of another Markdown text."""
    text = README.read_text(encoding="utf-8") if text is None else text
    return [
        Block(text.count("\n", 0, match.start()) + 2, match[1], tuple(match[2].split()), match[3])
        for match in FENCE.finditer(text)
    ]
