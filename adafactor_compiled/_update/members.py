"""The tensors of parameters that are stepped together, as lists: what every step of several parameters takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Member(NamedTuple):
    """One parameter. What it has none of is None."""

    p: Tensor
    g: Tensor
    row: Any  # Tensor | None, as all that follow
    col: Any
    exp_avg_sq: Any
    exp_avg: Any
    ones: Any  # of a matrix in blocks, see `ones_for` in matrices.py
    table: Any  # its `Numbers`, a vector
    draws: Any  # for stochastic rounding, see rounding.py
    cautious: bool = False


class Members(NamedTuple):
    """k parameters: each field a list of k, empty where they have none."""

    params: list[Tensor]
    grads: list[Tensor]
    rows: list[Tensor]
    cols: list[Tensor]
    exp_avg_sqs: list[Tensor]
    exp_avgs: list[Tensor]
    ones: list[Tensor]
    table: Tensor  # [k, len(Numbers)]
    draws: Tensor | None  # [k, DRAWS]
    cautious: bool = False  # see momentum.py

    @classmethod
    def of(cls, each: Iterable[Sequence[Any]], table: Tensor, draws: Tensor | None, cautious: bool) -> Members:
        """From the first seven fields of each `Member`."""
        lists = ([] if column[0] is None else list(column) for column in zip(*each, strict=True))
        return cls(*lists, table, draws, cautious)  # type: ignore[call-arg, arg-type]

    def each(self) -> Iterator[Member]:
        """One after the other."""
        none = [None] * len(self.params)
        lists = (x or none for x in self[2:7])
        draws = none if self.draws is None else self.draws.unbind()
        yield from map(Member, self.params, self.grads, *lists, self.table.unbind(), draws, [self.cautious] * len(none))

    def part(self, start: int, stop: int) -> Members:
        """Some of them."""
        return Members(*(x[start:stop] if isinstance(x, (list, Tensor)) else x for x in self))  # type: ignore[arg-type]
