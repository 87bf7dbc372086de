"""The largest error of one update against float64, over the largest update, for every distinct shape of the parameter lists.

Each path, and transformers' Adafactor, takes two steps beside the reference path in float64, from the same parameters and with
the same gradients, whose rows differ in size; the parameters are put side by side again before the second step, whose update is
compared. With a learning rate of 1 the update is as large as the parameters, so that float32 keeps its digits when the two
are subtracted. The largest error of few elements is a matter of luck: up to a million of them it is the median of nine draws.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _networks import NETWORKS
from _shared import color_of, figures, markdown_table, parser, run_profile
from torch import Tensor
from torch.optim import Optimizer

from adafactor_compiled import Adafactor

MOST_ERROR = 2e-5
ROUNDS, DRAWN_ONCE = 9, 1 << 20  # draws; more elements than so many are drawn once
EMBEDDING = (50257, 768)
SETTINGS = {"lr": 1.0, "relative_step": False, "scale_parameter": True}
QUICK = [(64, 48), (100,), (8, 4, 3, 3)]


def _transformers(params: list[Tensor]) -> Optimizer:
    from transformers.optimization import Adafactor as TransformersAdafactor

    return TransformersAdafactor(params, **SETTINGS)


Make = Callable[[list[Tensor]], Optimizer]
CONTENDERS: dict[str, Make] = {
    "Adafactor, fused": lambda params: Adafactor(params, fused=True, **SETTINGS),
    "Adafactor, compiled": lambda params: Adafactor(params, compile=True, **SETTINGS),
    "Adafactor, multi-tensor": lambda params: Adafactor(params, compile=False, **SETTINGS),
    "Adafactor, reference path": lambda params: Adafactor(params, foreach=False, **SETTINGS),
    "transformers": _transformers,
}
FUSED, _, _, REFERENCE, _ = CONTENDERS


def distinct_shapes() -> list[tuple[int, ...]]:
    shapes = {shape for network in NETWORKS.values() for shape in network()}
    return sorted(shapes, key=lambda shape: (math.prod(shape), shape))


def gradients_of(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal, in float32; rows differ in size by a factor of e, give or take."""
    normal = torch.empty(shape).normal_(generator=generator)
    if len(shape) < 2:
        return normal
    return normal.mul_(torch.empty((*shape[:-1], 1)).normal_(generator=generator).exp_())


def second_update(make: Make, start: list[Tensor], gradients: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What the second step takes off a parameter that starts as `start[0]` and is put to `start[1]` after the first."""
    param = torch.nn.Parameter(start[0].to(dtype, copy=True))
    optimizer = make([param])
    for value, gradient in zip(start, gradients, strict=True):
        param.grad = None
        param.data.copy_(value)
        param.grad = gradient.to(dtype)
        optimizer.step()
    param.grad = None
    return start[-1].to(dtype) - param.detach()


def errors_of(shape: tuple[int, ...], keys: list[str], seed: int) -> dict[str, float]:
    """For each contender the largest error of its update over the largest update."""
    generator = torch.Generator().manual_seed(seed)
    start = [torch.empty(shape).normal_(0, 0.02, generator=generator) for _ in range(2)]
    gradients = [gradients_of(shape, generator) for _ in range(2)]
    exact = second_update(CONTENDERS[REFERENCE], start, gradients, torch.float64)
    largest = exact.abs().max()
    errors = {}
    for key in keys:
        update = second_update(CONTENDERS[key], start, gradients, torch.float32)
        errors[key] = float((update - exact).abs_().max() / largest)
    return errors


def rounds_of(shape: tuple[int, ...]) -> int:
    return 1 if math.prod(shape) > DRAWN_ONCE else ROUNDS


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shapes = [shape for shape in (QUICK if options.quick else distinct_shapes()) if math.prod(shape) <= options.most_numel]
    keys, missing = list(CONTENDERS), {}
    try:
        importlib.import_module("transformers.optimization")
    except ImportError as error:
        keys.pop()
        missing["transformers"] = str(error)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        draws = [errors_of(shape, keys, seed) for seed in range(rounds_of(shape))]
        errors = {key: statistics.median(draw[key] for draw in draws) for key in keys}
        rows.append({"shape": shape, "numel": math.prod(shape), "rounds": len(draws), "errors": errors})
        print(f"{len(rows)} of {len(shapes)}: {'x'.join(map(str, shape))}", flush=True)
    yield {"rounds": ROUNDS, "most_error": MOST_ERROR, "not_measured": missing, "shapes": rows}


def table(result: dict[str, Any]) -> str:
    """The largest error by kind of shape, then the embedding, then where the fused path errs most beyond the reference."""
    rows = result["shapes"]
    kinds = {
        "vectors": [row for row in rows if len(row["shape"]) == 1],
        "matrices": [row for row in rows if len(row["shape"]) == 2],
        "three and more dimensions": [row for row in rows if len(row["shape"]) > 2],
        "x".join(map(str, EMBEDDING)): [row for row in rows if tuple(row["shape"]) == EMBEDDING],
    }
    names = [name for name in CONTENDERS if name not in result["not_measured"]]
    lines = [
        [f"{kind} ({len(chosen)})", *(f"{max(row['errors'][name] for row in chosen):.1e}" for name in names)]
        for kind, chosen in kinds.items()
        if chosen
    ]
    worst = max(rows, key=lambda row: row["errors"][FUSED] / row["errors"][REFERENCE])
    beyond = sum(row["errors"][FUSED] > row["errors"][REFERENCE] for row in rows)
    over = sum(row["errors"][FUSED] >= result["most_error"] for row in rows)
    most = f"by most on {'x'.join(map(str, worst['shape']))}: {worst['errors'][FUSED]:.1e}, {worst['errors'][REFERENCE]:.1e}"
    return (
        f"{markdown_table(['largest error / largest update', *names], lines)}\n\n"
        f"Of {len(rows)} shapes, the fused path's error is above {result['most_error']:g} on {over} and above the reference "
        f"path's on {beyond}; {most}."
    )


def draw(result: dict[str, Any]) -> Any:
    """Error over size, a dot a shape, for each contender."""
    figure, axes = figures().subplots(figsize=(9, 5))
    rows = result["shapes"]
    for name in reversed(CONTENDERS):
        if name in result["not_measured"]:
            continue
        axes.plot(
            [row["numel"] for row in rows],
            [row["errors"][name] for row in rows],
            "D" if name == FUSED else "o",
            color=color_of(name),
            markersize=5,
            alpha=0.8,
            label=name,
        )
    axes.axhline(result["most_error"], color="black", linewidth=1.5, label="goal of the fused step")
    axes.axhline(torch.finfo(torch.float32).eps, color="grey", linewidth=1, linestyle=":", label="float32's last digit")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="elements of the parameter",
        ylabel="largest error / largest update",
        title="Error of one update against float64",
    )
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    options = parser(__doc__, redraw=True)
    options.add_argument(
        "--most-numel",
        type=int,
        default=1 << 62,
        metavar="N",
        help="leave out shapes of more elements (float64 takes 50 bytes each)",
    )
    run_profile("accuracy", options.parse_args(), measure, table, draw)


if __name__ == "__main__":
    main()
