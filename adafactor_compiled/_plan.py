"""What one step does: the parameters that take part, checked, and how they are grouped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from adafactor_compiled._numbers import numbers_of
from adafactor_compiled._options import Group, check_gradient
from adafactor_compiled._passes import Members
from adafactor_compiled._placements import Origin, check_gradient_placements
from adafactor_compiled._rounding import draws_of, wants_rounding
from adafactor_compiled._routes import any_shape
from adafactor_compiled._shape_class import ShapeClass, check_of, compute_dtype, group_by_class, joined, shape_class_of
from adafactor_compiled._state import State, complete


class Entry(NamedTuple):
    """A parameter that takes part in a step."""

    position: int  # counted over all groups
    param: Tensor
    grad: Tensor
    state: State
    group: Group

    @property
    def rounds(self) -> bool:
        """Stochastically."""
        return wants_rounding(self.param.dtype, self.group["stochastic_rounding"])


class Part(NamedTuple):
    """Entries that are stepped together, by their positions, and how."""

    path: str
    shape_class: ShapeClass
    positions: list[int]
    kept: dict[str, Any]  # what is made in the first of its steps and used in all


class Seen:
    """The entries that a plan was last found to hold for. To compare with them takes 1 us each; to describe them anew, 9."""

    def __init__(self, entries: list[Entry]) -> None:
        self._rest: Any = None  # of what cannot be asked again
        self._check: Any = None
        self.remember(entries)

    def remember(self, entries: list[Entry]) -> None:
        tensors = _tensors_of(entries)
        plain = not torch.compiler.is_compiling() and all(type(x) in (Tensor, Parameter) for x in tensors)
        self._rest = _rest_of(entries) if plain else None
        if plain:
            self._check = check_of(tensors)

    def again(self, entries: list[Entry]) -> bool:
        """Whether tensors have the same dtypes, devices, shapes and strides, states are as full and options the same."""
        return self._rest is not None and self._rest == _rest_of(entries) and self._check(*_tensors_of(entries))


def _tensors_of(entries: list[Entry]) -> list[Tensor]:
    return [entry.param for entry in entries] + [entry.grad for entry in entries]


def _rest_of(entries: list[Entry]) -> tuple[Any, ...]:
    groups = {id(entry.group): entry.group for entry in entries}.values()
    options = [(x["foreach"], x["compile"], x["beta1"] is None, x["stochastic_rounding"], x["capturable"]) for x in groups]
    return options, [id(entry.group) for entry in entries], [len(entry.state) for entry in entries]


class Plan(NamedTuple):
    seen: Seen
    made_for: list[Any]
    parts: list[Part]  # shape classes
    batches: list[Part]  # the same with short vectors of all lengths as one: what is stepped, one after the other
    merged: list[Part]  # batches with matrices of all shapes as one too, for compiled steps that no profiler watches
    update_rms: list[Tensor]  # of each entry, 0-dim: the RMS of its last update before clipping


def entries_of(groups: list[Group], state: Mapping[Tensor, State]) -> list[Entry]:
    """The parameters that have a gradient."""
    entries, position = [], -1
    for group in groups:
        for param in group["params"]:
            position += 1
            grad = param.grad
            if grad is not None:
                entries.append(Entry(position, param, grad, state[param], group))
    return entries


def count_step(entries: list[Entry]) -> None:
    """Raise the step counts; those in tensors, a kernel each otherwise, by one call."""
    counts = [entry.state["step"] for entry in entries if isinstance(entry.state["step"], Tensor)]
    if counts:
        torch._foreach_add_(counts, 1)
    for entry in entries:
        if not isinstance(entry.state["step"], Tensor):
            entry.state["step"] += 1


def path_of(group: Group, param: Tensor | None = None) -> str:
    if isinstance(param, DTensor):
        return "sharded"
    if group["foreach"] is False:
        return "reference"
    return "multi_tensor" if group["compile"] is False else "compiled"


def plan_of(entries: list[Entry], last: Plan | None) -> Plan:
    """The plan of a step: the last one, where nothing has changed that it depends on.

    Raises:
        RuntimeError: a gradient does not fit its parameter; nothing has changed.
    """
    if last is not None and last.seen.again(entries):
        return last
    for entry in entries:
        check_gradient(entry.param, entry.grad, entry.position)
        check_gradient_placements(entry.param, entry.grad, entry.position)
    keys = [
        (path_of(x.group, x.param), shape_class_of(x.param, x.grad, x.group["beta1"] is not None, x.rounds)) for x in entries
    ]
    made_for = [*keys, *((len(entry.state), entry.group["capturable"]) for entry in entries)]
    if last is not None and last.made_for == made_for:
        last.seen.remember(entries)
        return last
    for entry in entries:
        complete(entry.state, entry.param, entry.group)
    made_for[len(keys) :] = [(len(entry.state), entry.group["capturable"]) for entry in entries]
    parts = _parts_of(keys)
    batches = _parts_of(map(_batch_of, keys))
    merged = _parts_of(map(_merged_batch_of, keys))
    update_rms = [torch.zeros_like(entry.state["RMS"]) for entry in entries]
    return Plan(Seen(entries), made_for, parts, batches, merged, update_rms)


def _parts_of(keys: Iterable[tuple[str, ShapeClass]]) -> list[Part]:
    return [Part(*key, positions, {}) for key, positions in group_by_class(keys).items()]


def _batch_of(key: tuple[str, ShapeClass]) -> tuple[str, ShapeClass]:
    path, shape_class = key
    together = path in ("multi_tensor", "compiled") and not torch.compiler.is_compiling()
    return path, joined(shape_class) if together else shape_class


def _merged_batch_of(key: tuple[str, ShapeClass]) -> tuple[str, ShapeClass]:
    path, shape_class = _batch_of(key)
    return path, any_shape(shape_class) if path == "compiled" and not torch.compiler.is_compiling() else shape_class


def members_of(part: Part, entries: list[Entry], update_rms: list[Tensor]) -> Members:
    chosen = [entries[i] for i in part.positions]
    states = [entry.state for entry in chosen]
    factored, momentum = part.shape_class.factored, part.shape_class.momentum
    return Members(
        params=[entry.param for entry in chosen],
        grads=[entry.grad for entry in chosen],
        rows=[state["exp_avg_sq_row"] for state in states] if factored else [],
        cols=[state["exp_avg_sq_col"] for state in states] if factored else [],
        exp_avg_sqs=[] if factored else [state["exp_avg_sq"] for state in states],
        exp_avgs=[state["exp_avg"] for state in states] if momentum else [],
        rms=[state["RMS"] for state in states],
        update_rms=[update_rms[i] for i in part.positions],
        draws=draws_of_entries(chosen, [Origin()] * len(chosen)) if part.shape_class.rounding else [],
    )


def draws_of_entries(entries: list[Entry], origins: Sequence[Origin]) -> list[Tensor]:
    """What determines the noise of entries on one device, or of their pieces, at their step."""
    seeds, positions = [entry.group["rounding_seed"] for entry in entries], [entry.position for entry in entries]
    return draws_of(seeds, positions, origins, [entry.state["step"] for entry in entries], entries[0].param.device)


def tables_of(entries: list[Entry]) -> list[Tensor]:
    """The numbers of each entry, a vector on its device; made once for entries of one group at one step."""
    tables: list[Tensor] = [None] * len(entries)  # type: ignore[list-item]
    by_key = group_by_class(
        (index, compute_dtype(entry.param.dtype), entry.param.device, _count(entry.state["step"]))
        for index, entry in zip(_group_indices(entries), entries, strict=True)
    )
    for (_, dtype, device, count), positions in by_key.items():
        first = entries[positions[0]]
        if count is None:
            steps = torch.stack([entries[i].state["step"] for i in positions]).to(dtype)
            rows = list(numbers_of(first.group, steps, dtype, device).unbind())
        else:
            rows = [numbers_of(first.group, count, dtype, device)] * len(positions)
        for i, row in zip(positions, rows, strict=True):
            tables[i] = row
    return tables


def _group_indices(entries: list[Entry]) -> list[int]:
    """The number of each entry's group. Its `id` would be guarded by an outer graph, and load_state_dict makes new groups."""
    indices, index, last = [], -1, None
    for entry in entries:
        if entry.group is not last:
            index, last = index + 1, entry.group
        indices.append(index)
    return indices


def _count(step: int | Tensor) -> int | None:
    """A step count as a key; None where it lives in a tensor, which is not read."""
    return None if isinstance(step, Tensor) else step
