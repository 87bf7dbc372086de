"""The step of DTensor parameters: local passes, one all_reduce a mesh, local passes.

Each rank sees its own pieces. What it sums of them goes into the flat buffer of their mesh (`exchange.py`); after the
all_reduce every rank has what it needs of the whole parameters. Which sums these are depends on the dimensions that are split
(`Split`). Nothing is written before the ranks have agreed on the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._compile import passes
from adafactor_compiled._compile.examples import Pass
from adafactor_compiled._compile.passes import pass_of
from adafactor_compiled._fused.pieces import COUNT, STATISTICS
from adafactor_compiled._fused.table import Found, Table
from adafactor_compiled._sharded.exchange import Slot
from adafactor_compiled._sharded.exchanges import Exchanges, admit, agree, begin, slots_of
from adafactor_compiled._sharded.members import local_grad, pieces_of
from adafactor_compiled._sharded.pieces import Piece, can_compile, passes_of
from adafactor_compiled._state.entries import Entry, path_of
from adafactor_compiled._state.moments import factored_dims, is_cautious, momentum_of
from adafactor_compiled._state.options import wants_rounding
from adafactor_compiled._state.placements import Split, local, split_of
from adafactor_compiled._state.views import origin_in
from adafactor_compiled._update import vectors
from adafactor_compiled._update.chunks import Run, vector_shape
from adafactor_compiled._update.matrices import Averages, Factors, Sums, averages, finish
from adafactor_compiled._update.members import Member
from adafactor_compiled._update.numbers import Numbers, moving_average
from adafactor_compiled._update.rounding import draws_of_entries


class Job(NamedTuple):
    """A DTensor parameter that takes part in a step."""

    entry: Entry
    table: Tensor  # its numbers
    update_rms: Tensor  # written
    compiles: bool  # whether its passes are compiled
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
    rounding = [job.entry for job in jobs if _rounds(job.entry)]
    # One that has no origin raises here: its option was switched on by hand.
    origins = [slots[x.position].origin or origin_in(x.param, x.group, x.position) for x in rounding]
    draws = dict(zip((x.position for x in rounding), draws_of_entries(rounding, origins), strict=True))
    return [job._replace(draws=draws.get(job.entry.position)) for job in jobs]


def _rounds(entry: Entry) -> bool:
    return wants_rounding(entry.param.dtype, entry.group)


def passes_of_shards(entries: Iterable[Entry]) -> list[Pass]:
    """What stepping DTensor parameters runs compiled on this rank."""
    keys: dict[Pass, None] = {}
    for entry in entries:
        if not compiles(entry):
            continue
        p, g = local(entry.param), local(entry.grad)
        split = split_of(cast(DTensor, entry.param), factored_dims(entry.param.shape, entry.group) is not None)
        if split is Split.VECTOR and _can_compile_vector(p, g):
            shape = vector_shape(p.numel())
            keys |= {_pass_for(entry, function, shape): None for function in (vectors.vector_sums, vectors.apply_vector)}
        elif split is not Split.VECTOR and can_compile(p, g):
            keys |= {_pass_for(entry, *of): None for of in passes_of(tuple(p.shape), split)}
    return list(keys)


def compiles(entry: Entry) -> bool:
    """Whether the passes over a piece are to be compiled; what counts the signs that agree is not."""
    return path_of(entry.group) in ("fused", "compiled") and not is_cautious(momentum_of(entry.param.dtype, entry.group))


def _pass_for(entry: Entry, function: Callable[..., Any], sizes: tuple[int, ...]) -> Pass:
    param, dtypes = entry.param, (entry.param.dtype, entry.grad.dtype)
    return pass_of(function, sizes, param.device, dtypes, momentum_of(param.dtype, entry.group), _rounds(entry))


def _runner(job: Job, compiles: bool) -> Run:
    if compiles:
        return lambda function, sizes, *arguments: passes.compiled(_pass_for(job.entry, function, sizes))(*arguments)
    return lambda function, sizes, *arguments: function(*arguments)


class _Piece:
    """A piece on its way through a step: sums, all_reduce, (sums, all_reduce,) all writes."""

    def __init__(self, job: Job, slot: Slot) -> None:
        self.job, self.slot, self.entry, self.table = job, slot, job.entry, job.table
        self.numbers, self.numel = Numbers.of(job.table), job.entry.param.numel()
        self.grad = local_grad(job.entry)  # placed as the parameter is

    def first(self) -> None:
        """Put into the first buffer what the ranks add up."""

    def second(self) -> None:
        """Put into the second buffer what needs the first."""

    def third(self) -> None:
        """Put into the third buffer how many elements agree in sign, where the step is cautious."""

    def finish(self) -> None:
        """Write the parameter and the state."""

    def summed(self, name: str) -> Tensor:
        """A sum over the ranks, after the first all_reduce."""
        return self.slot.first[name].to(self.table.dtype)

    def agree(self, agreeing: Callable[[], Tensor]) -> None:
        if self.slot.third:
            self.slot.third["agreeing"].copy_(agreeing())

    def share(self) -> Tensor | None:
        """Of the elements of the whole parameter that agree in sign, after the third all_reduce."""
        return self.slot.third["agreeing"].to(self.table.dtype) / self.numel if self.slot.third else None

    def measured(self, measured: Tensor) -> None:
        """Put the RMS of parameter and update, shape [2], where they are kept."""
        torch._foreach_copy_([self.entry.state["RMS"], self.job.update_rms], list(measured.unbind()))


class _Matrix(_Piece):
    def __init__(self, job: Job, slot: Slot) -> None:
        super().__init__(job, slot)
        state = job.entry.state
        *_, self.rows, self.columns = job.entry.param.shape
        self.row = local(state["exp_avg_sq_row"])
        # Passes write rows before the ranks have agreed, and as views of what is contiguous.
        row, col = self.row.clone(memory_format=torch.contiguous_format), local(state["exp_avg_sq_col"])
        exp_avg = local(state["exp_avg"]) if job.entry.group["beta1"] is not None else None
        self.x = Member(local(job.entry.param), self.grad, row, col, None, exp_avg, None, job.table, job.draws)
        compiles = job.compiles and can_compile(self.x.p, self.x.g)
        self.piece = Piece(self.x, _runner(job, compiles), compiles)

    def third(self) -> None:
        self.f, self.rms = self.factors()
        self.agree(lambda: self.piece.agreement(self.f))

    def finish(self) -> None:
        self.piece.apply(self.f, self.share())
        self.row.copy_(self.x.row)
        self.measured(self.rms)

    def factors(self) -> tuple[Factors, Tensor]:
        """What turns the gradient into a step, and both RMS; brings the averages of this piece up to date, rows in `x.row`."""
        return finish(self.averages(), self.summed("param_sq"), self.x.col, self.table, self.numel)

    def averages(self) -> Averages:
        """The new averages of this piece, the rows also in `x.row`, and the sum of the squares of the whole update."""
        raise NotImplementedError


class _Slices(_Matrix):
    """Whole rows and columns, so that only two numbers are added up."""

    def first(self) -> None:
        sums = self.piece.statistics()
        self.local = averages(sums, self.x.col, self.table, self.rows)
        self.slot.add(param_sq=sums.param_sq, update_sq=self.local.update_sq)

    def averages(self) -> Averages:
        return self.local._replace(update_sq=self.summed("update_sq"))


class _Rows(_Matrix):
    """Whole rows: the two reads of matrices.py."""

    def first(self) -> None:
        self.slot.add(**self.piece.statistics()._asdict())

    def averages(self) -> Averages:
        return averages(Sums(*map(self.summed, Sums._fields)), self.x.col, self.table, self.rows)


class _Columns(_Matrix):
    """Whole columns: the same identity with rows and columns exchanged."""

    def first(self) -> None:
        sums = self.piece.plain_sums()
        self.col = moving_average(self.x.col, sums.col_sq / self.rows, self.numbers)
        self.slot.add(param_sq=sums.param_sq, row_sq=sums.row_sq, weighted_sq=self.piece.weighted_rows(self.col))

    def averages(self) -> Averages:
        row = moving_average(self.x.row, self.summed("row_sq") / self.columns, self.numbers)
        row_mean = row.mean(-1)
        self.x.row.copy_(row)
        # The mean last: beside large rows, its ratio to one without gradient would overflow.
        return Averages(row_mean, self.col, ((self.summed("weighted_sq") / row).sum(-1) * row_mean).sum())


class _Grid(_Matrix):
    """Neither: the row and column sums are added up first, and then what the update's RMS needs."""

    def first(self) -> None:
        sums = self.piece.plain_sums()
        *lead, rows, columns = self.slot.window
        self.lead, self.of_rows, self.of_columns = tuple(lead), (*lead, rows), (*lead, columns)
        self.slot.add(param_sq=sums.param_sq)
        self.slot.first["row_sq"][self.of_rows].copy_(sums.row_sq)
        self.slot.first["col_sq"][self.of_columns].copy_(sums.col_sq)

    def second(self) -> None:
        row_sq, col_sq = self.summed("row_sq")[self.of_rows], self.summed("col_sq")[self.of_columns]
        row = moving_average(self.x.row, row_sq / self.columns, self.numbers)
        self.col = moving_average(self.x.col, col_sq / self.rows, self.numbers)
        self.x.row.copy_(row)
        if self.slot.counts:
            self.slot.second["weighted_sq"][self.lead].copy_((self.piece.weighted_rows(self.col) / row).sum(-1))
        if self.slot.owns_rows:
            self.slot.second["row"][self.lead].copy_(row.sum(-1))

    def averages(self) -> Averages:
        row_sum, weighted_sq = (self.slot.second[name].to(self.table.dtype) for name in ("row", "weighted_sq"))
        row_mean = row_sum / self.rows
        return Averages(row_mean[self.lead], self.col, (weighted_sq * row_mean).sum())


class _Vector(_Piece):
    def __init__(self, job: Job, slot: Slot) -> None:
        super().__init__(job, slot)
        state, p, g = job.entry.state, local(job.entry.param), self.grad
        compiles = job.compiles and _can_compile_vector(p, g)
        self.run, self.shape = _runner(job, compiles), vector_shape(p.numel()) if compiles else tuple(p.shape)
        exp_avg = local(state["exp_avg"]) if job.entry.group["beta1"] is not None else None
        views: list[Any] = [None if x is None else x.view(self.shape) for x in (p, g, local(state["exp_avg_sq"]), exp_avg)]
        self.p, self.g, self.exp_avg_sq, self.exp_avg = views

    def first(self) -> None:
        sums = self.run(vectors.vector_sums, self.shape, self.p, self.g, self.exp_avg_sq, self.table)
        self.slot.add(**sums._asdict())

    def third(self) -> None:
        self.sums = self.summed("param_sq"), self.summed("update_sq")
        rest = *self.sums, self.table, self.numel
        self.agree(lambda: vectors.vector_agreement(self.g, self.exp_avg_sq, self.exp_avg, *rest))

    def finish(self) -> None:
        pieces = self.p, self.g, self.exp_avg_sq, self.exp_avg
        rest = self.table, self.job.draws, self.numel, self.share()
        self.measured(self.run(vectors.apply_vector, self.shape, *pieces, *self.sums, *rest))


def _can_compile_vector(p: Tensor, g: Tensor) -> bool:
    return p.numel() > 1 and p.is_contiguous() and g.is_contiguous()


KINDS: dict[Split, type[_Piece]] = {
    Split.VECTOR: _Vector,
    Split.SLICES: _Slices,
    Split.ROWS: _Rows,
    Split.COLUMNS: _Columns,
    Split.GRID: _Grid,
}
