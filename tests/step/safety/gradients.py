"""Gradients in layouts of their own, shared ones, what has no memory, and one that is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from parameters import params_of
from paths import PATHS
from torch import Tensor

from adafactor_compiled import Adafactor
from safety.cases import SHAPES, assert_same, case, check_error, check_steps, give_gradients, made, plain, reference_of


def negative(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    grad = torch.randn(shape, generator=generator, dtype=torch.complex64).conj().imag
    assert grad.is_neg()
    return grad


def contiguous_negative(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """With the strides of its parameter, so that nothing but the bit tells it from another gradient."""
    grad = torch._neg_view(torch.randn(shape, generator=generator))
    assert grad.is_neg()
    return grad


def overlapping(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(sum(shape) + 1, generator=generator).as_strided(shape, (1,) * len(shape))


def odd(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """At an address that no vector instruction likes."""
    numel = torch.Size(shape).numel()
    return torch.randn(numel + 1, generator=generator)[1:].view(shape)


GRADIENTS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "negative bit": negative,
    "negative bit alone": contiguous_negative,
    "expanded from a number": lambda shape, generator: torch.randn((), generator=generator).expand(shape),
    "expanded rows": lambda shape, generator: torch.randn(shape[-1:], generator=generator).expand(shape),
    "expanded columns": lambda shape, generator: torch.randn((*shape[:-1], 1)[len(shape) == 0 :], generator=generator).expand(
        shape
    ),
    "overlapping": overlapping,
    "odd addresses": odd,
    "zeros without memory": lambda shape, _: torch._efficientzerotensor(shape),
}


def step_gradients(path: str, of: Callable[[tuple[int, ...], torch.Generator], Tensor], before: int) -> None:
    _, optimizer = made(path, before=before)
    generator = torch.Generator().manual_seed(1)
    for p in params_of(optimizer):
        p.grad = of(tuple(p.shape), generator)
    reference = reference_of(optimizer)
    kept = [(p.grad, plain(p.grad)) for p in params_of(optimizer) if p.grad is not None]
    reference.step()
    optimizer.step()
    assert_same(optimizer, reference, path)
    assert all(torch.equal(plain(grad), copied) for grad, copied in kept)
    check_steps(optimizer, path)


for name, of_shape in GRADIENTS.items():
    for before in (0, 2):
        case("gradients", f"{name}, {before} steps before")(functools.partial(step_gradients, of=of_shape, before=before))


@case("gradients", "gradients whose memory was given back")
def free_gradients(path: str) -> None:
    _, optimizer = made(path, before=1)
    freed = params_of(optimizer)[2].grad
    assert freed is not None
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 2 .* has no memory; nothing was stepped"):
        optimizer.step()
    check_steps(optimizer, path)


@case("gradients", "a parameter whose memory was given back")
def free_parameter(path: str) -> None:
    _, optimizer = made(path, before=1)
    give_gradients(optimizer, 50)
    storage = params_of(optimizer)[2].untyped_storage()
    size = storage.size()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=r"parameter 2 .* has no memory; nothing was stepped"):
        optimizer.step()
    storage.resize_(size)
    params_of(optimizer)[2].data.zero_()
    check_steps(optimizer, path)


@case("gradients", "a parameter with the negative bit")
def negative_parameter(path: str) -> None:
    params = [torch.nn.Parameter(torch._neg_view(torch.randn(shape))) for shape in SHAPES]
    assert all(p.is_neg() for p in params)
    check_steps(Adafactor(params, weight_decay=0.1, **PATHS[path]), path)


@case("gradients", "one gradient of several parameters")
def share_gradient(path: str) -> None:
    model, optimizer = made(path, before=1)
    model[0].grad = model[2].grad = torch.arange(48.0).view(6, 8)
    model[3].grad = model[5].grad = torch.arange(6.0)
    reference = reference_of(optimizer)
    reference.step()
    optimizer.step()
    assert_same(optimizer, reference, path)
    check_steps(optimizer, path)


@case("gradients", "other dtypes, shapes and layouts")
def refuse_gradients(path: str) -> None:
    model, optimizer = made(path, before=1)
    refused = torch.ones(6, 8).to_sparse()
    give_gradients(optimizer, 50)
    model[2].grad = refused
    check_error(optimizer, "sparse")
