"""The step of DTensor parameters: local sums, one all_reduce a mesh, local writes.

Each rank sees its own pieces. What it sums of them goes into the flat buffer of their mesh (`exchange.py`); after the
all_reduce every rank has what it needs of the whole parameters. Which sums these are depends on the dimensions that are split
(`Split`). Nothing is written before the ranks have agreed on the gradients.

Pieces that kernels do not step go through the stages of multi_tensor.py, one after the other. Where columns are split they are
stepped as transposes, whose rows are split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._fused.pieces import COUNT, STATISTICS
from adafactor_compiled._fused.table import Found, Table
from adafactor_compiled._sharded.exchange import Slot
from adafactor_compiled._sharded.exchanges import Exchanges, admit, agree, begin, slots_of
from adafactor_compiled._sharded.members import pieces_of
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import is_cautious, momentum_of
from adafactor_compiled._state.options import wants_rounding
from adafactor_compiled._state.placements import Split, local
from adafactor_compiled._state.views import origin_in
from adafactor_compiled._update import multi_tensor
from adafactor_compiled._update.members import Members
from adafactor_compiled._update.multi_tensor import Averages, Sums, averages
from adafactor_compiled._update.numbers import Numbers, moving_average
from adafactor_compiled._update.rounding import draws_of_entries


class Job(NamedTuple):
    """A DTensor parameter that takes part in a step."""

    entry: Entry
    table: Tensor  # its numbers
    update_rms: Tensor  # written
    draws: Tensor | None = None  # for stochastic rounding


class Launched(NamedTuple):
    """The part of a step that kernels take, plain parameters included."""

    table: Table
    found: Found


def step(exchanges: Exchanges, jobs: Sequence[Job], launched: Launched | None) -> tuple[dict[int, Tensor], set[int]]:
    """Step DTensor parameters; collective over their meshes.

    Args:
        exchanges: of all DTensor parameters, also of those without a gradient.
        jobs: those that have one, and that kernels do not step.
        launched: those that they do.

    Returns:
        Whether the whole gradient is finite, 0-dim, by the position of the parameter, where a group of the jobs asks; and
        which members kernels have skipped.

    Raises:
        RuntimeError: before anything has changed, where another rank has other gradients.
    """
    positions = [job.entry.position for job in jobs] + (launched.table.sharded if launched else [])
    slots = slots_of(exchanges)
    if not slots.keys() >= set(positions):
        admit(exchanges, positions)
        slots = slots_of(exchanges)
    begin(exchanges)
    pieces = [KINDS[slots[job.entry.position].split](job, slots[job.entry.position]) for job in _with_draws(jobs, slots)]
    for piece in pieces:
        piece.first()
        if piece.entry.group["nonfinite"] == "skip":
            piece.slot.add(nonfinite=~torch.isfinite(piece.grad).all())
    if launched:
        launched.table.share([x.first.flat for x in exchanges], lambda: pieces_of(launched.table.members, slots))
        launched.table.call(STATISTICS, launched.found)
    agree(exchanges, positions)
    for piece in pieces:
        piece.second()
    for exchange in exchanges:
        exchange.sum(exchange.second)
    for piece in pieces:
        piece.third()
    if launched and any(x.third.flat.numel() for x in exchanges):
        launched.table.call(COUNT, launched.found)
    for exchange in exchanges:
        exchange.sum(exchange.third)
    skipped = launched.table.run(launched.found) if launched else set()
    for piece in pieces:
        piece.finish()
    asking = [job.entry.position for job in jobs if job.entry.group["nonfinite"] == "skip"]
    return {position: slots[position].first["nonfinite"] == 0 for position in asking}, skipped


def _with_draws(jobs: Sequence[Job], slots: dict[int, Slot]) -> list[Job]:
    """The jobs with what determines the noise of their pieces: that of the same elements of an unsharded parameter."""
    rounding = [x for x, *_ in jobs if wants_rounding(x.param.dtype, x.group)]
    # One that has no origin raises here: its option was switched on by hand.
    origins = [slots[x.position].origin or origin_in(x.param, x.group, x.position) for x in rounding]
    draws = dict(zip((x.position for x in rounding), draws_of_entries(rounding, origins), strict=True))
    return [job._replace(draws=draws.get(job.entry.position)) for job in jobs]


class _Piece:
    """A piece on its way through a step: sums, all_reduce, (sums, all_reduce,) all writes."""

    def __init__(self, job: Job, slot: Slot) -> None:
        self.job, self.slot, self.entry = job, slot, job.entry
        self.grad = local(job.entry.grad)
        self.members = _members_of(job, self.grad, slot.split)
        # Of rows or columns, whichever averages ranks share: how many elements of the whole parameter each is over.
        self.over = 1 if job.entry.param.ndim < 2 else job.entry.param.shape[-1 if self.members.transposed else -2]

    def first(self) -> None:
        """Put into the first buffer what the ranks add up."""
        self.sums = multi_tensor.statistics(self.members)
        self.put(param_sq=self.sums.param_sq)

    def second(self) -> None:
        """Put into the second buffer what needs the first."""

    def third(self) -> None:
        """Put into the third buffer how many elements agree in sign, where the step is cautious."""
        self.new, numel = self.averages(), self.entry.param.numel()
        (self.factors,), self.measured = multi_tensor.factors_of(
            [self.members], [self.summed("param_sq")], [self.new.update_sq], [numel]
        )
        if self.slot.third:
            self.slot.third["agreeing"].copy_(multi_tensor.count(self.members, self.new, self.factors)[0])

    def finish(self) -> None:
        """Write the parameter and the state."""
        shares = None
        if self.slot.third:
            agreeing = self.slot.third["agreeing"].to(self.job.table.dtype)
            shares = (agreeing / self.entry.param.numel()).unsqueeze(0)
        multi_tensor.apply(self.members, self.new, self.factors, shares)
        torch._foreach_copy_([self.entry.state["RMS"], self.job.update_rms], [x[0] for x in self.measured])

    def averages(self) -> Averages:
        """The new second moments of this piece, and the sum of the squares of the whole update."""
        raise NotImplementedError

    def put(self, **sums: Tensor) -> None:
        self.slot.add(**{name: x[0] for name, x in sums.items()})

    def summed(self, name: str) -> Tensor:
        """A sum over the ranks, after the first all_reduce, [1, ...]."""
        return self.slot.first[name].to(self.job.table.dtype).unsqueeze(0)


class _Whole(_Piece):
    """A piece with the whole of its averages, so that only two numbers are added up."""

    def first(self) -> None:
        super().first()
        self.local = averages(self.members, self.sums, self.over)
        self.put(update_sq=self.local.update_sq)

    def averages(self) -> Averages:
        return self.local._replace(update_sq=self.summed("update_sq"))


class _Rows(_Piece):
    """Whole rows of some columns, or, as a transpose, whole columns of some rows."""

    def first(self) -> None:
        super().first()
        sums = self.sums
        if self.members.transposed:
            self.put(row_sq=sums.shared_sq, weighted_sq=sums.weighted_sq)
        else:
            self.put(row=sums.own_sum, col_sq=sums.shared_sq, weighted_sq=sums.weighted_sq)

    def averages(self) -> Averages:
        own_sum = None if self.members.transposed else self.summed("row")
        shared_sq = self.summed("row_sq" if self.members.transposed else "col_sq")
        whole = Sums(self.sums.param_sq, self.sums.own, own_sum, shared_sq, self.summed("weighted_sq"))
        return averages(self.members, whole, self.over)


class _Grid(_Piece):
    """Neither: the row and column sums are added up first, and then what the update's RMS needs."""

    def first(self) -> None:
        p, g = (x[0].to(self.job.table.dtype) for x in (self.members.params, self.members.grads))
        self.squared = g.square()
        *lead, rows, columns = self.slot.window
        self.lead, self.of_rows, self.of_columns = tuple(lead), (*lead, rows), (*lead, columns)
        self.slot.add(param_sq=p.square().sum())
        self.slot.first["row_sq"][self.of_rows].copy_(self.squared.sum(-1))
        self.slot.first["col_sq"][self.of_columns].copy_(self.squared.sum(-2))

    def second(self) -> None:
        numbers, (*_, rows, columns) = Numbers.of(self.job.table), self.entry.param.shape
        row_sq, col_sq = self.summed("row_sq")[0][self.of_rows], self.summed("col_sq")[0][self.of_columns]
        self.row = moving_average(self.members.own[0], row_sq / columns, numbers)
        self.col = moving_average(self.members.shared[0], col_sq / rows, numbers)
        if self.slot.counts:
            weighted = (self.squared / self.col.unsqueeze(-2)).sum(-1) / self.row
            self.slot.second["weighted_sq"][self.lead].copy_(weighted.sum(-1))
        if self.slot.owns_rows:
            self.slot.second["row"][self.lead].copy_(self.row.sum(-1))
        del self.squared

    def averages(self) -> Averages:
        row_sum, weighted_sq = (self.slot.second[name].to(self.job.table.dtype) for name in ("row", "weighted_sq"))
        mean = row_sum / self.entry.param.shape[-2]
        update_sq = (weighted_sq * mean).sum()
        return Averages(*(x.unsqueeze(0) for x in (update_sq, self.row, self.col, mean[self.lead])))


def _members_of(job: Job, grad: Tensor, split: Split) -> Members:
    """A piece as the only member of its class."""
    entry, state = job.entry, {key: local(x) for key, x in job.entry.state.items() if isinstance(x, Tensor)}
    table, momentum = job.table.unsqueeze(0), momentum_of(entry.param.dtype, entry.group)
    whole = split is Split.VECTOR
    members = Members(
        [local(entry.param)],
        [grad],
        [state["exp_avg_sq" if whole else "exp_avg_sq_row"]],
        [] if whole else [state["exp_avg_sq_col"]],
        [],
        [] if momentum is None else [state["exp_avg"]],
        table,
        Numbers.of(table),
        None if job.draws is None else job.draws.unsqueeze(0),
        is_cautious(momentum),
    )
    return members.transposes() if split is Split.COLUMNS else members


KINDS: dict[Split, type[_Piece]] = {
    Split.VECTOR: _Whole,
    Split.SLICES: _Whole,
    Split.ROWS: _Rows,
    Split.COLUMNS: _Rows,
    Split.GRID: _Grid,
}
