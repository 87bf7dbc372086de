"""The tensors of parameters that are stepped together, as lists: what every step of several parameters takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import is_cautious
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.numbers import Numbers
from adafactor_compiled._update.rounding import swapped

Tensors = list[Tensor] | tuple[Tensor, ...]

IN_CACHE = 262_144  # on a CPU: elements that are stepped at once, so that one operation finds what another has left in cache
FEW, LARGE = 8, 1_048_576  # members at once and elements of one: below, a CPU steps one after the other sooner
PARTS_OF_HALF = 8  # a class in half precision is stepped in so many: float32 takes twice as much, three times, and averages


def one_by_one(of: ShapeClass, count: int) -> bool:
    """Whether so many of a class are stepped sooner one by one: on a CPU an operation on a list is a loop, and saves little."""
    if of.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return of.numel <= LARGE and min(count, IN_CACHE // max(1, of.numel)) < FEW


class Members(NamedTuple):
    """k parameters of one shape, with gradients and state: each field a list of k, or empty."""

    params: Tensors
    grads: Tensors
    own: Tensors  # the averages of the rows, [..., R], or the whole second moment
    shared: Tensors  # those of the columns, [..., C], which pieces with whole rows share; none of a whole second moment
    twins: Tensors  # of kernels of one element, whose row and column are the whole second moment: the other one
    exp_avgs: Tensors
    table: Tensor  # [k, len(Numbers)]
    numbers: Numbers  # the same, each [k], or a Python number that all of them have
    draws: Tensor | None  # for stochastic rounding, [k, DRAWS]
    cautious: bool = False
    transposed: bool = False  # whether these are transposes, and `own` the averages of the columns

    @classmethod
    def of(cls, of: ShapeClass, entries: Sequence[Entry], table: Tensor, numbers: Numbers, draws: Tensor | None) -> Members:
        """Entries of a class, as they lie."""
        states = [x.state for x in entries]
        own = [x["exp_avg_sq_row" if of.factored else "exp_avg_sq"] for x in states]
        shared, twins = [x["exp_avg_sq_col"] for x in states] if of.factored else [], []
        if of.is_pointwise:
            own, shared, twins = [x.unsqueeze(-1) for x in shared], [], [x.unsqueeze(-1) for x in own]
        params, grads = [x.param.detach() for x in entries], [x.grad.detach() for x in entries]
        exp_avgs = [x["exp_avg"] for x in states] if of.momentum else []
        return cls(params, grads, own, shared, twins, exp_avgs, table, numbers, draws, is_cautious(of.momentum))

    def transposes(self) -> Members:
        """Matrices whose columns are their rows; these step alike."""
        params, grads, exp_avgs = ([x.mT for x in of] for of in (self.params, self.grads, self.exp_avgs))
        draws = None if self.draws is None else swapped(self.draws)
        swapped_state: dict[str, Any] = {"own": self.shared, "shared": self.own, "exp_avgs": exp_avgs, "draws": draws}
        return self._replace(params=params, grads=grads, **swapped_state, transposed=not self.transposed)

    def part(self, start: int, stop: int) -> Members:
        """Some of them."""
        some: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in LISTS}
        some["table"] = table = self.table[start:stop]
        some["draws"] = None if self.draws is None else self.draws[start:stop]
        return self._replace(numbers=Numbers.of(table) if isinstance(self.numbers.beta2, Tensor) else self.numbers, **some)

    def parts(self) -> Iterator[Members]:
        """As many at once as suit the device."""
        k, numel = len(self.params), self.params[0].numel()
        size = k if self.params[0].dtype == self.table.dtype else -(-k // PARTS_OF_HALF)
        if torch.compiler.is_compiling():
            size = 1
        elif self.params[0].device.type == "cpu":
            size = min(size, max(1, IN_CACHE // max(1, numel)))
        return iter([self]) if size >= k else (self.part(start, start + size) for start in range(0, k, size))


LISTS = Members._fields[:6]
