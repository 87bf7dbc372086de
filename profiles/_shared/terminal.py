"""What a profile does on the terminal: its options, the order of things, a line of progress, a table."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from _shared.figures import save_figure
from _shared.records import RESULTS, read_result, write_result

QUICK_ROUNDS = 3


def at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1 but is: {text}")
    return int(text)


def parser(description: str | None, rounds: int = 9, **lists: Collection[str]) -> argparse.ArgumentParser:
    """A parser with the options that all profiles have.

    Args:
        description: what `--help` shows.
        rounds: default of `--rounds`.
        **lists: further options of one or more words, and the words that each may have.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="a small and short run, to see that everything works")
    result.add_argument("--rounds", type=at_least_one, default=rounds, help="measurements of a contender (default %(default)s)")
    result.add_argument("--threads", type=at_least_one, help="threads for torch (default: all cores)")
    result.add_argument("--results", type=Path, default=RESULTS, help="directory for the JSON and the picture")
    result.add_argument("--redraw", action="store_true", help="measure nothing, print and draw the last result")
    for name, words in lists.items():
        result.add_argument(f"--{name}", nargs="+", choices=words, metavar="NAME", help=f"of {', '.join(words)}")
    return result


def run_profile(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Iterator[Mapping[str, Any]]],
    table: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any]], Any],
) -> None:
    """Measure, unless `--redraw` was given; then print the table and save the picture of what is in the JSON.

    Where matplotlib is missing the measuring is not lost: the picture can be drawn elsewhere, from the JSON.

    Args:
        name: of the profile.
        options: from a `parser`; a quick run has few rounds.
        measure: yields everything measured so far, each time there is more; each is written, so that a long run that is
            interrupted leaves what it has.
        table: Markdown from the content of the JSON.
        draw: a figure from the content of the JSON.
    """
    if not options.redraw:
        torch.set_num_threads(options.threads or torch.get_num_threads())
        if options.quick:
            options.rounds = min(QUICK_ROUNDS, options.rounds)
        print(f"writing {options.results / name}.json", flush=True)
        for payload in measure(options):
            write_result(name, payload, options.results)
    result = read_result(name, options.results)
    print(table(result))
    if importlib.util.find_spec("matplotlib") is None and not options.redraw:
        print("no picture, since matplotlib is missing; `--redraw` draws it where that is installed")
        return
    print(f"drew {save_figure(draw(result), name, options.results)}")


def show_progress(text: str = "") -> None:
    """A line on standard error in place of the last one; nothing where that is no terminal."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns  # a line that wraps could not be written over
        sys.stderr.write(f"\r\x1b[K{text[: columns - 1]}")
        sys.stderr.flush()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well on a terminal and in Markdown; all columns but the first are aligned to the right."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row should have {len(header)} cells but has {len(row)}: {list(row)!r}")
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
