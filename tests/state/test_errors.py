"""Bad input: what is given, which exception it raises, what that says. Nothing is lost by any of them."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adafactor_compiled import Adafactor
from adafactor_compiled._state.options import check_gradient
from adafactor_compiled._step.compilation import Compilation

MANUAL = {"lr": 1e-3, "relative_step": False}

# options, message
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lr": 1e-3}, "Cannot combine manual `lr` and `relative_step=True` options"),
    ({**MANUAL, "warmup_init": True}, "`warmup_init=True` requires `relative_step=True`"),
    ({"relative_step": False}, "`lr` should be a number or a tensor when `relative_step=False` but is: None"),
    (
        {**MANUAL, "lr": -1e-3},
        "a finite number >= 0 or a floating-point tensor with one element but is: -0.001",
    ),
    ({**MANUAL, "lr": math.nan}, "`lr` should be None, a finite number >= 0"),
    ({**MANUAL, "lr": math.inf}, "`lr` should be None, a finite number >= 0"),
    ({**MANUAL, "lr": "fast"}, "`lr` should be None, a finite number >= 0"),
    ({**MANUAL, "lr": True}, "`lr` should be None, a finite number >= 0"),
    ({**MANUAL, "lr": torch.ones(2)}, "a floating-point tensor with one element"),
    ({**MANUAL, "lr": torch.tensor(1)}, "a floating-point tensor with one element"),
    ({"eps": (-1, 1e-3)}, "`eps` should be two finite numbers >= 0 but is: (-1, 0.001)"),
    ({"eps": (1e-30,)}, "`eps` should be two finite numbers >= 0 but is: (1e-30,)"),
    ({"eps": (1e-30, 1e-3, 1e-3)}, "`eps` should be two finite numbers >= 0"),
    ({"eps": 1e-8}, "`eps` should be two finite numbers >= 0 but is: 1e-08"),
    ({"eps": (math.nan, 1e-3)}, "`eps` should be two finite numbers >= 0"),
    ({"eps": ("a", "b")}, "`eps` should be two finite numbers >= 0"),
    ({"clip_threshold": 0.0}, "`clip_threshold` should be None or a finite number > 0 but is: 0.0"),
    ({"clip_threshold": -1.0}, "`clip_threshold` should be None or a finite number > 0"),
    ({"clip_threshold": math.inf}, "`clip_threshold` should be None or a finite number > 0"),
    ({"decay_rate": 0.8}, "`decay_rate` should be a finite number <= 0 but is: 0.8"),
    ({"decay_rate": None}, "`decay_rate` should be a finite number <= 0 but is: None"),
    ({"decay_rate": -math.inf}, "`decay_rate` should be a finite number <= 0"),
    ({"beta1": 1.0}, "`beta1` should be None or a number in [0, 1) but is: 1.0"),
    ({"beta1": -0.1}, "`beta1` should be None or a number in [0, 1)"),
    ({"beta1": (0.9, 0.999)}, "`beta1` should be None or a number in [0, 1)"),
    ({"weight_decay": -0.1}, "`weight_decay` should be a finite number >= 0 but is: -0.1"),
    ({"weight_decay": math.nan}, "`weight_decay` should be a finite number >= 0"),
    ({"scale_parameter": 2}, "`scale_parameter` should be a bool but is: 2"),
    ({"weight_decay": np.bool_(True)}, "`weight_decay` should be a finite number >= 0 but is: True"),
    ({"weight_decay": torch.ones(2)}, "`weight_decay` should be a finite number >= 0"),
    ({**MANUAL, "lr": np.ones(2)}, "`lr` should be None, a finite number >= 0"),
    ({"decay_rate": torch.tensor(0.5)}, "`decay_rate` should be a finite number <= 0 but is: 0.5"),
    ({"relative_step": None, "lr": 1e-3}, "`relative_step` should be a bool but is: None"),
    ({"warmup_init": "no"}, "`warmup_init` should be a bool but is: 'no'"),
    ({"foreach": 2}, "`foreach` should be None or a bool but is: 2"),
    ({"compile": "inductor"}, "`compile` should be None or a bool but is: 'inductor'"),
    ({"maximize": None}, "`maximize` should be a bool but is: None"),
    ({"capturable": -1}, "`capturable` should be a bool but is: -1"),
    ({"foreach": False, "compile": True}, "`compile=True` compiles the multi-tensor path and cannot go with `foreach=False`"),
]
of_a_group = [case for case in OPTIONS if case[0].get("relative_step", False) is not None]

of_a_checkpoint = [
    case for case in OPTIONS[3:] if not case[0].keys() & {"foreach", "compile", "capturable"}
]  # never read there


def param(*shape: int, **like: Any) -> Tensor:
    return torch.ones(shape or (3, 4), requires_grad=True, **like)


def snapshot(optimizer: Adafactor) -> Any:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy([[p.detach() for p in params], [optimizer.state[p] for p in params]])


def assert_unchanged(optimizer: Adafactor, before: Any) -> None:
    after = snapshot(optimizer)
    assert torch.utils._pytree.tree_all(
        lambda pair: torch.equal(*pair) if isinstance(pair[0], Tensor) else pair[0] == pair[1],
        torch.utils._pytree.tree_map(lambda *pair: pair, after, before),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Adafactor([param()], **options)


@pytest.mark.parametrize(("options", "message"), of_a_group, ids=str)
def test_group(options: dict[str, Any], message: str) -> None:
    optimizer = Adafactor([param()])
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": [param()], **options})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 1
    with pytest.raises(ValueError, match=re.escape(message)):
        Adafactor([{"params": [param()]}, {"params": [param()], **options}])


@pytest.mark.parametrize(("options", "message"), of_a_checkpoint, ids=str)
def test_checkpoint_with_a_bad_option(options: dict[str, Any], message: str) -> None:
    optimizer = Adafactor([param()])
    before = copy.deepcopy(optimizer.param_groups)
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(checkpoint)
    assert [{**group, "params": None} for group in optimizer.param_groups] == [{**group, "params": None} for group in before]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([param(dtype=torch.complex64)], "Adafactor does not support complex parameters but parameter 0 of shape (3, 4)"),
        ([param(), torch.ones(2).to(torch.float8_e5m2).requires_grad_()], "but parameter 1 of shape (2,) is torch.float8_e5m2"),
        (
            [{"params": [param()], "weight_deacy": 0.1}],
            "unknown key in a parameter group: 'weight_deacy', which is close to `weight_decay`",
        ),
        ([], "optimizer got an empty parameter list"),
        ([{"params": [shared := param()]}, {"params": [shared]}], "some parameters appear in more than one parameter group"),
        ([param(), twice := param(), twice], "parameter group 0 holds a parameter twice"),
    ],
    ids=["complex", "float8", "typo", "empty list", "shared", "twice"],
)
def test_parameters(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Adafactor(params)


@pytest.mark.parametrize(
    "params", [[{"params": {param()}}], [[param()]], [1.0], param()], ids=["set", "lists", "number", "tensor"]
)
def test_parameters_that_torch_refuses(params: Any) -> None:
    with pytest.raises(TypeError) as ours:
        Adafactor(params)
    with pytest.raises(TypeError) as theirs:
        torch.optim.SGD(params)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2])
def test_frozen_parameter_that_is_to_be_stepped_after_all(dtype: torch.dtype) -> None:
    frozen, other = torch.ones(2).to(dtype), param()
    optimizer = Adafactor([frozen, other], compile=False)
    frozen.grad, other.grad = torch.ones(2).to(dtype), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=f"parameter 0 of shape .* is {dtype}"):
        optimizer.step()
    assert optimizer.state[other]["step"] == 0


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="weight_deacy"):
        Adafactor([param()], weight_deacy=0.1)  # type: ignore[call-arg]


def of_another_shape(p: Tensor) -> None:
    p.data = torch.ones(4, 3)


def sparse(p: Tensor) -> None:
    p.grad = torch.ones(3, 4).to_sparse()


GRADIENTS = [
    (sparse, "Adafactor does not support sparse gradients."),
    (
        of_another_shape,
        "of parameter 1 (shape (4, 3) on cpu) should have its shape and device but has shape (3, 4) on cpu",
    ),
]


@pytest.mark.parametrize("path", [{"foreach": False}, {"compile": False}, {"compile": True}], ids=str)
@pytest.mark.parametrize(("spoil", "message"), GRADIENTS, ids=lambda x: getattr(x, "__name__", ""))
def test_gradients(spoil: Any, message: str, path: dict[str, Any]) -> None:
    """The first parameter is fine, and has not moved when the second one is refused."""
    first, second = param(), param()
    optimizer = Adafactor([first, second], **path)
    first.grad, second.grad = torch.ones(3, 4), torch.ones(3, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compilation, "compiles", lambda *_: False)  # the checks come before; nothing is to be compiled here
        spoil(second)
        state = copy.deepcopy(optimizer.state[first])
        with pytest.raises(RuntimeError, match=re.escape(message)):
            optimizer.step()
    assert torch.equal(first, torch.ones(3, 4))
    assert state.keys() == optimizer.state[first].keys()
    assert all(torch.equal(torch.as_tensor(optimizer.state[first][key]), torch.as_tensor(state[key])) for key in state)


def test_gradient_on_another_device() -> None:
    """Torch refuses to set one, but a tensor subclass may."""
    message = "the gradient of parameter 1 (shape (3, 4) on cpu) should have its shape and device but has shape (3, 4) on meta"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        check_gradient(param(), param(device="meta"), 1)


def drop_column(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state"][0]["exp_avg_sq_col"]


def swap_factors(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["state"][0]
    state["exp_avg_sq_row"], state["exp_avg_sq_col"] = state["exp_avg_sq_col"], state["exp_avg_sq_row"]


def spoil_row(checkpoint: dict[str, Any]) -> None:
    checkpoint["state"][0]["exp_avg_sq_row"].fill_(math.nan)


def drop_parameter(checkpoint: dict[str, Any]) -> None:
    checkpoint["param_groups"][0]["params"].pop()


CHECKPOINTS = [
    (drop_column, "the checkpoint's state of parameter 0 (shape (3, 4)) lacks exp_avg_sq_col; nothing was loaded"),
    (swap_factors, "the checkpoint's `exp_avg_sq_row` of parameter 0 (shape (3, 4)) should have shape (3,) but is: (4,)"),
    (spoil_row, "the checkpoint's `exp_avg_sq_row` of parameter 0 (shape (3, 4)) should be finite but holds NaN or inf"),
    (drop_parameter, "the checkpoint's groups should have [2] parameters but have [1]; nothing was loaded"),
]


@pytest.mark.parametrize(("spoil", "message"), CHECKPOINTS, ids=lambda x: getattr(x, "__name__", ""))
def test_checkpoints(spoil: Any, message: str) -> None:
    params = [param(), param(5)]
    optimizer = Adafactor(params, compile=False)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    spoil(checkpoint)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)
    optimizer.step()  # and goes on
