"""Parameters of chosen shapes, and gradients for them: the same numbers for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Give each a gradient of its own dtype and layout."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.empty_like(p).copy_(scale * torch.randn(p.shape, generator=generator))


def params_of(of: Optimizer | Sequence[dict[str, Any]]) -> list[Tensor]:
    """Of all groups, in their order."""
    return [p for group in (of.param_groups if isinstance(of, Optimizer) else of) for p in group["params"]]


@torch.no_grad()
def take_over(reference: Optimizer, optimizer: Optimizer) -> None:
    """Have a reference go on from the bits of another optimizer, so that differences of rounding do not pile up."""
    for q, p in zip(params_of(reference), params_of(optimizer), strict=True):
        q.copy_(p)
        for key, value in reference.state[q].items():
            if isinstance(value, Tensor):
                value.copy_(optimizer.state[p][key])
