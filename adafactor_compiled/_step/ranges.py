"""Names for what a step does, in the traces of torch's profiler; where no profiler runs they are neither made nor recorded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.profiler import record_function

from adafactor_compiled._fused.table import Table
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._step.calls import Call
from adafactor_compiled._step.plan import Part

NAME = "Adafactor: "
UNNAMED: AbstractContextManager[object] = nullcontext()


def range_of_call(call: Call) -> AbstractContextManager[object]:
    """What a compiled call costs: `Adafactor: 8 x 64x64 float32 step_small_matrices`."""
    return _range(call.shape_class, call.positions, call.routes[0].function.__name__)


def range_of_table(table: Table) -> AbstractContextManager[object]:
    """What the launches of a step take, on a GPU what they cost the host: `Adafactor: 148 x 768x2304 float32 fused`."""
    return _range(table.members[0].of, range(len(table.members)), "fused")


def range_of_part(part: Part) -> AbstractContextManager[object]:
    """What eager operations cost: `Adafactor: 8 x 64x64 float32 multi_tensor`."""
    return _range(part.shape_class, part.positions, part.path)


def profiled() -> bool:
    """Whether a profiler is recording this thread."""
    return not torch.compiler.is_compiling() and torch._C._autograd._profiler_enabled()


def _range(of: ShapeClass, positions: Sequence[int], how: str) -> AbstractContextManager[object]:
    """Named for the first of its members; the others of a call may have other shapes."""
    shape = "x".join(map(str, of.shape)) or "scalar"
    return record_function(f"{NAME}{len(positions)} x {shape} {str(of.dtype).removeprefix('torch.')} {how}")
