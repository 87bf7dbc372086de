"""Names for what a step does, in the traces of torch's profiler; where no profiler runs they are neither made nor recorded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.profiler import record_function

from adafactor_compiled._shape_class import ShapeClass

CLASS, PASS = "Adafactor class: ", "Adafactor pass: "
UNNAMED: AbstractContextManager[object] = nullcontext()


def profiled() -> bool:
    """Whether a profiler is recording this thread."""
    return not torch.compiler.is_compiling() and torch._C._autograd._profiler_enabled()


def range_of_class(shape_class: ShapeClass, path: str, members: int) -> AbstractContextManager[object]:
    """What a class costs: `Adafactor class: 12 x 768x3072 float32 compiled`."""
    if not profiled():
        return UNNAMED
    shape = "vectors" if shape_class.joined else "x".join(map(str, shape_class.shape)) or "scalar"
    dtype = str(shape_class.dtype).removeprefix("torch.")
    return record_function(f"{CLASS}{members} x {shape} {dtype} {path}")


def range_of_pass(name: str) -> AbstractContextManager[object]:
    """What a compiled pass costs: `Adafactor pass: step_matrix`."""
    return record_function(PASS + name) if profiled() else UNNAMED
