"""Which kernels step a member on a GPU, and the tables that say what each block of threads does: all that shapes decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._fused.forms import MATRICES, SLICES, TWICE, VECTOR, form_of
from adafactor_compiled._fused.pieces import COLUMNS, ROWS, Piece
from adafactor_compiled._state.layout import cached, is_dense
from adafactor_compiled._state.moments import Momentum, is_cautious
from adafactor_compiled._state.shape_class import ShapeClass

VECTORS, SHORT = "vectors", "short vectors"  # beside matrices and slices
BLOCK_BYTES = 262_144  # of a gradient, in a block of rows: those that are being stepped stay in the second-level cache
LEAST_ROWS, MOST_BLOCKS = 16, 512  # of a block, of a matrix: the sums of a block take two rows
FEW_ROWS, WIDE = 2048, 4  # a matrix of fewer rows, `LEAST_ROWS` of which are more than 4 blocks, steps as its transpose
WIDEST = 1024  # columns of a tile
TILE = {2: 4096, 4: 4096, 8: 2048}  # elements, by the bytes of one of a gradient
CHUNK = 1024  # elements of a long vector
SHORTEST = (1024, 4096)  # elements of a vector that one block of threads steps, at most
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


class Cut(NamedTuple):
    """A member in blocks of rows, of some units; a slice of a few elements, and an element of a vector, is a row."""

    of: ShapeClass
    units: int
    rows: int  # of a unit
    columns: int
    per: int  # rows of a block
    blocks: int  # of a unit
    chunks: int  # of a unit, whose part of the sum of squares of the update is known apart
    averages: tuple[int, int]  # of rows and columns of a unit, but for vectors, which write theirs with their elements
    partial: int  # sums of columns, plain and weighted, in all blocks of a unit


class Tables(NamedTuple):
    """What kernels are told of shapes; the columns of the last two are named in tables.py."""

    jobs: Tensor  # int32, the unit of each block of threads
    column_jobs: Tensor
    units: Tensor  # int64
    members: Tensor  # int64


class Room(NamedTuple):
    """What kernels leave for those that follow."""

    partial: Tensor | None  # sums of the columns of blocks
    kept: Tensor | None  # new averages of pieces, which are written when the step is sure
    sums: Tensor  # float64


def power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@cached
def kernels_of(of: ShapeClass, split: int | None = None) -> Kernels | None:
    """None for what has no kernels here, see `form_of`."""
    form = form_of(of, split, power) if is_gpu(of.device) else None
    if form is None:
        return None
    kind, _, rows, columns, contiguous = form

    def kernels(kind: str, sixteens: bool, *shape: int) -> Kernels:
        return Kernels(kind, of.device, of.dtype, of.grad_dtype, of.momentum, of.rounding, split, sixteens, shape)

    if kind in (VECTOR, TWICE):
        short = split is None and columns <= SHORTEST[-1]
        tile = next(most for most in SHORTEST if columns <= most) if short else CHUNK
        return kernels(SHORT if short else VECTORS, columns % 16 == 0, tile, kind == TWICE)
    if kind == SLICES:
        known = contiguous or (len(of.shape) <= 4 and is_dense(of.shape, of.stride))
        return kernels(SLICES, False, rows, columns, contiguous) if known else None
    swapped = rows < FEW_ROWS and LEAST_ROWS * columns * of.grad_dtype.itemsize > WIDE * BLOCK_BYTES
    if split in (ROWS, COLUMNS):  # the kernels' rows are whole
        swapped = split == COLUMNS
    rows, columns = (columns, rows) if swapped else (rows, columns)
    if not columns:
        return None
    if contiguous == swapped:
        return kernels(MATRICES, rows % 16 == 0, 64, 64, False, True, swapped)
    width = min(max(16, power(columns)), WIDEST)
    height = TILE[of.grad_dtype.itemsize] // width
    return kernels(MATRICES, columns % 16 == 0, height, width, columns <= width, False, swapped)


def cut_of(kernels: Kernels, of: ShapeClass) -> Cut:
    """Of a member that these kernels step."""
    kind, shape = kernels.kind, kernels.shape
    if kind == MATRICES:
        units, rows, columns = _as_matrix(of)
        rows, columns = (columns, rows) if kernels.swapped else (rows, columns)
        most = max(LEAST_ROWS, BLOCK_BYTES // kernels.grad_dtype.itemsize // columns, -(-rows // MOST_BLOCKS))
        per = -(-min(most, max(rows, 1)) // shape[0]) * shape[0]
        blocks = max(-(-rows // per), 1)  # also of no rows, where a piece has none: there are columns to be finished
        chunks = -(-columns // TILE_OF_COLUMNS[1])
        return Cut(of, units, rows, columns, per, blocks, chunks, (rows, columns), 2 * columns * blocks)
    if kind == SLICES:
        rows, per, averages = _as_matrix(of)[0], slices_of_a_block(*shape[:2]), shape[:2]
    else:
        rows, per, averages = of.numel, shape[0], (0, 0)
    blocks = -(-rows // per)
    return Cut(of, 1, rows, 1, per, blocks, blocks, (rows * averages[0], rows * averages[1]), 0)


class Places:
    """Places one behind the other."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, count: int, multiple: int = 1) -> int:
        """The first of so many; what is taken is a multiple."""
        self.end += -(-count // multiple) * multiple
        return self.end - -(-count // multiple) * multiple


class Layout:
    """Members that are stepped together, pieces or not: tables, and how many elements of each kind of room they take.

    Pieces need not know yet where ranks add up their sums.
    """

    def __init__(self, kernels: Kernels, cuts: Sequence[Cut], pieces: Sequence[Piece | None]) -> None:
        jobs, column_jobs, partial, kept, sums = (Places() for _ in range(5))
        is_matrix, cautious = kernels.kind == MATRICES, is_cautious(kernels.momentum)
        members, units = [], []
        for m, (cut, piece) in enumerate(zip(cuts, pieces, strict=True)):
            _, count, rows, columns, per, blocks, chunks, averages, of_columns = cut
            all_blocks, all_chunks = count * blocks, count * chunks
            param_sq, update_sq, result = sums.take(all_blocks * (1 + cautious)), sums.take(all_chunks), sums.take(3)
            numel, exchanged = (cut.of.numel, (0, 0)) if piece is None else (piece.numel, (piece.sums, piece.agree))
            members.append([numel, result, param_sq, all_blocks, update_sq, all_chunks, *exchanged])
            for s in range(count):
                unit = [m, s * rows * columns, s * rows, s * columns, rows, columns, per, blocks, jobs.take(blocks)]
                row_sums = max(blocks, chunks) if kernels.split == COLUMNS else blocks
                unit += [column_jobs.take(chunks * is_matrix), partial.take(of_columns)]
                unit += [sums.take(row_sums * is_matrix), sums.take(1 * is_matrix)]
                first = param_sq + s * blocks
                unit += [first, update_sq + s * chunks, s, *_exchanged(piece, count, s, rows, columns)]
                unit += [kept.take(0 if kernels.split is None else n, 16) for n in averages]  # 128 bits can be read there
                unit.append(first + all_blocks)
                if kernels.kind == SLICES:
                    unit[1], unit[9:13], unit[16:20] = _strides_of_slices(cut.of)
                units.append(unit)
        every = torch.arange(len(units), dtype=torch.int32, device="cpu")
        counts = [(cuts[unit[0]].blocks, cuts[unit[0]].chunks * is_matrix) for unit in units]
        of_jobs = (every.repeat_interleave(torch.tensor(x, device="cpu")) for x in zip(*counts, strict=True))
        self.tables = Tables(*of_jobs, *(torch.tensor(x, dtype=torch.int64, device="cpu") for x in (units, members)))
        self.partial, self.kept, self.sums = partial.end, kept.end, sums.end


def _as_matrix(of: ShapeClass) -> tuple[int, int, int]:
    *lead, rows, columns = of.shape
    return math.prod(lead), rows, columns


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
