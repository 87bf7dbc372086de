"""The compiled calls of a step: k members each, whatever their shapes, by one compiled function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._compile import passes
from adafactor_compiled._compile.examples import Pass, example_of
from adafactor_compiled._compile.passes import pass_of
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.layout import cached, group_by_key
from adafactor_compiled._state.moments import SECOND_MOMENTS, is_cautious
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._step.routes import Route, route_of
from adafactor_compiled._update.members import Members
from adafactor_compiled._update.rounding import swapped


class Call(NamedTuple):
    shape_class: ShapeClass  # of its first member
    keys: tuple[Pass, ...]  # what it runs: one pass, or several where one member takes several
    positions: list[int]  # its members, by their positions among the entries of a step
    routes: list[Route]  # and how each is passed
    stand_ins: list[Members]  # what fills it up to k members, made when it is first needed: a graph is for a number of them


def calls_of(classes: Iterable[tuple[ShapeClass, Sequence[int]]]) -> list[Call]:
    """The calls that step these classes, each of which has a route."""
    members = [(of, i) for of, positions in classes for i in positions]
    calls = []
    for (keys, _), chosen in group_by_key((passes_of(of), _route(of).transposed and of.rounding) for of, _ in members).items():
        for part in _split(chosen, keys[0].k):
            routes = [_route(members[j][0]) for j in part]
            calls.append(Call(members[part[0]][0], keys, [members[j][1] for j in part], routes, []))
    return calls


def calls_inline(classes: Iterable[tuple[ShapeClass, Sequence[int]]]) -> list[Call]:
    """The same for an outer graph: a class each, of any number of members."""
    return [Call(of, (), list(positions), [_route(of)] * len(positions), []) for of, positions in classes]


def _split(positions: list[int], k: int) -> Iterator[list[int]]:
    for start in range(0, len(positions), k):
        yield positions[start : start + k]


@cached
def passes_of(of: ShapeClass) -> tuple[Pass, ...]:
    dtypes, keys = (of.dtype, of.grad_dtype), []
    for function, sizes in _route(of).passes:
        keys.append(pass_of(function, sizes, of.device, dtypes, of.momentum, of.rounding))
    return tuple(dict.fromkeys(keys))


def _route(of: ShapeClass) -> Route:
    route = route_of(of)
    assert route is not None
    return route


class Tables:
    """The numbers of the entries of a step, stacked for its calls and launches; many share them."""

    def __init__(self, tables: list[Tensor], draws: dict[int, Tensor]) -> None:
        self.tables, self.draws_of_each = tables, draws
        self._stacked: dict[tuple[int, ...], Tensor] = {}

    def of(self, positions: Sequence[int], k: int) -> Tensor:
        """[k, len(Numbers)]; the last one again where there are more members than positions."""
        rows = [self.tables[i] for i in positions]
        return self.stack(rows + rows[-1:] * (k - len(rows)))

    def stack(self, rows: list[Tensor]) -> Tensor:
        """Made once in a step."""
        if torch.compiler.is_compiling():  # the graph finds by itself what is there already
            return torch.stack(rows)
        key = tuple(map(id, rows))
        stacked = self._stacked.get(key)
        if stacked is None:
            stacked = self._stacked[key] = torch.stack(rows)
        return stacked

    def draws(self, positions: Sequence[int], k: int, transposed: bool = False) -> Tensor:
        """[k, DRAWS], likewise; of the transposes, where they are stepped instead."""
        rows = [self.draws_of_each[i] for i in positions]
        draws = torch.stack(rows + rows[-1:] * (k - len(rows)))
        return swapped(draws) if transposed else draws


def run_call(call: Call, members: Members) -> Tensor:
    """Step the members of a call, as part of an outer graph where there is one.

    Gives the RMS of each and of its update, shape [2, k or more].
    """
    route, of, inline = call.routes[0], call.shape_class, torch.compiler.is_compiling()

    def run(function: Callable[..., Any], sizes: tuple[int, ...], *arguments: Any) -> Any:
        if not inline:
            key = pass_of(function, sizes, of.device, (of.dtype, of.grad_dtype), of.momentum, of.rounding)
            function = passes.compiled(key)
        return function(*arguments)

    if route.in_parts:
        return torch.stack([route.function(member, run) for member in members.each()], 1)
    measured: Tensor = (route.function if inline else passes.compiled(call.keys[0]))(members)
    return measured


def members_of(call: Call, entries: list[Entry], tables: Tables) -> Members:
    """The tensors of a call, as the views of their routes, and of what stands in for the members that it lacks."""
    of, k = call.shape_class, len(call.positions)
    each: list[tuple[Any, ...]] = []
    for i, route in zip(call.positions, call.routes, strict=True):
        _, p, g, state, _ = entries[i]
        row = col = ones = None
        if of.factored:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            if route.transposed:
                row, col = col, row
            row = row if row.shape == route.row_shape else row.view(route.row_shape)
            col = col if col.shape == route.col_shape else col.view(route.col_shape)
            ones = route.ones(g, len(each)) if route.in_blocks else None
        whole = None if of.factored else route.view(state["exp_avg_sq"])
        exp_avg = route.view(state["exp_avg"]) if of.momentum else None
        each.append((route.view(p), route.view(g), row, col, whole, exp_avg, ones))
    if call.keys and call.keys[0].k > k:
        if not call.stand_ins:
            call.stand_ins.append(example_of(call.keys[0], tiny=True)[0])
        each += [x[:7] for x in islice(call.stand_ins[0].each(), k, None)]
        k = call.keys[0].k
    draws = tables.draws(call.positions, k, call.routes[0].transposed) if of.rounding else None
    table = tables.of(call.positions, k)
    return Members.of(each, table, draws, is_cautious(of.momentum))


def members_as_they_are(of: ShapeClass, positions: Sequence[int], entries: list[Entry], tables: Tables) -> Members:
    """The tensors of entries of a class."""
    each: list[tuple[Any, ...]] = []
    for i in positions:
        _, p, g, state, _ = entries[i]
        exp_avg = state["exp_avg"] if of.momentum else None
        each.append((p.detach(), g.detach(), *map(state.get, SECOND_MOMENTS), exp_avg, None))
    draws = tables.draws(positions, len(each)) if of.rounding else None
    return Members.of(each, tables.of(positions, len(each)), draws, is_cautious(of.momentum))
