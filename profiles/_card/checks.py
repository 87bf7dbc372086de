"""Whether every path runs on the device, is right there, and never makes the host wait for it; and the tests that say more."""

from __future__ import annotations

import importlib.util
import os
import time
from typing import Any

import torch
from _shared.records import REPOSITORY
from torch import Tensor

from _card.jobs import SHOWN, Emit, Record, recorded
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
SHAPES = [(64, 48), (64, 48), (64, 48), (1000, 513), (64, 16, 3, 3), (40,), (40,), ()]
MOST_ERROR = 1e-4  # of a step in float32, over the largest change
SYNC_STEPS = 20


def optimizer_of(device: str, dtype: torch.dtype, **path: Any) -> tuple[list[Tensor], Adafactor]:
    """Parameters with gradients, and what steps them: by a tenth, so that float32 keeps the digits of the change."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
    return params, Adafactor(params, lr=0.1, relative_step=False, **path)


def changes(device: str, dtype: torch.dtype, **path: Any) -> list[Tensor]:
    """What a step takes off the parameters, in float64 on the CPU."""
    params, optimizer = optimizer_of(device, dtype, **path)
    before = [param.detach().to("cpu", torch.float64, copy=True) for param in params]
    optimizer.step()
    return [old - param.detach().to(old) for old, param in zip(before, params, strict=True)]


def sanity(record: Record, emit: Emit, device: str) -> None:
    """One step of each path: its error against the reference path in float64 on the CPU, over the largest change."""
    exact = changes("cpu", torch.float64, foreach=False)
    for name, path in PATHS.items():
        result, start = record.setdefault(name, {}), time.perf_counter()
        with recorded(result):
            pairs = zip(changes(device, torch.float32, **path), exact, strict=True)
            errors = torch.stack([(change - of).abs().max() / of.abs().max() for change, of in pairs])
            result.update(error=float(errors.max()), seconds=round(time.perf_counter() - start, 1))
            result["ok"] = result["error"] < MOST_ERROR  # NaN is not
        emit()


def syncs(record: Record, emit: Emit, device: str) -> None:
    """Twenty steps of each path in which waiting for the device is an error."""
    if device != "cuda":
        record["skipped"] = "needs a CUDA device"
        return
    record.update(steps=SYNC_STEPS, paths={})
    for name, path in PATHS.items():
        result = record["paths"][name] = {}
        with recorded(result):
            _, optimizer = optimizer_of(device, torch.float32, **path)
            for _ in range(3):  # which make what is kept: graphs, room for vectors
                optimizer.step()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(SYNC_STEPS):
                    optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            result["ok"] = True
        emit()


class Counter:
    """A plugin of pytest that adds each report to the record."""

    def __init__(self, record: Record, emit: Emit) -> None:
        self.record, self.emit = record, emit
        record.update(passed=0, failed=0, skipped=0, failures={})

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self.add(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.add(report)

    def add(self, report: Any) -> None:
        self.record[report.outcome] += 1
        if report.outcome == "failed":
            self.record["failures"][report.nodeid] = report.longreprtext[-SHOWN:]
        self.emit()


def tests(record: Record, emit: Emit) -> None:
    """`pytest -m cuda`."""
    import pytest

    os.chdir(REPOSITORY)
    # The file that has them: others import what a machine with a GPU may lack, and so do the settings of the whole suite.
    arguments = ["-m", "cuda", "-q", "--tb=short", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    if importlib.util.find_spec("hypothesis") is None:
        arguments.insert(0, "--noconftest")
    record["status"] = int(pytest.main(arguments, plugins=[Counter(record, emit)]))
