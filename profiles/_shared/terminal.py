"""What a profile says on the terminal: its options, a line of progress, a table."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from _shared.records import RESULTS

WIDTH = 16


class _Threads(argparse.Action):
    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        assert isinstance(values, int)
        torch.set_num_threads(values)


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1 but is: {value}")
    return value


def parser(description: str | None, rounds: int = 9, redraw: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that all profiles have, `--redraw` for those that `run_profile` runs; `--threads` takes effect
    when it is parsed."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="a small and short run, to see that everything works")
    result.add_argument(
        "--rounds", type=at_least_one, default=rounds, help="measurements of each contender (default %(default)s)"
    )
    result.add_argument("--threads", type=at_least_one, action=_Threads, help="threads for torch (default: all cores)")
    result.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON and the picture (default profiles/results)"
    )
    if redraw:
        result.add_argument(
            "--redraw", action="store_true", help="measure nothing: print the table and draw the picture of the last result"
        )
    return result


class ProgressLine:
    """One line on standard error that is written over and gone at the end; nothing where that is no terminal.

    with ProgressLine("training") as line:
        line.show(done, total, "loss 2.31")
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.visible = sys.stderr.isatty()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def show(self, done: int, total: int, text: str = "") -> None:
        """Draw the bar for `done` of `total`, with `text` behind it."""
        if self.visible:
            filled = WIDTH * done // total
            line = f"{self.title} [{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total} {text}"
            columns = shutil.get_terminal_size().columns  # a line that wraps could not be written over
            sys.stderr.write(f"\r\x1b[K{line[: columns - 1]}")
            sys.stderr.flush()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well on a terminal and in Markdown; all columns but the first are aligned to the right."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row should have {len(header)} cells but has {len(row)}: {list(row)!r}")
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
