"""`fully_shard`: every option and path against the same training unsharded, and what a step sends."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from compilers import count_graphs
from sharded_training import Bag, assert_same, mesh_of, set_gradients, train_beside_unsharded, whole_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from adafactor_compiled import Adafactor
from adafactor_compiled._sharded.exchanges import exchanges_of
from adafactor_compiled._step import stepper

SHAPES = [(64, 48), (7, 5), (3, 17), (1, 9), (6, 1), (130,), (3,), (1,), (5, 4, 3), (2, 3, 4), (5, 2, 3, 3), (90, 40), (0, 4)]

MODES: list[dict[str, Any]] = [{"foreach": False}, {"compile": False}, {}]
MODE_NAMES = ["reference", "multi_tensor", "fused"]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"warmup_init": True, "beta1": 0.9, "weight_decay": 0.1},
    {"lr": 3e-3, "relative_step": False, "scale_parameter": False, "clip_threshold": None, "maximize": True},
    {
        "lr": torch.tensor(1e-2),
        "relative_step": False,
        "eps": (1e-8, 1e-2),
        "decay_rate": -0.5,
        "beta1": 0.0,
        "capturable": True,
    },
]


def fsdp_parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Sharded parameters, and a plain one without dimensions, which `fully_shard` does not take."""
    model = Bag(SHAPES, dtype)
    fully_shard(model)
    params = [*model.parameters()]
    assert all(isinstance(p, DTensor) for p in params)
    return [*params, nn.Parameter(torch.tensor(1.5, dtype=dtype))]


def check_options(mode: dict[str, Any]) -> None:
    for options in OPTIONS:
        train_beside_unsharded(fsdp_parameters(), options, mode)


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_training_equals_unsharded(ranks, mode):
    """On 4 ranks; 2 are those of most tests here."""
    ranks(4).run(check_options, mode)


def check_launched() -> None:
    """All pieces are members of one launch, empty ones too; a steady step plans nothing, whatever gradients there are."""
    params = fsdp_parameters()
    optimizer = Adafactor(params, beta1=0.9)
    whole = [torch.zeros(p.shape) for p in params]
    for step in range(6):
        set_gradients(params, whole, step)
        if step == 0:  # whatever has no gradient yet has its place nevertheless
            for p in params:
                p.grad = torch.ones_like(p)
        with mock.patch.object(stepper, "plan_of", side_effect=AssertionError) if step else nullcontext():
            optimizer.step()
    assert {line.path for line in optimizer.summary().classes} == {"fused"}


def test_launched(ranks):
    ranks(4).run(check_launched)


def check_deferred(mode: dict[str, Any], **options: Any) -> None:
    """Sharded on the meta device, given to an optimizer, then to memory: as an optimizer made last."""
    with torch.device("meta"):
        model = Bag(SHAPES)
    fully_shard(model)
    params = list(model.parameters())
    optimizer = Adafactor(params, **mode, **options)
    before = exchanges_of(optimizer.param_groups, [])
    optimizer.summary()
    model.to_empty(device="cpu")
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    assert exchanges_of(optimizer.param_groups, [before])[0].first.flat.device.type == "cpu"
    whole = [p.detach().clone().requires_grad_() for p in Bag(SHAPES).parameters()]
    with torch.no_grad():
        for p, q in zip(params, whole, strict=True):
            p.copy_(distribute_tensor(q.detach(), p.device_mesh, p.placements, src_data_rank=None))
    reference = Adafactor(whole, foreach=False, **options)
    for step in range(3):
        set_gradients(params, whole, step)
        optimizer.step()
        reference.step()
    assert_same(optimizer, reference, params, whole)


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_deferred_initialisation(ranks, mode):
    ranks(2).run(functools.partial(check_deferred, beta1=0.9, lr=1e-2, relative_step=False), mode)
    ranks(2).run(functools.partial(check_deferred, capturable=True), mode)


def check_dtype(dtype: torch.dtype, steps: int) -> None:
    for options in OPTIONS[:2]:
        train_beside_unsharded(fsdp_parameters(dtype), options, {"compile": False}, steps)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float64, 20), (torch.bfloat16, 1), (torch.float16, 1)], ids=str)
def test_dtypes(ranks, dtype, steps):
    """Half precision: one step, since roundings that fall to either side of a midpoint then take ways of their own."""
    ranks(2).run(check_dtype, dtype, steps)


def check_one_all_reduce() -> None:
    params = fsdp_parameters()
    optimizer = train_beside_unsharded(params, {}, {"compile": False}, steps=1)
    for without in (slice(0, 0), slice(0, 3), slice(None)):
        for p in params:
            p.grad = torch.ones_like(p)
        for p in params[without]:
            p.grad = None
        with CommDebugMode() as sent:
            optimizer.step()
        assert dict(sent.get_comm_counts()) == {torch.ops.c10d.allreduce_: 1}
    (exchange,) = optimizer._stepper._exchanges[0]
    matrices = [p for p in params if p.ndim >= 2]
    sums = sum(p.shape[:-2].numel() * 2 * p.shape[-1] + p.shape[:-2].numel() + 2 if p.ndim == 2 else 3 for p in matrices)
    vectors = 3 * (len(params) - 1 - len(matrices))
    assert exchange.first.flat.numel() == len(params) + sums + vectors
    assert exchange.second.flat.numel() == 0


def test_one_all_reduce_a_step(ranks):
    """Also without gradients, since a rank cannot know that the others have none; the README states the bytes."""
    ranks(2).run(check_one_all_reduce)


def check_compile_is_true(placements: list[Any], shapes: list[tuple[int, ...]]) -> None:
    """Pieces step by the same operations, one after the other: nothing is compiled for them."""
    mesh = mesh_of((2,) * len(placements))
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in Bag(shapes).parameters()]
    before = count_graphs()
    train_beside_unsharded(params, OPTIONS[1], {"compile": True})
    assert count_graphs() == before


def test_compile_is_true(ranks):
    ranks(2).run(check_compile_is_true, [Shard(0)], [(64, 48), (90, 40), (1, 5), (130,), (44,), (3,), (1,)])
    ranks(2).run(check_compile_is_true, [Shard(1)], [(64, 48), (90, 40)])


def check_frozen_and_late() -> None:
    """Frozen parameters take no part, unless they still have a gradient; a group that joins late does."""
    params = fsdp_parameters()
    for p in params[:6]:
        p.requires_grad_(False)
    whole = [nn.Parameter(whole_of(p).detach().clone(), requires_grad=p.requires_grad) for p in params]
    mine, reference = Adafactor(params[:9], compile=False), Adafactor(whole[:9], foreach=False)
    for step in range(6):
        set_gradients(params, whole, step)
        for p in [*params[:3], *whole[:3]]:
            p.grad = None
        if step == 3:
            mine.add_param_group({"params": params[9:], "beta1": 0.5})
            reference.add_param_group({"params": whole[9:], "beta1": 0.5})
        mine.step()
        reference.step()
    assert_same(mine, reference, params, whole)


def test_frozen_and_late(ranks):
    ranks(2).run(check_frozen_and_late)


def check_grad_scaler() -> None:
    """An overflow on one rank alone: every rank skips the step."""
    params = fsdp_parameters()[:4]
    optimizer, scaler = Adafactor(params, compile=False, capturable=True), torch.amp.GradScaler("cpu", init_scale=8.0)
    for overflow in (False, True, False):
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad = torch.full_like(p, 8.0)
        if overflow and dist.get_rank() == 1:
            params[0].grad.to_local()[0] = torch.inf
        before = [p.to_local().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p.to_local(), x) for p, x in zip(params, before, strict=True) if x.numel()) == overflow
    assert scaler.get_scale() == 4.0
    assert int(optimizer.state[params[0]]["step"]) == 2


def test_grad_scaler(ranks):
    ranks(2).run(check_grad_scaler)
