"""Ranks that disagree, or that die: an error on each rank that says what is wrong, and nothing has changed."""

from __future__ import annotations

import copy
import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from sharded_training import Bag, assert_close, whole_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from adafactor_compiled import Adafactor

SHAPES = [(6, 4), (5,), (2, 3, 4), (7, 3)]


def sharded_parameters(shapes: list[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    model = Bag(shapes)
    fully_shard(model)
    return list(model.parameters())


def snapshot(optimizer: Adafactor, params: list[torch.Tensor]) -> list[Any]:
    states = [{key: whole_of(x) for key, x in optimizer.state[p].items()} for p in params]
    return copy.deepcopy([*(whole_of(p).detach() for p in params), *states])


def check_missing_gradient(first_step: bool) -> None:
    """A gradient that is None on one rank alone, at the first step or later, beside a plain parameter."""
    params = [*sharded_parameters(), nn.Parameter(torch.ones(3))]
    optimizer = Adafactor(params, beta1=0.9, compile=False)
    for p in params:
        p.grad = torch.ones_like(p)
    if not first_step:
        optimizer.step()
    before = snapshot(optimizer, params)
    grad = params[2].grad
    if dist.get_rank() == 1:
        params[2].grad = None
    n = dist.get_world_size()
    with pytest.raises(RuntimeError, match=rf"parameter 2 \(shape \(2, 3, 4\).* there on: {n - 1}; nothing was stepped"):
        optimizer.step()
    torch.testing.assert_close(snapshot(optimizer, params), before, rtol=0, atol=0)
    params[2].grad = grad
    optimizer.step()  # all is well again
    assert all(int(optimizer.state[p]["step"]) == 2 - first_step for p in params)


@pytest.mark.parametrize("first_step", [True, False], ids=["first step", "later"])
def test_missing_gradient(ranks, first_step):
    ranks(4).run(check_missing_gradient, first_step)


def check_told_late() -> None:
    """As on a device that a step must not wait for: the error comes with the next step."""
    params = sharded_parameters()
    optimizer = Adafactor(params, compile=False)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (exchange,) = optimizer._stepper._exchanges[0]
    exchange.tells_late = True
    with mock.patch("torch.Event") as event:
        optimizer.step()
        optimizer.step()
        grad = params[1].grad
        if dist.get_rank() == 0:
            params[1].grad = None
        optimizer.step()
        params[1].grad = grad
        with pytest.raises(
            RuntimeError, match=r"parameter 1 \(shape \(5,\).* there on: 1; an update of the last step is wrong"
        ):
            optimizer.step()
        assert event.return_value.record.call_count == event.return_value.synchronize.call_count == 3
        optimizer.step()  # once told, it is over


def test_told_late(ranks):
    ranks(2).run(check_told_late)


def check_told_before_another_exchange() -> None:
    """What is yet to be told is told although options change, for which another exchange is made, or a former one found."""
    params = sharded_parameters()
    optimizer = Adafactor(params, beta1=0.9)
    for i in range(8):
        optimizer.param_groups[0]["cautious"] = i % 4 > 1
        for p in params:
            p.grad = torch.ones_like(p)
        if i % 2 and dist.get_rank() == 0:
            params[1].grad = None
        if i % 2:
            exchange = optimizer._stepper._exchanges[0][0]
            exchange.tells_late = True
            with mock.patch("torch.Event"):
                optimizer.step()
            exchange.tells_late = False
            optimizer.param_groups[0]["cautious"] = i % 4 < 2
            params[1].grad = torch.ones_like(params[1])
            with pytest.raises(RuntimeError, match="there on: 1; an update of the last step is wrong"):
                optimizer.step()
        optimizer.param_groups[0]["cautious"] = i % 4 > 1
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(optimizer._stepper._exchanges) == 2


def test_told_before_another_exchange(ranks):
    ranks(2).run(check_told_before_another_exchange)


def check_two_meshes(mode: dict[str, Any]) -> None:
    """A disagreement on a mesh of some ranks is heard on the mesh of all."""
    everyone = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    params = [
        nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)], src_data_rank=None))
        for mesh in (square["a"], everyone)
    ]
    optimizer = Adafactor(params, **mode)
    for step in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        if step % 2 == 0:
            optimizer.step()
            continue
        before = snapshot(optimizer, params)
        if dist.get_rank() == 0:
            params[0].grad = None
        there = "parameter 0 .* there on: 1" if dist.get_rank() in (0, 2) else "ranks of another mesh disagree .*"
        with pytest.raises(RuntimeError, match=f"{there}; nothing was stepped"):
            optimizer.step()
        torch.testing.assert_close(snapshot(optimizer, params), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [{}, {"compile": False}], ids=["fused", "multi_tensor"])
def test_two_meshes(ranks, mode):
    ranks(4).run(check_two_meshes, mode)


def check_frozen_with_a_gradient(mode: dict[str, Any]) -> None:
    """On one rank alone: an error on both. On both: it is stepped."""
    params = sharded_parameters()
    params[2].requires_grad_(False)
    optimizer = Adafactor(params, **mode)
    for step in range(4):
        for p in params:
            p.grad = torch.ones_like(p) if p.requires_grad else None
        if step == 1 and dist.get_rank() == 0:
            params[2].grad = torch.ones_like(params[2])
        if step == 2:
            params[2].grad = torch.ones_like(params[2])
        if step == 1:
            before = [p.to_local().clone() for p in params]
            with pytest.raises(RuntimeError, match=r"parameter 2 .* there on: 1; nothing was stepped"):
                optimizer.step()
            assert all(torch.equal(p.to_local(), x) for p, x in zip(params, before, strict=True))
        else:
            optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 3, 1, 3]


@pytest.mark.parametrize("mode", [{}, {"compile": False}], ids=["fused", "multi_tensor"])
def test_frozen_with_a_gradient(ranks, mode):
    ranks(2).run(check_frozen_with_a_gradient, mode)


def check_freezing_often() -> None:
    """Neither a process group nor a thread more, though sums go over two dimensions of three, which have no group."""
    mesh = init_device_mesh("cpu", (1, 2, 2))
    small = init_device_mesh("cpu", (2, 2))
    params = [
        nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Replicate(), Shard(0), Shard(0)], src_data_rank=None)),
        nn.Parameter(distribute_tensor(torch.ones(8, 4), small, [Shard(0), Shard(1)], src_data_rank=None)),
        nn.Parameter(torch.ones(3)),
    ]
    optimizer = Adafactor(params)
    groups, threads = dist.get_pg_count(), 0
    for i in range(12):
        for j, p in enumerate(params):
            p.requires_grad_((i + j) % 3 > 0)
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        if i == 2:
            exchanges, groups, threads = (
                optimizer._stepper._exchanges[0],
                dist.get_pg_count(),
                len(os.listdir("/proc/self/task")),
            )
    assert optimizer._stepper._exchanges == [exchanges]
    assert dist.get_pg_count() == groups
    assert len(os.listdir("/proc/self/task")) == threads


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads as Linux lists them")
def test_freezing_often(ranks):
    ranks(4).run(check_freezing_often)


def check_modes_and_dtypes_that_change(mode: dict[str, Any]) -> None:
    """The first step in inference mode, later ones outside; then in float64, at its precision."""
    model = Bag(SHAPES)
    fully_shard(model)
    params = list(model.parameters())
    optimizer = Adafactor(params, lr=1e-2, relative_step=False, **mode)
    whole = [nn.Parameter(whole_of(p).detach().clone()) for p in params]
    reference = Adafactor(whole, lr=1e-2, relative_step=False, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        if step == 2:
            model.double()
            for p in whole:
                p.data = p.data.double()
        with torch.inference_mode(step == 0):
            for p, q in zip(params, whole, strict=True):
                q.grad = torch.randn(q.shape, generator=generator, dtype=q.dtype)
                p.grad = distribute_tensor(q.grad.clone(), p.device_mesh, p.placements, src_data_rank=None)
            optimizer.step()
        reference.step()
        for p, q in zip(params, whole, strict=True):
            assert p.dtype == q.dtype
            assert_close(p, q, 1e-6, step)
            if step == 2:  # from here on at the precision of float64, both from the same state
                with torch.no_grad():
                    q.copy_(whole_of(p))
                    for key in reference.state[q].keys() - {"step"}:
                        reference.state[q][key].copy_(whole_of(optimizer.state[p][key]))
            if step == 3:
                assert_close(p, q, 1e-14, step)


@pytest.mark.parametrize("mode", [{}, {"compile": False}], ids=["fused", "multi_tensor"])
def test_modes_and_dtypes_that_change(ranks, mode):
    ranks(2).run(check_modes_and_dtypes_that_change, mode)


def check_not_captured() -> None:
    params = sharded_parameters()
    optimizer = Adafactor(params, capturable=True)
    for p in params:
        p.grad = torch.ones_like(p)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match=r"captured in a CUDA graph .* parameter group 0 has some; nothing was stepped"),
    ):
        optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 0 for p in params)


def test_not_captured(ranks):
    """Of a step that several ranks take, a CUDA graph would keep what the host has looked at once."""
    ranks(2).run(check_not_captured)


def check_other_lists() -> None:
    """Another order, another length, another placement."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    params = sharded_parameters()
    square = [nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), x])) for x in (Shard(1), Replicate())]
    last = dist.get_rank() == 3
    for mine, message in (
        ([*params[:2], params[3], params[2]] if last else params, "parameter 2 of shape .* on rank 0 and parameter 2 of shape"),
        (params[:-1] if last else params, r"parameter 3 of shape \(7, 3\).* on rank 0 and nothing on rank 3"),
        (square[:1] if last else square[1:], r"\(Shard\(dim=0\), Replicate\(\)\) on rank 0 and .* Shard\(dim=1\)\) on rank 3"),
    ):
        optimizer = Adafactor(mine, compile=False)
        for p in mine:
            p.grad = torch.ones_like(p)
        before = [p.to_local().detach().clone() for p in mine]
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert all(optimizer.state[p]["step"] == 0 for p in mine)
        assert all(torch.equal(p.to_local(), x) for p, x in zip(mine, before, strict=True))


def test_other_lists(ranks):
    ranks(4).run(check_other_lists)


def check_other_options() -> None:
    """On which the layout of what is added up depends: it would be another one on each rank."""
    for options, said in (
        ({"min_dim_size_to_factor": 8}, "not factored"),
        ({"cautious": True}, "cautious"),
        ({"stochastic_rounding": True}, "rounded stochastically"),
    ):
        params = [p.bfloat16() for p in sharded_parameters()]
        of_rank = options if dist.get_rank() == 1 else {}
        optimizer = Adafactor([nn.Parameter(p.detach()) for p in params], beta1=0.9, compile=False, **of_rank)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=rf"same DTensor parameters but .* on rank 0 and .*{said}.* on rank 1"):
            optimizer.step()


def test_other_options(ranks):
    ranks(2).run(check_other_options)


def check_wrong_kind() -> None:
    """A DTensor gradient of a plain parameter, and a plain one of a DTensor."""
    (sharded,) = sharded_parameters([(4, 3)])
    plain = nn.Parameter(torch.ones(4, 3))
    for param, grad, was in ((sharded, torch.ones(4, 3), "DTensor"), (plain, sharded.detach(), "Tensor")):
        optimizer = Adafactor([param], compile=False)
        param.grad = grad
        with pytest.raises(RuntimeError, match=f"the gradient of parameter 0 .* should be a {was} as the parameter is"):
            optimizer.step()
        assert optimizer.state[param]["step"] == 0


def test_wrong_kind(ranks):
    ranks(2).run(check_wrong_kind)


def step_until_the_other_is_gone() -> None:
    params = sharded_parameters()
    optimizer = Adafactor(params, compile=False)
    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        if step == 2 and dist.get_rank() == 1:
            os._exit(1)
        optimizer.step()


def test_dead_rank():
    """The others get torch.distributed's own error within its timeout."""
    pair = Ranks(2, timeout=10.0)
    try:
        (survived, error), (_, dead) = pair.outcomes(step_until_the_other_is_gone, timeout=30.0)
        assert dead == "died, exit code 1"
        assert not survived
        assert "dist.all_reduce" in error
    finally:
        pair.close()
    assert pair.closed
