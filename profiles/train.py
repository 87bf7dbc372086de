"""Train a small character transformer on English: this package's optimizer beside its peers, from the same start.

The fused optimizer, its compiled and its reference path, torch.optim.Adafactor and torch's fused AdamW each train a copy of one
model on the same batches, taken in turn at every step, each at the learning rate that its own documentation recommends, warmed
up linearly. At the end: a table, and under profiles/results/ a JSON with every loss and every step's time, and a picture.

Two runs on one machine give the same losses, digit by digit.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from _shared import at_least_one, color_of, figures, markdown_table, parser, run_profile, show_progress, timing_of
from _shared.character_model import CharacterTransformer, batches, english
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adafactor_compiled import Adafactor

SEED = 0
STEPS, QUICK_STEPS = 800, 8
WARM_UP = 0.05  # of the steps, over which the learning rates rise to what the table says
BATCH, CONTEXT = 12, 64
HELD_OUT_BATCHES = 40
T5 = {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "clip_threshold": 1.0}

Make = Callable[[Iterable[Tensor]], Optimizer]

FUSED, COMPILED, REFERENCE = "Adafactor, fused", "Adafactor, compiled", "Adafactor, reference path"
CONTENDERS: dict[str, tuple[Make, float, str]] = {
    FUSED: (lambda params: Adafactor(params, **T5, fused=True), 1e-3, "transformers' T5 setting"),
    COMPILED: (lambda params: Adafactor(params, **T5, compile=True), 1e-3, "transformers' T5 setting"),
    REFERENCE: (lambda params: Adafactor(params, **T5, foreach=False), 1e-3, "transformers' T5 setting"),
    "torch.optim.Adafactor": (lambda params: torch.optim.Adafactor(params, lr=1e-2), 1e-2, "torch's default"),
    "fused AdamW": (lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True), 1e-3, "torch's default"),
}

LINES: dict[str, dict[str, Any]] = {
    FUSED: {"linewidth": 3.6},
    COMPILED: {"linewidth": 1.8},
    REFERENCE: {"linewidth": 1.2, "linestyle": (0, (4, 3))},
}


class Run:
    """One contender's model, optimizer and what came of them."""

    def __init__(self, name: str, model: CharacterTransformer, steps: int) -> None:
        self.name, self.model = name, model
        self.optimizer = CONTENDERS[name][0](model.parameters())
        self.schedule = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / max(1.0, WARM_UP * steps)))
        self.losses: list[float] = []
        self.step_ms: list[float] = []  # of optimizer.step() alone

    def train_step(self, x: Tensor, y: Tensor) -> None:
        loss = self.model.loss(x, y)
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def distance_from(self, other: Run) -> float:
        return max(abs(a - b) / b for a, b in zip(self.losses, other.losses, strict=True))

    @torch.no_grad()
    def outcome(self, held_out: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """What the JSON has of it; the first step, which compiles and makes state, apart from the others."""
        _, lr, source = CONTENDERS[self.name]
        return {
            "lr": lr,
            "lr_source": source,
            "held_out_loss": statistics.fmean(self.model.loss(x, y).item() for x, y in held_out),
            "step_ms": timing_of(self.step_ms[1:] or self.step_ms),
            "state_bytes": state_bytes(self.optimizer),
            "first_step_s": self.step_ms[0] / 1e3,
            "losses": self.losses,
            "each_step_ms": [round(ms, 4) for ms in self.step_ms],
        }


def state_bytes(optimizer: Optimizer) -> int:
    """What it keeps between steps."""
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    start = time.perf_counter()
    text, held_out, alphabet = english()
    torch.manual_seed(SEED)
    model = CharacterTransformer(len(alphabet), context=CONTEXT)
    runs = [Run(name, copy.deepcopy(model), steps) for name in CONTENDERS]
    counters.clear()
    for done, (x, y) in enumerate(batches(text, steps, BATCH, CONTEXT, SEED), 1):
        for run in runs:
            run.train_step(x, y)
        show_progress(f"training {done}/{steps}, losses " + " | ".join(f"{run.losses[-1]:.2f}" for run in runs))
    show_progress()
    pairs = list(batches(held_out, 2 if options.quick else HELD_OUT_BATCHES, BATCH, CONTEXT, SEED))
    fused, compiled, reference, *_ = runs
    shapes = [tuple(param.shape) for param in reference.model.parameters()]
    yield {
        "seconds": time.perf_counter() - start,
        "seed": SEED,
        "rounds": steps,
        "model": {"parameters": sum(map(math.prod, shapes)), "shapes": shapes, "batch": BATCH, "context": CONTEXT},
        "largest_relative_difference_to_reference": {run.name: run.distance_from(reference) for run in (fused, compiled)},
        "graphs_compiled": counters["stats"]["unique_graphs"],
        "runs": {run.name: run.outcome(pairs) for run in runs},
    }


def table(result: dict[str, Any]) -> str:
    header = ["", "learning rate", "held-out loss", "step, ms", "state, bytes", "first step, s"]
    rows = []
    for name, run in result["runs"].items():
        trained = [f"{run['lr']:g}, {run['lr_source']}", f"{run['held_out_loss']:.3f}", f"{run['step_ms']['median']:.2f}"]
        rows.append([name, *trained, f"{run['state_bytes']:,}", f"{run['first_step_s']:.2f}"])
    model, apart = result["model"], result["largest_relative_difference_to_reference"]
    size = f"{model['parameters']:,} parameters in {len(model['shapes'])} tensors"
    differences = ", ".join(f"{name} {most:.1e}" for name, most in apart.items())
    return (
        f"{size}, {result['rounds']} steps of {model['batch']} x {model['context']} characters, {result['seconds']:.0f} s\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"losses differ from the reference path's by at most: {differences}; "
        f"{result['graphs_compiled']} graphs were compiled"
    )


def draw(result: dict[str, Any]) -> Any:
    """Losses over the steps, and the time of every optimizer step; lines are running means and medians."""
    figure, (left, right) = figures().subplots(1, 2, figsize=(11, 4.4))
    window = max(1, result["rounds"] // 40)
    for name, run in result["runs"].items():
        color, ms, first = color_of(name), run["each_step_ms"], run["first_step_s"]
        steps = range(1, len(ms) + 1)
        losses = running(statistics.fmean, run["losses"], window)
        # Our paths lie on each other: thin lines on broad ones show them all.
        left.plot(steps, losses, color=color, label=f"{name}: {run['held_out_loss']:.3f} held out", **LINES.get(name, {}))
        right.plot(steps, ms, ".", color=color, markersize=2, alpha=0.3)
        label = f"{name}: median {run['step_ms']['median']:.2f} ms, the first {first:.2g} s"
        right.plot(steps[1:], running(statistics.median, ms[1:], window), color=color, label=label)
    left.set(title="Loss of a character transformer on English", xlabel="step", ylabel="nats per character")
    right.set(title="Time of each step of the optimizer", xlabel="step", ylabel="ms, logarithmic", yscale="log")
    left.legend()
    right.legend(loc="upper right", fontsize=8)
    return figure


def running(average: Callable[[list[float]], float], values: list[float], window: int) -> list[float]:
    """For each value the average of it and the `window` values before it."""
    return [average(values[max(0, i - window) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--steps", type=at_least_one, help=f"default {STEPS}; --quick: {QUICK_STEPS}")
    run_profile("train", options.parse_args(), measure, table, draw)
