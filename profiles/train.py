"""Train a small character transformer on English: this package's optimizer beside its peers, from the same start.

The fused optimizer, its compiled and its reference path, torch.optim.Adafactor and torch's fused AdamW each train a copy of one
model on the same batches, taken in turn at every step, each at the learning rate that its own documentation recommends, warmed
up linearly. At the end: a table, and under profiles/results/ a JSON with every loss and every step's time, and a picture.

Two runs on one machine give the same losses, digit by digit.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from _shared import (
    ProgressLine,
    Timing,
    color_of,
    figures,
    markdown_table,
    parser,
    save_figure,
    timing_of,
    write_result,
)
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


@dataclass
class Run:
    """One contender's model, optimizer and what came of them."""

    name: str
    model: CharacterTransformer
    optimizer: Optimizer
    schedule: LambdaLR
    lr: float
    lr_source: str
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)  # of optimizer.step() alone
    held_out_loss: float = float("nan")

    def train_step(self, x: Tensor, y: Tensor) -> None:
        loss = self.model.loss(x, y)
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.step_ms.append((time.perf_counter() - start) * 1e3)
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    @property
    def progress(self) -> str:
        """Loss and milliseconds a step, of late."""
        name = self.name.removeprefix("Adafactor, ")
        return f"{name} {statistics.fmean(self.losses[-20:]):.2f} {statistics.median(self.step_ms[-20:]):.1f} ms"

    @property
    def step_time(self) -> Timing:
        """Of the steps after the first, which compiles and makes state."""
        return timing_of(self.step_ms[1:])

    @property
    def state_bytes(self) -> int:
        tensors = (x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
        return sum(x.numel() * x.element_size() for x in tensors)


def start_runs(alphabet_size: int, steps: int) -> list[Run]:
    torch.manual_seed(SEED)
    start = CharacterTransformer(alphabet_size, context=CONTEXT)
    runs = []
    for name, (make, lr, source) in CONTENDERS.items():
        model = copy.deepcopy(start)
        optimizer = make(model.parameters())
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1.0, WARM_UP * steps)))
        runs.append(Run(name, model, optimizer, schedule, lr, source))
    return runs


def train(runs: list[Run], text: Tensor, steps: int) -> None:
    """Train all runs on the same batches, taken in turn at every step."""
    with ProgressLine("training") as line:
        for done, (x, y) in enumerate(batches(text, steps, BATCH, CONTEXT, SEED), 1):
            for run in runs:
                run.train_step(x, y)
            line.show(done, steps, " | ".join(run.progress for run in runs))


@torch.no_grad()
def evaluate(runs: list[Run], text: Tensor, count: int) -> None:
    held_out = list(batches(text, count, BATCH, CONTEXT, SEED))
    for run in runs:
        run.held_out_loss = statistics.fmean(run.model.loss(x, y).item() for x, y in held_out)


def table(runs: list[Run]) -> str:
    header = ["", "learning rate", "held-out loss", "step, ms", "state, bytes", "first step, s"]
    rows = [
        [
            run.name,
            f"{run.lr:g}, {run.lr_source}",
            f"{run.held_out_loss:.3f}",
            f"{run.step_time.median:.2f}",
            f"{run.state_bytes:,}",
            f"{run.step_ms[0] / 1e3:.2f}",
        ]
        for run in runs
    ]
    return markdown_table(header, rows)


def draw(runs: list[Run]) -> Any:
    """Losses over the steps, and the time of every optimizer step; lines are running means and medians."""
    figure, (left, right) = figures().subplots(1, 2, figsize=(11, 4.4))
    steps = range(1, len(runs[0].losses) + 1)
    window = max(1, len(steps) // 40)
    for run in runs:
        color = color_of(run.name)
        # Our paths lie on each other: thin lines on broad ones show them all.
        line = LINES.get(run.name, {})
        losses = running(statistics.fmean, run.losses, window)
        left.plot(steps, losses, color=color, label=f"{run.name}: {run.held_out_loss:.3f} held out", **line)
        right.plot(steps, run.step_ms, ".", color=color, markersize=2, alpha=0.3)
        times = running(statistics.median, run.step_ms[1:], window)
        right.plot(steps[1:], times, color=color, label=f"{run.name}: median {run.step_time.median:.2f} ms")
    for run in runs[:2]:
        color, first = color_of(run.name), run.step_ms[0]
        right.plot(1, first, "o", color=color, markersize=4)
        text = f"its first step: {first / 1e3:.1f} s" if first > 100 else f"its first step: {first:.0f} ms"
        right.annotate(text, (1, first), (10, -3), textcoords="offset points", color=color)
    left.set(title="Loss of a character transformer on English", xlabel="step", ylabel="nats per character")
    right.set(title="Time of each step of the optimizer", xlabel="step", ylabel="ms, logarithmic", yscale="log")
    left.legend()
    right.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    return figure


def running(average: Callable[[list[float]], float], values: list[float], window: int) -> list[float]:
    """For each value the average of it and the `window` values before it."""
    return [average(values[max(0, i - window) : i + 1]) for i in range(len(values))]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, help=f"steps of each contender (default {STEPS}; --quick: {QUICK_STEPS})")
    arguments = options.parse_args()
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)
    if steps < 3:
        options.error(f"--steps should be at least 3 but is: {steps}")
    start = time.perf_counter()
    text, held_out, alphabet = english()
    runs = start_runs(len(alphabet), steps)
    counters.clear()
    train(runs, text, steps)
    evaluate(runs, held_out, 2 if arguments.quick else HELD_OUT_BATCHES)
    *others, reference = runs[:3]
    apart = {run.name: max(abs(a - b) / b for a, b in zip(run.losses, reference.losses, strict=True)) for run in others}
    model = {
        "parameters": sum(p.numel() for p in reference.model.parameters()),
        "shapes": [tuple(p.shape) for p in reference.model.parameters()],
        "batch": BATCH,
        "context": CONTEXT,
        "training_characters": len(text),
    }
    payload = {
        "seconds": time.perf_counter() - start,
        "seed": SEED,
        "rounds": steps,
        "model": model,
        "largest_relative_difference_to_reference": apart,
        "graphs_compiled": counters["stats"]["unique_graphs"],
        "runs": {
            run.name: {
                "lr": run.lr,
                "lr_source": run.lr_source,
                "held_out_loss": run.held_out_loss,
                "step_ms": run.step_time,
                "state_bytes": run.state_bytes,
                "first_step_s": run.step_ms[0] / 1e3,
                "losses": run.losses,
                "each_step_ms": [round(ms, 4) for ms in run.step_ms],
            }
            for run in runs
        },
    }
    written = write_result("train", payload, arguments.results)
    drawn = save_figure(draw(runs), "train", arguments.results)
    print(
        f"{model['parameters']:,} parameters in {len(model['shapes'])} tensors, {steps} steps of {BATCH} x {CONTEXT} characters"
    )
    print(table(runs))
    differences = ", ".join(f"{name} {most:.1e}" for name, most in apart.items())
    print(
        f"losses differ from the reference path's by at most: {differences}; {payload['graphs_compiled']} graphs were compiled"
    )
    print(f"{payload['seconds']:.0f} s; wrote {written} and {drawn}")


if __name__ == "__main__":
    main()
