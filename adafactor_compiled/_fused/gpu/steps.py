"""What each kind of launch runs: its kernels, in order, with what they are compiled for."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from adafactor_compiled._fused.forms import MATRICES, SLICES
from adafactor_compiled._fused.gpu import layout
from adafactor_compiled._fused.gpu.common import finish, put
from adafactor_compiled._fused.gpu.layout import SHORT, Kernels, Room, Tables, power, slices_of_a_block
from adafactor_compiled._fused.gpu.matrices import apply_matrix, column_means, matrix_columns, matrix_statistics
from adafactor_compiled._fused.gpu.slices import step_slices
from adafactor_compiled._fused.gpu.vectors import step_vectors
from adafactor_compiled._fused.pieces import COLUMNS, COUNT, ROWS, STATISTICS, STEP
from adafactor_compiled._state.layout import HALF, compute_dtype
from adafactor_compiled._state.moments import is_cautious

NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


def step(
    of: Kernels, call: int, tables: Tables, pointers: Tensor, aligned: bool, numbers: Tensor, draws: Tensor | None, room: Room
) -> None:
    """Run the kernels of a call of a launch.

    Args:
        of: what they are compiled for.
        call: STATISTICS, COUNT or STEP; of whole parameters the last one is all.
        tables: of shapes.
        pointers: where the members lie.
        aligned: whether 128 bits can be read at a time.
        numbers: rows of `Numbers`.
        draws: for stochastic rounding.
        room: what kernels leave for those that follow.
    """
    jobs, column_jobs, units, members = tables
    tensors = units, members, pointers, numbers, draws, *room
    whole, split, cautious = of.split is None, {"SPLIT": of.split}, is_cautious(of.momentum)
    arithmetic = {"A": NAMES[compute_dtype(of.dtype)]}
    types = {"P": NAMES[of.dtype], "G": NAMES[of.grad_dtype], **arithmetic, **_tile(of, aligned)}
    of_members, grid = {**split, "num_warps": 4}, (len(members),)

    def run(kernel: Any, of_blocks: Tensor, **constants: Any) -> None:
        kernel[of_blocks.shape](of_blocks, *tensors, **constants)

    begins, short = whole or call == STATISTICS, of.kind == SHORT
    if of.kind == MATRICES:
        stepped, (blocks, columns) = apply_matrix, layout.TILE_OF_COLUMNS
        of_columns = {"TILE_BLOCKS": blocks, "TILE_COLUMNS": columns, **of_members}
        if begins:
            run(matrix_statistics, jobs, **types, ONE_TILE=bool(of.shape[2]))
        exchanges = of.split in (ROWS, COLUMNS)
        if begins or exchanges:  # the sums of columns are those of all rows
            run(matrix_columns, column_jobs, **arithmetic, **of_columns, PUTS=begins and exchanges)
        if of.split == COLUMNS and not begins:
            column_means[(len(units),)](units, room.sums, TILE_COLUMNS=columns, num_warps=4)
    else:
        stepped = step_slices if of.kind == SLICES else step_vectors
        if begins and not short:
            run(stepped, jobs, **types, M=None, N=None, CAUTIOUS=False, CALL=STATISTICS)
    # The elements are applied last; before, where a step is cautious, those that agree are counted.
    for now in () if call == STATISTICS else (COUNT, STEP) if whole and cautious and not short else (call,):
        if not short:
            finish[grid](members, pointers, numbers, room.sums, **arithmetic, **of_members, CAUTIOUS=cautious, CALL=now)
        drawn_for = of.dtype if of.dtype in HALF or of.momentum is None else of.momentum.dtype  # as in rounding.half_of
        noise = NAMES[drawn_for] if of.rounding and now == STEP else None
        momentum = None if of.momentum is None else NAMES[of.momentum.dtype]
        run(stepped, jobs, **types, M=momentum, N=noise, CAUTIOUS=cautious, CALL=now)
    if call != STEP:
        put[grid](members, room.sums, **of_members, CALL=call)


def _tile(of: Kernels, aligned: bool) -> dict[str, Any]:
    """How elements are read."""
    if of.kind == MATRICES:
        height, width, _, transposed, _ = of.shape
        warps = 4 if width >= 256 else 8
        tile: dict[str, Any] = {"TILE_ROWS": height, "TILE_COLUMNS": width, "TRANSPOSED": bool(transposed), "SPLIT": of.split}
        return {**tile, "ALIGNED": aligned, "num_warps": warps}
    if of.kind == SLICES:
        rows, columns, contiguous = of.shape
        tile = {"TILE": slices_of_a_block(rows, columns), "TILE_ROWS": power(rows), "TILE_COLUMNS": power(columns)}
        return {**tile, "R": rows, "C": columns, "CONTIGUOUS": bool(contiguous), "SPLIT": of.split, "num_warps": 4}
    elements, twice = of.shape
    warps = max(4, elements // 512)
    return {"TILE": elements, "TWICE": bool(twice), "WHOLE": of.kind == SHORT, "ALIGNED": aligned, "num_warps": warps}
