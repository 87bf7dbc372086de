"""Whether every path runs on the device, is right there, and never makes the host wait for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from _card.clock import synchronize
from _card.errors import recorded
from adafactor_compiled import Adafactor

PATHS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "multi-tensor": {"compile": False},
    "multi-tensor, capturable": {"compile": False, "capturable": True},
    "compiled": {"compile": True},
    "compiled, capturable": {"compile": True, "capturable": True},
    "fused": {"fused": True},
    "fused, capturable": {"fused": True, "capturable": True},
}
Shapes = list[tuple[int, ...]]
SMALL: Shapes = [(64, 48), (64, 48), (64, 48), (40,), (40,)]
SHAPES: Shapes = [
    *[(768, 3072)] * 2,
    (3072, 768),
    *[(64, 33)] * 3,
    (1000, 513),
    *[(64, 16, 3, 3)] * 2,
    (256, 64, 1, 1),
    *[(768,)] * 9,
    *[(65,)] * 2,
    (),
]
Case = tuple[torch.dtype, dict[str, Any]]
CASES: dict[str, Case] = {
    "float32": (torch.float32, {}),
    "float32, beta1 and weight decay": (torch.float32, {"beta1": 0.9, "weight_decay": 0.01}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
}
LR = 0.1  # with the scale of a parameter: a step changes a tenth of it, so that float32 keeps the digits of the change
PARITY_STEPS, SYNC_STEPS = 5, 20


def parameters(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def gradients(shapes: Shapes, dtype: torch.dtype, device: str, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def set_gradients(params: list[Tensor], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def sanity(record: dict[str, Any], emit: Callable[[], None], device: str, quick: bool) -> None:
    """One step of each path on a few small parameters."""
    for name, path in PATHS.items():
        result = record[name] = {}
        start = time.perf_counter()
        with recorded(result):
            params = parameters(SMALL, torch.float32, device)
            before = [param.detach().clone() for param in params]
            set_gradients(params, gradients(SMALL, torch.float32, device, 0))
            Adafactor(params, **path).step()
            for param, old in zip(params, before, strict=True):
                moved = (param.detach() - old).abs()
                result["ok"] = bool((moved > 0).any() and moved.isfinite().all())
                assert result["ok"], f"a parameter of shape {tuple(param.shape)} moved by {float(moved.max())}"
            result["seconds"] = round(time.perf_counter() - start, 1)
        emit()


def parity(record: dict[str, Any], emit: Callable[[], None], device: str, quick: bool) -> None:
    """The largest error after some steps against the reference path in float64 on the CPU, over the largest change."""
    shapes, cases = (SMALL, ["float32"]) if quick else (SHAPES, list(CASES))
    record.update(steps=PARITY_STEPS, shapes=shapes, errors={})
    for case in cases:
        dtype, options = CASES[case]
        # What half precision cannot hold is rounded before, so that all start from the same numbers.
        start = [x.detach().double() for x in parameters(shapes, dtype, "cpu")]
        grads = [gradients(shapes, dtype, "cpu", step) for step in range(PARITY_STEPS)]
        exact = after_steps(start, grads, torch.float64, "cpu", {"foreach": False, **options})
        changes = [float((x - old).abs().max()) for x, old in zip(exact, start, strict=True)]
        of_case = record["errors"][case] = {}
        for name, path in PATHS.items():
            result = of_case[name] = {}
            with recorded(result):
                params = after_steps(start, grads, dtype, device, {**path, **options})
                errors = [
                    float((param - x).abs().max()) / change for param, x, change in zip(params, exact, changes, strict=True)
                ]
                worst = max(range(len(errors)), key=lambda i: math.inf if math.isnan(errors[i]) else errors[i])
                result.update(error=errors[worst], shape=shapes[worst])
            emit()


def after_steps(
    start: list[Tensor], grads: list[list[Tensor]], dtype: torch.dtype, device: str, options: dict[str, Any]
) -> list[Tensor]:
    """What the steps make of the parameters, in float64 on the CPU."""
    params = [x.to(device, dtype, copy=True).requires_grad_() for x in start]
    optimizer = Adafactor(params, lr=LR, relative_step=False, **options)
    for of_step in grads:
        set_gradients(params, [grad.to(device, dtype) for grad in of_step])
        optimizer.step()
    return [param.detach().cpu().double() for param in params]


def syncs(record: dict[str, Any], emit: Callable[[], None], device: str, quick: bool) -> None:
    """Twenty steps of each path in which waiting for the device is an error."""
    if device != "cuda":
        record["skipped"] = "needs a CUDA device"
        return
    record.update(steps=SYNC_STEPS, paths={})
    for name, path in PATHS.items():
        result = record["paths"][name] = {}
        params = parameters(SHAPES, torch.float32, device)
        grads = [gradients(SHAPES, torch.float32, device, step) for step in range(3)]
        with recorded(result):
            optimizer = Adafactor(params, **path)
            for step in range(3):  # which make what is kept: graphs, room for vectors
                set_gradients(params, grads[step])
                optimizer.step()
            synchronize(device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for step in range(SYNC_STEPS):
                    set_gradients(params, grads[step % 3])
                    optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            synchronize(device)
            result["ok"] = True
        emit()
