"""The step of DTensor parameters: local passes, one all_reduce a mesh, local passes.

Each rank sees its own pieces. What it sums of them goes into the flat buffer of their mesh (`_exchange.py`); after the
all_reduce every rank has what it needs of the whole parameters. Which sums these are depends on the dimensions that are split
(`Split`). Nothing is written before the ranks have agreed on the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled import _blocked
from adafactor_compiled._blocked import Averages, Factors, Sums
from adafactor_compiled._compile import Pass, compiled, pass_of, size_variant
from adafactor_compiled._depth_first import Matrix
from adafactor_compiled._exchange import Exchange, Slot
from adafactor_compiled._options import Group
from adafactor_compiled._passes import Members, Runner, apply_stacked, put_back, stacked_of, stacked_update
from adafactor_compiled._placements import Split, checked_origin, local
from adafactor_compiled._plan import Entry, draws_of_entries
from adafactor_compiled._shape_class import group_by_class
from adafactor_compiled._shard_passes import Piece, moving_average


def exchanges_of(groups: list[Group], last: Sequence[Exchange]) -> Sequence[Exchange]:
    """The exchanges of all DTensor parameters that may get a gradient: the last ones, where these are the same."""
    params = [param for group in groups for param in group["params"]]
    sharded = [
        (i, param)
        for i, param in enumerate(params)
        if isinstance(param, DTensor) and (param.requires_grad or param.grad is not None)
    ]
    known = [x for exchange in last for x in exchange.params]
    if len(known) == len(sharded) and {(i, id(x)) for i, x in known} == {(i, id(x)) for i, x in sharded}:
        return last
    by_mesh = group_by_class(param.device_mesh for _, param in sharded)
    return [Exchange(mesh, [sharded[i] for i in chosen]) for mesh, chosen in by_mesh.items()]


class Job(NamedTuple):
    """A DTensor parameter that takes part in a step."""

    entry: Entry
    table: Tensor  # its numbers
    update_rms: Tensor  # written
    compiles: bool  # whether its passes are compiled
    draws: Tensor | None = None  # for stochastic rounding


def step(exchanges: Sequence[Exchange], jobs: Sequence[Job]) -> dict[int, Tensor]:
    """Step DTensor parameters; collective over their meshes.

    Args:
        exchanges: of all DTensor parameters, also of those without a gradient.
        jobs: those that have one.

    Returns:
        Whether the whole gradient is finite, 0-dim, by the position of the parameter, where a group asks.

    Raises:
        RuntimeError: before anything has changed, where another rank has other gradients.
    """
    slots = {position: slot for exchange in exchanges for position, slot in exchange.slots.items()}
    for exchange in exchanges:
        exchange.clear()
    pieces = list(_pieces_of(_with_draws(jobs, slots), slots))
    for piece in pieces:
        piece.first()
        for slot, entry, grad in piece.gradients():
            if entry.group["nonfinite"] == "skip":
                slot.add(nonfinite=~torch.isfinite(grad).all())
    for exchange in exchanges:
        exchange.sum_first([job.entry.position for job in jobs if job.entry.position in exchange.slots])
    for piece in pieces:
        piece.second()
    for exchange in exchanges:
        exchange.sum_second()
    for piece in pieces:
        piece.finish()
    asking = [job.entry.position for job in jobs if job.entry.group["nonfinite"] == "skip"]
    return {position: slots[position].first["nonfinite"] == 0 for position in asking}


def _with_draws(jobs: Sequence[Job], slots: dict[int, Slot]) -> list[Job]:
    """The jobs with what determines the noise of their pieces: that of the same elements of an unsharded parameter."""
    jobs = list(jobs)
    rounding = [i for i, job in enumerate(jobs) if job.entry.rounds]
    for of_device in group_by_class(jobs[i].entry.param.device for i in rounding).values():
        chosen = [rounding[i] for i in of_device]
        entries = [jobs[i].entry for i in chosen]
        # One that has no origin raises here: its option was switched on by hand.
        origins = [slots[entry.position].origin or checked_origin(entry.param, entry.position) for entry in entries]
        for i, draws in zip(chosen, draws_of_entries(entries, origins), strict=True):
            jobs[i] = jobs[i]._replace(draws=draws)
    return jobs


def _pieces_of(jobs: Sequence[Job], slots: dict[int, Slot]) -> Iterator[_Pieces]:
    """Matrices one by one and vectors by class."""
    vectors = []
    for job in jobs:
        slot = slots[job.entry.position]
        if slot.split is Split.VECTOR:
            vectors.append((job, slot))
        else:
            yield MATRICES[slot.split](job, slot)
    for chosen in group_by_class(_vector_class(job) for job, _ in vectors).values():
        yield _Vectors(*zip(*(vectors[i] for i in chosen), strict=True))


def local_grad(entry: Entry) -> Tensor:
    """The gradient placed as its parameter is; a sum that is still due over the ranks is taken here."""
    param, grad = entry.param, entry.grad
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def pass_for(entry: Entry, function: Callable[..., Any], variant: tuple[int, ...]) -> Pass:
    param, dtypes = entry.param, (entry.param.dtype, entry.grad.dtype)
    return pass_of(function, param.device, dtypes, entry.group["beta1"] is not None, entry.rounds, variant)


def _runner(job: Job) -> Runner:
    if job.compiles:
        return lambda function, variant, *arguments: compiled(pass_for(job.entry, function, variant))(*arguments)
    return lambda function, variant, *arguments: function(*arguments)


class _Pieces:
    """Pieces on their way through a step: sums, all_reduce, (sums, all_reduce,) all writes."""

    def gradients(self) -> list[tuple[Slot, Entry, Tensor]]:
        """The pieces of gradients, placed as the parameters are."""
        raise NotImplementedError

    def first(self) -> None:
        """Put into the first buffer what the ranks add up."""

    def second(self) -> None:
        """Put into the second buffer what needs the first."""

    def finish(self) -> None:
        """Write the parameter and the state."""


class _Matrix(_Pieces):
    def __init__(self, job: Job, slot: Slot) -> None:
        entry, state = job.entry, job.entry.state
        self.slot, self.entry, self.table = slot, entry, job.table
        *_, self.rows, self.columns = entry.param.shape
        self.numel = entry.param.numel()
        self.row = local(state["exp_avg_sq_row"])
        self.x = Matrix(
            local(entry.param),
            local_grad(entry),
            self.row.clone(),  # passes write it before the ranks have agreed
            local(state["exp_avg_sq_col"]),
            local(state["exp_avg"]) if entry.group["beta1"] is not None else None,
            state["RMS"].view(1),
            job.update_rms.view(1),
            job.draws,
        )
        self.piece = Piece(self.x, self.table, _runner(job), job.compiles)

    def gradients(self) -> list[tuple[Slot, Entry, Tensor]]:
        return [(self.slot, self.entry, self.x.g)]

    def summed(self, name: str) -> Tensor:
        """A sum over the ranks, after the first all_reduce."""
        return self.slot.first[name].to(self.table.dtype)

    def finish(self) -> None:
        self.piece.apply(self.factors())
        self.row.copy_(self.x.row)

    def factors(self) -> Factors:
        """What turns the gradient into a step; brings all state of this piece up to date, the rows in `x.row`."""
        x, param_sq = self.x, self.summed("param_sq")
        return _blocked.finish(self.averages(), param_sq, x.col, x.rms, x.update_rms, self.table, self.numel)

    def averages(self) -> Averages:
        """The new averages of this piece, the rows also in `x.row`, and the sum of the squares of the whole update."""
        raise NotImplementedError


class _Slices(_Matrix):
    """Whole rows and columns, so that only two numbers are added up."""

    def first(self) -> None:
        sums = self.piece.statistics()
        self.local = _blocked.averages(sums, self.x.col, self.table, self.rows)
        self.slot.add(param_sq=sums.param_sq, update_sq=self.local.update_sq)

    def averages(self) -> Averages:
        return self.local._replace(update_sq=self.summed("update_sq"))


class _Rows(_Matrix):
    """Whole rows: the two reads of `_blocked`."""

    def first(self) -> None:
        self.slot.add(**self.piece.statistics()._asdict())

    def factors(self) -> Factors:
        return self.piece.factors(Sums(*map(self.summed, Sums._fields)), self.rows, self.numel)


class _Columns(_Matrix):
    """Whole columns: the same identity with rows and columns exchanged."""

    def first(self) -> None:
        sums = self.piece.plain_sums()
        self.col = moving_average(self.x.col, sums.col_sq / self.rows, self.table)
        self.slot.add(param_sq=sums.param_sq, row_sq=sums.row_sq, weighted_sq=self.piece.weighted_rows(self.col))

    def averages(self) -> Averages:
        row = moving_average(self.x.row, self.summed("row_sq") / self.columns, self.table)
        row_mean = row.mean(-1)
        self.x.row.copy_(row)
        return Averages(row_mean, self.col, (self.summed("weighted_sq") * (row_mean.unsqueeze(-1) / row)).sum())


class _Grid(_Matrix):
    """Neither: the row and column sums are added up first, and then what the update's RMS needs."""

    def first(self) -> None:
        sums = self.piece.plain_sums()
        *lead, rows, columns = self.slot.window
        self.lead, self.of_rows, self.of_columns = tuple(lead), (*lead, rows), (*lead, columns)
        if self.slot.counts:
            self.slot.first["param_sq"].copy_(sums.param_sq)
            self.slot.first["row_sq"][self.of_rows].copy_(sums.row_sq)
            self.slot.first["col_sq"][self.of_columns].copy_(sums.col_sq)

    def second(self) -> None:
        row_sq, col_sq = self.summed("row_sq")[self.of_rows], self.summed("col_sq")[self.of_columns]
        row = moving_average(self.x.row, row_sq / self.columns, self.table)
        self.col = moving_average(self.x.col, col_sq / self.rows, self.table)
        self.x.row.copy_(row)
        if self.slot.counts:
            self.slot.second["weighted_sq"][self.lead].copy_((self.piece.weighted_rows(self.col) / row).sum(-1))
        if self.slot.owns_rows:
            self.slot.second["row"][self.lead].copy_(row.sum(-1))

    def averages(self) -> Averages:
        row_sum, weighted_sq = (self.slot.second[name].to(self.table.dtype) for name in ("row", "weighted_sq"))
        row_mean = row_sum / self.rows
        return Averages(row_mean[self.lead], self.col, (weighted_sq * row_mean).sum())


MATRICES: dict[Split, type[_Matrix]] = {
    Split.SLICES: _Slices,
    Split.ROWS: _Rows,
    Split.COLUMNS: _Columns,
    Split.GRID: _Grid,
}


def _vector_class(job: Job) -> tuple[Any, ...]:
    entry = job.entry
    param, grad, momentum = entry.param, entry.grad, entry.group["beta1"] is not None
    return local(param).shape, param.shape, param.dtype, grad.dtype, param.device, momentum, entry.rounds, job.compiles


class _Vectors(_Pieces):
    """Pieces of vectors of one class, stacked."""

    def __init__(self, jobs: Sequence[Job], slots: Sequence[Slot]) -> None:
        if len(jobs) == 1 and jobs[0].compiles:  # one would be another graph than several: step it twice, side by side
            jobs, slots = [*jobs, *jobs], [*slots, *slots]
        self.entries = entries = [job.entry for job in jobs]
        self.slots, self.table = slots, torch.stack([job.table for job in jobs])
        self.numel = entries[0].param.numel()
        self.members = Members(
            params=[local(x.param) for x in entries],
            grads=[local_grad(x) for x in entries],
            rows=[],
            cols=[],
            exp_avg_sqs=[local(x.state["exp_avg_sq"]) for x in entries],
            exp_avgs=[local(x.state["exp_avg"]) for x in entries] if entries[0].group["beta1"] is not None else [],
            rms=[x.state["RMS"] for x in entries],
            update_rms=[job.update_rms for job in jobs],
            draws=[job.draws for job in jobs if job.draws is not None],
        )
        self.stacked = stacked_of(self.members)
        k, n = self.stacked.params.shape
        self.variant = size_variant(k, n, self.numel)
        self.run = _runner(jobs[0] if n > 0 else jobs[0]._replace(compiles=False))

    def gradients(self) -> list[tuple[Slot, Entry, Tensor]]:
        return list(zip(self.slots, self.entries, self.members.grads, strict=True))

    def first(self) -> None:
        self.new = self.run(stacked_update, self.variant, self.stacked, self.table)
        for slot, param_sq, update_sq in zip(self.slots, self.new.param_sq, self.new.update_sq, strict=True):
            slot.add(param_sq=param_sq[0], update_sq=update_sq[0])

    def finish(self) -> None:
        param_sq, update_sq = (
            torch.stack([slot.first[name] for slot in self.slots]).to(self.table.dtype).unsqueeze(1)
            for name in ("param_sq", "update_sq")
        )
        new = self.new._replace(param_sq=param_sq, update_sq=update_sq)
        self.run(apply_stacked, self.variant, self.stacked, new, self.table, self.numel)
        put_back(self.members, self.stacked)
