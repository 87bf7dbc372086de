"""One style for all pictures, and for each contender the same colour in all of them. Needs matplotlib: extra `profiles`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from _shared.records import RESULTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1a1a1a", "#5f6368", "#e4e4e4"

STYLE: dict[str, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
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


def color_of(name: str) -> str:
    """The colour of a contender: that of the first entry of COLORS that its name contains, else a grey."""
    return next((color for key, color in COLORS.items() if key.lower() in name.lower()), MUTED)


def figures() -> Any:
    """`matplotlib.pyplot` in this style, without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the picture needs matplotlib: pip install 'adafactor-compiled[profiles]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def save_figure(figure: Figure, name: str, directory: Path = RESULTS) -> Path:
    """Write `directory/name.png` and close the figure.

    Returns:
        The path of the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    figure.savefig(path, metadata={"Software": None})
    figures().close(figure)
    return path
