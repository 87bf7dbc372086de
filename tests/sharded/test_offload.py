"""Parameters on the CPU of a mesh of another device, as `CPUOffloadPolicy` leaves them."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sharded_training import Bag, assert_close, assert_same, set_gradients
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from adafactor_compiled import Adafactor
from adafactor_compiled._sharded import agreement, exchange
from adafactor_compiled._sharded.exchanges import exchanges_of

SHAPES = [(6, 4), (5,), (3, 3, 2), (7, 3), (1, 9)]
MODES: list[dict[str, Any]] = [{}, {"compile": False}, {"foreach": False}]


def offloaded(value: Tensor, mesh: DeviceMesh) -> DTensor:
    """Split in rows, as FSDP builds it: on a device that is not that of the mesh."""
    here = distribute_tensor(value, init_device_mesh("cpu", (mesh.size(),)), [Shard(0)], src_data_rank=None)
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(here.shape, here.stride(), here.dtype))
    return DTensor(here.to_local(), spec, requires_grad=False)


def check_offloaded(mode: dict[str, Any]) -> None:
    """On a mesh of CUDA that has no CUDA: nothing may be moved there. gloo sums what lies on the CPU."""
    mesh = DeviceMesh("cuda", list(range(dist.get_world_size())))
    options = {"lr": 1e-2, "relative_step": False, "beta1": 0.9}
    whole = [nn.Parameter(p.detach().clone()) for p in Bag(SHAPES).parameters()]
    params = [nn.Parameter(offloaded(p.detach(), mesh)) for p in whole]
    optimizer, reference = Adafactor(params, **options, **mode), Adafactor(whole, **options, foreach=False)
    for step in range(5):
        gradients = [nn.Parameter(torch.empty_like(p)) for p in whole]
        set_gradients(gradients, whole, step)
        for p, q in zip(params, whole, strict=True):
            p.grad = None if q.grad is None else offloaded(q.grad, mesh)
        if step == 3:  # resumed
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Adafactor(params, **options, **mode)
            optimizer.load_state_dict(saved)
        optimizer.step()
        reference.step()
    on_cpu = init_device_mesh("cpu", (mesh.size(),))
    for p, q in zip(params, whole, strict=True):
        for key, x in optimizer.state[p].items():
            if isinstance(x, DTensor):
                assert x.device_mesh == mesh
                assert x.to_local().device.type == "cpu"
                whole_x = reference.state[q][key]
                placed = distribute_tensor(whole_x, on_cpu, list(x.placements), src_data_rank=None)
                torch.testing.assert_close(x.to_local(), placed.to_local())
        assert_close(
            p.to_local(), distribute_tensor(q.detach(), on_cpu, [Shard(0)], src_data_rank=None).to_local(), 1e-6, q.shape
        )


@pytest.mark.parametrize("mode", MODES, ids=["fused", "multi_tensor", "reference"])
def test_offloaded(ranks, mode):
    ranks(2).run(check_offloaded, mode)


def check_cpu_offload_policy(mode: dict[str, Any]) -> None:
    model, whole = Bag(SHAPES), Bag(SHAPES)
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    params, expected = list(model.parameters()), list(whole.parameters())
    optimizer, reference = Adafactor(params, **mode), Adafactor(expected, foreach=False)
    for step in range(3):
        set_gradients(params, expected, step)
        optimizer.step()
        reference.step()
    assert_same(optimizer, reference, params, expected)


def test_cpu_offload_policy(ranks):
    ranks(2).run(check_cpu_offload_policy, {})


def check_over_the_device() -> None:
    """Where the backend of a mesh has nothing for the CPU, sums go over its device; here that is the CPU again."""
    assert agreement.can_sum(dist.group.WORLD, torch.device("cpu"))
    with mock.patch.object(agreement.dist, "get_backend_config", return_value="cuda:nccl"):
        assert not agreement.can_sum(dist.group.WORLD, torch.device("cpu"))
        assert agreement.can_sum(dist.group.WORLD, torch.device("cuda", 0))
    with mock.patch.object(exchange, "can_sum", return_value=False):
        check_cpu_offload_policy({})


def test_over_the_device(ranks):
    ranks(2).run(check_over_the_device)


def check_some_offloaded() -> None:
    """Pieces of one mesh on two devices: state beside each piece, and an exchange for each device."""
    mesh = DeviceMesh("cuda", list(range(dist.get_world_size())))
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(torch.Size((6, 4)), (4, 1), torch.float32))
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            local = torch.ones(3, 4, device=device)
            param = nn.Parameter(DTensor(local, spec, requires_grad=False))
            state = Adafactor([param], compile=False).state[param]
            assert {x.to_local().device for x in state.values() if isinstance(x, DTensor)} == {local.device}
            assert state["exp_avg_sq_col"].placements == (Replicate(),)
    params = [nn.Parameter(DTensor(torch.ones(3, 4, device=x), spec, requires_grad=False)) for x in ("cpu", "meta", "cpu")]
    made = exchanges_of([{**Adafactor(params).defaults, "params": params}], [])
    assert [[i for i, _ in exchange.params] for exchange in made] == [[0, 2], [1]]
    assert [exchange.first.flat.device.type for exchange in made] == ["cpu", "meta"]


def test_some_offloaded(ranks):
    ranks(2).run(check_some_offloaded)
