"""Names for what a step does, in the traces of torch's profiler; where no profiler runs they are neither made nor recorded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.profiler import record_function

from adafactor_compiled._state.shape_class import ShapeClass

NAME = "Adafactor: "
UNNAMED: AbstractContextManager[object] = nullcontext()


def name_of(of: ShapeClass, count: int, how: str) -> str:
    """`Adafactor: 148 x 768x2304 float32 fused`: so many parameters, by the class of the first."""
    shape = "x".join(map(str, of.shape)) or "scalar"
    return f"{NAME}{count} x {shape} {str(of.dtype).removeprefix('torch.')} {how}"


def range_of(of: ShapeClass, count: int, how: str) -> AbstractContextManager[object]:
    """What so many parameters cost, on a GPU the host."""
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return UNNAMED
    return record_function(name_of(of, count, how))
