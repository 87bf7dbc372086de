"""A progress bar for a terminal that leaves no trace, and writes nothing anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

WIDTH = 24


def progress(items: Sequence[Item], title: str, show: bool | None = None) -> Iterator[Item]:
    """Iterate over `items` with a bar on standard error.

    Args:
        items: what to go through.
        title: what is being done.
        show: True or False to insist; None for "where standard error is a terminal".
    """
    shown = _is_terminal() if show is None else show
    try:
        for done, item in enumerate(items):
            filled = WIDTH * done // len(items)
            shown = shown and _written(f"\r{title} [{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{len(items)}")
            yield item
    finally:
        if shown:
            _written("\r\x1b[K")


def _is_terminal() -> bool:
    """Whether standard error is one; it may be None, closed, or whatever someone has put there."""
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):
        return False


def _written(text: str) -> bool:
    """Whether standard error takes a text."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (AttributeError, ValueError, OSError):
        return False
    return True
