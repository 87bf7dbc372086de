"""One style for all pictures, and for each contender the same colour in all of them. Needs matplotlib: extra `profiles`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from _shared.records import RESULTS

Rows = Mapping[str, Iterable[tuple[str, float]]]

MUTED, GRID = "#5f6368", "#e4e4e4"

STYLE: dict[str, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}

# Okabe and Ito's colours, which readers with any colour vision can tell apart, and a dark blue; blues are for this package.
COLORS = {
    "AdamW": "#e69f00",  # before "fused", which it may be too
    "fused": "#0072b2",
    "compiled": "#332288",
    "multi-tensor": "#56b4e9",
    "reference": "#009e73",
    "torch.optim.Adafactor": "#cc79a7",
    "transformers": "#d55e00",
    "timm": "#8c6d31",
    "pytorch_optimizer": "#7f7f7f",
}
HOLLOW = ("foreach", "stochastic", "bfloat16", "8bit")


def color_of(name: str) -> str:
    """The colour of a contender: that of the first entry of COLORS that its name contains, else a grey."""
    return next((color for key, color in COLORS.items() if key.lower() in name.lower()), MUTED)


def figures() -> Any:
    """`matplotlib.pyplot` in this style, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def dots(panels: Mapping[str, Rows], xlabel: str, linear_to: float | None = None) -> Any:
    """Panels side by side, in each a line of dots for every row, in the colours of the contenders.

    Args:
        panels: by title the rows, by name the contenders and their values. Contenders that differ little from one of the same
            colour are hollow, and the fused step is a diamond.
        xlabel: of all panels, whose scale is logarithmic.
        linear_to: a value up to which the scale is linear, where there are zeros.
    """
    height = max(map(len, panels.values()))
    plt = figures()
    figure, axes = plt.subplots(1, len(panels), figsize=(max(10, 6 * len(panels)), 1.8 + 0.4 * height), squeeze=False)
    known: dict[str, Any] = {}
    shown: list[str] = []
    for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
        values = []
        for y, contenders in enumerate(rows.values()):
            for name, value in contenders:
                face = "white" if name == "AdamW" or any(word in name for word in HOLLOW) else color_of(name)
                marker, order = ("D", 3) if name == "Adafactor, fused" else ("o", 2)
                look = {"color": color_of(name), "markerfacecolor": face, "zorder": order, "clip_on": False}
                (known[name],) = ax.plot(value, y, marker, **look)
                values.append(value)
        ax.set_yticks(range(len(rows)), list(rows) if list(rows) != shown else [])
        shown = list(rows)
        ax.set_ylim(max(1, len(rows)) - 0.5, -0.5)
        if linear_to is not None:
            ax.set_xscale("symlog", linthresh=linear_to)
            ax.set_xlim(left=0)
        else:
            ax.set_xscale("log")
            if values and max(values) > 5 * min(values):
                ax.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5) if max(values) < 1e4 * min(values) else (1,)))
                ax.minorticks_off()
            ax.xaxis.set_minor_formatter("{x:.3g}")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=title, xlabel=xlabel)
    if known:
        figure.legend(known.values(), known, loc="outside lower center", ncols=4)
    return figure


def save_figure(figure: Any, name: str, directory: Path = RESULTS) -> Path:
    """Write `directory/name.png` and close the figure."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    figure.savefig(path, metadata={"Software": None})
    figures().close(figure)
    return path
