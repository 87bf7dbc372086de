"""The variations of other Adafactors: against timm's classes, the formulas of optax and big_vision, and path against path."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from bare_timm import timm_module
from paths import PATHS
from tolerances import assert_same_parameter, assert_same_state, largest
from torch import Tensor

from adafactor_compiled import Adafactor
from adafactor_compiled._update import members

SHAPES = [(24, 18), (20, 24, 3, 3), (16, 12, 1, 1), (3, 20), (7,), (), (2, 9, 8), (5, 4, 3)]
FIXED = {"lr": 1e-2, "scale_parameter": False, "relative_step": False}
VARIATIONS: dict[str, dict[str, Any]] = {
    "min_dim_size_to_factor": {"min_dim_size_to_factor": 8},
    "factor_dims": {"factor_dims": "largest"},
    "beta2_cap": {"beta2_cap": 0.6},
    "decay_offset": {"decay_offset": 3},
    "cautious": {"cautious": True, "beta1": 0.9},
    "weight_decay_scale": {"weight_decay_scale": "none", "weight_decay": 1e-3},
    "momentum_dtype": {"momentum_dtype": torch.bfloat16, "beta1": 0.9},
}
EAGER = [PATHS["reference"], PATHS["multi-tensor"]]
PAIRS = [f"{a}+{b}" for a, b in itertools.combinations(VARIATIONS, 2)]


def of_name(name: str) -> dict[str, Any]:
    return {**FIXED, **{key: value for one in name.split("+") for key, value in VARIATIONS[one].items()}}


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def check_steps(params: list[Tensor], other_params: list[Tensor], path: str, ours: Any, theirs: Any, steps: int = 50) -> None:
    for t in range(0, steps, 10):
        train(ours, params, 10)
        train(theirs, other_params, 10)
        for p, q in zip(params, other_params, strict=True):
            assert_same_parameter(p, q.detach().to(p.dtype), path, where=f"step {t + 10}, shape {tuple(p.shape)}")


TIMM = {
    "plain": ({}, {"min_dim_size_to_factor": 3}),
    "caution": ({"betas": (0.9, 0.999), "caution": True}, {"beta1": 0.9, "cautious": True, "min_dim_size_to_factor": 3}),
    "decay": ({"weight_decay": 0.1}, {"weight_decay": 0.1, "min_dim_size_to_factor": 3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", TIMM)
def test_timm_adafactor(name: str, dtype: torch.dtype) -> None:
    theirs, ours = TIMM[name]
    shapes = [(24, 18), (20, 24, 3, 3), (3, 20), (7,)]  # of these it factors the dimensions that are largest
    params, others = parameters(dtype, shapes), parameters(dtype, shapes)
    other = timm_module("adafactor").Adafactor(others, lr=1e-2, min_dim_size_to_factor=2, clip_threshold=1.0, **theirs)
    optimizer = Adafactor(params, **FIXED, factor_dims="largest", foreach=False, **{**ours, "min_dim_size_to_factor": 3})
    check_steps(params, others, "timm", optimizer, other)


BIG_VISION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cap": ({"momentum": None, "beta2_cap": 0.9}, {"beta2_cap": 0.9}),
    "offset": ({"momentum": None, "decay_offset": 20}, {"decay_offset": 20, "beta2_cap": 0.999}),
    "momentum": ({"momentum_dtype": "float32"}, {"beta1": 0.9, "beta2_cap": 0.999}),
    "caution": ({"momentum_dtype": "float32", "caution": True}, {"beta1": 0.9, "cautious": True, "beta2_cap": 0.999}),
    "clipping": ({"momentum": None, "clipping_threshold": 0.5}, {"clip_threshold": 0.5, "beta2_cap": 0.999}),
    "decay": ({"momentum": None, "weight_decay": 0.1}, {"weight_decay": 0.1, "beta2_cap": 0.999}),
    "unscaled decay": (
        {"momentum": None, "weight_decay": 1e-3, "unscaled_wd": True},
        {"weight_decay": 1e-3, "weight_decay_scale": "none", "beta2_cap": 0.999},
    ),
}


@pytest.mark.parametrize("path", EAGER, ids=str)
@pytest.mark.parametrize("name", BIG_VISION)
def test_timm_adafactor_of_big_vision(name: str, path: dict[str, Any]) -> None:
    theirs, ours = BIG_VISION[name]
    dtype = torch.float64 if "decay" in name else torch.float32  # its p * (1 - decay) rounds the same way at every step
    params, others = parameters(dtype), parameters(dtype)
    other = timm_module("adafactor_bv").AdafactorBigVision(others, lr=1e-2, min_dim_size_to_factor=8, **theirs)
    layout = {"factor_dims": "largest", "min_dim_size_to_factor": 8, "clip_threshold": None}
    check_steps(params, others, "timm's big_vision", Adafactor(params, **{**FIXED, **layout, **path, **ours}), other)


def test_timm_momentum_in_bfloat16() -> None:
    """timm rounds before it adds as well, and steps by what is rounded: they agree to the digits of bfloat16."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    start = [p.detach().clone() for p in params]
    other = timm_module("adafactor_bv").AdafactorBigVision(others, lr=1e-2, min_dim_size_to_factor=8)
    layout = {"factor_dims": "largest", "min_dim_size_to_factor": 8, "clip_threshold": None, "beta2_cap": 0.999}
    ours = Adafactor(params, **FIXED, **layout, beta1=0.9, momentum_dtype=torch.bfloat16, foreach=False)
    train(ours, params, 50)
    train(other, others, 50)
    for p, q, p0 in zip(params, others, start, strict=True):
        assert largest(p - q) <= 2**-6 * largest(q - p0)


class Optax:
    """`optax.scale_by_factored_rms` and what big_vision puts around it, in float64, written from their formulas."""

    def __init__(self, least: int, cap: float, offset: int, clipping: float | None, beta1: float | None) -> None:
        self.least, self.cap, self.offset, self.clipping, self.beta1 = least, cap, offset, clipping, beta1
        self.count, self.v_row, self.v_col, self.v, self.momentum = 0, {}, {}, {}, {}

    def step(self, params: dict[int, Tensor], grads: dict[int, Tensor], lr: float, decay: float) -> None:
        """big_vision caps 1 - (count - offset + 1) ** -0.8, and subtracts `decay` of a parameter whatever the rate is."""
        beta2 = min(self.cap, 1.0 - max(self.count - self.offset + 1, 1) ** -0.8)
        self.count += 1
        for i, g in grads.items():
            order = sorted(range(g.ndim), key=lambda dim, g=g: (g.shape[dim], dim))
            squared = g**2 + 1e-30
            if g.ndim < 2 or g.shape[order[-2]] < self.least:
                self.v[i] = beta2 * self.v.get(i, 0) + (1 - beta2) * squared
                update = g * self.v[i] ** -0.5
            else:
                d1, d0 = order[-2:]
                row = self.v_row[i] = beta2 * self.v_row.get(i, 0) + (1 - beta2) * squared.mean(d0, keepdim=True)
                col = self.v_col[i] = beta2 * self.v_col.get(i, 0) + (1 - beta2) * squared.mean(d1, keepdim=True)
                update = g * (row / row.mean(d1, keepdim=True)) ** -0.5 * col**-0.5
            if self.clipping is not None:
                update = update / max(1.0, float(update.square().mean().sqrt()) / self.clipping)
            if self.beta1 is not None:
                update = self.momentum[i] = self.beta1 * self.momentum.get(i, 0) + (1 - self.beta1) * update
            params[i] = params[i] - decay * params[i] - lr * update


@pytest.mark.parametrize("path", EAGER, ids=str)
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("least", [1, 10])
def test_optax_and_big_vision(least: int, beta1: float | None, path: dict[str, Any]) -> None:
    params = parameters(torch.float64)
    theirs = {i: p.detach().clone() for i, p in enumerate(params)}
    options = {**of_name("factor_dims+weight_decay_scale"), "min_dim_size_to_factor": least, "beta2_cap": 0.8}
    ours = Adafactor(params, **options, **path, decay_offset=2, beta1=beta1)
    other, generator = Optax(least, 0.8, 2, 1.0, beta1), torch.Generator().manual_seed(2)
    for _ in range(20):
        grads = {i: torch.randn(p.shape, generator=generator, dtype=p.dtype) for i, p in enumerate(params)}
        for i, p in enumerate(params):
            p.grad = grads[i]
        ours.step()
        other.step(theirs, grads, 1e-2, 1e-3)
    for i, p in enumerate(params):
        assert_same_parameter(p, theirs[i], "optax", where=f"shape {tuple(p.shape)}")


@pytest.mark.parametrize("name", [*VARIATIONS, *PAIRS])
def test_multi_tensor_is_the_reference(name: str) -> None:
    """Each variation and each pair of them, in three dtypes, against the reference in float64."""
    check_path(name, compile=False)


def check_path(
    name: str,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16),
    shapes: list[tuple[int, ...]] = SHAPES,
    **path: Any,
) -> None:
    options = of_name(name)
    for dtype in dtypes:
        params = parameters(dtype, shapes)
        exact = [torch.nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in params]
        ours, reference = Adafactor(params, **options, **path), Adafactor(exact, **options, foreach=False)
        train(ours, params, 1)
        train_on(reference, exact, params)
        rounded = "momentum_dtype" in options
        for p, q in zip(params, exact, strict=True):
            if rounded:  # a momentum on either side of a midpoint is one unit apart, and the next one steps by it
                ours.state[p]["exp_avg"].copy_(reference.state[q]["exp_avg"])
                continue
            expected = {k: v.to(ours.state[p][k].dtype) if isinstance(v, Tensor) else v for k, v in reference.state[q].items()}
            assert_same_state(ours.state[p], expected, dtype, f"{name}, shape {tuple(p.shape)}")
        train(ours, params, 1)
        train_on(reference, exact, params)
        for p, q in zip(params, exact, strict=True):
            assert_same_parameter(p, q.detach().to(dtype), "variations - reference", 1.0, f"shape {tuple(p.shape)}")


def train_on(optimizer: Adafactor, exact: list[Tensor], params: list[Tensor]) -> None:
    """With the gradients that these parameters have."""
    for p, q in zip(params, exact, strict=True):
        assert p.grad is not None
        q.grad = p.grad.to(q.dtype)
    optimizer.step()


@pytest.mark.parametrize(
    "name", ["min_dim_size_to_factor+beta2_cap+decay_offset+weight_decay_scale", "factor_dims+cautious+momentum_dtype"]
)
def test_compiled_is_the_reference(name: str) -> None:
    check_path(name, (torch.float32,), [(24, 18), (16, 12, 1, 1), (20, 24, 3, 3), (7,)], compile=True)


@pytest.mark.parametrize("path", [PATHS["multi-tensor"], PATHS["compiled"]], ids=str)
@pytest.mark.parametrize("order", [(2, 0, 3, 1), (3, 2, 0, 1), (0, 2, 1, 3)], ids=str)
def test_kernels_in_any_memory_order(order: tuple[int, ...], path: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of other frameworks lie otherwise, and then their factors do not lie as they do."""
    monkeypatch.setattr(members, "IN_CACHE", 64)
    monkeypatch.setattr(members, "FEW", 0)
    sizes = sorted((2, 3, 24, 20), reverse=order[0] == 0)
    params = [torch.nn.Parameter(p.detach().permute(order)) for p in parameters(torch.float32, [tuple(sizes)])]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    options = {**FIXED, "factor_dims": "largest", "beta1": 0.9}
    ours, reference = Adafactor(params, **options, **path), Adafactor(others, **options, foreach=False)
    for _ in range(3):
        train(ours, params, 1)
        train_on(reference, others, params)
    assert_same_parameter(params[0], others[0], "variations - reference")


@pytest.mark.parametrize("path", EAGER, ids=str)
def test_options_of_the_layout_stay_once_steps_were_taken(path: dict[str, Any]) -> None:
    for first, then in ((0, 128), (128, 0)):
        [p] = params = parameters(torch.float32, [(16, 12)])
        optimizer = Adafactor(params, **FIXED, **path, min_dim_size_to_factor=first)
        optimizer.param_groups[0]["min_dim_size_to_factor"] = then
        train(optimizer, params, 2)  # not yet stepped: it may change
        assert ("exp_avg_sq" in optimizer.state[p]) == (then == 128) != ("exp_avg_sq_row" in optimizer.state[p])
        before = p.detach().clone()
        optimizer.param_groups[0]["min_dim_size_to_factor"] = first
        with pytest.raises(RuntimeError, match="stay as they are once steps were taken; nothing was stepped"):
            optimizer.step()
        assert torch.equal(p, before)
        assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("path", EAGER, ids=str)
def test_cautious_means_nothing_once_there_is_no_momentum(path: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = Adafactor([p], **FIXED, beta1=0.9, cautious=True, **path)
    optimizer.param_groups[0]["beta1"] = None
    p.grad = torch.zeros(8, 8)
    p.grad[:, 0] = 1.0
    optimizer.step()
    assert largest(1 - p) == pytest.approx(1e-2 / 1.0, rel=2.0)
    assert largest(1 - p) < 3.5e-2  # masked, it would be eight times that


def test_defaults_are_transformers() -> None:
    """Given by name, the values that change nothing change no bit."""
    neutral = {
        "min_dim_size_to_factor": 0, "factor_dims": "last", "beta2_cap": None, "decay_offset": 0, "momentum_dtype": None,
        "cautious": False, "weight_decay_scale": "lr",
    }  # fmt: skip
    for path in ({"foreach": False}, {"compile": False}):
        params, others = parameters(torch.float32), parameters(torch.float32)
        options = {**FIXED, "beta1": 0.9, "weight_decay": 0.1, **path}
        train(Adafactor(params, **options), params, 5)
        train(Adafactor(others, **options, **neutral), others, 5)
        assert all(map(torch.equal, params, others))


def test_state_of_kernels() -> None:
    """Of 512 x 512 x 3 x 3, the largest dimensions keep 2 x 4,608 numbers, and the last two 1.5 million."""
    kernel = torch.nn.Parameter(torch.randn(512, 512, 3, 3))
    for dims, numbers in (("largest", 2 * 4608), ("last", 2 * 512 * 512 * 3)):
        state = Adafactor([kernel], **FIXED, factor_dims=dims).state[kernel]
        assert state["exp_avg_sq_row"].numel() + state["exp_avg_sq_col"].numel() == numbers


def test_a_short_dimension_keeps_the_whole_second_moment() -> None:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (16, 15), (4, 16, 16))]
    optimizer = Adafactor(params, **FIXED, min_dim_size_to_factor=16)
    assert ["exp_avg_sq" in optimizer.state[p] for p in params] == [False, True, False]
    assert optimizer.state[params[1]]["exp_avg_sq"].shape == (16, 15)


@pytest.mark.parametrize("path", EAGER, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_momentum_in_bfloat16_loses_nothing_on_average(dtype: torch.dtype, path: dict[str, Any]) -> None:
    """Under the same gradient a momentum nears its update; rounded to nearest it stops where a step is below half a digit."""
    for rounding, most in ((True, 2e-3), (False, 1.0)):
        p = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
        optimizer = Adafactor([p], **FIXED, beta1=0.999, momentum_dtype=torch.bfloat16, stochastic_rounding=rounding, **path)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        kept = optimizer.state[p]["exp_avg"]
        assert kept.dtype == torch.bfloat16
        error = abs(float(kept.double().mean()) / (1e-2 * (1 - 0.999**1000)) - 1)
        assert error < most if rounding else error > 0.05


@pytest.mark.parametrize("path", EAGER, ids=str)
def test_cautious_updates_go_with_the_gradient(path: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.zeros(64, 48))
    optimizer = Adafactor([p], **FIXED, beta1=0.9, cautious=True, **path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        moved, momentum = before - p.detach(), optimizer.state[p]["exp_avg"]
        agree = momentum * p.grad > 0
        assert torch.equal(moved != 0, agree)
        torch.testing.assert_close(moved[agree], (momentum / agree.float().mean())[agree], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layout", ["min_dim_size_to_factor", "factor_dims"])
def test_a_checkpoint_of_the_other_kind_is_refused_by_name(layout: str) -> None:
    params = parameters(torch.float32)
    ours, plain = Adafactor(params, **FIXED, **VARIATIONS[layout]), Adafactor(parameters(torch.float32), **FIXED)
    before = {key: x.clone() for key, x in ours.state[params[1]].items() if isinstance(x, Tensor)}
    for optimizer, other in ((ours, plain), (plain, ours)):
        saved = other.state_dict()
        for kept in (saved, {**saved, "param_groups": [without(group, layout) for group in saved["param_groups"]]}):
            if other is ours and kept is not saved:
                continue  # it then says that it is of the default kind, and its shapes are refused
            with pytest.raises(ValueError, match=f"{layout}=.*construct it with the former; nothing was loaded"):
                optimizer.load_state_dict(kept)
    assert all(torch.equal(ours.state[params[1]][key], x) for key, x in before.items())
    ours.load_state_dict(ours.state_dict())


def without(group: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != name}


def test_where_kinds_come_to_the_same_a_checkpoint_loads() -> None:
    p, q = (torch.nn.Parameter(torch.randn(30, 20)) for _ in range(2))
    other = Adafactor([q], **FIXED, min_dim_size_to_factor=16, factor_dims="largest")
    train(other, [q], 2)
    optimizer = Adafactor([p], **FIXED)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["factor_dims"] == "last"
    assert torch.equal(optimizer.state[p]["exp_avg_sq_row"], other.state[q]["exp_avg_sq_row"])


def test_a_momentum_goes_through_a_checkpoint_in_its_dtype() -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    options = of_name("momentum_dtype")
    optimizer, other = Adafactor(params, **options), Adafactor(others, **options, compile=False)
    train(other, others, 3)
    optimizer.load_state_dict(other.state_dict())
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
