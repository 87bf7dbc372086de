"""What one step does, as data: the parameters that take part, checked, and what steps them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn import Parameter

from adafactor_compiled._compile.calls import Call, calls_of, view_of
from adafactor_compiled._fused.launches import Kernels, kernels_of, launches_of, skips_by_itself
from adafactor_compiled._fused.members import Member, member_of
from adafactor_compiled._fused.table import Table
from adafactor_compiled._sharded.members import localized, placed_of
from adafactor_compiled._state.entries import Entry, path_of
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.moments import State, check, complete, factored_dims, is_left_by_inference
from adafactor_compiled._state.options import LAYOUT, Group, check_gradient
from adafactor_compiled._state.placements import address_of, check_gradient_placements
from adafactor_compiled._state.shape_class import ShapeClass, shape_class_of
from adafactor_compiled._state.views import is_moved, with_dims_last

STRIDED = torch.strided


class Part(NamedTuple):
    """A shape class, and what steps it where that can be done."""

    path: str  # "fused", "compiled", "multi_tensor", "reference" or "sharded"
    shape_class: ShapeClass
    positions: list[int]


class Plan(NamedTuple):
    made_for: list[Described]
    parts: list[Part]
    fused: list[int]  # the positions of the members of the table, or, inside of an outer graph, of its operator
    table: Table | None
    calls: list[Call]  # of compiled graphs
    uncompiled: list[Part]  # what no call steps, by the multi-tensor or the reference path
    without_calls: list[Part]  # the same where nothing is compiled
    sharded: list[int]  # the positions of DTensors that are not among the members of the table
    moved: list[int]  # of what is factored over other dimensions than its last two
    update_rms: list[Tensor]  # of each entry, 0-dim: the RMS of its last update before clipping

    @property
    def kernels(self) -> list[Kernels]:
        """What launches run."""
        return [] if self.table is None else [launch.kernels for launch in self.table.launches]


def plan_of(entries: list[Entry], last: Plan | None, fused: bool = True, apart: Collection[int] = ()) -> Plan:
    """The plan of a step: the last one, where nothing has changed that it depends on.

    All that compiled code relies on is looked at in each step: dtypes, devices, shapes and strides of parameters and gradients,
    the options, and whether the tensors of the states are those that were checked when the plan was made.

    Args:
        entries: of the step.
        last: the plan of the last step.
        fused: whether there are fused kernels; where not, what asks for them is compiled.
        apart: entries that share memory, and step one after the other.

    Raises:
        RuntimeError: a gradient or a state does not fit its parameter; nothing has changed.
    """
    if last is not None and _holds(last, entries):
        return last
    for entry in entries:
        check_gradient(entry.param, entry.grad, entry.position)
        check_gradient_placements(entry.param, entry.grad, entry.position)
        check(entry.state, entry.param, entry.group, entry.position)
    for entry in entries:
        complete(entry.state, entry.param, entry.group)
    moved = [i for i, entry in enumerate(entries) if is_moved(entry)]
    seen = with_dims_last(entries, moved)
    classes = [(_path_of(x, fused, i in apart), _class_of(x)) for i, x in enumerate(seen)]
    for i in moved:
        path, of = classes[i]
        factors = seen[i].state["exp_avg_sq_row"], seen[i].state["exp_avg_sq_col"]
        if path in ("fused", "compiled") and not all(x.is_contiguous() for x in factors):
            classes[i] = "multi_tensor", of  # others take factors that lie as their parameter
    inline = torch.compiler.is_compiling()
    update_rms = [torch.zeros_like(entry.state["RMS"]) for entry in entries]
    launched = [i for i, (path, of) in enumerate(classes) if path == "fused" and kernels_of(of) is not None]
    members = [] if inline else [member_of(entries[i], classes[i][1], update_rms[i]) for i in launched]
    for i in () if inline or not fused else range(len(entries)):
        wanted = classes[i][0] == "sharded" and i not in moved and i not in apart
        piece = _piece_of(entries[i], update_rms[i]) if wanted else None
        if piece is not None:
            classes[i] = "fused", piece.of
            launched.append(i)
            members.append(piece)
    called = [] if inline else [i for i, (path, of) in enumerate(classes) if path == "compiled" and view_of(of) is not None]
    sharded = [i for i, (path, _) in enumerate(classes) if path == "sharded"]
    return Plan(
        [] if inline else [_described(entry, i in launched) for i, entry in enumerate(entries)],
        _parts_of(classes, range(len(entries))),
        launched,
        None if not members else _table_of(members, [entries[i] for i in launched]),
        calls_of((x.shape_class, x.positions) for x in _parts_of(classes, called)),
        _uncompiled(classes, {*launched, *called, *sharded}),
        _uncompiled(classes, {*launched, *sharded}),
        sharded,
        moved,
        update_rms,
    )


def _piece_of(entry: Entry, update_rms: Tensor) -> Member | None:
    """A DTensor as a member, if kernels are wanted, and can step this rank's piece."""
    placed = placed_of(entry) if path_of(entry.group) == "fused" else None
    if placed is None:
        return None
    local = localized(entry)
    if placed.split is not None and entry.group["nonfinite"] == "skip" and not skips_by_itself(local.param.device):
        return None  # whether it is to be undone is another number that ranks add up, which only operations of torch do
    if local.param.dtype != entry.param.dtype:  # a DTensor whose `data` was set, which its piece does not learn of
        return None
    of = _class_of(local)._replace(factored=factored_dims(entry.param.shape, entry.group) is not None)
    return None if kernels_of(of, placed.split) is None else member_of(local, of, update_rms, placed)


def _table_of(members: list[Member], entries: list[Entry]) -> Table:
    unaligned = {i for i, entry in enumerate(entries) if not isinstance(entry.param, DTensor) and _is_unaligned(entry)}
    return Table(members, launches_of([x.planned for x in members], unaligned))


def _path_of(entry: Entry, fused: bool, apart: bool) -> str:
    path = path_of(entry.group, entry.param)
    if apart and path != "sharded":
        return "reference"
    return "compiled" if path == "fused" and not fused else path


def _is_unaligned(entry: Entry) -> bool:
    """Whether parameter or gradient begin at an address that is no multiple of 16, as views of flat buffers may."""
    return (entry.param.data_ptr() | entry.grad.data_ptr()) % 16 > 0


class Described(NamedTuple):
    """All that a plan depends on of an entry; what it says of its state is that these are the tensors that were checked."""

    group: int
    options: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    grad_type: type
    grad_dtype: torch.dtype
    grad_stride: tuple[int, ...]
    state: list[tuple[Any, Layout | None]]  # layouts for kernels that only know addresses; graphs have guards
    piece: Piece | None  # of a DTensor


Layout = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]
Piece = tuple[tuple[Placement, ...], Layout, int]  # how a parameter is placed, and where the piece of this rank lies


def _described(entry: Entry, launched: bool) -> Described:
    _, p, g, state, group = entry
    of_param, of_grad = (p.dtype, p.device, p.shape, p.stride()), (type(g), g.dtype, g.stride())
    of_state = [(x, _layout_of(x) if launched and isinstance(x, Tensor) else None) for x in state.values()]
    return Described(id(group), options_of(group), *of_param, *of_grad, of_state, _piece(p))


def _piece(p: Tensor) -> Piece | None:
    if not isinstance(p, DTensor):
        return None
    return tuple(p.placements), _layout_of(p.to_local()), address_of(p)


def _layout_of(x: Tensor) -> Layout:
    return x.dtype, x.device, x.shape, x.stride()


def options_of(group: Group) -> tuple[Any, ...]:
    names = (
        "foreach",
        "compile",
        "fused",
        "stochastic_rounding",
        "capturable",
        "momentum_dtype",
        "cautious",
        "nonfinite",
        *LAYOUT,
    )
    return group["beta1"] is None, *(group[name] for name in names)


def _holds(plan: Plan, entries: list[Entry]) -> bool:
    """Whether a plan is for these entries, as they are now."""
    if len(plan.made_for) != len(entries) or not entries:
        return False
    made = plan.update_rms[0]
    if type(made) is not type(entries[0].state.get("RMS")) or is_left_by_inference(made):
        return False  # made in a mode that has ended, or has begun
    options: dict[int, tuple[Any, ...]] = {}
    for (_, p, g, state, group), was in zip(entries, plan.made_for, strict=True):
        if id(group) not in options:
            options[id(group)] = options_of(group)
        if (
            p.dtype is not was.dtype
            or g.dtype is not was.grad_dtype
            or type(g) is not was.grad_type
            or g.layout is not STRIDED
            or g.stride() != was.grad_stride
            or p.stride() != was.stride
            or p.is_neg()
            or p.shape != was.shape
            or g.shape != was.shape
            or not (p.device == g.device == was.device)
            or options[id(group)] != was.options
            or id(group) != was.group
            or not _is_same(state, was.state)
            or (was.piece is not None and _piece(p) != was.piece)
        ):
            return False
    return True


def _is_same(state: State, was: list[tuple[Any, Layout | None]]) -> bool:
    """Whether a state has the tensors that were checked, laid out as they were; its step count, a number, may be another."""
    if len(state) != len(was):
        return False
    for x, (checked, layout) in zip(state.values(), was, strict=True):
        if type(checked) is not int and (x is not checked or (layout is not None and _layout_of(x) != layout)):
            return False
    return True


def _class_of(entry: Entry) -> ShapeClass:
    _, param, grad, state, group = entry
    tensors = [grad, *(x for x in state.values() if isinstance(x, Tensor))]
    # A class of parameters may be derived from Parameter for its name alone.
    plain = all(type(x) is Tensor for x in tensors) and (type(param) in (Tensor, Parameter) or type(param.detach()) is Tensor)
    return shape_class_of(param, grad, group, plain and (torch.compiler.is_compiling() or not param.is_neg()))


def _parts_of(classes: list[tuple[str, ShapeClass]], positions: Iterable[int]) -> list[Part]:
    positions = list(positions)
    by_class = group_by_key(classes[i] for i in positions)
    return [Part(*key, [positions[j] for j in chosen]) for key, chosen in by_class.items()]


def _uncompiled(classes: list[tuple[str, ShapeClass]], others: Collection[int]) -> list[Part]:
    """All but the others: plain tensors by the multi-tensor path, unless they ask for the reference path."""
    eager = [("reference" if path == "reference" or not of.plain else "multi_tensor", of) for path, of in classes]
    return _parts_of(eager, (i for i in range(len(classes)) if i not in others))
