"""What the numbers of variations.py say: whether each contender is better than what it varies, in words and in a picture."""

from __future__ import annotations

import math
import statistics
from typing import Any

from _shared import COLORS, color_of, figures, markdown_table

HEADER = ["", "learning rate", "held-out loss (least to most)", "accuracy", "against its base", "state, bytes", "step, ms"]
SENTENCES = {
    "better": "Better than {base}",
    "no difference": "No help: no difference to {base} beyond the spread",
    "the same": "No help: the same losses as {base}, to the last digit",
    "worse": "Worse than {base}",
}


def best_of(contender: dict[str, Any]) -> dict[str, Any]:
    """What it did at its best rate, where losses that JSON has as null are infinite."""
    rate = contender["rates"][contender["best"]]
    return {**rate, "held_out_losses": [math.inf if loss is None else loss for loss in rate["held_out_losses"]]}


def verdict(contender: dict[str, Any], base: dict[str, Any]) -> tuple[str, float]:
    """One of SENTENCES, and the difference of the mean losses.

    They differ where the means are further apart than the seeds of either; they are the same where every loss is, at all rates.
    """
    if contender["rates"] == base["rates"]:
        return "the same", 0.0
    losses, of_base = best_of(contender)["held_out_losses"], best_of(base)["held_out_losses"]
    difference = statistics.fmean(losses) - statistics.fmean(of_base)
    spread = max(max(losses) - min(losses), max(of_base) - min(of_base))
    if abs(difference) <= spread < math.inf:
        return "no difference", difference
    return "better" if difference < 0 else "worse", difference


def rate_text(contender: dict[str, Any]) -> str:
    """The best rate; and whether it is the least or the largest that was tried, so that one beyond it may be better."""
    rates = [rate["lr"] for rate in contender["rates"]]
    lr = rates[contender["best"]]
    if lr is None:
        return "its own"
    return f"{lr:g}" + {min(rates): ", least tried", max(rates): ", largest tried"}.get(lr, "")


def table(result: dict[str, Any]) -> str:
    return "\n\n".join(_table_of(task, of_task) for task, of_task in result["tasks"].items())


def _table_of(task: str, of_task: dict[str, Any]) -> str:
    contenders = of_task["contenders"]
    rows: list[list[str]] = []
    judged: dict[str, dict[str, list[str]]] = {}
    for name, contender in contenders.items():
        best, against = best_of(contender), ""
        if contender["base"]:
            base = contenders[contender["base"]]
            word, difference = verdict(contender, base)
            against = word if word == "the same" else f"{word}, {difference:+.4f}"
            share = contender["state_bytes"] / base["state_bytes"]
            shown = name if share == 1 else f"{name} ({share:.2g} x its state)"
            judged.setdefault(contender["base"], {}).setdefault(word, []).append(shown)
        losses, accuracy = best["held_out_losses"], statistics.fmean(best["accuracies"])
        loss = f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        costs = [f"{contender['state_bytes']:,}", f"{contender['step_ms']['median']:.2f}"]
        rows.append([name, rate_text(contender), loss, f"{accuracy:.1%}", against, *costs])
    lines = [
        f"- {sentence.format(base=base)}: {'; '.join(of_base[word])}."
        for base, of_base in judged.items()
        for word, sentence in SENTENCES.items()
        if word in of_base
    ]
    title = f"{task}: {of_task['parameters']:,} parameters, {of_task['steps']} steps"
    return "\n".join([title, "", markdown_table(HEADER, rows), "", *lines])


def draw(result: dict[str, Any]) -> Any:
    """The held-out loss of every seed at the best rate; behind it in grey, where those of its base lie."""
    tasks = result["tasks"]
    figure, axes = figures().subplots(1, len(tasks), figsize=(6 * len(tasks), 5), squeeze=False)
    for ax, (task, of_task) in zip(axes[0], tasks.items(), strict=True):
        contenders = of_task["contenders"]
        for i, (name, contender) in enumerate(contenders.items()):
            losses, of_base = (best_of(contenders[key])["held_out_losses"] for key in (name, contender["base"] or name))
            ax.plot([min(of_base), max(of_base)], [i, i], color="#d0d0d0", linewidth=11, solid_capstyle="butt")
            color = color_of(name) if name in COLORS else COLORS["fused"]
            ax.plot(losses, [i] * len(losses), "o", color=color, markersize=5, alpha=0.7)
        ax.set_yticks(range(len(contenders)), list(contenders))
        ax.invert_yaxis()
        ax.set(title=f"{task}, {len(result['seeds'])} seeds; grey: what is varied", xscale="log")
        ax.set_xlabel("held-out loss, logarithmic")
        ax.xaxis.set_major_formatter("{x:.3g}")
        ax.xaxis.set_minor_formatter("{x:.3g}")
    return figure
