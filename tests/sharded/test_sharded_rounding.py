"""Stochastic rounding and `nonfinite="skip"` of DTensors: what happens is what happens unsharded, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_training import Bag, assert_replicas_agree, mesh_of, set_gradients, whole_of
from test_placements import PLACEMENTS
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from adafactor_compiled import Adafactor

OPTIONS = {"lr": 1e-2, "relative_step": False, "stochastic_rounding": True}
MODES: list[dict[str, Any]] = [{"compile": False}, {}]
CONTIGUOUS = [name for name in PLACEMENTS if name != "slices twice"]


def placed(shapes: list[tuple[int, ...]], placements: list[Any], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    mesh = mesh_of((2,) * len(placements))
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in Bag(shapes, dtype).parameters()]


def differing(params: list[Tensor], others: list[Tensor]) -> float:
    """The share of elements."""
    pairs = [(whole_of(p).detach(), q.detach()) for p, q in zip(params, others, strict=True)]
    return sum(int((p != q).sum()) for p, q in pairs) / sum(p.numel() for p, _ in pairs)


def check_draws(shapes: list[tuple[int, ...]], placements: list[Any], mode: dict[str, Any]) -> None:
    """Each step draws as the same step unsharded. Elements seldom lie so that the last digit of a sum decides."""
    params = placed(shapes, placements)
    mine = Adafactor(params, **OPTIONS, **mode)
    whole, other = ([nn.Parameter(whole_of(p).detach().clone()) for p in params] for _ in range(2))
    unsharded, seeded = Adafactor(whole, **OPTIONS, foreach=False), Adafactor(other, **OPTIONS, foreach=False, rounding_seed=1)
    for step in range(3):
        for x in (whole, other):
            set_gradients(params, x, step)
        for optimizer in (mine, unsharded, seeded):
            optimizer.step()
        assert differing(params, whole) <= 0.01
        if step:  # the first gradient is None at step 0
            assert differing(params, other) >= 0.1  # another seed draws otherwise
        for p, *twins in zip(params, whole, other, strict=True):
            for twin in twins:
                twin.data.copy_(whole_of(p))
    assert_replicas_agree(mine, params)


@pytest.mark.parametrize("name", CONTIGUOUS)
def test_draws_are_those_of_unsharded_training(ranks, name):
    placements, shapes, _ = PLACEMENTS[name]
    larger = [tuple((4 if name == "strided rows" else 3) * size for size in shape) for shape in shapes]
    for mode in MODES:
        ranks(4).run(check_draws, larger, placements, mode)


def test_compiled_draws(ranks):
    pair = ranks(2)
    pair.run(check_draws, [(64, 48), (90, 40), (130,), (44,)], [Shard(0)], {"compile": True})


def strided(dtype: torch.dtype) -> nn.Module:
    """Eighteen rows under tensor parallel and `fully_shard`: nine for each pair of ranks, which share them as five and four."""
    mesh = mesh_of((2, 2), ("dp", "tp"))
    model = nn.Sequential(nn.Linear(12, 18, bias=False, dtype=dtype))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    assert any(isinstance(x, _StridedShard) for x in next(model.parameters()).placements)
    return model


def check_refused() -> None:
    (param,), (exact,) = (strided(dtype).parameters() for dtype in (torch.bfloat16, torch.float32))
    (slices,) = placed([(4, 6, 5, 5)], [Replicate(), Shard(1)])
    for p in (param, slices):
        with pytest.raises(ValueError, match=r"needs pieces contiguous in slices, rows and columns but parameter 0 of shape"):
            Adafactor([p], **OPTIONS)
    Adafactor([exact], **OPTIONS, compile=False)  # float32 is not rounded
    optimizer = Adafactor([param], compile=False)
    state = Adafactor([nn.Parameter(whole_of(param).detach())], **OPTIONS, compile=False).state_dict()
    with pytest.raises(ValueError, match=r"needs pieces contiguous"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["stochastic_rounding"] is False
    before = param.to_local().clone()
    optimizer.param_groups[0]["stochastic_rounding"] = True
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"needs pieces contiguous"):
        optimizer.step()
    assert torch.equal(param.to_local(), before)
    assert optimizer.state[param]["step"] == 0


def test_pieces_without_consecutive_places_are_refused(ranks):
    ranks(4).run(check_refused)


def check_skip(placements: list[Any], shapes: list[tuple[int, ...]], mode: dict[str, Any]) -> None:
    """A NaN in one rank's piece leaves the whole parameter as it was, on every rank; the twin gets None in its place."""
    params, twins = (placed(shapes, placements, torch.float32) for _ in range(2))
    options = {"beta1": 0.9, "weight_decay": 0.1, **mode}
    optimizer, twin = Adafactor(params, nonfinite="skip", **options), Adafactor(twins, **options)
    for step in range(4):
        whole = [whole_of(p).detach() for p in params]
        set_gradients(params, whole, step)
        set_gradients(twins, whole, step)
        spoiled = {step % len(params)} & {i for i, p in enumerate(params) if p.grad is not None} if step % 2 else set()
        for i in spoiled:
            gradient = params[i].grad
            assert isinstance(gradient, DTensor)
            local = gradient.to_local()
            if local.numel() and all(at == 0 for at in gradient.device_mesh.get_coordinate()):
                local.view(-1)[0] = torch.nan
            if all(x.is_replicate() for x in placements):
                local.view(-1)[0] = torch.nan  # replicas have the same gradient
            twins[i].grad = None
        optimizer.step()
        twin.step()
        stepped = sum(p.grad is not None for p in params)
        assert not stepped or optimizer.telemetry()[0].skipped == pytest.approx(len(spoiled) / stepped)
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.to_local(), q.to_local(), rtol=1e-6, atol=1e-6)
            assert int(optimizer.state[p]["step"]) == int(twin.state[q]["step"])
    assert_replicas_agree(optimizer, params)
    assert sum(int(optimizer.state[p]["step"]) for p in params) > 0


@pytest.mark.parametrize("name", ["replicated", "rows twice", "columns twice", "grid", "slices twice"])
def test_a_parameter_is_skipped_on_all_ranks_or_none(ranks, name):
    placements, shapes, _ = PLACEMENTS[name]
    for mode in MODES:
        ranks(4).run(check_skip, placements, shapes, mode)


def check_sums_are_taken_first() -> None:
    """A gradient still to be summed over replicas, with a NaN on the last rank alone."""
    mesh = mesh_of((2,))
    param = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Replicate()]))
    optimizer = Adafactor([param], nonfinite="skip", compile=False)
    local = torch.ones(6, 4)
    if dist.get_rank() == 1:
        local[0, 0] = torch.nan
    param.grad = DTensor.from_local(local, mesh, [Partial()], run_check=False)
    optimizer.step()
    assert torch.equal(param.to_local(), torch.ones(6, 4))
    assert int(optimizer.state[param]["step"]) == 0


def test_sums_are_taken_first(ranks):
    ranks(2).run(check_sums_are_taken_first)
