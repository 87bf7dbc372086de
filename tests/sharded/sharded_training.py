"""Sharded training beside the same training unsharded, with gradients that a test sets."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from adafactor_compiled import Adafactor

STEPS = 12  # of which each parameter has no gradient in two, see `set_gradients`


@functools.cache
def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """One for all checks, under any names of the same process groups: these have threads that poll while the rank lives."""
    if names is None:
        return init_device_mesh("cpu", sizes)
    unnamed = mesh_of(sizes)
    groups = [unnamed.get_group(dim) for dim in range(len(sizes))]
    return DeviceMesh.from_group(groups, "cpu", mesh=unnamed.mesh, mesh_dim_names=names)


class Bag(nn.Module):
    """Parameters of any shape; a gradient is what a test sets."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, shape in enumerate(shapes):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(f"p{i}", nn.Parameter(value.to(dtype)))


def set_gradients(sharded: list[Tensor], whole: list[Tensor], step: int) -> None:
    """The same gradients for both, of a size of their own for each parameter; some None at some steps."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, (p, q) in enumerate(zip(sharded, whole, strict=True)):
        grad = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q.dtype) * 10.0 ** (i % 5 - 2)
        p.grad = q.grad = None
        if (i + step) % 6:
            q.grad = grad
            p.grad = grad.clone()
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)


def whole_of(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_close(actual: Tensor, expected: Tensor, limit: float, where: Any) -> None:
    """Within `limit` of the largest element, and NaN in the same places."""
    actual, expected = whole_of(actual).detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, where
    assert torch.equal(actual.isnan(), expected.isnan()), where
    error, largest = (float(x.nan_to_num().abs().max()) if x.numel() else 0.0 for x in (actual - expected, expected))
    assert error <= limit * largest, f"{where}: {error:.2e} apart, of {largest:.2e}"


def assert_same(mine: Adafactor, reference: Adafactor, params: list[Tensor], expected: list[Tensor]) -> None:
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        where = f"parameter {i} {tuple(q.shape)} {q.dtype} {getattr(p, 'placements', '')}"
        assert_close(p, q, TOLERANCES[q.dtype].param, where)
        state, wanted = mine.state[p], reference.state[q]
        assert set(state) == set(wanted), where
        assert int(state.get("step", 0)) == int(wanted.get("step", 0)), where
        for key in sorted(set(wanted) - {"step"}):  # all ranks in one order: what follows gathers
            assert isinstance(state[key], DTensor) == (isinstance(p, DTensor) and key != "RMS"), f"{where} {key}"
            assert_close(state[key], wanted[key], TOLERANCES[q.dtype].state, f"{where} {key}")


def assert_replicas_agree(optimizer: Adafactor, params: list[Tensor]) -> None:
    """Bit for bit, parameters and state: what is not split over a mesh dimension is the same on all of its ranks."""
    for p in params:
        for x in (p.detach(), *optimizer.state[p].values()):
            if isinstance(x, DTensor):
                for dim, placement in enumerate(x.placements):
                    group, local = x.device_mesh.get_group(dim), x.to_local()
                    replicas = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
                    if placement.is_replicate():
                        dist.all_gather(replicas, local.contiguous(), group=group)
                        for replica in replicas:
                            torch.testing.assert_close(replica, local, rtol=0, atol=0, equal_nan=True)


def train_beside_unsharded(
    params: list[Tensor], options: dict[str, Any], mode: dict[str, Any], steps: int = STEPS
) -> Adafactor:
    """Train `params`, plain tensors and DTensors, and compare parameters and state with unsharded training at the end."""
    whole = [nn.Parameter(whole_of(p).detach().clone()) for p in params]
    mine, reference = Adafactor(params, **options, **mode), Adafactor(whole, **options, foreach=False)
    for step in range(steps):
        set_gradients(params, whole, step)
        mine.step()
        reference.step()
    assert_same(mine, reference, params, whole)
    assert_replicas_agree(mine, params)
    limit = max(TOLERANCES[q.dtype].state for q in whole)
    for ours, theirs in zip(mine.telemetry(), reference.telemetry(), strict=True):
        if steps == 1:  # the first update of a vector has an RMS of 1: whether it is clipped is a matter of the last digit
            ours = ours._replace(clipped=theirs.clipped)
        assert ours == pytest.approx(theirs, rel=limit)
    return mine
