"""What the profiles share: timing side by side, one JSON for each run, one style of picture, one form of table.

A profile is a script, `python profiles/NAME.py --help`; the directory of a script is on its path, so it says

    from _shared import compare, markdown_table, parser, save_figure, write_result

    options = parser(__doc__).parse_args()          # --quick, --rounds, --threads, --results; add your own
    timings = compare({"ours": ours, "fused AdamW": adamw}, options.rounds)
    ours, adamw = timings.values()                  # Timing(median, low, high), milliseconds
    print(markdown_table(["", "ms", "/ AdamW"], [["ours", f"{ours.median:.1f}", f"{ours.median / adamw.median:.2f}"]]))
    write_result("NAME", {"shapes": shapes, "rounds": options.rounds, "timings": timings}, options.results)
    save_figure(figure, "NAME", options.results)    # NAME.png; the figure from `figures()`, colours from `color_of(name)`

A profile whose table and picture are made from its JSON alone leaves the order of things to `run_profile`.
`write_result` adds the machine: versions, processor, threads, commit. Timings and dtypes may be anywhere in what it is given.
"""

from _shared.figures import COLORS, color_of, figures, save_figure
from _shared.profile import run_profile
from _shared.records import RESULTS, machine, read_result, write_result
from _shared.terminal import ProgressLine, markdown_table, parser
from _shared.timing import Timing, compare, timing_of

__all__ = [
    "COLORS",
    "RESULTS",
    "ProgressLine",
    "Timing",
    "color_of",
    "compare",
    "figures",
    "machine",
    "markdown_table",
    "parser",
    "read_result",
    "run_profile",
    "save_figure",
    "timing_of",
    "write_result",
]
