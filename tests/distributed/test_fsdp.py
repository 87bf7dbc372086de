"""`fully_shard`: every option and path against the same training unsharded, and what a step sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from adafactor_compiled import Adafactor

SHAPES = [(64, 48), (7, 5), (3, 17), (1, 9), (6, 1), (130,), (3,), (1,), (5, 4, 3), (2, 3, 4), (5, 2, 3, 3), (90, 40), (0, 4)]
STEPS = 20

OPTIONS: list[dict[str, Any]] = [
    {},
    {"warmup_init": True, "beta1": 0.9, "weight_decay": 0.1},
    {"lr": 3e-3, "relative_step": False, "scale_parameter": False, "clip_threshold": None, "maximize": True},
    {"lr": 1e-2, "relative_step": False, "eps": (1e-8, 1e-2), "decay_rate": -0.5, "beta1": 0.0, "capturable": True},
]


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
    actual, expected = whole_of(actual).detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, where
    if expected.numel():
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
        assert error <= limit or (torch.equal(actual.isnan(), expected.isnan()) and expected.isnan().all()), (
            where,
            float(error),
        )


def assert_same(mine: Adafactor, reference: Adafactor, params: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        assert_close(p, q, limit, (i, "parameter"))
        state, wanted = mine.state[p], reference.state[q]
        assert set(state) == set(wanted)
        assert int(state["step"]) == int(wanted["step"])
        for key in set(wanted) - {"step"}:
            assert isinstance(state[key], DTensor) == (isinstance(p, DTensor) and key != "RMS"), key
            assert_close(state[key], wanted[key], 10 * limit, (i, key))


def train_both(options: dict[str, Any], mode: dict[str, Any], dtype: torch.dtype, limit: float, steps: int) -> None:
    model = Bag(SHAPES, dtype)
    plain = nn.Parameter(torch.tensor(1.5, dtype=dtype))
    whole = [nn.Parameter(p.detach().clone()) for p in [*model.parameters(), plain]]
    fully_shard(model)
    params = [*model.parameters(), plain]
    assert all(isinstance(p, DTensor) for p in params[:-1])
    mine, reference = Adafactor(params, **options, **mode), Adafactor(whole, **options, foreach=False)
    for step in range(steps):
        set_gradients(params, whole, step)
        mine.step()
        reference.step()
    assert_same(mine, reference, params, whole, limit)


def check_options(mode: dict[str, Any]) -> None:
    for options in OPTIONS:
        train_both(options, mode, torch.float32, 1e-6, STEPS)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", [{"foreach": False}, {"compile": False}], ids=["reference", "multi_tensor"])
def test_training_equals_unsharded(ranks, size, mode):
    ranks(size).run(check_options, mode)
