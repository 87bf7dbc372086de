"""Nothing outlives its owner: when a program lets go of an optimizer, its parameters and its state are freed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compilers import aot_eager, compiled_by, uncompiled
from paths import PATHS
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from adafactor_compiled import Adafactor, AdafactorSchedule, StepInBackward


def make(**options: Any) -> tuple[nn.Module, Adafactor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
    return model, Adafactor(model.parameters(), **options)


def backward(model: nn.Module) -> None:
    model(torch.ones(3, 6)).square().mean().backward()


def train(model: nn.Module, optimizer: Adafactor) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def train_in_backward(model: nn.Module, optimizer: Adafactor) -> None:
    StepInBackward(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)


def train_and_go_back(model: nn.Module, optimizer: Adafactor) -> None:
    in_backward = StepInBackward(optimizer)
    backward(model)
    in_backward.remove()
    train(model, optimizer)


def train_with_new_group(model: nn.Module, optimizer: Adafactor) -> None:
    StepInBackward(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 2))]})
    backward(model)
    optimizer.param_groups[1]["params"][0].sum().backward()


def train_on_schedule(model: nn.Module, optimizer: Adafactor) -> None:
    schedule = AdafactorSchedule(optimizer)
    train(model, optimizer)
    schedule.step()


def train_on_lambda(model: nn.Module, optimizer: Adafactor) -> None:
    optimizer.param_groups[0].update(lr=0.1, relative_step=False)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer)
    schedule.step()


def train_and_look(model: nn.Module, optimizer: Adafactor) -> None:
    optimizer.warm_up()
    train(model, optimizer)
    assert optimizer.telemetry()
    assert str(optimizer.summary())


def train_and_reload(model: nn.Module, optimizer: Adafactor) -> None:
    train(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer)


def train_scaled(model: nn.Module, optimizer: Adafactor) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(3, 6)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()


def train_alone(model: nn.Module, optimizer: Adafactor) -> None:
    backward(model)
    for i, param in enumerate(optimizer.param_groups[0]["params"]):
        optimizer.step_parameter(param, optimizer.param_groups[0], i)


USES = [
    *(train, train_in_backward, train_and_go_back, train_with_new_group, train_on_schedule, train_on_lambda, train_and_look),
    *(train_and_reload, train_scaled, train_alone),
]


def used(use: Callable[[nn.Module, Adafactor], None], **options: Any) -> list[weakref.ref[Any]]:
    """Weak references to all that an optimizer has, after its use."""
    model, optimizer = make(**options)
    use(model, optimizer)
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [weakref.ref(x) for x in (model, optimizer, *params, *states)]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"nonfinite": "skip", "beta1": 0.9}], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_all_is_freed(path: str, options: dict[str, Any], use: Callable[[nn.Module, Adafactor], None]) -> None:
    gc.freeze()  # of what other tests have left, the collection below would look at each object
    with compiled_by(aot_eager if use is train and not options else uncompiled):
        references = used(use, **PATHS[path], **options)
        gc.collect()  # schedulers and their optimizers refer to each other
        assert sum(x() is not None for x in references) == 0


def test_a_step_under_a_scaler_keeps_nothing_of_what_was_stepped_before() -> None:
    optimizer = Adafactor([nn.Parameter(torch.ones(4, 6, dtype=torch.float16))])
    group, scaler = optimizer.param_groups[0], torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(group["params"][0].float().sum()).backward()
    optimizer.step()
    gone = weakref.ref(group["params"][0])
    optimizer.state.clear()
    group["params"][0] = nn.Parameter(torch.ones(4, 6, dtype=torch.float16))
    scaler.scale(group["params"][0].float().sum()).backward()
    scaler.step(optimizer)
    assert gone() is None


def test_ten_optimizers_that_step_in_backward_go_at_once() -> None:
    """By their last reference: were they left to the collector, they would step until it comes."""
    gc.disable()
    try:
        references = [used(train_in_backward, compile=False)[1] for _ in range(10)]
        assert [x() for x in references] == [None] * 10
    finally:
        gc.enable()


@pytest.mark.parametrize("keep", ["optimizer", "StepInBackward"])
def test_either_of_two_keeps_the_steps(keep: str) -> None:
    model, optimizer = make(compile=False)
    in_backward = StepInBackward(optimizer)
    kept: Any = optimizer if keep == "optimizer" else in_backward
    del optimizer, in_backward
    before = copy.deepcopy(model.state_dict())
    backward(model)
    assert not any(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    del kept


def test_a_model_says_that_it_is_not_stepped_any_more() -> None:
    model, optimizer = make(compile=False)
    StepInBackward(optimizer)
    del optimizer
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="is gone, and its gradient stays"):
        backward(model)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())


def test_another_optimizer_after_remove() -> None:
    model, optimizer = make(compile=False)
    in_backward = StepInBackward(optimizer)
    in_backward.remove()
    in_backward.remove()
    del optimizer, in_backward
    second = Adafactor(model.parameters(), compile=False)
    with warnings.catch_warnings(action="error"):
        train_in_backward(model, second)
    assert {state["step"] for state in second.state.values()} == {3}


def through_torch(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("shown", [True, False, None])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_torch])
def test_copies_show_progress_alike(shown: bool | None, copied: Callable[[Any], Any]) -> None:
    model, optimizer = make(compile=False, show_progress=shown)
    train(model, optimizer)
    assert copied(optimizer).show_progress is shown
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.show_progress is shown
