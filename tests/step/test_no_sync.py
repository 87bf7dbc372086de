"""No path but the reference reads a tensor's value in a step: on a GPU that would wait for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compilers import compiled_by, uncompiled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adafactor_compiled import Adafactor, AdafactorSchedule
from adafactor_compiled._update import members

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in READS:
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


OPTIONS: dict[str, dict[str, Any]] = {
    "relative": {"weight_decay": 0.1},
    "warmup": {"warmup_init": True, "scale_parameter": False},
    "float lr": {"lr": 1e-3, "relative_step": False},
    "tensor lr": {"lr": torch.tensor(1e-3), "relative_step": False, "beta1": 0.9, "clip_threshold": None},
    "capturable": {"capturable": True, "weight_decay": 0.1},
    "capturable, tensor lr": {"capturable": True, "lr": torch.tensor([1e-3]), "relative_step": False, "maximize": True},
}


def make_params() -> list[Tensor]:
    shapes = [(24, 40), (24, 40), (13, 7), (8, 4, 3, 3), (5, 1), (7,), (7,), (), (0,)]
    params = [torch.ones(shape, requires_grad=True) for shape in shapes]
    params.append(torch.ones(24, 40, dtype=torch.bfloat16, requires_grad=True))
    return params


def step_without_reads(optimizer: Adafactor, params: list[Tensor]) -> None:
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = None if t == 1 and i % 2 else torch.ones_like(p)
        with NoHostReads():
            optimizer.step()


def test_the_mode_sees_reads() -> None:
    x = torch.ones(1)
    for read in (lambda: x.item(), lambda: bool(x > 0), lambda: float(x), lambda: torch.equal(x, x)):
        with NoHostReads(), pytest.raises(AssertionError, match="reads a tensor on the host"):
            read()


@pytest.mark.parametrize("name", OPTIONS)
def test_multi_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "FEW", 0)
    params = make_params()
    step_without_reads(Adafactor(params, compile=False, **OPTIONS[name]), params)


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_calls(name: str) -> None:
    """What is compiled, operation by operation, and all that is around it."""
    params = make_params()
    optimizer = Adafactor(params, compile=True, **OPTIONS[name])
    with compiled_by(uncompiled):
        optimizer.warm_up()
        step_without_reads(optimizer, params)


@pytest.mark.parametrize("name", ["relative", "capturable"])
def test_compiled(name: str) -> None:
    params = make_params()
    optimizer = Adafactor(params, compile=True, **OPTIONS[name])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    step_without_reads(optimizer, params)


# With `capturable` the step count is a tensor, and whether a parameter has been stepped is a read: a report is no step.
@pytest.mark.parametrize("name", [name for name in OPTIONS if "capturable" not in name])
def test_zero_grad_and_schedule(name: str) -> None:
    params = make_params()
    optimizer = Adafactor(params, compile=False, **OPTIONS[name])
    schedule = AdafactorSchedule(optimizer)
    step_without_reads(optimizer, params)
    with NoHostReads():
        schedule.step()
        optimizer.zero_grad()
