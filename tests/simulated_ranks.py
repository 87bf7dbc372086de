"""Ranks that share parameters, in one process: each has launches for its pieces, and what these sum is added up here."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from parameters import parameters, set_gradients
from tolerances import assert_same_parameter, assert_same_state, largest
from torch import Tensor

from adafactor_compiled import Adafactor
from adafactor_compiled._fused.members import Placed, member_of
from adafactor_compiled._fused.pieces import COLUMNS, COUNT, NEITHER, ROWS, STATISTICS, Piece
from adafactor_compiled._fused.table import Found, Table
from adafactor_compiled._sharded.exchange import _terms
from adafactor_compiled._sharded.members import SPLITS
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import factored_dims
from adafactor_compiled._state.placements import Origin, Split
from adafactor_compiled._state.shape_class import class_of
from adafactor_compiled._update.numbers import plain_numbers
from adafactor_compiled._update.rounding import draws_of

SPLIT_OF = {split: of for of, split in SPLITS.items() if of is not Split.VECTOR}
CASES = {  # the dimension that is split, unevenly, of some shapes; of three ranks the last has nothing of two rows
    "rows": (-2, [(70, 48), (33, 20), (3, 1100), (2, 40, 24), (2, 16)]),
    "columns": (-1, [(70, 48), (33, 20), (20, 70), (2, 24, 40), (80, 2)]),
    "slices": (0, [(5, 24, 20), (2, 40, 48), (10, 3, 3, 3), (2, 6, 3, 3), (9, 4, 1, 1)]),
    "vectors": (0, [(5000,), (31,), (2,)]),
}


class Shared:
    """A parameter that is split along `dim`, as `Shard` does."""

    def __init__(self, param: Tensor, dim: int, group: dict[str, Any]) -> None:
        self.param, self.shape, self.dim = param, tuple(param.shape), dim % max(param.ndim, 1)
        self.factored = factored_dims(param.shape, group) is not None
        from_end = self.dim - param.ndim
        self.split = {-1: COLUMNS, -2: ROWS}.get(from_end, NEITHER) if self.factored else NEITHER
        terms, _ = _terms(SPLIT_OF[self.split], self.shape)
        self.sums = sum(map(math.prod, terms.values()))

    def window(self, rank: int, ranks: int) -> tuple[int, int]:
        """Where the piece of a rank begins, and how long it is."""
        n = self.shape[self.dim]
        begin = min(n, rank * -(-n // ranks))
        return begin, min(n, (rank + 1) * -(-n // ranks)) - begin

    def part(self, x: Tensor, name: str, window: tuple[int, int]) -> Tensor:
        """That of the parameter, its gradient or a tensor of its state."""
        dims = list(range(len(self.shape)))
        if name in ("exp_avg_sq_row", "exp_avg_sq_col"):
            dims.pop(-1 if name == "exp_avg_sq_row" else -2)
        return x.narrow(dims.index(self.dim), *window) if x.dim() and self.dim in dims else x

    def origin(self, begin: int) -> Origin:
        at = begin * math.prod(self.shape[self.dim + 1 :])
        if not self.factored:
            return Origin(0, 0, at)
        slices = at // math.prod(self.shape[-2:]) if self.split == NEITHER else 0
        return Origin(slices, begin if self.split == ROWS else 0, begin if self.split == COLUMNS else 0)


class Rank:
    """Copies of the pieces of one rank, and the table that steps them."""

    def __init__(self, whole: Adafactor, shared: Sequence[Shared], rank: int, ranks: int) -> None:
        (self.group,) = whole.param_groups
        self.shared, self.windows = shared, [x.window(rank, ranks) for x in shared]
        self.entries = []
        for i, x in enumerate(shared):
            state = {name: self._own(x, i, v, name) if isinstance(v, Tensor) else v for name, v in whole.state[x.param].items()}
            of_rank = self._own(x, i, x.param, "param"), self._own(x, i, x.param, "grad")
            self.entries.append(Entry(i, *of_rank, state, self.group))
        self.origins = [x.origin(begin) for x, (begin, _) in zip(shared, self.windows, strict=True)]
        members = []
        for x, entry, origin in zip(shared, self.entries, self.origins, strict=True):
            of = class_of(entry)._replace(factored=x.factored)
            placed = Placed(entry.param, None, (), 0, [], x.split, origin)  # type: ignore[arg-type]
            members.append(member_of(entry, of, torch.zeros_like(entry.state["RMS"]), placed))
        self.table = Table(members)
        self.first, self.third = (torch.zeros(n, dtype=torch.float64) for n in (sum(x.sums for x in shared), len(shared)))
        self.table.share([self.first], self._pieces)

    def _own(self, x: Shared, i: int, whole: Tensor, name: str) -> Tensor:
        part = x.part(whole.detach(), name, self.windows[i])
        return part.clone(memory_format=torch.contiguous_format)

    def _pieces(self) -> list[Piece]:
        pieces, at = [], self.first.data_ptr()
        for i, x in enumerate(self.shared):
            rows, columns = x.shape[-2:] if len(x.shape) > 1 else (1, math.prod(x.shape))
            pieces.append(Piece(at, self.third[i:].data_ptr(), x.split, math.prod(x.shape), rows, columns))
            at += 8 * x.sums
        return pieces

    def take(self, whole: Adafactor) -> None:
        """Parameters, gradients and states as they are now."""
        for x, entry, window in zip(self.shared, self.entries, self.windows, strict=True):
            entry.param.copy_(x.part(x.param.detach(), "param", window))
            entry.grad.copy_(x.part(x.param.grad, "grad", window))
            for name, value in whole.state[x.param].items():
                if isinstance(value, Tensor):
                    entry.state[name].copy_(x.part(value, name, window))
                else:
                    entry.state[name] = value

    def find(self) -> None:
        """What a step finds anew; steps are counted here."""
        grads, states = [x.grad for x in self.entries], [x.state for x in self.entries]
        addresses = self.table.addresses_of(
            self.table.tensors([x.param for x in self.entries], grads, states), [0] * len(grads)
        )
        for state in states:
            state["step"] += 1
        assert not self.table.conflicts(addresses, grads)
        steps = [x.state["step"] for x in self.entries]
        seeds = [self.group["rounding_seed"]] * len(steps)
        draws = draws_of(seeds, range(len(steps)), self.origins, steps, torch.device("cpu"))
        rounds = self.group["stochastic_rounding"]
        self.found = Found(addresses, array("d", plain_numbers(self.group, steps[0])), dict(enumerate(draws)) if rounds else {})


class Ranks:
    """The ranks of an optimizer that steps whole parameters, and that they are compared with.

    Args:
        whole: the reference, of one group, which has stepped.
        dims: along which each parameter is split.
        ranks: how many.
    """

    def __init__(self, whole: Adafactor, dims: Sequence[int], ranks: int) -> None:
        (group,) = whole.param_groups
        self.whole, self.shared = whole, [Shared(p, dim, group) for p, dim in zip(group["params"], dims, strict=True)]
        self.ranks = [Rank(whole, self.shared, rank, ranks) for rank in range(ranks)]

    @classmethod
    def of(cls, dim: int, shapes: Sequence[tuple[int, ...]], ranks: int, dtype: torch.dtype, **options: Any) -> Ranks:
        """Of parameters that have made a step, and have gradients for another."""
        params = parameters(shapes, dtype)
        whole = Adafactor(params, foreach=False, **options)
        set_gradients(params, 0)
        whole.step()
        set_gradients(params, 1)
        return cls(whole, [dim] * len(params), ranks)

    def step(self) -> None:
        for rank in self.ranks:
            rank.first.zero_()
            rank.find()
        self.statistics()
        if self.ranks[0].group["cautious"]:
            self.call(COUNT)
            self.add("third")
        for rank in self.ranks:
            rank.table.run(rank.found)

    def statistics(self) -> None:
        self.call(STATISTICS)
        self.add("first")

    def call(self, call: int) -> None:
        for rank in self.ranks:
            rank.table.call(call, rank.found)

    def add(self, name: str) -> None:
        buffers = [getattr(rank, name) for rank in self.ranks]
        total = torch.stack(buffers).sum(0)
        for buffer in buffers:
            buffer.copy_(total)

    def gathered(self, i: int, name: str) -> Tensor:
        """Of all ranks, a parameter or a tensor of its state; what they all have is the same, bit for bit."""
        x, entries = self.shared[i], [rank.entries[i] for rank in self.ranks]
        pieces = [entry.param if name == "param" else entry.state[name] for entry in entries]
        whole = x.param if name == "param" else self.whole.state[x.param][name]
        if x.part(whole, name, (0, 0)).shape == whole.shape:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces), name
            return pieces[0]
        dims = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}
        dim = list(range(whole.dim() + (name in dims)))
        if name in dims:
            dim.pop(dims[name])
        return torch.cat(pieces, dim.index(x.dim))

    def check(self, path: str) -> None:
        """Step all, and compare; then the ranks go on from where the whole is."""
        for rank in self.ranks:
            rank.take(self.whole)
        before = [largest(x.param) for x in self.shared]
        self.step()
        self.whole.step()
        for i, (x, scale) in enumerate(zip(self.shared, before, strict=True)):
            expected = self.whole.state[x.param]
            state = {name: self.gathered(i, name) for name, value in expected.items() if isinstance(value, Tensor)}
            state["step"] = self.ranks[0].entries[i].state["step"]
            assert_same_parameter(self.gathered(i, "param"), x.param.detach(), path, scale, f"parameter {i}")
            assert_same_state(state, expected, x.param.dtype, f"parameter {i}")
