"""What must hold of a step, whatever the numbers: invariants of the multi-tensor path and of the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parameters import params_of
from strategies import Group, Parameter, Problem, options, parameters, problems, seeds, shapes
from tolerances import largest
from torch import Tensor

from adafactor_compiled import Adafactor
from adafactor_compiled._state.moments import factored_dims

PATHS = [{"foreach": False}, {"compile": False}]
ids = ["reference", "multi-tensor"]
FLOATS = (torch.float32, torch.float64)


def run(problem: Problem, steps: int, **ours: Any) -> list[Tensor]:
    groups = problem.param_groups()
    optimizer = Adafactor(groups, **ours)
    for t in range(steps):
        problem.set_gradients(groups, t)
        optimizer.step()
    return [p.detach() for p in params_of(groups)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7 * max(largest(e), 1e-30), equal_nan=True)


def with_gradients(problem: Problem, kind: str) -> Problem:
    return Problem(
        tuple(g._replace(parameters=tuple(p._replace(pattern=(kind,)) for p in g.parameters)) for g in problem.groups),
        problem.seed,
    )


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_zero_gradients_move_nothing_but_decay(path: dict[str, Any]) -> None:
    @settings(max_examples=40)
    @given(problem=problems(dtypes=FLOATS))
    def check(problem: Problem) -> None:
        groups = with_gradients(problem, "zero").param_groups()
        before = [p.detach().clone() for p in params_of(groups)]
        optimizer = Adafactor(groups, **path)
        for p in params_of(groups):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        position = 0
        for group in optimizer.param_groups:
            for p in group["params"]:
                alpha = float(Adafactor._get_lr(group, optimizer.state[p])) if p.numel() else 0.0
                scale = alpha if group["weight_decay_scale"] == "lr" else 1.0
                expected = before[position] * (1 - group["weight_decay"] * scale)
                position += 1
                torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
                if group["weight_decay"] == 0:
                    assert torch.equal(p, before[position - 1])

    check()


@settings(max_examples=40)
@given(problem=problems(dtypes=FLOATS, max_groups=1), order=st.randoms(use_true_random=False))
def test_permuting_parameters_permutes_the_result(problem: Problem, order: Any) -> None:
    groups = problem.param_groups()
    count = len(groups[0]["params"])
    permutation = list(range(count))
    order.shuffle(permutation)
    permuted = problem.param_groups()
    permuted[0]["params"] = [permuted[0]["params"][i] for i in permutation]
    first, second = Adafactor(groups, compile=False), Adafactor(permuted, compile=False)
    for t in range(2):
        problem.set_gradients(groups, t)
        for i, p in zip(permutation, permuted[0]["params"], strict=True):
            p.grad = groups[0]["params"][i].grad
        first.step()
        second.step()
    assert_equal([p.detach() for p in permuted[0]["params"]], [groups[0]["params"][i].detach() for i in permutation])


@settings(max_examples=40)
@given(problem=problems(dtypes=FLOATS, max_groups=1), data=st.data())
def test_splitting_a_group_changes_nothing(problem: Problem, data: st.DataObject) -> None:
    (group,) = problem.groups
    cut = data.draw(st.integers(0, len(group.parameters)))
    parts = [part for part in (group.parameters[:cut], group.parameters[cut:]) if part]
    split = problem._replace(groups=tuple(Group(group.options, part) for part in parts))
    assert_equal(run(split, 2, compile=False), run(problem, 2, compile=False))


@settings(max_examples=40)
@given(group=options(ours=True), parameter=parameters(FLOATS, shapes), k=st.integers(2, 6), seed=seeds)
def test_equal_parameters_get_equal_updates(group: dict[str, Any], parameter: Parameter, k: int, seed: int) -> None:
    params = [parameter.make(torch.Generator().manual_seed(seed)) for _ in range(k)]
    optimizer = Adafactor([{"params": params, **group}], compile=False)
    for t in range(2):
        for p in params:
            p.grad = parameter.gradient(t, p, torch.Generator().manual_seed(seed + 1 + t))
        optimizer.step()
    assert_equal([p.detach() for p in params[1:]], [params[0].detach()] * (k - 1))


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_clipping_bounds_the_rms_of_an_update(path: dict[str, Any]) -> None:
    @settings(max_examples=40)
    @given(parameter=parameters((torch.float64,), shapes), threshold=st.sampled_from([0.01, 0.5, 1.0, 2.0]), seed=seeds)
    def check(parameter: Parameter, threshold: float, seed: int) -> None:
        assume(math.prod(parameter.shape) > 0)
        generator = torch.Generator().manual_seed(seed)
        p = parameter.make(generator)
        lr = 1.0  # the update itself, since nothing scales it
        optimizer = Adafactor([p], lr, clip_threshold=threshold, scale_parameter=False, relative_step=False, **path)
        for t in range(3):
            p.grad = parameter.gradient(t, p, generator)
            with torch.no_grad():
                p.zero_()
            optimizer.step()
            assert p.detach().norm() / p.numel() ** 0.5 <= threshold * (1 + 1e-12)

    check()


@settings(max_examples=60)
@given(problem=problems())
def test_state_is_rows_and_columns(problem: Problem) -> None:
    groups = problem.param_groups()
    optimizer = Adafactor(groups, compile=False)
    problem.set_gradients(groups, 0)
    optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            dims = factored_dims(p.shape, group)
            factors = p.numel() if dims is None else sum(math.prod(p.shape[:i] + p.shape[i + 1 :]) for i in dims)
            momentum = p.numel() if group["beta1"] is not None else 0
            width = 8 if p.dtype == torch.float64 else 4
            held = sum(x.numel() * x.element_size() for x in optimizer.state[p].values() if isinstance(x, Tensor))
            assert held == (factors + momentum + 1) * width  # and the RMS


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_maximize_is_minimizing_the_negated(path: dict[str, Any]) -> None:
    @settings(max_examples=30)
    @given(problem=problems(dtypes=FLOATS))
    def check(problem: Problem) -> None:
        descent, ascent = problem.param_groups(), problem.param_groups()
        for d, a in zip(descent, ascent, strict=True):
            d["maximize"], a["maximize"] = False, True
        down, up = Adafactor(descent, **path), Adafactor(ascent, **path)
        for t in range(2):
            problem.set_gradients(ascent, t)
            for d, a in zip(params_of(descent), params_of(ascent), strict=True):
                d.grad = None if a.grad is None else -a.grad
            given = [None if p.grad is None else p.grad.clone() for p in params_of(ascent)]
            up.step()
            down.step()
            for p, grad in zip(params_of(ascent), given, strict=True):
                assert grad is None or torch.equal(p.grad, grad)
        assert_equal([p.detach() for p in params_of(ascent)], [p.detach() for p in params_of(descent)])

    check()
