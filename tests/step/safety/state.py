"""State that was replaced, edited, cleared or made on the meta device; and parameters of other shapes than their state."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from parameters import params_of
from torch import Tensor

from adafactor_compiled import Adafactor
from safety.cases import case, check_error, check_steps, give_gradients, made


def replace(path: str, of: Callable[[Tensor], Any], keys: tuple[str, ...], before: int, message: str | None) -> None:
    _, optimizer = made(path, before=before, beta1=0.9)
    for state in optimizer.state.values():
        for key in keys:
            if key in state:
                state[key] = of(state[key])
    if message is None:
        check_steps(optimizer, path)
    else:
        give_gradients(optimizer, 50)
        check_error(optimizer, message)


def strided(x: Tensor) -> Tensor:
    """Every second element of memory that is full of other numbers."""
    return x.new_full((*x.shape, 2), 1e6)[..., 0].copy_(x)


def wider(x: Tensor) -> Tensor:
    """The first elements of longer rows."""
    return x.new_full((*x.shape[:-1], x.shape[-1] + 3), 1e6)[..., : x.shape[-1]].copy_(x) if x.ndim else x


SECOND_MOMENTS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")
ALL = (*SECOND_MOMENTS, "exp_avg", "RMS")
REPLACED: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...], str | None]] = {
    # name: what becomes of a tensor of the state, which ones, the error
    "state in float64": (Tensor.double, ALL, None),
    "state in bfloat16": (Tensor.bfloat16, ALL, None),
    "state in float16": (Tensor.half, ALL, None),
    "state in int64": (Tensor.long, ALL, None),
    "state strided": (strided, ALL, None),
    "state as parts of rows": (wider, ALL, None),
    "state transposed": (lambda x: x.mT.contiguous().mT if x.ndim == 2 else x, ("exp_avg",), None),
    "state with the negative bit": (lambda x: torch._neg_view(-x), ALL, None),
    "state expanded": (lambda x: x.new_tensor(0.5).expand(x.shape), ALL, None),
    "state without memory": (lambda x: x.to("meta"), ALL, None),
    "RMS an int": (lambda x: 0, ("RMS",), None),
    "RMS a float": (lambda x: 0.5, ("RMS",), None),
    "RMS of one element": (lambda x: x.reshape(1), ("RMS",), "`RMS` of parameter 0"),
    "RMS of two elements": (lambda x: x.new_zeros(2), ("RMS",), "`RMS` of parameter 0"),
    "rows too few": (lambda x: x[:-1], ("exp_avg_sq_row",), "`exp_avg_sq_row` of parameter 0"),
    "columns too many": (lambda x: torch.cat([x, x]), ("exp_avg_sq_col",), "`exp_avg_sq_col` of parameter 0"),
    "rows as a column": (lambda x: x.unsqueeze(-1), ("exp_avg_sq_row",), "`exp_avg_sq_row` of parameter 0"),
    "a number for columns": (lambda x: 0.5, ("exp_avg_sq_col",), "`exp_avg_sq_col` of parameter 0"),
    "second moment too short": (lambda x: x[:-1] if x.ndim else x, ("exp_avg_sq",), "`exp_avg_sq` of parameter 3"),
    "second moment of one element": (lambda x: x.new_zeros(1), ("exp_avg_sq",), "`exp_avg_sq` of parameter 3"),
    "momentum of another shape": (lambda x: x.new_zeros(2, 3), ("exp_avg",), "`exp_avg` of parameter 0"),
    "momentum of the transpose's shape": (lambda x: x.mT if x.ndim > 1 else x, ("exp_avg",), "`exp_avg` of parameter 0"),
}
for name, (of, keys, message) in REPLACED.items():
    for before in (0, 2):
        case("state", f"{name}, {before} steps before")(
            functools.partial(replace, of=of, keys=keys, before=before, message=message)
        )


@case("state", "state cleared")
def clear(path: str) -> None:
    _, optimizer = made(path, before=1, beta1=0.9)
    for state in optimizer.state.values():
        state.clear()
    check_steps(optimizer, path)


def edit(path: str, of: Callable[[Adafactor], None], **options: Any) -> None:
    _, optimizer = made(path, before=2, beta1=0.9, **options)
    of(optimizer)
    check_steps(optimizer, path)
    of(optimizer)
    check_steps(optimizer, path)


def edit_each(of: Callable[[dict[str, Any]], Any]) -> Callable[[Adafactor], None]:
    def edit_all(optimizer: Adafactor) -> None:
        for state in optimizer.state.values():
            of(state)

    return edit_all


EDITS: dict[str, Callable[[Adafactor], None]] = {
    "all state cleared": lambda optimizer: optimizer.state.clear(),
    "all state replaced": lambda optimizer: setattr(optimizer, "state", copy.deepcopy(optimizer.state)),
    "step set back": edit_each(lambda state: state.update(step=0)),
    "step a float": edit_each(lambda state: state.update(step=5.0)),
    "step a tensor": edit_each(lambda state: state.update(step=torch.tensor(5))),
    "moments filled in place": edit_each(lambda state: [x.fill_(0.5) for key, x in state.items() if key != "step"]),
    "a key of the user's": edit_each(lambda state: state.update(seen=1)),
    "a key taken out": edit_each(lambda state: state.pop("exp_avg")),
}
for name, of_optimizer in EDITS.items():
    for capturable in (False, True):
        case("state", f"{name}{', capturable' * capturable}")(functools.partial(edit, of=of_optimizer, capturable=capturable))


def materialize(path: str, how: Callable[[torch.nn.ParameterList], None], before: int, **options: Any) -> None:
    """An optimizer made on the meta device goes on as one that is made now."""
    model, optimizer = made(path, before=before, beta1=0.9, device="meta", **options)
    optimizer.zero_grad()
    optimizer.state_dict()
    with pytest.warns(UserWarning, match="begins anew") if before and not options else nullcontext():
        how(model)
        assert not any(p.is_meta for p in params_of(optimizer))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in params_of(optimizer):
                p.copy_(torch.randn(p.shape, generator=generator))
        check_steps(optimizer, path)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def swap_by_module(model: torch.nn.ParameterList) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swap_each(model: torch.nn.ParameterList) -> None:
    for p in model:
        torch.utils.swap_tensors(p, torch.nn.Parameter(torch.empty(p.shape)))


for name, how in {"to_empty": swap_by_module, "swap_tensors": swap_each}.items():
    for before in (0, 2):
        for options_ in ({}, {"capturable": True}, {"capturable": True, "lr": 1e-2, "relative_step": False}):
            case("state", f"{name} of meta parameters, {before} steps before{''.join(f', {key}' for key in options_)}")(
                functools.partial(materialize, how=how, before=before, **options_)
            )


@case("state", "other parameters, of other shapes, in the same objects")
def reshape(path: str) -> None:
    model, optimizer = made(path, before=1, beta1=0.9)
    model[0].grad = None
    model[0].data = torch.ones(6, 9)
    model[0].grad = torch.ones(6, 9)
    for p in params_of(optimizer)[1:]:
        p.grad = torch.ones_like(p)
    check_error(optimizer, r"`exp_avg_sq_col` of parameter 0 \(shape \(6, 9\)\)")
