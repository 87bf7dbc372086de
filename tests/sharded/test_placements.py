"""Placements other than those of `fully_shard` alone, and tensors that are not sharded at all."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from sharded_training import Bag, assert_same, mesh_of, train_beside_unsharded
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from adafactor_compiled import Adafactor

EAGER = {"compile": False}
FUSED: dict[str, Any] = {}
MOMENTUM = {"beta1": 0.9, "weight_decay": 0.1, "lr": 1e-2, "relative_step": False}
R = Replicate()

# Placements on a mesh of 2 x 2 ranks, shapes that they split evenly or not, and how many all_reduces a step takes.
PLACEMENTS: dict[str, tuple[list[Any], list[tuple[int, ...]], int]] = {
    "replicated": ([R, R], [(6, 4), (5,), (), (2, 3, 4)], 0),
    "hybrid": ([R, Shard(0)], [(6, 4), (5,), (1, 3), (3, 4, 5), (7, 9)], 1),
    "rows twice": ([Shard(0), Shard(0)], [(8, 4), (5, 3), (9,), (3, 4)], 1),
    "strided rows": ([_StridedShard(0, split_factor=2), Shard(0)], [(8, 4), (16, 3), (8,)], 1),
    "columns": ([R, Shard(1)], [(6, 4), (5, 7), (3, 1)], 1),
    "columns twice": ([Shard(1), Shard(1)], [(6, 8), (5, 7)], 1),
    "grid": ([Shard(0), Shard(1)], [(6, 4), (5, 7), (1, 3), (33, 17)], 2),
    "grid the other way": ([Shard(1), Shard(0)], [(6, 4), (5, 7)], 2),
    "slices": ([Shard(0), R], [(4, 5, 6), (3, 2, 3, 3)], 1),
    "slices twice": ([Shard(0), Shard(1)], [(4, 3, 5, 6)], 1),
    "rows of slices": ([R, Shard(1)], [(4, 5, 6)], 1),
    "columns of slices": ([R, Shard(2)], [(4, 5, 6)], 1),
    "slices and rows": ([Shard(0), Shard(1)], [(4, 5, 6), (3, 3, 2)], 2),
    "slices and columns": ([Shard(0), Shard(2)], [(4, 5, 6), (3, 3, 2)], 2),
    "rows and columns of slices": ([Shard(1), Shard(2)], [(4, 5, 6), (3, 3, 2)], 2),
}


def placed_parameters(placements: list[Any], shapes: list[tuple[int, ...]], names: tuple[str, str] | None) -> list[Tensor]:
    mesh = mesh_of((2, 2), names)
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in Bag(shapes).parameters()]


def all_reduces_of_a_step(params: list[Tensor], optimizer: Adafactor) -> int:
    for p in params:
        p.grad = torch.ones_like(p)
    with CommDebugMode() as sent:
        optimizer.step()
    return int(sent.get_total_counts())


def check_placements(name: str) -> None:
    placements, shapes, all_reduces = PLACEMENTS[name]
    for options, mode in product(({}, MOMENTUM), (EAGER, FUSED)):
        params = placed_parameters(placements, shapes, ("a", "b"))
        optimizer = train_beside_unsharded(params, options, mode)
        assert all_reduces_of_a_step(params, optimizer) == all_reduces


@pytest.mark.parametrize("name", PLACEMENTS)
def test_training_equals_unsharded(ranks, name):
    ranks(4).run(check_placements, name)


def check_large_gradients(name: str) -> None:
    """Beside a row and a column without gradient, whose averages are 1e-30: ratios would overflow."""
    placements, shapes, _ = PLACEMENTS[name]
    for size, mode in product((3e4, 1e7), (EAGER, FUSED)):
        params = placed_parameters(placements, shapes, ("a", "b"))
        whole = [nn.Parameter(p.full_tensor().detach().clone()) for p in params]
        optimizer, reference = Adafactor(params, **mode), Adafactor(whole, foreach=False)
        for p, q in zip(params, whole, strict=True):
            q.grad = torch.full_like(q, size)
            if q.ndim > 1:
                q.grad[..., 0, :] = q.grad[..., 0] = 0
            p.grad = distribute_tensor(q.grad.clone(), p.device_mesh, p.placements, src_data_rank=None)
        optimizer.step()
        reference.step()
        assert all(p.full_tensor().isfinite().all() for p in params)
        assert_same(optimizer, reference, params, whole)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_large_gradients(ranks, name):
    ranks(4).run(check_large_gradients, name)


def check_gradients_placed_otherwise() -> None:
    """As a backward pass may leave them: still to be summed, on every rank in full, or in pieces of another layout."""
    mesh = mesh_of((2,))
    for mode, options in product((EAGER, FUSED), ({}, MOMENTUM)):
        param = nn.Parameter(distribute_tensor(torch.linspace(-1, 1, 24).view(6, 4), mesh, [Shard(0)]))
        whole = nn.Parameter(param.full_tensor().detach().clone())
        optimizer, reference = Adafactor([param], **options, **mode), Adafactor([whole], foreach=False, **options)
        for step, kind in enumerate([Shard(0), Partial(), Partial(), R, Shard(1), Shard(0), Partial()]):
            whole.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            if isinstance(kind, Partial):
                of_rank = whole.grad.clone() if mesh.get_local_rank() == 0 else torch.zeros(6, 4)
                param.grad = DTensor.from_local(of_rank, mesh, [kind], run_check=False)
            else:
                param.grad = distribute_tensor(whole.grad.clone(), mesh, [kind], src_data_rank=None)
            optimizer.step()
            reference.step()
        assert_same(optimizer, reference, [param], [whole])


def test_gradients_placed_otherwise(ranks):
    ranks(2).run(check_gradients_placed_otherwise)


def check_gradients_of_a_mesh_of_the_same_ranks() -> None:
    mesh, named = mesh_of((2,)), mesh_of((2,), ("dp",))
    for mode in (EAGER, FUSED):
        param = nn.Parameter(distribute_tensor(torch.linspace(-1, 1, 24).view(6, 4), mesh, [Shard(0)]))
        whole = nn.Parameter(param.full_tensor().detach().clone())
        optimizer, reference = Adafactor([param], **mode), Adafactor([whole], foreach=False)
        for step, of_grad in enumerate([mesh, named, named, mesh, named]):
            whole.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            param.grad = distribute_tensor(whole.grad.clone(), of_grad, [Shard(0)], src_data_rank=None)
            optimizer.step()
            reference.step()
        assert_same(optimizer, reference, [param], [whole])


def test_gradients_of_a_mesh_of_the_same_ranks(ranks):
    ranks(2).run(check_gradients_of_a_mesh_of_the_same_ranks)


VARIATIONS: list[dict[str, Any]] = [
    {"factor_dims": "largest", "beta2_cap": 0.5, "beta1": 0.9},
    {"min_dim_size_to_factor": 4, "decay_offset": 1, "weight_decay": 0.1, "weight_decay_scale": "none"},
]


def check_variations() -> None:
    for options, mode in product(VARIATIONS, (EAGER, FUSED)):
        params: list[Tensor] = []
        for placements, shapes, _ in [*PLACEMENTS.values(), ([R, Shard(0)], [(2, 20, 3, 24), (4, 20, 24, 3)], 1)]:
            params += placed_parameters(placements, shapes, ("a", "b"))
        optimizer = train_beside_unsharded(params, {"lr": 1e-2, "relative_step": False, **options}, mode)
        assert any("exp_avg_sq" in optimizer.state[p] for p in params if p.ndim > 1) == ("min_dim_size_to_factor" in options)
        dims = [p.ndim - 1 - i for p in params if p.ndim > 2 for i in sorted(range(p.ndim), key=lambda i: p.shape[i])[-2:]]
        assert max(dims) > 1  # some are factored over others than their last two
    # What keeps its whole second moment is one row, and draws as unsharded where the pieces follow one another in it.
    rounded = {"lr": 1e-2, "relative_step": False, "min_dim_size_to_factor": 9, "stochastic_rounding": True}
    halves = [nn.Parameter(p.detach().bfloat16()) for p in placed_parameters([R, Shard(0)], [(7, 5), (3, 2, 3)], ("a", "b"))]
    for mode in (EAGER, FUSED):
        train_beside_unsharded(halves, rounded, mode)


def test_variations(ranks):
    ranks(4).run(check_variations)


def check_cautious(mode: dict[str, Any]) -> None:
    """The signs that agree are counted over all ranks, in a round of their own."""
    cautious = {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1, "cautious": True}
    for placements, shapes, all_reduces in PLACEMENTS.values():
        params = placed_parameters(placements, shapes, ("a", "b"))
        optimizer = train_beside_unsharded(params, cautious, mode)
        assert all_reduces_of_a_step(params, optimizer) == all_reduces + (all_reduces > 0)
    halves = [nn.Parameter(p.detach().bfloat16()) for p in placed_parameters([R, Shard(0)], [(7, 5), (9,)], ("a", "b"))]
    rounded = {**cautious, "maximize": True, "momentum_dtype": torch.bfloat16, "stochastic_rounding": True}
    train_beside_unsharded(halves, rounded, mode)
    optimizer.param_groups[0]["cautious"] = False  # a schedule may switch it
    optimizer.step()


@pytest.mark.parametrize("mode", [EAGER, FUSED], ids=["eager", "fused"])
def test_cautious(ranks, mode):
    ranks(4).run(check_cautious, mode)


def check_mixture() -> None:
    """All of them in one optimizer, beside plain tensors, in two dtypes; also where the mesh has no names."""
    for names, mode in ((("a", "b"), EAGER), (None, EAGER), (None, FUSED)):
        params: list[Tensor] = [nn.Parameter(torch.full((3, 2), 0.5)), nn.Parameter(torch.tensor(2.0))]
        for placements, shapes, _ in PLACEMENTS.values():
            params += placed_parameters(placements, shapes, names)
        params[5::7] = [nn.Parameter(p.detach().double()) for p in params[5::7]]
        optimizer = train_beside_unsharded(params, MOMENTUM, mode)
        assert all_reduces_of_a_step(params, optimizer) == 2  # the first and the second round of one mesh


def test_mixture(ranks):
    ranks(4).run(check_mixture)


def check_part_of_the_world() -> None:
    """Sums over two of three mesh dimensions take a group that no mesh has."""
    mesh = mesh_of((2, 2, 2))
    shapes = [(6, 4), (5, 7), (9,)]
    placements = [[R, Shard(0), Shard(1)], [R, Shard(0), Shard(0)], [R, Shard(0), R]]
    params = [
        nn.Parameter(distribute_tensor(p.detach(), mesh, x)) for p, x in zip(Bag(shapes).parameters(), placements, strict=True)
    ]
    for mode in (EAGER, FUSED):
        train_beside_unsharded(params, MOMENTUM, mode)


def test_part_of_the_world(ranks):
    ranks(8).run(check_part_of_the_world)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 20), nn.Linear(20, 12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def train_block(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x.flip(0)).square().mean().backward()
        optimizer.step()


def check_parallel_model(shard: bool) -> None:
    """Tensor parallel, alone and under `fully_shard`: forward and backward as the wrappers run them."""
    torch.manual_seed(0)
    whole = Block()
    model = Block()
    model.load_state_dict(whole.state_dict())
    mesh = mesh_of((2, 2), ("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if shard:
        fully_shard(model, mesh=mesh["dp"])
    mine = Adafactor(model.parameters(), **MOMENTUM, compile=False)
    reference = Adafactor(whole.parameters(), **MOMENTUM, foreach=False)
    train_block(model, mine)
    train_block(whole, reference)
    assert_same(mine, reference, list(model.parameters()), list(whole.parameters()))
    kinds = {type(x) for p in model.parameters() if isinstance(p, DTensor) for x in p.placements}
    assert (_StridedShard in kinds) == shard


@pytest.mark.parametrize("shard", [False, True], ids=["tensor parallel", "under fully_shard"])
def test_parallel_model(ranks, shard):
    ranks(4).run(check_parallel_model, shard)


def check_data_parallel() -> None:
    torch.manual_seed(0)
    whole = Block()
    reference = Adafactor(whole.parameters(), **MOMENTUM, foreach=False)
    models = [Block() for _ in range(3)]
    for model in models:
        model.load_state_dict(whole.state_dict())
    ddp, zero, hybrid = models
    hybrid_mesh = mesh_of((2, 2), ("replicate", "shard"))
    fully_shard(hybrid, mesh=hybrid_mesh)
    optimizers = [
        Adafactor(ddp.parameters(), **MOMENTUM, compile=False),
        ZeroRedundancyOptimizer(zero.parameters(), Adafactor, **MOMENTUM, compile=False),
        Adafactor(hybrid.parameters(), **MOMENTUM, compile=False),
    ]
    wrapped = [DistributedDataParallel(ddp), DistributedDataParallel(zero), hybrid]
    train_block(whole, reference)
    for model, optimizer in zip(wrapped, optimizers, strict=True):
        train_block(model, optimizer)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            p = p.full_tensor() if isinstance(p, DTensor) else p
            assert (p - q).abs().max() <= 1e-6 * q.abs().max()


def test_data_parallel(ranks):
    """DDP, ZeroRedundancyOptimizer around this class, and `fully_shard` over replicas of shards."""
    ranks(4).run(check_data_parallel)


def check_refused() -> None:
    mesh = mesh_of((2, 2), ("a", "b"))
    partial = DTensor.from_local(torch.ones(4, 3), mesh, [Shard(0), Partial()])
    flattened = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"))
    optimizer = Adafactor([nn.Parameter(torch.ones(3))], compile=False)
    for params, message in (
        ([partial], r"parameter 1 of shape \(8, 3\) has placements \(Shard\(dim=0\), Partial\(sum\)\)"),
        (flattened.parameters(), r"parameter 1 of shape .* FullyShardedDataParallel has flattened"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": params})
        assert len(optimizer.param_groups) == 1
    whole = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0), R]))
    optimizer = Adafactor([whole], compile=False)
    whole.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0), R])
    whole.grad = whole.grad.redistribute(mesh, [R, R])  # another placement of the same gradient
    optimizer.step()
    assert optimizer.state[whole]["exp_avg_sq_row"].full_tensor().tolist() == [1.0] * 4


def test_refused(ranks):
    ranks(4).run(check_refused)
