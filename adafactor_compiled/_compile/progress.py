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
    stream = sys.stderr
    if show is None:
        show = stream.isatty()
    try:
        for done, item in enumerate(items):
            if show:
                filled = WIDTH * done // len(items)
                stream.write(f"\r{title} [{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{len(items)}")
                stream.flush()
            yield item
    finally:
        if show:
            stream.write("\r\x1b[K")
            stream.flush()
