"""How an optimizer will step its parameters: shape classes, state and compilation, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from adafactor_compiled._compile import graphs
from adafactor_compiled._compile.calls import Graph, calls_of
from adafactor_compiled._fused import launches
from adafactor_compiled._fused.launches import Kernels
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._step.plan import Part, Plan


class ClassSummary(NamedTuple):
    """One shape class.

    Args:
        shape: shape of each parameter.
        dtype: dtype of the parameters, without "torch.".
        device: where they are.
        members: number of parameters.
        factored: whether row and column averages stand for the second moment.
        momentum: whether there is an `exp_avg`.
        state_bytes: memory of the members' state, of all ranks where it is sharded.
        path: "fused", "compiled", "multi_tensor", "reference" or "sharded".
        compiled: whether all that a class runs, on its own piece where it is sharded, is compiled in this process.
        compile_seconds: what compiling that took in this process; classes share most of it.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    members: int
    factored: bool
    momentum: bool
    state_bytes: int
    path: str
    compiled: bool
    compile_seconds: float


class Summary(NamedTuple):
    """Shape classes in the order of their first member; `str()` of it is a table.

    Args:
        classes: one line for each class.
        compile_seconds: of all that was compiled, each counted once.
    """

    classes: list[ClassSummary]
    compile_seconds: float

    @property
    def state_bytes(self) -> int:
        """Memory of the whole state."""
        return sum(line.state_bytes for line in self.classes)

    def __str__(self) -> str:
        header = ("shape", "dtype", "members", "second moment", "momentum", "state", "path", "compiled")
        lines = [header, *map(_cells, self.classes)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        members = sum(line.members for line in self.classes)
        total = (
            f"{members} parameters in {len(self.classes)} shape classes, {_readable(self.state_bytes)} of state, "
            f"{self.compile_seconds:.1f} s of compilation"
        )
        return "\n".join([*table, total])


def summary_of(plan: Plan, entries: list[Entry], compiles: bool) -> Summary:
    """Summarize a plan; nothing is compiled."""
    classes, seconds = [], {}
    members = () if plan.table is None else plan.table.members
    kernels = {i: member.planned.kernels for i, member in zip(plan.fused, members, strict=False)}
    for part in plan.parts:
        shape_class, launched = part.shape_class, kernels.get(part.positions[0])
        keys = [launched] if launched is not None else _graphs_of(part) if compiles else []
        of_part = {key: _seconds_of(key) for key in keys}
        known = {key: value for key, value in of_part.items() if value is not None}
        seconds.update(known)
        classes.append(
            ClassSummary(
                shape=tuple(entries[part.positions[0]].param.shape),
                dtype=str(shape_class.dtype).removeprefix("torch."),
                device=str(shape_class.device),
                members=len(part.positions),
                factored=shape_class.factored,
                momentum=shape_class.momentum is not None,
                state_bytes=_bytes(value for i in part.positions for value in entries[i].state.values()),
                path="multi_tensor" if part.path == "compiled" and not compiles else part.path,
                compiled=bool(of_part) and len(known) == len(of_part),
                compile_seconds=sum(known.values()),
            )
        )
    return Summary(classes, sum(seconds.values()))


def _graphs_of(part: Part) -> Sequence[Graph | Kernels]:
    return [call.graph for call in calls_of([(part.shape_class, part.positions)])] if part.path == "compiled" else []


def _seconds_of(key: Graph | Kernels) -> float | None:
    return graphs.seconds_of(key) if isinstance(key, Graph) else launches.seconds_of(key)


def _bytes(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _cells(line: ClassSummary) -> tuple[str, ...]:
    return (
        "x".join(map(str, line.shape)) or "scalar",
        line.dtype,
        str(line.members),
        "row and column" if line.factored else "whole",
        "yes" if line.momentum else "no",
        _readable(line.state_bytes),
        line.path,
        f"{line.compile_seconds:.1f} s" if line.compiled else "no",
    )


def _readable(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
