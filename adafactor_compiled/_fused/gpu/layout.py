"""Which kernels step a member on a GPU, and the tables that say what each block of threads does: all that shapes decide."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._fused.pieces import COLUMNS, ROWS, Piece
from adafactor_compiled._state.layout import cached, contiguous_stride, is_dense, same_layout
from adafactor_compiled._state.moments import Momentum
from adafactor_compiled._state.shape_class import ShapeClass

MATRICES, VECTORS, SHORT, SLICES = "matrices", "vectors", "short vectors", "slices"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK_BYTES = 262_144  # of a gradient, in a block of rows: those that are being stepped stay in the second-level cache
LEAST_ROWS, MOST_BLOCKS = 16, 512  # of a block, of a matrix: the sums of a block take two rows
FEW_ROWS, WIDE = 2048, 4  # a matrix of fewer rows, `LEAST_ROWS` of which are more than 4 blocks, steps as its transpose
WIDEST = 1024  # columns of a tile
TILE = {2: 4096, 4: 4096, 8: 2048}  # elements, by the bytes of one of a gradient
CHUNK = 1024  # elements of a long vector
SHORTEST = (1024, 4096)  # elements of a vector that one block of threads steps, at most
MOST_OF_SLICE = 256  # elements
TILE_OF_SLICES = 2048  # elements
TILE_OF_COLUMNS = (32, 64)  # blocks and columns


class Kernels(NamedTuple):
    """Which kernels step a member, and all that they are compiled for."""

    kind: str
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    momentum: Momentum | None
    rounding: bool
    split: int | None  # of pieces, see pieces.py
    sixteens: bool  # whether sizes are multiples of 16, so that 128 bits are read at a time
    # Of matrices: rows and columns of a tile, whether it has all columns, whether they are transposed, whether they step as
    # their transposes. Of vectors: elements of a tile, whether there are two copies of the second moment. Of slices: rows,
    # columns, whether they are contiguous.
    shape: tuple[int, ...]

    @property
    def swapped(self) -> bool:
        """Whether the columns of a matrix are the kernels' rows: few rows, very wide, would be few blocks of threads."""
        return self.kind == MATRICES and bool(self.shape[-1])


class Tables(NamedTuple):
    """What kernels are told of shapes; the columns of the last two are named in tables.py."""

    jobs: Tensor  # int32, the unit of each block of threads
    column_jobs: Tensor
    units: Tensor  # int64
    members: Tensor  # int64


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@cached
def kernels_of(of: ShapeClass, split: int | None = None) -> Kernels | None:
    """None for what eager operations step: subclasses, strides that no kernel knows, dtypes other than `DTYPES`, nothing.

    Args:
        of: a parameter, or a piece of one.
        split: of a piece, what ranks split; it may be empty, of what is summed it has its share nevertheless.
    """
    momentum_dtype = torch.float32 if of.momentum is None else of.momentum.dtype
    if not is_gpu(of.device):
        return None
    if not of.plain or not {of.dtype, of.grad_dtype, momentum_dtype} <= set(DTYPES):
        return None
    strides = (of.stride, of.grad_stride)
    contiguous = all(same_layout(of.shape, x, contiguous_stride(of.shape)) for x in strides)

    def kernels(kind: str, sixteens: bool, *shape: int) -> Kernels:
        return Kernels(kind, of.device, of.dtype, of.grad_dtype, of.momentum, of.rounding, split, sixteens, shape)

    def matrices(transposed: bool, swapped: bool, rows: int, columns: int) -> Kernels:
        if transposed:
            return kernels(MATRICES, rows % 16 == 0, 64, 64, False, True, swapped)
        width = min(max(16, power(columns)), WIDEST)
        tile_rows = TILE[of.grad_dtype.itemsize] // width
        return kernels(MATRICES, columns % 16 == 0, tile_rows, width, columns <= width, False, swapped)

    slices, rows, columns = _as_matrix(of) if of.factored else (1, 1, of.numel)
    if split in (ROWS, COLUMNS):  # rows that are whole; else these are columns that are
        swapped = split == COLUMNS
        rows, columns = (columns, rows) if swapped else (rows, columns)
        return matrices(swapped, swapped, rows, columns) if contiguous and slices and columns else None
    if not of.numel:
        return None if split is None else kernels(VECTORS, True, CHUNK, False)
    if not of.factored or (slices > 1 and rows == columns == 1):
        if not contiguous:
            return None
        tile = next((most for most in SHORTEST if of.numel <= most), CHUNK)
        kind = SHORT if of.numel <= SHORTEST[-1] else VECTORS
        if split is not None:
            tile, kind = CHUNK, VECTORS
        return kernels(kind, of.numel % 16 == 0, tile, of.factored)
    if slices > 1 and power(rows) * power(columns) <= MOST_OF_SLICE:
        if contiguous or (len(of.shape) <= 4 and is_dense(of.shape, of.stride)):
            return kernels(SLICES, False, rows, columns, contiguous)
        return None
    transposed = (*contiguous_stride((*of.shape[:-2], columns, rows))[:-2], 1, rows)
    if not contiguous and not all(same_layout(of.shape, x, transposed) for x in strides):
        return None
    swapped = rows < FEW_ROWS and LEAST_ROWS * columns * of.grad_dtype.itemsize > WIDE * BLOCK_BYTES
    if swapped:
        rows, columns = columns, rows
    return matrices(contiguous == swapped, swapped, rows, columns)


def power(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Layout:
    """Lays out the tables of members that are stepped together."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.units: list[list[int]] = []
        self.members: list[list[int]] = []
        self.blocks: list[int] = []  # of each unit
        self.chunks: list[int] = []
        self.jobs = self.column_jobs = self.partial = self.sums = self.kept = 0

    def partial_of(self, of: ShapeClass) -> int:
        if self.kernels.kind != MATRICES:
            return 0
        slices, rows, columns = self._matrix_of(of)
        return 2 * columns * slices * self._blocks(rows, self._rows_of_a_block(rows, columns))

    def _blocks(self, rows: int, per: int) -> int:
        """One of no rows, where a piece has none: there are columns to be finished."""
        return max(-(-rows // per), int(self.kernels.kind == MATRICES))

    def _matrix_of(self, of: ShapeClass) -> tuple[int, int, int]:
        slices, rows, columns = _as_matrix(of)
        return (slices, columns, rows) if self.kernels.swapped else (slices, rows, columns)

    def _rows_of_a_block(self, rows: int, columns: int) -> int:
        tile_rows = self.kernels.shape[0]
        most = max(LEAST_ROWS, BLOCK_BYTES // self.kernels.grad_dtype.itemsize // columns, -(-rows // MOST_BLOCKS))
        return -(-min(most, max(rows, 1)) // tile_rows) * tile_rows

    def _taken(self, count: int) -> int:
        self.sums += count
        return self.sums - count

    def _placed(self, count: int) -> int:
        """In what is kept, a place that 128 bits can be read from."""
        self.kept += -(-count // 16) * 16
        return self.kept - -(-count // 16) * 16

    def add(self, of: ShapeClass, piece: Piece | None = None) -> None:
        """Give places to a member; one that is a piece need not know yet where ranks add up its sums."""
        m, kernels, kind, shape = len(self.members), self.kernels, self.kernels.kind, self.kernels.shape
        slices, rows, columns = (1, of.numel, 1) if kind in (VECTORS, SHORT) else self._matrix_of(of)
        if kind == MATRICES:
            per, units = self._rows_of_a_block(rows, columns), slices
            chunks = -(-columns // TILE_OF_COLUMNS[1])
        elif kind == SLICES:
            per, units, rows = slices_of_a_block(*shape[:2]), 1, slices
            chunks = -(-rows // per)
        else:
            per, units = shape[0], 1
            chunks = -(-rows // per)
        blocks = self._blocks(rows, per)
        param_sq, update_sq, result = self._taken(units * blocks), self._taken(units * chunks), self._taken(3)
        numel, exchanged = (of.numel, (0, 0)) if piece is None else (piece.numel, (piece.sums, piece.agree))
        self.members.append([numel, result, param_sq, units * blocks, update_sq, units * chunks, *exchanged])
        for s in range(units):
            places = s * rows * columns, s * rows, s * columns, rows, columns, per, blocks
            sums = param_sq + s * blocks, update_sq + s * chunks, s
            if kind == MATRICES:
                row_sums = max(blocks, chunks) if kernels.split == COLUMNS else blocks
                of_sums = self.jobs, self.column_jobs, self.partial, self._taken(row_sums), self._taken(1)
                unit = [m, *places, *of_sums, *sums, *_exchanged(piece, slices, s, rows, columns)]
            else:
                inner, of_p, of_g = _strides_of_slices(of) if kind == SLICES else (1, [0] * 4, [0] * 4)
                unit = [m, inner, *places[1:], self.jobs, *of_p, *sums, *of_g]
            kept = (0, 0) if kernels.split is None else _averages(kernels, rows, columns)
            self.units.append([*unit, *map(self._placed, kept)])
            self.blocks.append(blocks)
            self.chunks.append(chunks if kind == MATRICES else 0)
            self.jobs += blocks
            self.column_jobs += self.chunks[-1]
            self.partial += 2 * columns * blocks if kind == MATRICES else 0

    def tables(self) -> Tables:
        def jobs(counts: list[int]) -> Tensor:
            every = torch.arange(len(counts), dtype=torch.int32, device="cpu")
            return every.repeat_interleave(torch.tensor(counts, device="cpu"))

        def table(rows: list[list[int]]) -> Tensor:
            return torch.tensor(rows, dtype=torch.int64, device="cpu")

        return Tables(jobs(self.blocks), jobs(self.chunks), table(self.units), table(self.members))


def _as_matrix(of: ShapeClass) -> tuple[int, int, int]:
    *lead, rows, columns = of.shape
    return math.prod(lead), rows, columns


def _averages(kernels: Kernels, rows: int, columns: int) -> tuple[int, int]:
    """How many averages of rows and of columns a unit has, but for vectors, which write theirs with their elements."""
    if kernels.kind == SLICES:
        return rows * kernels.shape[0], rows * kernels.shape[1]
    return (rows, columns) if kernels.kind == MATRICES else (0, 0)


def _exchanged(piece: Piece | None, slices: int, s: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Of a slice of a matrix how many rows the whole has, and where ranks add up the sum of the rows, if these are split, and
    those of the columns, plain and weighted; rows and columns are the kernels'. `_sharded/exchange.py` has the same order.
    """
    if piece is None or piece.split not in (ROWS, COLUMNS):
        return rows, 0, 0, 0
    of_columns = 2 + s * columns + (slices if piece.split == ROWS else 0)
    row_sum, col_sq, weighted_sq = (piece.sums + 8 * i for i in (2 + s, of_columns, of_columns + slices * columns))
    return piece.rows if piece.split == ROWS else piece.columns, row_sum, col_sq, weighted_sq


def slices_of_a_block(rows: int, columns: int) -> int:
    return TILE_OF_SLICES // (power(rows) * power(columns))


def _strides_of_slices(of: ShapeClass) -> tuple[int, list[int], list[int]]:
    """How many slices lie one stride apart, and strides of parameter and gradient: of those, of these, of rows and columns."""
    if len(of.shape) == 4:
        return of.shape[1], list(of.stride), list(of.grad_stride)
    return 1, [of.stride[0], 0, *of.stride[-2:]], [of.grad_stride[0], 0, *of.grad_stride[-2:]]
