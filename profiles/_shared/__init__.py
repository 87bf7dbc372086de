"""What the profiles share: timing side by side, one JSON for each run, one style of picture, one form of table.

A profile is a script, whose directory is on its path, so it says

    from _shared import compare, dots, markdown_table, parser, run_profile

    def measure(options):                               # yields everything measured so far, whenever there is more
        yield {"timings": compare({"ours": ours, "fused AdamW": adamw}, options.rounds)}  # milliseconds

    def table(result):                                  # Markdown from the content of the JSON, and so the picture
        return markdown_table(["", "ms"], [[name, f"{x['median']:.1f}"] for name, x in result["timings"].items()])

    run_profile("NAME", parser(__doc__).parse_args(), measure, table, draw)
"""

from _shared.figures import COLORS, color_of, dots, figures, save_figure
from _shared.processes import in_fresh_process
from _shared.records import read_result, write_result
from _shared.terminal import at_least_one, markdown_table, parser, run_profile, show_progress
from _shared.timing import Timing, call_ms, compare, timing_of

__all__ = [
    "COLORS",
    "Timing",
    "at_least_one",
    "call_ms",
    "color_of",
    "compare",
    "dots",
    "figures",
    "in_fresh_process",
    "markdown_table",
    "parser",
    "read_result",
    "run_profile",
    "save_figure",
    "show_progress",
    "timing_of",
    "write_result",
]
