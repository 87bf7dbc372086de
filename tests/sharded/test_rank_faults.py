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
from sharded_training import Bag, whole_of
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
