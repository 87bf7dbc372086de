"""Steps of any path beside those of the reference: parameters and all state, realigned after each step."""

from __future__ import annotations

from typing import Any

import torch
from parameters import params_of
from strategies import Group, Parameter, Problem
from tolerances import assert_same_parameter, assert_same_state, largest
from torch import Tensor

from adafactor_compiled import Adafactor

PLAIN = {"lr": 1e-2, "relative_step": False, "weight_decay": 0.1, "clip_threshold": 0.5}
MOMENTUM = {"beta1": 0.9, "weight_decay": 0.1, "scale_parameter": False}
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def problem_of(*shapes: tuple[int, ...], dtype: torch.dtype = FLOAT32, layout: str = "contiguous", **options: Any) -> Problem:
    pattern = ("zero_column", "normal", "normal")  # first, where the column has no second moment yet
    parameters = tuple(Parameter(shape, dtype, layout, dtype, pattern) for shape in shapes)
    return Problem((Group(options or PLAIN, parameters),), seed=1)


def realign(optimizer: Adafactor, reference: Adafactor) -> None:
    """Copy parameters and state, so that differences of rounding do not pile up."""
    for ours, theirs in zip(params_of(optimizer), params_of(reference), strict=True):
        ours.data.copy_(theirs.data)
        theirs.data.copy_(ours.data)  # where it is kept in a wider dtype
        for key, value in reference.state[theirs].items():
            if isinstance(value, Tensor):
                optimizer.state[ours][key].copy_(value)


def check_against_reference(
    problem: Problem, path: str, steps: int = 3, reference_dtype: torch.dtype | None = None, **ours: Any
) -> None:
    """Step both; the reference in `reference_dtype` where the reference itself would be the less accurate one."""
    reference_groups, groups = problem.param_groups(), problem.param_groups()
    for group in reference_groups:
        group["params"] = [p.detach().to(reference_dtype or p.dtype).requires_grad_() for p in group["params"]]
    reference, optimizer = Adafactor(reference_groups, foreach=False), Adafactor(groups, **ours)
    for t in range(steps):
        problem.set_gradients(groups, t)
        before = [largest(p) for p in params_of(optimizer)]
        for p, q in zip(params_of(optimizer), params_of(reference), strict=True):
            q.grad_dtype = None
            q.grad = p.grad if p.grad is None or reference_dtype is None else p.grad.to(reference_dtype)
        reference.step()
        optimizer.step()
        for i, (p, q, scale) in enumerate(zip(params_of(optimizer), params_of(reference), before, strict=True)):
            where, state = f"parameter {i} at step {t}", optimizer.state[p]
            expected = {k: v.to(state[k].dtype) if isinstance(v, Tensor) else v for k, v in reference.state[q].items()}
            assert_same_parameter(p, q.to(p.dtype), f"{path} - reference", scale, where)
            assert_same_state(state, expected, p.dtype, where)
        realign(optimizer, reference)
