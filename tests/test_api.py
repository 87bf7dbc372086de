"""The face of the optimizer: its signature, groups, hooks, subclasses and closures, on every path."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
from parameters import parameters, set_gradients
from paths import PATHS
from torch import Tensor
from transformers.optimization import Adafactor as TransformersAdafactor

import adafactor_compiled
from adafactor_compiled import Adafactor

SHAPES = [(6, 8), (6, 8), (7,), ()]
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def test_exports() -> None:
    assert {"Adafactor", "AdafactorSchedule", "get_adafactor_schedule", "__version__"} <= set(adafactor_compiled.__all__)
    assert all(hasattr(adafactor_compiled, name) for name in adafactor_compiled.__all__)


def test_signature_begins_with_that_of_transformers() -> None:
    ours = list(inspect.signature(Adafactor).parameters.values())
    theirs = list(inspect.signature(TransformersAdafactor).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_positional_arguments() -> None:
    values = (1e-3, [1e-20, 1e-2], 0.5, -0.7, 0.9, 0.1, False, False, False)
    ours, theirs = Adafactor(parameters(SHAPES), *values), TransformersAdafactor(parameters(SHAPES), *values)
    assert {key: ours.defaults[key] for key in theirs.defaults} == theirs.defaults


@on_every_path
def test_group_options_are_those_of_separate_optimizers(path: dict[str, Any]) -> None:
    options = [
        {"lr": 1e-2, "relative_step": False, "weight_decay": 0.1},
        {"warmup_init": True, "clip_threshold": None, "decay_rate": -0.5},
        {"scale_parameter": False, "eps": [1e-20, 0.1], "maximize": True},
    ]
    together, apart = [parameters(SHAPES) for _ in options], [parameters(SHAPES) for _ in options]
    one = Adafactor([{"params": params, **option} for params, option in zip(together, options, strict=True)], **path)
    several = [Adafactor(params, **option, **path) for params, option in zip(apart, options, strict=True)]
    for t in range(2):
        for params in together + apart:
            set_gradients(params, t)
        for optimizer in [one, *several]:
            optimizer.step()
    for mine, others in zip(together, apart, strict=True):
        for p, q in zip(mine, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@on_every_path
def test_groups_name_what_the_constructor_does_not(path: dict[str, Any]) -> None:
    """What counts is what a group ends up with."""
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    optimizer = Adafactor([{"params": ours, "lr": 1e-2}], relative_step=False, **path)
    reference = TransformersAdafactor([{"params": theirs, "lr": 1e-2}], relative_step=False)
    set_gradients(theirs, 1)
    set_gradients(ours, 1)
    optimizer.step()
    reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="`lr` should be a number or a tensor when `relative_step=False`"):
        Adafactor([{"params": ours[:1], "lr": 1e-2}, {"params": ours[1:]}], relative_step=False, **path)
    Adafactor([{"params": ours, "beta1": 0.9}], cautious=True, **path)


def test_groups_may_take_different_paths() -> None:
    params = [parameters(SHAPES) for _ in PATHS]
    optimizer = Adafactor([{"params": p, **path} for p, path in zip(params, PATHS.values(), strict=True)])
    for _ in range(2):
        for group in params:
            set_gradients(group, 1)
        optimizer.step()
    for others in params[1:]:
        for p, q in zip(params[0], others, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


@on_every_path
def test_add_param_group_after_steps(path: dict[str, Any]) -> None:
    """The newcomers begin at step one, and the others go on."""
    params, late = parameters(SHAPES), parameters(SHAPES)
    optimizer = Adafactor(params, **path)
    twin, late_twin = parameters(SHAPES), parameters(SHAPES)
    expected, expected_late = Adafactor(twin, foreach=False), Adafactor(late_twin, weight_decay=0.1, foreach=False)
    for t in range(4):
        if t == 2:
            optimizer.add_param_group({"params": late, "weight_decay": 0.1})
        for group in (params, late, twin, late_twin):
            set_gradients(group, t)
        optimizer.step()
        expected.step()
        if t >= 2:
            expected_late.step()
    for p, q in zip(params + late, twin + late_twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert [optimizer.state[p]["step"] for p in params + late] == [4] * 4 + [2] * 4


@on_every_path
def test_closure(path: dict[str, Any]) -> None:
    p = torch.full((3, 4), 2.0, requires_grad=True)
    optimizer = Adafactor([p], **path)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[0] == 48.0
    assert losses[2] < losses[1] < losses[0]
    assert optimizer.state[p]["step"] == 3


@on_every_path
def test_hooks_and_subclasses(path: dict[str, Any]) -> None:
    class Counting(Adafactor):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    params = parameters(SHAPES)
    counting = Counting(params, **path)
    set_gradients(params, 1)
    counting.step()
    assert counting.steps == 1
    assert all(counting.state[p]["step"] == 1 for p in params)

    optimizer = Adafactor(params, **path)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


@on_every_path
def test_maximize_leaves_gradients_alone(path: dict[str, Any]) -> None:
    params = parameters(SHAPES)
    optimizer = Adafactor(params, maximize=True, **path)
    set_gradients(params, 1)
    gradients = [(p.grad, p.grad.clone()) for p in params]
    optimizer.step()
    for p, (grad, value) in zip(params, gradients, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)


@on_every_path
def test_step_without_gradients(path: dict[str, Any]) -> None:
    params = parameters(SHAPES)
    optimizer = Adafactor(params, **path)
    before = [p.detach().clone() for p in params]
    assert optimizer.step() is None
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(optimizer.state[p]["step"] == 0 for p in params)


@on_every_path
def test_frozen_parameters_and_named_ones(path: dict[str, Any]) -> None:
    model = torch.nn.Linear(8, 6)
    model.bias.requires_grad_(False)
    optimizer = Adafactor(model.named_parameters(), **path)
    model(torch.ones(2, 8)).sum().backward()
    before = model.bias.detach().clone()
    optimizer.step()
    assert torch.equal(model.bias, before)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


OF_INFERENCE: list[dict[str, Any]] = [{}, {"capturable": True}, {"nonfinite": "skip"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OF_INFERENCE, ids=str)
@on_every_path
def test_parameters_made_in_inference_mode(path: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    with torch.inference_mode():
        params = parameters(SHAPES, dtype)
    others = parameters(SHAPES, dtype)
    optimizer, expected = Adafactor(params, **options, **path), Adafactor(others, **options, **path)
    for t in range(2):
        set_gradients(params, t)
        set_gradients(others, t)
        optimizer.step()
        expected.step()
        optimizer.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):  # by a graph of their own, which may round a last digit otherwise
        last_digit = 2.0**-23 if path.get("compile") and dtype is torch.float32 else 0.0
        torch.testing.assert_close(p, q, rtol=last_digit, atol=0.0)


def in_one_memory(params: list[Tensor], kind: str) -> None:
    if kind == "in part":
        flat = torch.linspace(-1.0, 1.0, 72)
        params[0].data, params[1].data = flat[:48].view(6, 8), flat[24:].view(6, 8)
    else:
        first, second = {"matrices": (0, 1), "vectors": (2, 3), "no dimensions": (4, 5)}[kind]
        params[second].data = params[first].data


@pytest.mark.parametrize("kind", ["matrices", "in part", "vectors", "no dimensions"])
@pytest.mark.parametrize("before", [0, 2])
@on_every_path
def test_parameters_in_one_memory(path: dict[str, Any], before: int, kind: str) -> None:
    """They step one after the other: at once, a step of one would be lost, or threads would race."""
    stepped = []
    for each in (path, {"foreach": False}):
        params = parameters([(6, 8), (6, 8), (7,), (7,), (), ()])
        optimizer = Adafactor(params, weight_decay=0.1, **each)
        for t in range(before + 2):
            if t == before:
                in_one_memory(params, kind)
            set_gradients(params, t)
            optimizer.step()
        stepped.append(params)
    for p, q in zip(*stepped, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_repr() -> None:
    text = repr(Adafactor([torch.ones(3, requires_grad=True)], lr=1e-3, relative_step=False, weight_decay=0.1))
    assert text.startswith("Adafactor (\nParameter Group 0\n")
    for line in ("lr: 0.001", "weight_decay: 0.1", "compile: None", "relative_step: False"):
        assert f"    {line}\n" in text


def test_zero_grad() -> None:
    params = parameters(SHAPES)
    optimizer = Adafactor(params)
    set_gradients(params, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("name", [m.name for m in pkgutil.walk_packages(adafactor_compiled.__path__, "adafactor_compiled.")])
def test_examples_in_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        assert name.startswith("adafactor_compiled._fused.gpu.")
        pytest.skip("a module of kernels, without Triton")
    assert doctest.testmod(module).failed == 0
