"""The entries of a step with their numbers and draws, as launches, graphs and the multi-tensor step take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.members import Members
from adafactor_compiled._update.numbers import Numbers, plain_numbers, tables_of


class Inputs:
    """Made once a step; what is stacked of numbers, many classes share.

    Args:
        entries: with rows and columns last.
        draws: of those that are rounded stochastically, by their positions.
    """

    def __init__(self, entries: Sequence[Entry], draws: Mapping[int, Tensor]) -> None:
        self.entries, self.draws = entries, draws
        self.tables = tables_of(entries)  # the numbers of each entry
        self._stacked: dict[tuple[int, ...], Tensor] = {}
        self._numbers: dict[int, Numbers] = {}  # by the id of a table

    def members(self, of: ShapeClass, positions: Sequence[int]) -> Members:
        """Entries of a class as what is stepped together."""
        draws = torch.stack([self.draws[i] for i in positions]) if of.rounding else None
        chosen = [self.entries[i] for i in positions]
        return Members.of(of, chosen, self._stack(positions), self._numbers_of(positions), draws)

    def _stack(self, positions: Sequence[int]) -> Tensor:
        """[k, len(Numbers)]."""
        rows = [self.tables[i] for i in positions]
        if torch.compiler.is_compiling():  # the graph finds by itself what is there already
            return torch.stack(rows)
        key = tuple(map(id, rows))
        if key not in self._stacked:
            alike = len(set(key)) == 1
            self._stacked[key] = rows[0].expand(len(rows), -1) if alike else torch.stack(rows)
        return self._stacked[key]

    def _numbers_of(self, positions: Sequence[int]) -> Numbers:
        """Python numbers, where all have the same and no input is a tensor."""
        first, entry = self.tables[positions[0]], self.entries[positions[0]]
        count = entry.state["step"]
        alike = not isinstance(count, Tensor) and all(self.tables[i] is first for i in positions)
        if alike and not torch.compiler.is_compiling():
            numbers = self._numbers.get(id(first))
            if numbers is None:
                numbers = self._numbers[id(first)] = plain_numbers(entry.group, count)
            if not any(isinstance(x, Tensor) for x in numbers):
                return numbers
        return Numbers.of(self._stack(positions))
