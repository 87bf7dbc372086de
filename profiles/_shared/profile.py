"""The order of a profile: measure, write the JSON, and make the table and the picture from what was written."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from _shared.figures import save_figure
from _shared.records import read_result, write_result

Result = dict[str, Any]


def run_profile(
    name: str,
    options: Namespace,
    measure: Callable[[Namespace], Iterator[Mapping[str, Any]]],
    table: Callable[[Result], str],
    draw: Callable[[Result], Any],
) -> None:
    """Measure, unless `--redraw` was given; then print the table and save the picture of what is in the JSON.

    Where matplotlib is missing the measuring is not lost: the picture can be drawn elsewhere, from the JSON.

    Args:
        name: of the profile.
        options: from a `parser(..., redraw=True)`.
        measure: yields everything measured so far, each time there is more; each is written, so that a long run that is
            interrupted leaves what it has.
        table: Markdown from the content of the JSON.
        draw: a figure from the content of the JSON.
    """
    if not options.redraw:
        written = None
        for payload in measure(options):
            path = write_result(name, payload, options.results)
            if path != written:
                print(f"writing {path}", flush=True)
            written = path
    result = read_result(name, options.results)
    print(table(result))
    if importlib.util.find_spec("matplotlib") is None and not options.redraw:
        print("no picture, since matplotlib is missing; `--redraw` draws it where that is installed")
        return
    print(f"drew {save_figure(draw(result), name, options.results)}")
