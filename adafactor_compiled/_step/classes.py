"""Shape classes as what the multi-tensor step takes: the tensors of their members, and the numbers of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.members import Members
from adafactor_compiled._update.numbers import Numbers, numbers_of_entry


class Tables:
    """The numbers of the entries of a step, stacked for its classes and launches; many share them."""

    def __init__(self, tables: list[Tensor], draws: Mapping[int, Tensor]) -> None:
        self.tables, self.draws_of_each = tables, draws
        self._stacked: dict[tuple[int, ...], Tensor] = {}
        self._numbers: dict[int, Numbers] = {}  # by the id of a table

    def dtype_of(self, positions: Sequence[int]) -> torch.dtype:
        """That of the arithmetic of some of one class."""
        return self.tables[positions[0]].dtype

    def of(self, positions: Sequence[int]) -> Tensor:
        """[k, len(Numbers)]."""
        rows = [self.tables[i] for i in positions]
        if torch.compiler.is_compiling():  # the graph finds by itself what is there already
            return torch.stack(rows)
        key = tuple(map(id, rows))
        if key not in self._stacked:
            alike = len(set(key)) == 1
            self._stacked[key] = rows[0].expand(len(rows), -1) if alike else torch.stack(rows)
        return self._stacked[key]

    def numbers(self, positions: Sequence[int], entries: Sequence[Entry]) -> Numbers:
        """Python numbers, where all have the same and no input is a tensor."""
        first = self.tables[positions[0]]
        if not torch.compiler.is_compiling() and all(self.tables[i] is first for i in positions):
            numbers = self._numbers.get(id(first))
            if numbers is None:
                numbers = self._numbers[id(first)] = numbers_of_entry(entries[positions[0]])
            if not any(isinstance(x, Tensor) for x in numbers):
                return numbers
        return Numbers.of(self.of(positions))

    def draws(self, positions: Sequence[int]) -> Tensor:
        """[k, DRAWS]."""
        return torch.stack([self.draws_of_each[i] for i in positions])


def members_of(of: ShapeClass, positions: Sequence[int], entries: Sequence[Entry], tables: Tables) -> Members:
    """The entries of a class as what is stepped together."""
    numbers, draws = tables.numbers(positions, entries), tables.draws(positions) if of.rounding else None
    return Members.of(of, [entries[i] for i in positions], tables.of(positions), numbers, draws)
