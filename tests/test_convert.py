"""Checkpoints: of other optimizers' real classes, refused ones, and through torch.distributed.checkpoint."""

import copy
import math
import re

import pytest
import torch
from bare_timm import timm_module
from parameters import parameters, set_gradients
from pytorch_optimizer import AdaFactor as PytorchOptimizerAdaFactor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from adafactor_compiled import Adafactor, convert

SHAPES = [(6, 9), (12,), (2, 3, 5), ()]


def timm_adafactor():
    return timm_module("adafactor").Adafactor


def run(optimizer, params, steps):
    for step in steps:
        set_gradients(params, 1000 + step)
        optimizer.step()


def continued(converter, source, params, **options):
    """Our optimizer over copies of the parameters, with the source's converted state."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    # Options that no checkpoint of these agrees with: the converter, not a default, has to set them.
    optimizer = Adafactor(copies, lr=0.3, relative_step=False, compile=False, **options)
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(converter(saved, optimizer))
    assert repr(saved) == repr(before)
    return optimizer, copies


def assert_goes_on_alike(converter, source, params, steps, tolerance=2e-6, **options):
    optimizer, copies = continued(converter, source, params, **options)
    for step in steps:
        run(source, params, [step])
        run(optimizer, copies, [step])
        for p, q in zip(params, copies, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    return optimizer


@pytest.mark.parametrize(
    ("options", "relative"),
    [
        ({}, True),
        ({"lr": 1e-3, "beta2_decay": -0.6, "d": 1.5, "maximize": True}, False),
        ({"lr": torch.tensor(0.02), "eps": (1e-8, 1e-2)}, False),
    ],
    ids=["default", "manual", "tensor lr"],
)
@pytest.mark.parametrize("foreach", [False, True])
def test_torch_goes_on_alike(options, relative, foreach):
    params = parameters(SHAPES)
    source = torch.optim.Adafactor(params, foreach=foreach, **options)
    run(source, params, range(5))
    optimizer = assert_goes_on_alike(convert.from_torch, source, params, range(5, 10))
    assert optimizer.param_groups[0]["relative_step"] == relative
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 10


def test_torch_late_in_a_run_is_relative():
    params = parameters(SHAPES)
    source = torch.optim.Adafactor(params, lr=0.05)
    run(source, params, range(2))
    for state in source.state.values():
        state["step"].fill_(20_000.0)
    optimizer = assert_goes_on_alike(convert.from_torch, source, params, range(2, 5))
    assert optimizer.param_groups[0]["relative_step"]


def test_torch_bfloat16_moments_become_float32():
    params = parameters(SHAPES, torch.bfloat16)
    source = torch.optim.Adafactor(params)
    run(source, params, range(3))
    optimizer, copies = continued(convert.from_torch, source, params)
    state = optimizer.state[copies[0]]
    assert state["exp_avg_sq_row"].dtype is torch.float32
    assert torch.equal(state["exp_avg_sq_row"], source.state[params[0]]["row_var"].squeeze(-1).float())


def test_a_parameter_that_never_stepped_converts():
    params = parameters(SHAPES)
    source = torch.optim.Adafactor(params)
    set_gradients(params, 0)
    params[1].grad = None
    source.step()
    assert_goes_on_alike(convert.from_torch, source, params, range(1, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1, "eps_scale": 1e-2, "clip_threshold": 0.7},
        {"warmup_init": True, "decay_rate": -0.6, "scale_parameter": False},
        {"caution": True},  # changes nothing without momentum
        {"caution": True, "betas": (0.9, 0.999), "lr": 1e-2},
    ],
)
def test_timm_goes_on_alike(options):
    shapes = [(20, 30), (7,), (3, 20, 24)]  # all factored as here, or not at all
    params = parameters(shapes)
    source = timm_adafactor()(params, **options)
    run(source, params, range(5))
    assert_goes_on_alike(convert.from_timm, source, params, range(5, 10))


def test_timm_whole_second_moment_of_a_small_matrix_becomes_what_ours_would_be():
    params = parameters([(4, 6)])
    source = timm_adafactor()(params)
    twins = parameters([(4, 6)])
    ours = Adafactor(twins, compile=False)
    run(source, params, range(5))
    run(ours, twins, range(5))
    assert "exp_avg_sq" in source.state[params[0]]
    optimizer, copies = continued(convert.from_timm, source, params)
    for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
        torch.testing.assert_close(optimizer.state[copies[0]][key], ours.state[twins[0]][key], rtol=1e-5, atol=0)


def test_timm_factors_convolutions_over_their_channels_and_small_matrices_not():
    params = parameters([(20, 30), (24, 18, 3, 3), (3, 20), (7,)])
    source = timm_adafactor()(params)
    run(source, params, range(5))
    own = {"factor_dims": "largest", "min_dim_size_to_factor": 17}
    optimizer = assert_goes_on_alike(convert.from_timm, source, params, range(5, 10), **own)
    kept = [set(optimizer.state[p]) - {"step", "RMS"} for p in optimizer.param_groups[0]["params"]]
    assert kept[2] == kept[3] == {"exp_avg_sq"} != kept[1]


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum_dtype": torch.float32, "beta2_cap": 0.6, "caution": True, "clipping_threshold": 1.0},
        {"momentum": None, "weight_decay": 1e-3, "unscaled_wd": True, "decay_offset": 2},
        {"momentum": None, "weight_decay": 0.1, "beta2_cap": 1.0},
    ],
    ids=str,
)
def test_timm_big_vision_goes_on_alike(options):
    params = parameters([(20, 30), (24, 18, 3, 3), (30, 40, 1, 1), (3, 20), (7,)])
    source = timm_module("adafactor_bv").AdafactorBigVision(params, lr=1e-2, **options)
    run(source, params, range(5))
    own = {"factor_dims": "largest", "min_dim_size_to_factor": 16}
    assert_goes_on_alike(convert.from_timm, source, params, range(5, 10), **own)


def test_optax_state_as_arrays():
    """optax's second moments lack their largest dimension, or their second largest, wherever these are."""
    shapes = [(20, 30), (30, 20), (24, 18, 3, 3), (3, 20), (7,)]
    params, twins = parameters(shapes), parameters(shapes)
    options = {"lr": 1e-2, "scale_parameter": False, "relative_step": False, "compile": False, "beta1": 0.9}
    options |= {"factor_dims": "largest", "min_dim_size_to_factor": 16}
    source, optimizer = Adafactor(params, **options), Adafactor(twins, **options)
    run(source, params, range(5))
    rows, columns, whole = [], [], []
    for p in params:
        state, nothing = source.state[p], torch.zeros(1)
        pair = [state.get("exp_avg_sq_row", nothing), state.get("exp_avg_sq_col", nothing)]
        order = sorted(range(p.ndim), key=lambda dim, p=p: p.shape[dim])[-2:]
        pair = pair if order == sorted(order) else pair[::-1]
        rows.append(pair[0].numpy())
        columns.append(pair[1].numpy())
        whole.append(state.get("exp_avg_sq", nothing).numpy())
    ema = [source.state[p]["exp_avg"].numpy() for p in params]
    optimizer.load_state_dict(convert.from_optax(5, rows, columns, whole, optimizer, ema))
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    run(source, params, range(5, 8))
    run(optimizer, twins, range(5, 8))
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    with pytest.raises(convert.Refused, match="`v` should have 5 arrays but has 4"):
        convert.from_optax(5, rows, columns, whole[:4], optimizer)


def test_torch_weight_decay_goes_on_alike():
    params = parameters(SHAPES)
    source = torch.optim.Adafactor(params, weight_decay=0.1)
    run(source, params, range(5))
    assert_goes_on_alike(convert.from_torch, source, params, range(5, 10))


def test_pytorch_optimizer_cap_goes_on_alike():
    params = parameters(SHAPES)
    source = PytorchOptimizerAdaFactor(params, betas=(0.9, 0.5), momentum_dtype=torch.float32)
    run(source, params, range(5))
    optimizer = assert_goes_on_alike(convert.from_pytorch_optimizer, source, params, range(5, 10))
    assert optimizer.param_groups[0]["beta2_cap"] == 0.5


def test_refusals_are_all_reasons():
    params = parameters([(17, 17, 17), (18, 18, 18), (5,)])
    source = timm_adafactor()(params)
    run(source, params, range(2))
    optimizer = Adafactor(params, compile=False)
    reasons = convert.refusals(convert.from_timm, source.state_dict(), optimizer)
    assert [f"parameter {i}" in reason for i, reason in enumerate(reasons)] == [True, True]
    with pytest.raises(ValueError, match=r"parameter 0 .*\(and 1 more, see `refusals`\)"):
        convert.from_timm(source.state_dict(), optimizer)
    agreeing = Adafactor(params, compile=False, factor_dims="largest")
    assert len(convert.refusals(convert.from_timm, source.state_dict(), agreeing)) == 2  # over 1, 2 here and 0, 1 there


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"betas": (None, 0.999)}, {}),
        ({"betas": (0.9, 0.999), "weight_decay": 0.1, "momentum_dtype": torch.float32, "warmup_init": True}, {}),
        ({"betas": (None, 0.999), "lr": 1e-3, "relative_step": False, "scale_parameter": False, "eps2": 1e-2}, {}),
        ({"betas": (None, 0.999), "decay_rate": -0.6, "clip_threshold": 0.7}, {"decay_rate": -0.6, "clip_threshold": 0.7}),
    ],
)
def test_pytorch_optimizer_goes_on_alike(options, own, foreach):
    params = parameters(SHAPES)
    source = PytorchOptimizerAdaFactor(params, foreach=foreach, **options)
    run(source, params, range(5))
    assert_goes_on_alike(convert.from_pytorch_optimizer, source, params, range(5, 10), **own)


def at_step(optimizer, step):
    for group in optimizer.param_groups:
        group["step"] = step
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(float(step))
    return optimizer


def without(key):
    def edit(optimizer):
        for state in optimizer.state.values():
            state.pop(key, None)
        return optimizer

    return edit


def torch_source(**options):
    return lambda params: torch.optim.Adafactor(params, **options)


def scheduled(optimizer):
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    return optimizer


REFUSED = {
    "torch weight decay": (
        convert.from_torch,
        torch_source(weight_decay=0.1),
        scheduled,
        "`weight_decay` should be 0 under a scheduler but is: 0.1",
    ),
    "torch lr": (convert.from_torch, torch_source(lr=0.1), lambda x: at_step(x, 500), r"`lr` should be at most .* 0\.04468"),
    "torch keys": (convert.from_torch, torch_source(), without("col_var"), r"parameter 0 \(shape \(20, 30\)\) lacks col_var"),
    "timm convolution": (
        convert.from_timm,
        lambda params: timm_adafactor()(params),
        None,
        r"parameter 2 \(shape \(17, 17, 17\)\) is factored over dimensions \(0, 1\) there but factored over \(1, 2\) here",
    ),
    "timm corrected decay": (
        convert.from_timm,
        lambda params: timm_module("adafactor_bv").AdafactorBigVision(params, weight_decay=0.1, corrected_weight_decay=True),
        None,
        "`corrected_weight_decay` should be False",
    ),
    "timm keys": (
        convert.from_timm,
        lambda params: timm_adafactor()(params[:2]),
        without("exp_avg_sq_col"),
        "lacks exp_avg_sq_col",
    ),
    "ams_bound": (
        convert.from_pytorch_optimizer,
        lambda params: PytorchOptimizerAdaFactor(params, ams_bound=True),
        None,
        "`ams_bound` should be False",
    ),
    "fixed decay": (
        convert.from_pytorch_optimizer,
        lambda params: PytorchOptimizerAdaFactor(params, weight_decay=0.1, fixed_decay=True),
        None,
        "`weight_decay` should be decoupled",
    ),
    "another optimizer": (convert.from_torch, torch.optim.AdamW, None, "those of the optimizer that is converted but lack 'd'"),
    "another one for timm": (convert.from_timm, torch.optim.AdamW, None, "but lack 'relative_step'"),
    "another number": (convert.from_torch, lambda params: torch.optim.Adafactor(params[:1]), None, r"have \[\d\] parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused(name):
    converter, make, edit, message = REFUSED[name]
    params = parameters([(20, 30), (7,), (17, 17, 17)])
    source = make(params)
    run(source, params, range(2))
    if edit is not None:
        source = edit(source)
    # The optimizer over as many parameters as the source has, unless the number is what is wrong.
    count = 3 if name == "another number" else len(source.param_groups[0]["params"])
    optimizer = Adafactor(params[:count], compile=False)
    with pytest.raises(ValueError, match=message):
        converter(source.state_dict(), optimizer)
    assert any(re.search(message, reason) for reason in convert.refusals(converter, source.state_dict(), optimizer))


def corrupted(key, value):
    def edit(saved):
        saved["state"][0][key] = value(saved["state"][0][key])

    return edit


BROKEN = {
    "nan": (corrupted("exp_avg_sq_row", lambda x: x / 0 * 0), r"`exp_avg_sq_row` of parameter 0 .* finite"),
    "inf": (corrupted("exp_avg_sq_col", lambda x: x / 0), r"`exp_avg_sq_col` of parameter 0 .* finite"),
    "RMS": (corrupted("RMS", lambda x: x * torch.nan), r"`RMS` of parameter 0 .* finite"),
    "momentum": (corrupted("exp_avg", lambda x: x * torch.inf), r"`exp_avg` of parameter 0 .* finite"),
    "shape": (corrupted("exp_avg_sq_row", lambda x: x[:-1]), r"`exp_avg_sq_row` of parameter 0 .* shape \(6,\) but is: \(5,\)"),
    "missing": (lambda saved: saved["state"][0].pop("exp_avg_sq_row"), "parameter 0 .* lacks exp_avg_sq_row"),
    "step nan": (
        corrupted("step", lambda _: torch.tensor(math.nan)),
        "`step` of parameter 0 .* a count >= 0 but is: tensor.nan",
    ),
    "step negative": (corrupted("step", lambda _: -1), "`step` of parameter 0 .* a count >= 0 but is: -1"),
    "step a word": (corrupted("step", lambda _: "3"), "`step` of parameter 0 .* a count >= 0 but is: '3'"),
    "steps": (corrupted("step", lambda _: torch.ones(2)), "`step` of parameter 0 .* a count >= 0"),
    "RMS of two": (corrupted("RMS", lambda _: torch.ones(2)), r"`RMS` of parameter 0 .* shape \(\) but is: \(2,\)"),
    "RMS a list": (corrupted("RMS", lambda _: [0.5]), r"`RMS` of parameter 0 .* shape \(\) but is: \[0.5\]"),
    "no step": (lambda saved: saved["state"][0].pop("step"), "parameter 0 .* lacks step"),
    "groups": (lambda saved: saved["param_groups"][0]["params"].pop(), r"\[4\] parameters but have \[3\]"),
    "option": (lambda saved: saved["param_groups"][0].update(decay_rate=1.0), "`decay_rate` should be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_and_changes_nothing(name):
    edit, message = BROKEN[name]
    params = parameters(SHAPES)
    optimizer = Adafactor(params, beta1=0.9, compile=False)
    run(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    edit(saved)
    run(optimizer, params, [3])
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert repr(optimizer.state_dict()) == repr(before[0])
    twins = [torch.nn.Parameter(p) for p in before[1]]
    twin = Adafactor(twins, beta1=0.9, compile=False)
    twin.load_state_dict(before[0])
    run(optimizer, params, [4])
    run(twin, twins, [4])
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("capturable", [False, True])
def test_distributed_checkpoint_of_an_optimizer_that_never_stepped_changes_no_parameter(capturable):
    torch.manual_seed(0)
    options = {"weight_decay": 0.5, "beta1": 0.9, "compile": False, "capturable": capturable}
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    fresh = copy.deepcopy(model)
    optimizer = Adafactor(model.parameters(), **options)
    saved_fresh = get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))

    run(optimizer, list(model.parameters()), range(3))
    saved = get_optimizer_state_dict(model, optimizer)
    other = copy.deepcopy(model)
    resumed = Adafactor(other.parameters(), **options)
    set_optimizer_state_dict(other, resumed, copy.deepcopy(saved))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    run(optimizer, list(model.parameters()), range(3, 6))
    run(resumed, list(other.parameters()), range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))

    again = Adafactor(fresh.parameters(), **options)
    set_optimizer_state_dict(fresh, again, saved_fresh)
    assert all(state["step"] == 0 for state in again.state.values())
