"""What is stepped as one, short vectors above all: against the reference path, at the edges of blocks and of what is joined."""

import pytest
import torch
from torch import nn

from adafactor_compiled import Adafactor
from adafactor_compiled._state.entries import entries_of
from adafactor_compiled._step.plan import plan_of
from adafactor_compiled._update import padded
from adafactor_compiled._update.chunks import SHORT

SIZES = [1, 5, padded.BLOCK - 1, padded.BLOCK, padded.BLOCK + 1, 300, SHORT, SHORT + 1]
MODES = {"multi-tensor": {"compile": False}, "compiled": {"compile": True}}


def vectors(dtype=torch.float32):
    """One of each size, one without dimensions and one with a stride."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in SIZES] + [torch.tensor(2.0)]
    return [nn.Parameter(x.to(dtype)) for x in values] + [nn.Parameter(torch.randn(80, generator=generator).to(dtype)[::2])]


def set_gradients(params, step, without=()):
    generator = torch.Generator().manual_seed(step + 1)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (i % 5 - 2)
        p.grad = None if i in without else grad


def train(mode, options, dtype=torch.float32, without=((), (), ())):
    params = vectors(dtype)
    optimizer = Adafactor(params, **options, **mode)
    for step, missing in enumerate(without):
        set_gradients(params, step, missing)
        optimizer.step()
    return params, optimizer


def assert_same(trained, expected, limit):
    (params, optimizer), (references, reference) = trained, expected
    for i, (p, q) in enumerate(zip(params, references, strict=True)):
        pairs = {"param": (p, q)} | {key: (optimizer.state[p][key], reference.state[q][key]) for key in ("exp_avg_sq", "RMS")}
        for name, (x, y) in pairs.items():
            error = (x - y).detach().abs().max() / y.detach().abs().max()
            assert error <= limit, (i, tuple(q.shape), name, float(error))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"beta1": 0.9, "weight_decay": 0.1, "clip_threshold": None}], ids=["plain", "momentum"]
)
def test_equals_the_reference(mode, dtype, limit, options):
    expected = train({"foreach": False}, options, dtype)
    assert_same(train(MODES[mode], options, dtype), expected, limit)


@pytest.mark.parametrize("mode", MODES)
def test_one_vector_or_none_has_a_gradient(mode):
    everyone = range(len(vectors()))
    without = ((), [i for i in everyone if i != 2], everyone, [i for i in everyone if i not in (2, 9)])
    assert_same(train(MODES[mode], {}, without=without), train({"foreach": False}, {}, without=without), 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_a_nan_stays_in_its_vector(mode, beta1):
    """Without eps, an element whose gradient is 0 divides 0 by 0, as on the reference path, but not the padding after it.

    What the padding comes to in one step does not reach the next one.
    """
    results = []
    for chosen in (MODES[mode], {"foreach": False}):
        params = vectors()
        optimizer = Adafactor(params, eps=(0.0, 1e-3), beta1=beta1, **chosen)
        for step in range(2):
            set_gradients(params, step)
            params[1].grad[2] = 0.0
            optimizer.step()
        results.append([bool(p.isnan().any()) for p in params])
    assert results[0] == results[1] == [i == 1 for i in range(len(results[0]))]


def test_short_vectors_are_stepped_as_one_and_reported_by_their_shapes():
    params = vectors()
    optimizer = Adafactor(params, compile=False)
    set_gradients(params, 0)
    plan = plan_of(entries_of(optimizer.param_groups, optimizer.state), None)
    assert [len(part.positions) for part in plan.all_eager] == [
        len(params) - 2,
        1,
        1,
    ]  # but for a long one and one with a stride
    assert len(plan.parts) == len({(p.shape, p.stride()) for p in params}) == len(optimizer.summary().classes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_draws_by_the_place_in_a_vector(dtype):
    """As alone on the reference path: another place would change about half of the elements."""
    options = {"lr": 1e-2, "relative_step": False, "stochastic_rounding": True}
    once = ((),)
    (params, _), (expected, _) = (train(mode, options, dtype, once) for mode in (MODES["multi-tensor"], {"foreach": False}))
    differing = sum(int((p != q).sum()) for p, q in zip(params, expected, strict=True))
    assert differing <= sum(p.numel() for p in params) // 1000
