"""What each kind of launch runs: its kernels, in order, with what they are compiled for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from adafactor_compiled._fused.gpu import layout
from adafactor_compiled._fused.gpu.common import finish, put, share
from adafactor_compiled._fused.gpu.launches import Ready, Room
from adafactor_compiled._fused.gpu.layout import (
    MATRICES,
    SHORT,
    SLICES,
    VECTORS,
    Kernels,
    power,
    slices_of_a_block,
)
from adafactor_compiled._fused.gpu.matrices import add_columns, apply_matrix, column_means, matrix_columns, matrix_statistics
from adafactor_compiled._fused.gpu.slices import apply_slices, slice_statistics
from adafactor_compiled._fused.gpu.vectors import apply_vector, vector_sums
from adafactor_compiled._fused.pieces import COLUMNS, COUNT, ROWS, STATISTICS
from adafactor_compiled._state.layout import HALF, compute_dtype
from adafactor_compiled._state.moments import is_cautious

NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


def _types(of: Kernels) -> dict[str, Any]:
    return {"P": NAMES[of.dtype], "G": NAMES[of.grad_dtype], "A": NAMES[compute_dtype(of.dtype)]}


def _options(of: Kernels) -> dict[str, Any]:
    momentum = None if of.momentum is None else NAMES[of.momentum.dtype]
    drawn_for = of.dtype if of.dtype in HALF or of.momentum is None else of.momentum.dtype  # as in rounding.half_of
    return {"M": momentum, "N": NAMES[drawn_for], "ROUNDING": of.rounding, "CAUTIOUS": is_cautious(of.momentum)}


def _room(ready: Ready) -> Room:
    """Of pieces that which the statistics have left."""
    launch, of = ready.launch, ready.launch.kernels
    if ready.summed:
        assert launch.room is not None
        return launch.room
    kept = None if of.split is None else torch.empty(launch.kept, dtype=compute_dtype(of.dtype), device=of.device)
    room = Room(kept, torch.empty(launch.sums, dtype=torch.float64, device=of.device))
    launch.room = None if of.split is None else room
    return room


def _step_matrices(ready: Ready, numbers: Tensor, draws: Tensor | None) -> None:
    launch, (jobs, column_jobs, units, members), pointers, aligned, _ = ready
    of, (kept, sums), split = launch.kernels, _room(ready), {"SPLIT": launch.kernels.split}
    types, (height, width, one_tile, transposed, _) = _types(of), of.shape
    tile = {"TILE_ROWS": height, "TILE_COLUMNS": width, "ALIGNED": aligned, "TRANSPOSED": bool(transposed), **split}
    tile["num_warps"] = 4 if width >= 256 else 8
    blocks, columns = layout.TILE_OF_COLUMNS
    of_columns = {**split, "TILE_BLOCKS": blocks, "TILE_COLUMNS": columns, "num_warps": 4}
    partial, exchanges = None, of.split in (ROWS, COLUMNS)
    if not ready.summed:
        partial = torch.empty(launch.partial, dtype=compute_dtype(of.dtype), device=of.device)
        arguments = jobs, units, pointers, numbers, partial, kept, sums
        matrix_statistics[jobs.shape](*arguments, **types, **tile, ONE_TILE=bool(one_tile))
        if exchanges:
            add_columns[column_jobs.shape](column_jobs, units, partial, sums, **of_columns)
    if exchanges == ready.summed:  # the sums of columns are those of all rows
        of_units = column_jobs, units, pointers, numbers, partial, kept, sums
        matrix_columns[column_jobs.shape](*of_units, A=types["A"], **of_columns)
        if of.split == COLUMNS:
            column_means[(len(units),)](units, sums, TILE_COLUMNS=columns, num_warps=4)
    options = {**types, **tile, **_options(of)}

    def apply(count: bool) -> None:
        apply_matrix[jobs.shape](jobs, units, members, pointers, numbers, draws, kept, sums, **options, COUNT=count)

    _finish(ready, numbers, sums, apply)


def _finish(ready: Ready, numbers: Tensor, sums: Tensor, apply: Callable[[bool], None]) -> None:
    """What follows the sums. The elements are applied last; before, where a step is cautious, those that agree are counted."""
    of, call, members = ready.launch.kernels, ready.call, ready.tables.members
    grid, split = (len(members),), {"SPLIT": of.split, "num_warps": 4}
    if call == STATISTICS:
        put[grid](members, sums, **split, COUNT=False)
        return
    finish[grid](members, ready.pointers, numbers, sums, A=_types(of)["A"], **split, COUNT=call == COUNT)
    if is_cautious(of.momentum):
        if not ready.summed or call == COUNT:
            apply(True)
        if call == COUNT:
            put[grid](members, sums, **split, COUNT=True)
            return
        share[grid](members, sums, **split)
    apply(False)


def _step_vectors(ready: Ready, numbers: Tensor, draws: Tensor | None) -> None:
    launch, (jobs, _, units, members), pointers, aligned, _ = ready
    of, (_, sums) = launch.kernels, _room(ready)
    types, (elements, twice) = _types(of), of.shape
    tile = {"TILE": elements, "TWICE": bool(twice), "ALIGNED": aligned, "num_warps": max(4, elements // 512)}
    whole = of.kind == SHORT
    if not whole and not ready.summed:
        vector_sums[jobs.shape](jobs, units, pointers, numbers, sums, **types, **tile)
    options = {**types, **tile, **_options(of), "WHOLE": whole}

    def apply(count: bool) -> None:
        apply_vector[jobs.shape](jobs, units, members, pointers, numbers, draws, sums, **options, COUNT=count)

    apply(False) if whole else _finish(ready, numbers, sums, apply)


def _step_slices(ready: Ready, numbers: Tensor, draws: Tensor | None) -> None:
    launch, (jobs, _, units, members), pointers, _, _ = ready
    of, (kept, sums) = launch.kernels, _room(ready)
    types, (rows, columns, contiguous) = _types(of), of.shape
    tile: dict[str, Any] = {
        "TILE": slices_of_a_block(rows, columns),
        "R": rows,
        "C": columns,
        "CONTIGUOUS": bool(contiguous),
        "num_warps": 4,
    }
    tile |= {"TILE_ROWS": power(rows), "TILE_COLUMNS": power(columns), "SPLIT": of.split}
    if not ready.summed:
        slice_statistics[jobs.shape](jobs, units, pointers, numbers, kept, sums, **types, **tile)
    options = {**types, **tile, **_options(of)}

    def apply(count: bool) -> None:
        apply_slices[jobs.shape](jobs, units, members, pointers, numbers, draws, kept, sums, **options, COUNT=count)

    _finish(ready, numbers, sums, apply)


STEPS: dict[str, Callable[[Ready, Tensor, Tensor | None], None]] = {
    MATRICES: _step_matrices,
    VECTORS: _step_vectors,
    SHORT: _step_vectors,
    SLICES: _step_slices,
}
