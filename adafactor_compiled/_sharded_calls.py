"""Every compiled call that a step of sharded parameters needs on this rank, noted ahead of it; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled import _blocked
from adafactor_compiled._blocked import Averages
from adafactor_compiled._compile import Call, size_variant
from adafactor_compiled._depth_first import Matrix
from adafactor_compiled._numbers import Numbers
from adafactor_compiled._passes import Stacked, apply_stacked, stacked_update
from adafactor_compiled._placements import Split, local, split_of
from adafactor_compiled._plan import Entry
from adafactor_compiled._rounding import DRAWS
from adafactor_compiled._shape_class import compute_dtype, group_by_class
from adafactor_compiled._shard_passes import Piece, can_compile
from adafactor_compiled._sharded import pass_for


def calls_of(entries: Iterable[Entry]) -> list[Call]:
    """The calls of DTensor parameters whose groups compile."""
    entries = list(entries)
    classes = group_by_class(map(_class_of, entries))
    calls: list[Call] = []
    for (split, *_), positions in classes.items():
        entry = entries[positions[0]]

        def run(function: Callable[..., Any], variant: tuple[int, ...], *arguments: Any, entry: Entry = entry) -> Any:
            calls.append(Call(pass_for(entry, function, variant), arguments))
            return function(*arguments)

        if split is Split.VECTOR:
            _step_vectors(entry, run)
        elif can_compile(local(entry.param), local(entry.grad)):
            _step_matrix(entry, split, run)
    return calls


def _class_of(entry: Entry) -> tuple[Any, ...]:
    param, momentum = cast(DTensor, entry.param), entry.group["beta1"] is not None
    return split_of(param), param.shape, local(param).shape, param.dtype, entry.grad.dtype, momentum, entry.rounds


def _step_matrix(entry: Entry, split: Split, run: Callable[..., Any]) -> None:
    p, g = _on_meta(local(entry.param)), _on_meta(local(entry.grad))
    dtype, rows = compute_dtype(p.dtype), entry.param.shape[-2]
    lead, numbers = p.shape[:-2], _empty(len(Numbers._fields), dtype=dtype)
    row, col, one = _empty(*p.shape[:-1], dtype=dtype), _empty(*lead, p.shape[-1], dtype=dtype), _empty(1, dtype=dtype)
    exp_avg = torch.empty_like(p, dtype=dtype) if entry.group["beta1"] is not None else None
    draws = _empty(DRAWS, dtype=torch.int32) if entry.rounds else None
    piece = Piece(Matrix(p, g, row, col, exp_avg, one, one, draws), numbers, run, compiled=True)
    new = Averages(_empty(*lead, dtype=dtype), col, one[0])
    if split is Split.ROWS:
        piece.apply(piece.factors(piece.statistics(), rows, entry.param.numel()))
        return
    if split is Split.SLICES:
        piece.statistics()
    else:
        piece.plain_sums()
        piece.weighted_rows(col)
    piece.apply(_blocked.finish(new, one[0], col, one, one, numbers, entry.param.numel()))


def _step_vectors(entry: Entry, run: Callable[..., Any]) -> None:
    """Two vectors: any number from two on takes the same graph."""
    p, g, numel = local(entry.param), local(entry.grad), entry.param.numel()
    if p.numel() == 0:
        return
    dtype, shape = compute_dtype(p.dtype), (2, p.numel())
    state, one = _empty(*shape, dtype=dtype), _empty(2, 1, dtype=dtype)
    exp_avgs = _empty(*shape, dtype=dtype) if entry.group["beta1"] is not None else None
    draws = _empty(2, DRAWS, dtype=torch.int32) if entry.rounds else None
    stacked = Stacked(_empty(*shape, dtype=p.dtype), _empty(*shape, dtype=g.dtype), state, exp_avgs, one, one, draws)
    numbers, variant = _empty(2, len(Numbers._fields), dtype=dtype), size_variant(*shape, numel)
    new = run(stacked_update, variant, stacked, numbers)
    run(apply_stacked, variant, stacked, new, numbers, numel)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
