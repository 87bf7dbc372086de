"""Where a DTensor parameter and its state lie: which of its dimensions are split, and over which mesh dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from adafactor_compiled._state.layout import contiguous_stride


class Split(Enum):
    """What a rank can sum by itself, which decides how a parameter is stepped."""

    VECTOR = "the second moment is kept whole, and is local"
    SLICES = "rows and columns are whole: the factors are local"
    ROWS = "the rows are split: row averages are local, column sums are not"
    COLUMNS = "the columns are split: column averages are local, row sums are not"
    GRID = "any more: neither are local"


def local(x: Tensor) -> Tensor:
    """The piece of this rank, detached; plain tensors are their own."""
    return piece_of(x).detach() if isinstance(x, DTensor) else x


def piece_of(x: DTensor) -> Tensor:
    """The piece of this rank, when what is sent has come."""
    piece = x.to_local()
    return piece.wait() if isinstance(piece, AsyncCollectiveTensor) else piece


def address_of(param: DTensor) -> int:
    """Where this rank's piece lies; 0 where a mode makes something of tensors that has no memory."""
    piece = param.to_local()
    return piece.data_ptr() if type(piece) is Tensor else 0


def is_split(placement: Placement) -> bool:
    return isinstance(placement, (Shard, _StridedShard))


def split_dims(param: DTensor) -> dict[int, int]:
    """Mesh dimension of more than one rank: the tensor dimension that it splits."""
    mesh, ndim = param.device_mesh, param.ndim
    return {i: x.dim % ndim for i, x in enumerate(param.placements) if is_split(x) and mesh.size(i) > 1}  # type: ignore[attr-defined]


def split_of(param: DTensor, factored: bool = True) -> Split:
    if param.ndim < 2 or not factored:
        return Split.VECTOR
    dims = {dim - param.ndim for dim in split_dims(param).values()}
    if not dims & {-1, -2}:
        return Split.SLICES
    if len(dims) > 1:
        return Split.GRID
    return Split.ROWS if -2 in dims else Split.COLUMNS


def check_placements(param: Tensor, index: int) -> None:
    """Raise ValueError for a distributed parameter that cannot be stepped."""
    who = f"parameter {index} of shape {tuple(param.shape)}"
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"Adafactor needs the rows and columns of a parameter but {who} is a piece of parameters that "
            "FullyShardedDataParallel has flattened; shard the model with torch.distributed.fsdp.fully_shard"
        )
    if not isinstance(param, DTensor):
        return
    where = f"{who} has placements {param.placements} on {param.device_mesh}"
    if not all(is_split(x) or isinstance(x, Replicate) for x in param.placements):
        raise ValueError(f"Adafactor steps DTensor parameters that are sharded or replicated but {where}")
    if param.device_mesh.get_coordinate() is None:
        raise ValueError(f"Adafactor steps DTensor parameters on the ranks of their mesh but {where}, which lacks this rank")
    if split_of(param) is Split.GRID and None in [_window(param, dim) for dim in range(param.ndim)]:
        raise ValueError(f"Adafactor steps pieces that are contiguous in each dimension but {where}")


def check_gradient_placements(param: Tensor, grad: Tensor, index: int) -> None:
    """Raise RuntimeError where only one of a parameter and its gradient is a DTensor."""
    if isinstance(param, DTensor) is not isinstance(grad, DTensor):
        kinds = [type(x.data).__name__ for x in (param, grad)]
        raise RuntimeError(
            f"the gradient of parameter {index} (shape {tuple(param.shape)}) should be a {kinds[0]} as the parameter is but "
            f"is a {kinds[1]}; nothing was stepped"
        )


def window_of(param: DTensor) -> list[slice]:
    """Which part of each dimension this rank holds; shorter than `param.ndim` where one is not contiguous."""
    windows = [_window(param, dim) for dim in range(param.ndim)]
    return [x for x in windows if x is not None]


class Origin(NamedTuple):
    """Where the piece of this rank begins in a parameter."""

    slice: int = 0
    row: int = 0
    column: int = 0


def origin_of(param: DTensor, factored: bool = True) -> Origin | None:
    """None, on all ranks alike, where the elements of a piece do not follow one another in slices, rows or columns."""
    lead, split = param.shape[:-2], split_dims(param).values()
    if not factored and param.ndim > 1:  # one row of all elements
        window = _window(param, 0) if set(split) <= {0} and _same_on_all_ranks(param, 0) else None
        return None if window is None else Origin(0, 0, window.start * param.shape[1:].numel())
    if any(dim in split and lead[:dim].numel() > 1 for dim in range(len(lead))):
        return None
    if not all(_same_on_all_ranks(param, dim) for dim in range(param.ndim)):
        return None
    windows = window_of(param)
    if len(windows) < param.ndim:
        return None
    starts = [window.start for window in windows]
    first = sum(start * lead[dim + 1 :].numel() for dim, start in enumerate(starts[:-2]))
    row, column = (0, 0, *starts)[-2:]
    return Origin(first, row, column)


def _same_on_all_ranks(param: DTensor, dim: int) -> bool:
    """Whether the pieces of all ranks are contiguous in a dimension if one is."""
    ranks = math.prod(param.device_mesh.size(i) for i, split_by in split_dims(param).items() if split_by == dim)
    strided = any(isinstance(x, _StridedShard) and x.dim % param.ndim == dim for x in param.placements)
    return not strided or param.shape[dim] % ranks == 0


def _window(param: DTensor, dim: int) -> slice | None:
    """None where the pieces are not contiguous."""
    ndim, mesh = param.ndim, param.device_mesh
    if dim not in split_dims(param).values():
        return slice(0, param.shape[dim])
    placements = [_moved(x, 0) if is_split(x) and x.dim % ndim == dim else Replicate() for x in param.placements]  # type: ignore[attr-defined]
    indices = (
        distribute_tensor(torch.arange(param.shape[dim], device="cpu"), mesh, placements, src_data_rank=None)
        .to_local()
        .tolist()
    )
    if not indices:
        return slice(0, 0)
    window = slice(indices[0], indices[0] + len(indices))
    return window if indices == list(range(window.start, window.stop)) else None


def _moved(placement: Placement, dim: int) -> Placement:
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)


def placements_of(param: DTensor, dims: Sequence[int]) -> list[Placement]:
    """The placements of a tensor that has these dimensions of a parameter."""
    return [
        _moved(x, dims.index(x.dim % param.ndim)) if is_split(x) and x.dim % param.ndim in dims else Replicate()  # type: ignore[attr-defined]
        for x in param.placements
    ]


def zeros(param: DTensor, dims: Sequence[int], dtype: torch.dtype) -> DTensor:
    """A tensor with these dimensions of a parameter, placed as it is."""
    local = param.to_local()
    return _wrapped(torch.zeros([local.shape[dim] for dim in dims], dtype=dtype, device=local.device), param, dims)


def placed(value: Tensor, param: DTensor, dims: Sequence[int], dtype: torch.dtype) -> DTensor:
    """A copy of `value`, whole on every rank or a DTensor of any placement, placed as these dimensions of a parameter are."""
    mesh, placements = param.device_mesh, placements_of(param, dims)
    if isinstance(value, DTensor):
        value = value.redistribute(mesh, placements) if value.device_mesh == mesh else value.full_tensor()
    if not isinstance(value, DTensor):
        value = distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)
    local = value.to_local()
    local = local.to(param.to_local().device, dtype, copy=True, memory_format=torch.contiguous_format)
    return _wrapped(local, param, dims)


def _wrapped(local: Tensor, param: DTensor, dims: Sequence[int]) -> DTensor:
    mesh, placements, shape = param.device_mesh, placements_of(param, dims), torch.Size(param.shape[dim] for dim in dims)
    # The shape and stride of the whole are given, since uneven shards do not tell them.
    stride = contiguous_stride(tuple(shape))
    if local.device.type in (mesh.device_type, "meta"):
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
    # A parameter that is offloaded, and so is its state; `from_local` would move it to the device of the mesh.
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, tuple(placements), TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
