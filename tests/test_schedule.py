"""Learning rates from outside and reports of the one inside: our schedule, transformers', and every one of torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from transformers import optimization

import adafactor_compiled
from adafactor_compiled import Adafactor

PATHS = [{"foreach": False}, {"compile": False}]


def make(lr: Any = None, **options: Any) -> tuple[list[Tensor], Adafactor]:
    params = [torch.full((3, 4), 2.0, requires_grad=True), torch.full((5,), 0.5, requires_grad=True)]
    groups = [{"params": params[:1]}, {"params": params[1:], "scale_parameter": False}]
    return params, Adafactor(groups, lr, relative_step=lr is None, compile=False, **options)


def step(params: list[Tensor], optimizer: Adafactor) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("module", [adafactor_compiled, optimization], ids=["ours", "transformers"])
@pytest.mark.parametrize("warmup_init", [False, True])
def test_reports_the_learning_rate_in_use(module: Any, warmup_init: bool) -> None:
    params, optimizer = make(warmup_init=warmup_init)
    schedule = module.AdafactorSchedule(optimizer)
    for t in range(1, 4):
        scale = params[0].detach().norm() / params[0].numel() ** 0.5
        step(params, optimizer)
        schedule.step()
        rate = min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t))
        assert [float(x) for x in schedule.get_lr()] == pytest.approx([rate * float(scale), rate], rel=1e-6)
        assert [float(x) for x in schedule.get_last_lr()] == pytest.approx([rate * float(scale), rate], rel=1e-6)


def test_reports_at_any_time() -> None:
    params, optimizer = make()
    schedule = adafactor_compiled.get_adafactor_schedule(optimizer, initial_lr=0.25)
    assert schedule.get_lr() == [0.25, 0.25]
    step(params, optimizer)
    in_use = [float(x) for x in schedule.get_lr()]
    optimizer.zero_grad()
    assert [float(x) for x in schedule.get_lr()] == in_use
    params[0].requires_grad_(False)
    assert [float(x) for x in schedule.get_lr()] == in_use


def test_frozen_first_parameter() -> None:
    frozen, trained = torch.ones(3, 4), torch.ones(3, 4, requires_grad=True)
    optimizer = Adafactor([frozen, trained], compile=False)
    schedule = adafactor_compiled.AdafactorSchedule(optimizer)
    step([trained], optimizer)
    assert [float(x) for x in schedule.get_lr()] == pytest.approx([1e-2])


@pytest.mark.parametrize("module", [adafactor_compiled, optimization], ids=["ours", "transformers"])
def test_a_report_is_never_read_back(module: Any) -> None:
    """With `relative_step`, the trajectory is that of an optimizer without a schedule."""
    (with_schedule, first), (without, second) = make(), make()
    schedule = module.AdafactorSchedule(first)
    for _ in range(3):
        step(with_schedule, first)
        schedule.step()
        step(without, second)
    assert all(torch.equal(p, q) for p, q in zip(with_schedule, without, strict=True))


@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125)], ids=["float", "tensor"])
def test_a_manual_rate_is_reported_and_left_alone(lr: Any) -> None:
    params, optimizer = make(lr)
    schedule = adafactor_compiled.AdafactorSchedule(optimizer)
    assert all(float(group["lr"]) == 0.125 for group in optimizer.param_groups)
    step(params, optimizer)
    schedule.step()
    assert all(float(group["lr"]) == 0.125 for group in optimizer.param_groups)
    assert [float(x) for x in schedule.get_lr()] == pytest.approx([0.25, 0.125])


def test_signatures() -> None:
    for name in ("AdafactorSchedule", "get_adafactor_schedule"):
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (adafactor_compiled, optimization))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def constant(optimizer: Any) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": constant,
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [constant(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([constant(o), lr_scheduler.ExponentialLR(o, 0.5)]),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8, cycle_momentum=False),
}


def test_no_scheduler_is_forgotten() -> None:
    exported = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))}
    assert exported - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_torch_scheduler(name: str, as_tensor: bool) -> None:
    """The rate it writes is the rate of the next step."""
    params, optimizer = make(torch.tensor(1e-2) if as_tensor else 1e-2)
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for _ in range(5):
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        before = [p.detach().clone() for p in params]
        step(params, optimizer)
        scale = before[0].norm() / before[0].numel() ** 0.5
        moved = [float((b - p.detach()).mean()) for b, p in zip(before, params, strict=True)]
        assert moved == pytest.approx([rates[0] * float(scale), rates[1]], rel=1e-3, abs=2e-7)  # constant gradients: u = 1
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        seen.append(rates[1])
    assert len(set(seen)) > 1
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == as_tensor


BRING_THEIR_OWN = ("CyclicLR", "OneCycleLR")  # these write a rate before they read one


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {*BRING_THEIR_OWN, "ReduceLROnPlateau"}))
def test_scheduler_without_a_number(name: str) -> None:
    _, optimizer = make()
    with pytest.raises(ValueError, match=r"lr.* None") as raised:
        SCHEDULERS[name](optimizer)
    for said in ("lr", "relative_step=False", "AdafactorSchedule"):
        assert said in str(raised.value)
