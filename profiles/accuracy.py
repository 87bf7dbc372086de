"""The largest error of one update against float64, over the largest update, for every distinct shape of the parameter lists.

Each path, and transformers' Adafactor, takes two steps beside the reference path in float64, from the same parameters and with
the same gradients, whose rows differ in size; the parameters are put side by side again before the second step, whose update is
compared. With a learning rate of 1 the update is as large as the parameters, so that float32 keeps its digits when the two
are subtracted. The largest error of few elements is a matter of luck: up to a million of them it is the median of nine draws.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from _contenders import CONTENDERS, make_optimizers
from _networks import ROWS
from _shared import dots, markdown_table, parser, run_profile
from torch import Tensor

DRAWS, DRAWN_ONCE = 9, 1 << 20  # draws; more elements than so many are drawn once
KEYS = ["fused", "compiled", "multi-tensor", "reference", "transformers"]
FUSED, REFERENCE = (CONTENDERS[key].name for key in ("fused", "reference"))
QUICK = [(64, 48), (100,), (8, 4, 3, 3)]


def gradients_of(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal, in float32; rows differ in size by a factor of e, give or take."""
    normal = torch.empty(shape).normal_(generator=generator)
    if len(shape) < 2:
        return normal
    return normal.mul_(torch.empty((*shape[:-1], 1)).normal_(generator=generator).exp_())


def second_update(key: str, start: list[Tensor], gradients: list[Tensor], dtype: torch.dtype) -> Tensor:
    """What the second step takes off a parameter that starts as `start[0]` and is put to `start[1]` after the first."""
    param = torch.nn.Parameter(start[0].to(dtype, copy=True))
    optimizer = CONTENDERS[key].make([param], None)
    optimizer.param_groups[0]["lr"] = 1.0
    for value, gradient in zip(start, gradients, strict=True):
        param.grad = None
        param.data.copy_(value)
        param.grad = gradient.to(dtype)
        optimizer.step()
    param.grad = None
    return start[-1].to(dtype) - param.detach()


def errors_of(shape: tuple[int, ...], keys: list[str], seed: int) -> dict[str, float]:
    """By name, for each contender the largest error of its update over the largest update."""
    generator = torch.Generator().manual_seed(seed)
    start = [torch.empty(shape).normal_(0, 0.02, generator=generator) for _ in range(2)]
    gradients = [gradients_of(shape, generator) for _ in range(2)]
    exact = second_update("reference", start, gradients, torch.float64)
    errors = {}
    for key in keys:
        update = second_update(key, start, gradients, torch.float32)
        errors[CONTENDERS[key].name] = float((update - exact).abs_().max() / exact.abs().max())
    return errors


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    distinct = set(QUICK) if options.quick else {shape for row in ROWS.values() for shape in row.shapes()}
    shapes = [shape for shape in sorted(distinct, key=math.prod) if math.prod(shape) <= options.most_numel]
    made, _ = make_optimizers(KEYS, [torch.ones(1)], None)  # those that are installed
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        draws = [errors_of(shape, list(made), seed) for seed in range(1 if math.prod(shape) > DRAWN_ONCE else DRAWS)]
        errors = {name: statistics.median(draw[name] for draw in draws) for name in draws[0]}
        rows.append({"shape": shape, "numel": math.prod(shape), "rounds": len(draws), "errors": errors})
        print(f"{len(rows)} of {len(shapes)}: {'x'.join(map(str, shape))}", flush=True)
        yield {"rounds": DRAWS, "shapes": rows}


def by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = {"vectors": [], "matrices": [], "three and more dimensions": []}
    for row in rows:
        kinds[list(kinds)[min(len(row["shape"]), 3) - 1]].append(row)
    return {f"{kind} ({len(of)})": of for kind, of in kinds.items() if of}


def table(result: dict[str, Any]) -> str:
    """The largest error by number of dimensions, and where the fused path errs most beyond the reference."""
    rows = result["shapes"]
    names = list(rows[0]["errors"])
    lines = [[kind, *(f"{max(row['errors'][name] for row in of):.1e}" for name in names)] for kind, of in by_kind(rows).items()]
    worst = max(rows, key=lambda row: row["errors"][FUSED] / row["errors"][REFERENCE])
    beyond = sum(row["errors"][FUSED] > row["errors"][REFERENCE] for row in rows)
    most = f"by most on {'x'.join(map(str, worst['shape']))}: {worst['errors'][FUSED]:.1e}, {worst['errors'][REFERENCE]:.1e}"
    shown = markdown_table(["largest error / largest update", *names], lines)
    return f"{shown}\n\nOf {len(rows)} shapes, the fused path's error is above the reference path's on {beyond}; {most}."


def draw(result: dict[str, Any]) -> Any:
    """A dot for each shape and contender."""
    rows = {kind: [pair for row in of for pair in row["errors"].items()] for kind, of in by_kind(result["shapes"]).items()}
    return dots({"Error of one update against float64": rows}, "largest error / largest update, logarithmic")


if __name__ == "__main__":
    options = parser(__doc__)
    help_numel = "leave out shapes of more elements (float64 takes 50 bytes each)"
    options.add_argument("--most-numel", type=int, default=1 << 62, metavar="N", help=help_numel)
    run_profile("accuracy", options.parse_args(), measure, table, draw)
