"""What a parameter group may hold: names of others, numbers of other libraries; and what is taken for a misspelled option."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from parameters import parameters, params_of, set_gradients
from paths import PATHS
from torch import Tensor
from transformers.optimization import Adafactor as TransformersAdafactor

from adafactor_compiled import Adafactor, AdafactorSchedule
from adafactor_compiled._state.names import option_meant
from adafactor_compiled._state.options import OPTIONS

NAMES = """
    params param_names name group_name layer layer_name rho adaptive rank update_proj_gap scale proj_type initial_lr
    max_lr min_lr base_lr swa_lr lr_scale lr_mult lr_ratio lr_decay lr_max scale_lr base_momentum max_momentum momentum
    betas beta2 alpha use_muon ns_steps step k r d d0 amsgrad fused differentiable warmup warmup_steps decay_steps
    weight_sum weight_lr_power scheduled_lr initial_weight_decay weight_decay_mult no_weight_decay wd_mult scale_factor
    relative clip threshold seed ema layer_decay train_mode id
"""

MISSPELLED = {
    "lr": "lrs LR lr_ learning_rate learningRate",
    "eps": "eps1 eps2 epsilon",
    "clip_threshold": "clip_treshold clipthreshold clip_thresh clipping_threshold",
    "decay_rate": "decayrate decay_rates",
    "beta1": "beta_1 beta beta1s",
    "weight_decay": "weight_deacy weightdecay weight_decays weights_decay wd",
    "scale_parameter": "scale_param scale_parameters scaleparameter scale_paramter",
    "relative_step": "relative_steps relativestep",
    "warmup_init": "warm_up_init warmup_int",
    "foreach": "for_each forech",
    "compile": "compiles",
    "maximize": "maximise",
    "capturable": "capturabel",
    "stochastic_rounding": "stochastic_roundings",
    "nonfinite": "non_finite",
}


@pytest.mark.parametrize("name", [*NAMES.split(), *OPTIONS])
def test_names_of_their_own(name: str) -> None:
    assert option_meant(name) is None


@pytest.mark.parametrize(("option", "name"), [(option, name) for option, x in MISSPELLED.items() for name in x.split()])
def test_misspelled_options(option: str, name: str) -> None:
    assert option_meant(name) == option
    with pytest.raises(ValueError, match=f"{name!r}, which is close to `{option}`"):
        Adafactor([{"params": [torch.ones(3, requires_grad=True)], name: 1}])


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_other_keys_are_kept_saved_and_loaded(compile: bool) -> None:
    params = [torch.ones(0, requires_grad=True)]
    keys = {
        "name": "encoder",
        "rank": np.int64(4),
        "rho": torch.tensor(0.5),
        "adaptive": True,
        7: "seven",
        "betas": (0.9, 0.99),
    }
    optimizer = Adafactor([{"params": params, **keys}], compile=compile)
    params[0].grad = torch.ones(0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = Adafactor([torch.ones(0, requires_grad=True)], compile=compile)
    other.load_state_dict(saved)
    for group in (optimizer.param_groups[0], saved["param_groups"][0], other.param_groups[0]):
        assert {key: group[key] for key in keys} == keys
        assert type(group["rank"]) is np.int64
    TransformersAdafactor([torch.ones(0, requires_grad=True)]).load_state_dict(saved)


VALUES: dict[str, list[Any]] = {
    "lr": [np.float32(0.5), np.float64(0.5), np.array(0.5), np.int64(1)],
    "eps": [(np.float32(0.5), torch.tensor(0.5)), [0.5, np.array(0.5)], np.array([0.5, 0.5])],
    "clip_threshold": [np.float32(0.5), torch.tensor(0.5, requires_grad=True)],
    "decay_rate": [np.float32(-0.5), torch.tensor(-0.5)],
    "beta1": [np.float32(0.5), torch.tensor(0.5)],
    "weight_decay": [np.float64(0.5), torch.tensor(1)],
    "scale_parameter": [np.bool_(False), 0, 1, torch.tensor(True)],
    "maximize": [np.bool_(True), 1, np.int64(1)],
    "foreach": [0, np.bool_(False), 1],
    "compile": [0, np.bool_(False)],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, x in VALUES.items() for value in x], ids=str)
def test_values_become_those_of_python(option: str, value: Any) -> None:
    manual = {"lr": 1e-3, "relative_step": np.bool_(False), "compile": False}
    given = {**manual, option: value}

    def param() -> Tensor:
        return torch.ones(3, 4, requires_grad=True)

    one = Adafactor([param()], **given)
    several = Adafactor([{"params": [param()], **given}])
    several.add_param_group({"params": [param()], **given})
    loaded = Adafactor([param()], **{option: value} if option in ("foreach", "compile") else {})
    saved = one.state_dict()
    saved["param_groups"][0][option] = value
    loaded.load_state_dict(saved)
    expected = tuple(map(float, value)) if option == "eps" else value
    for group in (*one.param_groups, *several.param_groups, *loaded.param_groups):
        parts = group[option] if option == "eps" else [group[option]]
        assert all(type(x) in (int, float, bool) for x in parts)
        assert (tuple(group[option]) if option == "eps" else group[option]) == expected
        assert group["relative_step"] is False


def test_lr_that_is_a_tensor_stays_that_tensor() -> None:
    lr = torch.tensor(1e-3)
    assert Adafactor([torch.ones(3, requires_grad=True)], lr=lr, relative_step=False).param_groups[0]["lr"] is lr


@pytest.mark.parametrize("path", PATHS)
def test_lr_with_a_dimension(path: str) -> None:
    """Of size 1: as without it, also for a parameter without dimensions."""
    stepped = []
    for lr in (torch.tensor(0.5), torch.tensor([0.5])):
        params = parameters([(6, 4), (5,), ()])
        optimizer = Adafactor(params, lr=lr, relative_step=False, **PATHS[path])
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        stepped.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*stepped, strict=True))


NUMBERS = {"lr": 0.5, "clip_threshold": 0.5, "decay_rate": -0.5, "beta1": 0.5, "weight_decay": 0.5, "beta2_cap": 0.5}
COUNTS = {"rounding_seed": 3, "min_dim_size_to_factor": 0, "decay_offset": 1}
SET_BY_HAND: list[tuple[str, Any]] = [*NUMBERS.items(), *COUNTS.items(), ("eps", (0.5, 0.5))]
KINDS: dict[str, Callable[[Any], Any]] = {
    "an array without dimensions": np.array,
    "an array": lambda x: np.array([x]),
    "numpy's number": lambda x: np.array(x)[()],
    "a tensor": lambda x: torch.tensor([x]),
    "of two dimensions": lambda x: torch.tensor([[x]]),
    "without dimensions": torch.tensor,
    "with gradients": lambda x: torch.tensor([x], requires_grad=isinstance(x, float)),
}


@pytest.mark.parametrize(("option", "value"), SET_BY_HAND, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_numbers_that_are_set_by_hand(path: str, option: str, value: Any) -> None:
    """Before the first step and between steps, as the number itself; or they are refused by name."""

    def stepped(value: Any, after: int) -> list[Tensor]:
        params = parameters([(6, 4), (5,), (5,), ()])
        rounds = option == "rounding_seed" and path != "compiled"  # which would compile for long
        options = {"stochastic_rounding": True, "momentum_dtype": torch.bfloat16} if rounds else {}
        optimizer = Adafactor(params, lr=1e-3, relative_step=False, beta1=0.9, **options, **PATHS[path])
        for step in range(3):
            if step == after:
                optimizer.param_groups[0][option] = value
            set_gradients(params, step)
            optimizer.step()
        return params

    for after in (0, 2):
        expected = stepped(value, after)
        for kind, of in KINDS.items():
            given = tuple(map(of, value)) if option == "eps" else of(value)
            for p, q in zip(stepped(given, after), expected, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=kind)
        for bad in (np.ones(3), torch.ones(3), "much", [], True):
            with pytest.raises(RuntimeError, match=re.escape(f"`{option}` should be ")):
                stepped(bad, after)


def test_a_tensor_that_is_set_by_hand_may_be_written_to() -> None:
    params, decay = parameters([(6, 4)]), torch.tensor([0.0])
    optimizer = Adafactor(params, lr=1.0, scale_parameter=False, relative_step=False, compile=False)
    optimizer.param_groups[0]["weight_decay"] = decay
    for step in range(2):
        set_gradients(params, step, scale=0.0)
        decay.fill_(step)
        optimizer.step()
    assert not params[0].any()


def test_groups_of_another_optimizer() -> None:
    """Whose `lr` is what a schedule has reported there; it is not read."""
    other = Adafactor(parameters([(3, 4)]), compile=False)
    AdafactorSchedule(other)
    set_gradients(params_of(other), 0)
    other.step()
    assert other.param_groups[0]["lr"] is not None
    assert Adafactor(other.param_groups).param_groups[0]["relative_step"] is True


@pytest.mark.parametrize("path", [{"foreach": False}, {"compile": False}, {"foreach": np.bool_(False)}], ids=str)
def test_values_edited_between_steps(path: dict[str, Any]) -> None:
    def stepped(optimizer_class: Any, **options: Any) -> list[Tensor]:
        params = [torch.full(shape, 2.0, requires_grad=True) for shape in ((3, 4), (5,))]
        optimizer = optimizer_class(params, lr=1e-2, relative_step=False, beta1=0.9, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
            optimizer.step()
            optimizer.param_groups[0].update(
                lr=np.float32(0.5),
                eps=(np.float64(1e-20), np.float32(0.25)),
                weight_decay=np.float32(0.25),
                decay_rate=np.float32(-0.5),
                clip_threshold=torch.tensor(0.5),
                scale_parameter=np.bool_(False),
                beta1=np.float64(0.5),
            )
        return params

    for ours, theirs in zip(stepped(Adafactor, **path), stepped(TransformersAdafactor), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
