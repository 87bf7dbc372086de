"""The parts of transformers' Adafactor that other tools call and override."""

from __future__ import annotations

import types
import warnings
from typing import Any, ClassVar

import pytest
import torch
from parameters import parameters, params_of, set_gradients
from torch import Tensor
from transformers.optimization import Adafactor as TransformersAdafactor

from adafactor_compiled import Adafactor

MANUAL = {"lr": 1e-3, "relative_step": False}
PATHS = [{"foreach": False}, {"compile": False}, {}, {"compile": True}]
SHAPES = [(6, 8), (2, 3, 4), (7,), ()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rms", [0, 0.5, torch.tensor(0.5), torch.tensor(1e-5)], ids=str)
@pytest.mark.parametrize(
    "options", [MANUAL, {}, {"warmup_init": True}, {**MANUAL, "scale_parameter": False}, {"beta1": 0.9}], ids=str
)
def test_results(options: dict[str, Any], rms: Any) -> None:
    (group,) = TransformersAdafactor(parameters(SHAPES), **options).param_groups
    for step in (1, 5, 100_000):
        state = {"step": step, "RMS": rms}
        assert float(Adafactor._get_lr(group, state)) == pytest.approx(float(TransformersAdafactor._get_lr(group, state)))
    for p in parameters(SHAPES):
        assert Adafactor._get_options(group, p.shape) == TransformersAdafactor._get_options(group, p.shape)
        torch.testing.assert_close(Adafactor._rms(p), TransformersAdafactor._rms(p))
    for row, col in ((torch.rand(6), torch.rand(8)), (torch.rand(2, 3), torch.rand(2, 4))):
        ours, theirs = Adafactor._approx_sq_grad(row, col), TransformersAdafactor._approx_sq_grad(row, col)
        torch.testing.assert_close(ours, theirs)


def halved(base: Any) -> Any:
    class Halved(base):
        seen: ClassVar[list[tuple[Any, int]]] = []

        @staticmethod
        def _get_lr(group: Any, state: Any) -> Any:
            Halved.seen.append((group, int(state["step"])))
            return base._get_lr(group, state) / 2

    return Halved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [MANUAL, {}, {**MANUAL, "beta1": 0.9, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_an_overridden_learning_rate(path: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    subclass = halved(Adafactor)
    with pytest.warns(UserWarning, match="`_get_lr` is overridden, and so steps take the reference path") as caught:
        optimizer = subclass(ours, **options, **path)
    assert len(caught) == 1
    expected = halved(TransformersAdafactor)(theirs, **options)
    for t in range(3):
        set_gradients(ours, t)
        set_gradients(theirs, t)
        with warnings.catch_warnings(action="error"):
            optimizer.step()
        expected.step()
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, **tolerance)
    assert all(group is optimizer.param_groups[0] for group, _ in subclass.seen)
    assert [step for _, step in subclass.seen] == [1] * 4 + [2] * 4 + [3] * 4
    optimizer.telemetry()
    assert {line.path for line in optimizer.summary().classes} == {"reference"}


def test_of_an_instance_and_back() -> None:
    p = torch.ones(3, 4, requires_grad=True)
    optimizer = Adafactor([p], compile=False, scale_parameter=False, **MANUAL)
    p.grad = torch.ones(3, 4)
    with pytest.warns(UserWarning, match="`_get_lr` is overridden"):
        optimizer._get_lr = lambda group, state: group["lr"] * 100
    optimizer.step()
    assert float(p.detach().mean()) == pytest.approx(0.9)
    del optimizer._get_lr
    optimizer.step()
    assert float(p.detach().mean()) == pytest.approx(0.899)


@pytest.mark.parametrize("name", ["_get_options", "_rms", "_approx_sq_grad"])
def test_others_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = staticmethod(lambda *_: None)
    with pytest.raises(TypeError, match=f"`{name}` should not be overridden"):
        type("Other", (Adafactor,), {name: own})(parameters(SHAPES))
    optimizer = Adafactor(parameters(SHAPES))
    with pytest.raises(TypeError, match=f"`{name}` should not be overridden"):
        setattr(optimizer, name, own)
    set_gradients(params_of(optimizer), 0)
    monkeypatch.setattr(Adafactor, name, own)  # of all that there are
    with pytest.raises(TypeError, match=f"`{name}` should not be overridden"):
        optimizer.step()


def step_of_a_tool(self: Any, p: Tensor, group: dict[str, Any]) -> None:
    """One step of transformers' algorithm from its parts, on the optimizer's state."""
    if p.grad is None:
        return
    g, state = p.grad.float(), self.state[p]
    factored, momentum = self._get_options(group, g.shape)
    state["step"] += 1
    state["RMS"] = self._rms(p.float())
    lr = self._get_lr(group, state)
    beta2 = 1.0 - state["step"] ** group["decay_rate"]
    squared = g * g + group["eps"][0]
    if factored:
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row.lerp_(squared.mean(-1), 1.0 - beta2)
        col.lerp_(squared.mean(-2), 1.0 - beta2)
        update = self._approx_sq_grad(row, col) * g
    else:
        update = state["exp_avg_sq"].lerp_(squared, 1.0 - beta2).rsqrt() * g
    update = update * lr / (self._rms(update) / group["clip_threshold"]).clamp(min=1.0)
    if momentum:
        update = state["exp_avg"].lerp_(update, 1.0 - group["beta1"])
    p.copy_(p.float() * (1.0 - group["weight_decay"] * lr) - update)


@torch.no_grad()
def all_of_a_tool(self: Any, closure: Any = None) -> None:
    for group in self.param_groups:
        for p in group["params"]:
            self.step_param(p, group)


@pytest.mark.parametrize("options", [MANUAL, {}, {**MANUAL, "beta1": 0.9, "weight_decay": 0.1}], ids=str)
def test_a_tool_binds_its_own_step(options: dict[str, Any]) -> None:
    """Its steps, then ours again on the state that they leave."""
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    optimizer, expected = Adafactor(ours, compile=False, **options), TransformersAdafactor(theirs, **options)
    optimizer.step_param = types.MethodType(step_of_a_tool, optimizer)
    optimizer.step = types.MethodType(all_of_a_tool, optimizer)
    for t in range(4):
        if t == 2:
            del optimizer.step
        set_gradients(ours, t)
        set_gradients(theirs, t)
        optimizer.step()
        expected.step()
        same(ours, theirs)


def test_a_tool_steps_in_backward() -> None:
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    optimizer, expected = Adafactor(ours, compile=False), TransformersAdafactor(theirs)
    optimizer.step_parameter = types.MethodType(step_of_a_tool, optimizer)

    @torch.no_grad()
    def step(p: Tensor) -> None:
        optimizer.step_parameter(p, optimizer.param_groups[0])
        p.grad = None

    for p in ours:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        for params in (ours, theirs):
            sum((p * p).sum() for p in params).backward()
        expected.step()
        expected.zero_grad()
        same(ours, theirs)
