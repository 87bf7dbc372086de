"""The reference path against transformers: what every other path is held to is itself held to the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from parameters import params_of
from strategies import DTYPES, Problem, problems
from tolerances import TOLERANCES, assert_same_parameter, assert_same_state, largest
from torch import Tensor
from transformers.optimization import Adafactor as TransformersAdafactor

from adafactor_compiled import Adafactor

STEPS = 100


def run_beside_transformers(problem: Problem, steps: int, path: str, **ours: bool) -> None:
    """Step both from the same start and compare all parameters and state at the end, without realigning."""
    theirs_groups, our_groups = problem.param_groups(), problem.param_groups()
    theirs, optimizer = TransformersAdafactor(theirs_groups), Adafactor(our_groups, **ours)
    expected, actual = params_of(theirs_groups), params_of(our_groups)
    scales = [largest(p) for p in expected]
    for t in range(steps):
        problem.set_gradients(theirs_groups, t)
        problem.set_gradients(our_groups, t)
        theirs.step()
        optimizer.step()
        scales = [max(scale, largest(p)) for scale, p in zip(scales, expected, strict=True)]
    for a, e, scale in zip(actual, expected, scales, strict=True):
        assert_same_parameter(a, e, path, scale)
        if theirs.state[e]:
            assert_same_state(optimizer.state[a], theirs.state[e], e.dtype)
            assert isinstance(optimizer.state[a]["step"], int)
        else:  # theirs begins with the first gradient, ours is there from the start
            assert optimizer.state[a]["step"] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_transformers(dtype: torch.dtype) -> None:
    @settings(max_examples=30)
    @given(problem=problems(dtypes=(dtype,), ours=False, max_params=3))
    def check(problem: Problem) -> None:
        run_beside_transformers(problem, STEPS, "reference - transformers, 100 steps", foreach=False)

    check()


@settings(max_examples=20)
@given(problem=problems(dtypes=(torch.float32,), ours=False, max_params=3))
def test_drift_of_the_multi_tensor_path(problem: Problem) -> None:
    """After 100 steps on its own it is no further from the exact trajectory than transformers is."""

    def trajectory(cls: Any, dtype: torch.dtype, **ours: bool) -> list[Tensor]:
        groups = problem.param_groups()
        for group in groups:
            group["params"] = [p.detach().to(dtype).requires_grad_() for p in group["params"]]
        optimizer = cls(groups, **ours)
        twins = problem.param_groups()  # these get the float32 gradients
        for t in range(STEPS):
            problem.set_gradients(twins, t)
            for group, twin in zip(groups, twins, strict=True):
                for p, q in zip(group["params"], twin["params"], strict=True):
                    p.grad = None if q.grad is None else q.grad.to(dtype)
            optimizer.step()
        return [p.detach().double() for p in params_of(groups)]

    exact = trajectory(TransformersAdafactor, torch.float64)
    theirs = trajectory(TransformersAdafactor, torch.float32)
    ours = trajectory(Adafactor, torch.float32, compile=False)
    limit = TOLERANCES[torch.float32].param
    for truth, their, our in zip(exact, theirs, ours, strict=True):
        assert largest(our - truth) <= largest(their - truth) + limit * largest(truth)
