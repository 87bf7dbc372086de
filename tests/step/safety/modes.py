"""Default devices, modes around a step, and parameters that are fake, without memory or wrapped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from compilers import compiled_by, uncompiled
from paths import PATHS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from adafactor_compiled import Adafactor
from adafactor_compiled._compile import graphs
from safety.cases import SHAPES, Wrapped, case, check_steps, give_gradients, made, unchanged


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def step_in(path: str, around: Callable[[], AbstractContextManager[Any]], before: int, **options: Any) -> None:
    _, optimizer = made(path, before=before, **options)
    check_steps(optimizer, path, around)


for device in ("meta", "cuda"):
    for before in (0, 2):
        of_default = functools.partial(step_in, around=functools.partial(default_device, device), before=before)
        case("modes", f"default device {device}, {before} steps before")(of_default)
        of_context = functools.partial(step_in, around=functools.partial(torch.device, device), before=before)
        case("modes", f"with torch.device {device}, {before} steps before")(of_context)


FACTORIES = {
    *(
        torch.empty,
        torch.empty_strided,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.tensor,
        torch.as_tensor,
        torch.scalar_tensor,
    ),
    *(torch.arange, torch.linspace, torch.logspace, torch.eye, torch.rand, torch.randn, torch.randint, torch.randperm),
    *(torch.sparse_coo_tensor, torch.tril_indices, torch.triu_indices, torch.hann_window, torch.asarray, torch.from_file),
}


class DevicesNamed(TorchFunctionMode):
    """Sees that what makes a tensor is told where: it would be made on the default device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in FACTORIES or (kwargs or {}).get("device") is not None, f"{function.__name__} without a device"
        return function(*args, **(kwargs or {}))


NAMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"beta1": 0.9},
    "a tensor as lr": {"lr": torch.tensor(1e-2), "relative_step": False},
    "capturable": {"capturable": True},
    "nonfinite": {"nonfinite": "skip"},
    "rounding": {"stochastic_rounding": True},
    "rounding, capturable": {"stochastic_rounding": True, "capturable": True},
}


for name in ("plain", "momentum", "capturable", "nonfinite"):
    case("modes", f"in an inference mode and out of it again, {name}")(
        functools.partial(step_in, around=torch.inference_mode, before=1, **NAMED[name])
    )


@case("modes", "the first step in an inference mode")
def first_in_inference_mode(path: str) -> None:
    step_in(path, torch.inference_mode, before=0)


def name_devices(path: str, options: dict[str, Any]) -> None:
    """The calls uncompiled: inside them devices are named as well."""
    with compiled_by(uncompiled), pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "environment", lambda: 0)
        _, optimizer = made(path, torch.bfloat16, **options)
        for t in range(2):
            give_gradients(optimizer, t)
            with DevicesNamed():
                optimizer.step()


for name, of_group in NAMED.items():
    case("modes", f"devices are named, {name}")(functools.partial(name_devices, options=of_group))


def step_in_fake_mode(path: str, before: int) -> None:
    _, optimizer = made(path, before=before)
    give_gradients(optimizer, 50)
    with unchanged(optimizer), FakeTensorMode(), pytest.raises(Exception, match=r"[Ff]ake"):
        optimizer.step()
    check_steps(optimizer, path)


for before, which in enumerate(["a first step", "a step"]):
    of_mode = functools.partial(step_in_fake_mode, before=before)
    case("modes", f"fake tensor mode around {which} of real parameters")(of_mode)


@case("modes", "fake parameters")
def step_fake_parameters(path: str) -> None:
    with FakeTensorMode():
        params = [torch.empty(shape).requires_grad_() for shape in SHAPES]
        optimizer = Adafactor(params, **PATHS[path])
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
    assert [state["step"] for state in optimizer.state.values()] == [2] * len(SHAPES)


@case("modes", "meta parameters")
def step_meta_parameters(path: str) -> None:
    params = [torch.empty(shape, device="meta").requires_grad_() for shape in SHAPES]
    optimizer = Adafactor(params, **PATHS[path], beta1=0.9)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    for p, shape in zip(params, SHAPES, strict=True):
        assert p.is_meta
        assert p.shape == shape
        state = optimizer.state[p]
        assert state["step"] == 2
        assert all(state[key].is_meta for key in state if key != "step")
        assert state["exp_avg"].shape == shape


@case("modes", "wrapper subclasses")
def step_wrapped(path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(Wrapped(torch.randn(shape, generator=generator))) for shape in SHAPES]
    optimizer = Adafactor(params, **PATHS[path], beta1=0.9)
    assert all(isinstance(p, Wrapped) for p in params)
    check_steps(optimizer, path)


@case("modes", "wrapper subclasses among others")
def step_some_wrapped(path: str) -> None:
    _, optimizer = made(path, before=1)
    params = [torch.nn.Parameter(Wrapped(torch.ones(shape))) for shape in SHAPES[:4]]
    optimizer.add_param_group({"params": params})
    check_steps(optimizer, path)
