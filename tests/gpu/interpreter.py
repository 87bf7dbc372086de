"""Triton's interpreter, where each access of a kernel is checked: a step may touch the tensors of its members, and what is
made for it, and nothing else."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adafactor_compiled._fused import launches as fused
from adafactor_compiled._fused.gpu import launches
from adafactor_compiled._fused.table import Table


def why_not() -> str | None:
    """What keeps the interpreter from running, if anything does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs Triton's interpreter, which a GPU takes the place of"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "needs Triton, of a CUDA build of torch"
    with contextlib.suppress(TypeError):
        int(np.zeros(1))
        return None
    known = tuple(map(int, triton.split(".")[:2])) >= (3, 8)
    return None if known else f"the interpreter of Triton {triton} takes arrays for numbers, as numpy before 2.4 does"


class Memory:
    """What may be read and written, a range of addresses for each tensor."""

    def __init__(self) -> None:
        self.ranges: set[tuple[int, int]] = set()
        self.kept: list[Tensor] = []  # so that no address is used again
        self.accesses = self.bytes = 0
        self._sorted: Any = None  # see `_apart`

    def forget(self) -> None:
        self.ranges.clear()
        self._sorted = None
        self.kept.clear()
        launches.try_out.cache_clear()
        fused._ready.clear()

    def add(self, *tensors: Tensor) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            self.ranges.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
            self.kept.append(x)

    def check(self, pointers: Any, mask: Any) -> None:
        first = pointers.data[mask.data]
        if first.size:
            self.accesses += first.size
            size = pointers.get_element_ty().primitive_bitwidth // 8
            self.bytes += first.size * size
            starts, ends = self._apart()
            at = np.searchsorted(starts, first, side="right") - 1
            inside = (at >= 0) & (first + size <= ends[at])
            assert inside.all(), "a kernel touches memory that is not its own"

    def _apart(self) -> tuple[Any, Any]:
        """Where ranges begin and end, in order, those that overlap as one; made anew where there are others."""
        if self._sorted is None or self._sorted[0] != len(self.ranges):
            apart: list[list[int]] = []
            for start, end in sorted(self.ranges):
                if apart and start < apart[-1][1]:
                    apart[-1][1] = max(apart[-1][1], end)
                else:
                    apart.append([start, end])
            self._sorted = len(self.ranges), *np.array(apart or [[0, 0]], dtype=np.uint64).T
        return self._sorted[1:]


def check_accesses(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """From now on; gives what is allowed."""
    from triton.runtime.interpreter import InterpreterBuilder

    from adafactor_compiled._fused.gpu import steps

    memory, empty = Memory(), launches._empty

    def checked(access: Any, mask_at: int) -> Any:
        def call(self: Any, pointers: Any, *arguments: Any) -> Any:
            memory.check(pointers, arguments[mask_at])
            return access(self, pointers, *arguments)

        return call

    def allowed(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            memory.add(result)
            if function is empty:
                result.fill_(torch.nan)  # as it may be: what is read before it is written shows
            return result

        return call

    conflicts_of = Table.conflicts

    def conflicts(table: Table, addresses: Any, grads: Any) -> set[int]:
        for x, grad in zip(table.members, grads, strict=True):
            memory.add(x.param, grad, *x.kept.values(), x.update_rms)
        return conflicts_of(table, addresses, grads)

    def step(run: Any) -> Any:
        def call(of: Any, call: int, tables: Any, pointers: Tensor, aligned: bool, *rest: Any) -> None:
            numbers, draws, _ = rest
            memory.add(*tables, pointers, numbers, *([] if draws is None else [draws]))
            run(of, call, tables, pointers, aligned, *rest)

        return call

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked(InterpreterBuilder.create_masked_load, 0))
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked(InterpreterBuilder.create_masked_store, 1))
    monkeypatch.setattr(Table, "conflicts", conflicts)
    monkeypatch.setattr(launches, "_empty", allowed(empty))
    monkeypatch.setattr(steps, "step", step(steps.step))
    return memory


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's language is searched for what the interpreter replaces once a launch: each call in a kernel takes 0.4 ms to find
    that all of it has been replaced already."""
    from triton.runtime import interpreter

    patch, restore = interpreter._patch_builtin, interpreter._LangPatchScope.restore
    patched: set[int] = set()

    def patch_new(part: Any, *rest: Any) -> None:
        if id(part) not in patched:
            patched.add(id(part))
            patch(part, *rest)

    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    monkeypatch.setattr(interpreter, "_patch_builtin", patch_new)
    monkeypatch.setattr(interpreter._LangPatchScope, "restore", restore_all)


def said_to_be_moved(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Gives the bytes of what is launched from now on, as profiles/gpu_kernels.py counts them."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "profiles"))
    import _gpu_step

    from adafactor_compiled._fused.gpu import steps

    launched = []

    class Noted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*arguments: Any, **constants: Any) -> None:
                launched.append(_gpu_step.Launched(self.kernel, grid[0], arguments, constants))
                self.kernel[grid](*arguments, **constants)

            return run

    for name in _gpu_step.KERNELS:
        monkeypatch.setattr(steps, name, Noted(getattr(steps, name)))
    return lambda: sum(map(_gpu_step.moved, launched))
