"""What each kind of launch runs: its kernels, in order, with what they are compiled for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from adafactor_compiled._fused.gpu import layout
from adafactor_compiled._fused.gpu.common import finish, share
from adafactor_compiled._fused.gpu.launches import Ready
from adafactor_compiled._fused.gpu.layout import (
    MATRICES,
    SHORT,
    SLICES,
    VECTORS,
    Kernels,
    power,
    slices_of_a_block,
)
from adafactor_compiled._fused.gpu.matrices import apply_matrix, matrix_columns, matrix_statistics
from adafactor_compiled._fused.gpu.slices import apply_slices, slice_statistics
from adafactor_compiled._fused.gpu.vectors import apply_vector, vector_sums
from adafactor_compiled._state.layout import HALF, compute_dtype
from adafactor_compiled._state.moments import is_cautious

NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


def _types(of: Kernels) -> dict[str, Any]:
    return {"P": NAMES[of.dtype], "G": NAMES[of.grad_dtype], "A": NAMES[compute_dtype(of.dtype)]}


def _options(of: Kernels) -> dict[str, Any]:
    momentum = None if of.momentum is None else NAMES[of.momentum.dtype]
    drawn_for = of.dtype if of.dtype in HALF or of.momentum is None else of.momentum.dtype  # as in rounding.half_of
    return {"M": momentum, "N": NAMES[drawn_for], "ROUNDING": of.rounding, "CAUTIOUS": is_cautious(of.momentum)}


def _sums(ready: Ready) -> Tensor:
    return torch.empty(ready.launch.sums, dtype=torch.float64, device=ready.launch.kernels.device)


def _step_matrices(ready: Ready, numbers: Tensor, draws: Tensor | None) -> None:
    launch, (jobs, column_jobs, units, members), pointers, aligned = ready[:4]
    of, sums = launch.kernels, _sums(ready)
    partial = torch.empty(launch.partial, dtype=compute_dtype(of.dtype), device=of.device)
    types, (height, width, one_tile, transposed, _) = _types(of), of.shape
    tile = {"TILE_ROWS": height, "TILE_COLUMNS": width, "ALIGNED": aligned, "TRANSPOSED": bool(transposed)}
    tile["num_warps"] = 4 if width >= 256 else 8
    matrix_statistics[jobs.shape](jobs, units, pointers, numbers, partial, sums, **types, **tile, ONE_TILE=bool(one_tile))
    blocks, columns = layout.TILE_OF_COLUMNS
    of_columns = {"A": types["A"], "TILE_BLOCKS": blocks, "TILE_COLUMNS": columns, "num_warps": 4}
    matrix_columns[column_jobs.shape](column_jobs, units, pointers, numbers, partial, sums, **of_columns)
    finish[(len(members),)](members, pointers, numbers, sums, A=types["A"], num_warps=4)
    options = {**types, **tile, **_options(of)}

    def apply(count: bool) -> None:
        apply_matrix[jobs.shape](jobs, units, members, pointers, numbers, draws, sums, **options, COUNT=count)

    _apply(of, members, sums, apply)


def _apply(of: Kernels, members: Tensor, sums: Tensor, launch: Callable[[bool], None]) -> None:
    """The last launch; before it, where a step is cautious, one that only counts, and one that makes shares of the counts."""
    if is_cautious(of.momentum):
        launch(True)
        share[(len(members),)](members, sums, num_warps=4)
    launch(False)


def _step_vectors(ready: Ready, numbers: Tensor, draws: Tensor | None) -> None:
    launch, (jobs, _, units, members), pointers, aligned = ready[:4]
    of, sums = launch.kernels, _sums(ready)
    types, (elements, twice) = _types(of), of.shape
    tile = {"TILE": elements, "TWICE": bool(twice), "ALIGNED": aligned, "num_warps": max(4, elements // 512)}
    whole = of.kind == SHORT
    if not whole:
        vector_sums[jobs.shape](jobs, units, pointers, numbers, sums, **types, **tile)
        finish[(len(members),)](members, pointers, numbers, sums, A=types["A"], num_warps=4)
    options = {**types, **tile, **_options(of), "WHOLE": whole}

    def apply(count: bool) -> None:
        apply_vector[jobs.shape](jobs, units, members, pointers, numbers, draws, sums, **options, COUNT=count)

    apply(False) if whole else _apply(of, members, sums, apply)


def _step_slices(ready: Ready, numbers: Tensor, draws: Tensor | None) -> None:
    launch, (jobs, _, units, members), pointers = ready[:3]
    of, sums = launch.kernels, _sums(ready)
    types, (rows, columns, contiguous) = _types(of), of.shape
    tile = {"TILE": slices_of_a_block(rows, columns), "R": rows, "C": columns, "CONTIGUOUS": bool(contiguous), "num_warps": 4}
    tile |= {"TILE_ROWS": power(rows), "TILE_COLUMNS": power(columns)}
    slice_statistics[jobs.shape](jobs, units, pointers, numbers, sums, **types, **tile)
    finish[(len(members),)](members, pointers, numbers, sums, A=types["A"], num_warps=4)
    options = {**types, **tile, **_options(of)}

    def apply(count: bool) -> None:
        apply_slices[jobs.shape](jobs, units, members, pointers, numbers, draws, sums, **options, COUNT=count)

    _apply(of, members, sums, apply)


STEPS: dict[str, Callable[[Ready, Tensor, Tensor | None], None]] = {
    MATRICES: _step_matrices,
    VECTORS: _step_vectors,
    SHORT: _step_vectors,
    SLICES: _step_slices,
}
