"""What the cases are made of: an optimizer to step, its reference, tensors that are not plain, and the table of the cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from parameters import params_of
from paths import PATHS
from tolerances import assert_same_parameter, assert_same_state, largest
from torch import Tensor
from torch.utils._pytree import tree_map

from adafactor_compiled import Adafactor

SHAPES = [(6, 8), (9, 7), (6, 8), (6,), (5,), (6,), (13,), ()]
CASES: dict[str, dict[str, Callable[[str], None]]] = {}  # by the process that they share, and by name


def case(process: str, name: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def register(run: Callable[[str], None]) -> Callable[[str], None]:
        assert not any(name in cases for cases in CASES.values())
        CASES.setdefault(process, {})[name] = run
        return run

    return register


def made(
    path: str, dtype: torch.dtype = torch.float32, before: int = 0, device: str = "cpu", **options: Any
) -> tuple[torch.nn.ParameterList, Adafactor]:
    """A model, and an optimizer that has stepped it `before` times."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ParameterList([torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES])
    optimizer = Adafactor(model.parameters(), weight_decay=0.1, **PATHS[path], **options)
    for t in range(before):
        give_gradients(optimizer, t)
        optimizer.step()
    return model, optimizer


def give_gradients(optimizer: Adafactor, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params_of(optimizer):
        grad = torch.randn(p.shape, generator=generator).to("meta" if p.is_meta else "cpu", p.dtype)
        p.grad = Wrapped(grad) if isinstance(p, Wrapped) else grad


class Wrapped(Tensor):
    """A tensor that has its numbers in another one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        layout = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **layout)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"Wrapped({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapped) else x

        result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if function._schema.is_mutable:
            return args[0] if isinstance(result, Tensor) else result
        return tree_map(lambda x: Wrapped(x) if isinstance(x, Tensor) else x, result)


def plain(x: Tensor) -> Tensor:
    """A contiguous copy, without whatever makes a tensor special."""
    x = x.inner if isinstance(x, Wrapped) else x
    return x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def reference_of(optimizer: Adafactor) -> Adafactor:
    """The reference path, before the same step, with plain tensors everywhere."""
    groups = []
    for group in optimizer.param_groups:
        params = [plain(p).requires_grad_() for p in group["params"]]
        groups.append({**group, "params": params, "foreach": False, "compile": None, "fused": None})
    reference = Adafactor(groups)
    for ours, theirs in zip(params_of(optimizer), params_of(reference), strict=True):
        theirs.grad = None if ours.grad is None else plain(ours.grad)
        state = reference.state[theirs]
        if any(isinstance(x, Tensor) and x.is_meta for x in optimizer.state[ours].values()):
            continue  # it begins anew
        for key, value in optimizer.state[ours].items():
            if key == "step":
                state[key] = int(value)
            elif key in state:
                state[key] = plain(torch.as_tensor(value)).to(state[key].dtype)
            else:
                state[key] = value
    return reference


def momenta_of(optimizer: Adafactor) -> list[float]:
    """The largest element of each momentum."""
    return [largest(optimizer.state[p].get("exp_avg", torch.zeros(()))) for p in params_of(optimizer)]


def assert_same(optimizer: Adafactor, reference: Adafactor, path: str, momenta: list[float] | None = None) -> None:
    """After a step; `momenta` are those of the reference before it."""
    for i, (ours, theirs) in enumerate(zip(params_of(optimizer), params_of(reference), strict=True)):
        state = {key: plain(x) if isinstance(x, Tensor) else x for key, x in optimizer.state[ours].items()}
        assert_same_parameter(plain(ours), theirs, path, where=f"parameter {i}")
        momentum = momenta[i] if momenta else 0.0
        assert_same_state(state, reference.state[theirs], theirs.dtype, f"parameter {i}", momentum)


def check_steps(optimizer: Adafactor, path: str, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Two steps that give what the reference gives; `around` is entered for the first of them."""
    for t, context in enumerate([around, nullcontext]):
        give_gradients(optimizer, 50 + t)
        reference = reference_of(optimizer)
        momenta = momenta_of(reference)
        reference.step()
        with context():
            optimizer.step()
        assert_same(optimizer, reference, path, momenta)


def check_error(optimizer: Adafactor, message: str, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """A step that raises, and changes nothing."""
    with unchanged(optimizer), around(), pytest.raises(RuntimeError, match=message):
        optimizer.step()


@contextmanager
def unchanged(optimizer: Adafactor) -> Iterator[None]:
    params = params_of(optimizer)
    values = [plain(p) for p in params]
    states = [dict(optimizer.state[p]) for p in params]
    copies = [{key: plain(x) if isinstance(x, Tensor) else x for key, x in state.items()} for state in states]
    yield
    for p, value, state, copied in zip(params, values, states, copies, strict=True):
        assert torch.equal(plain(p), value)
        now = optimizer.state[p]
        assert list(now) == list(state)
        for key, x in now.items():
            assert x is state[key] or not isinstance(x, Tensor), key
            assert type(x) is type(state[key]), key
            assert torch.equal(plain(x), copied[key]) if isinstance(x, Tensor) else x == copied[key], key
