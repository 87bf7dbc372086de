"""Stochastic rounding: unbiased, the same draws everywhere, exact to resume, and weights that learn."""

import copy
import math
from pydoc_data.topics import topics

import pytest
import torch
from compilers import compiled_by, uncompiled, viewed_otherwise
from parameters import parameters, set_gradients
from paths import PATHS

from adafactor_compiled import Adafactor, StepInBackward
from adafactor_compiled._compile import graphs
from adafactor_compiled._update import rounding

HALF = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def draws(seed=0, position=0, step=1, origin=(0, 0, 0)):
    return rounding.draws_of([seed], [position], [origin], [step], CPU)[0]


def rounded(x, dtype, **of_draws):
    return rounding.rounded(x, rounding.noise_of(draws(**of_draws), x.shape, dtype), dtype)


def neighbours(x, dtype):
    """The two numbers of `dtype` around each float32, in float32; equal where x is one of them."""
    nearest = x.to(dtype)
    away = torch.where(nearest.float() < x, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, away).float()
    nearest = nearest.float()
    exact = nearest == x
    return torch.where(exact, x, torch.minimum(nearest, other)), torch.where(exact, x, torch.maximum(nearest, other))


def samples(dtype, count=200_000):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(count, generator=generator) * (60 if dtype is torch.bfloat16 else 30) - 20
    return torch.randn(count, generator=generator) * 2.0**exponents


@pytest.mark.parametrize("dtype", HALF)
def test_every_result_is_one_of_the_two_neighbours(dtype):
    x = samples(dtype)
    if dtype is torch.float16:
        x = x[x.abs() < 65504]
    y = rounded(x, dtype)
    assert torch.equal(y.to(dtype).float(), y)
    low, high = neighbours(x, dtype)
    assert bool(((y == low) | (y == high)).all())
    assert bool((y == low).any())
    assert bool((y == high).any())


@pytest.mark.parametrize("dtype", HALF)
def test_representable_numbers_stay(dtype):
    x = samples(dtype).to(dtype).float()
    x = torch.cat([x, 2.0 ** torch.arange(-14, 15), torch.tensor([0.0, -0.0, 2.0**-24])])
    y = rounded(x, dtype)
    assert torch.equal(y, x)


def test_what_float16_cannot_hold_is_rounded_to_nearest():
    most = torch.finfo(torch.float16).max
    x = torch.tensor([math.nan, math.inf, -math.inf, most, -most, most * 1.0001, 1e38, -1e38])
    torch.testing.assert_close(rounded(x, torch.float16).half(), x.half(), rtol=0, atol=0, equal_nan=True)


def test_large_and_small_bfloat16_numbers():
    x = torch.tensor([2.0**110, -(2.0**110), 1e33, 3e-36, -(2.0**-118)])
    y = rounded(x, torch.bfloat16)
    low, high = neighbours(x, torch.bfloat16)
    assert bool(((y == low) | (y == high)).all())
    assert not rounded(torch.tensor([math.nan, math.inf, -math.inf]), torch.bfloat16).isfinite().any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("value", [1.0 + 2**-12, -1.0 - 2**-9, 1.9999, 1.3333334, 3.1e-5, 0.75 + 2**-11, -255.7, 1e-7])
def test_unbiased(dtype, value):
    """The share of roundings up is binomial: its draws are independent in pairs. At 6 standard deviations a right one fails
    once in 5e8 tests. Half a digit of float32, the bias that is allowed, is far below.

    The seeds are fixed: what was right once stays right.
    """
    x = torch.full((1000, 1000), value)
    low, high = (side[0, 0].item() for side in neighbours(x[:1, :1], dtype))
    y = rounded(x, dtype, seed=3)
    value = x[0, 0].item()
    expected = (value - low) / (high - low) if high > low else 0.0
    share = (y == high).double().mean().item() if high > low else 0.0
    # Below the normal numbers of float16 a probability is a multiple of 2**-13.
    slack = 2.0**-13 if dtype is torch.float16 and abs(value) < 2.0**-14 else 0.0
    assert abs(share - expected) <= 6 * math.sqrt(expected * (1 - expected) / x.numel()) + slack


def fractions(draws, shape, dtype=torch.bfloat16):
    """The noise, from -1/2 to 1/2."""
    noise = rounding.noise_of(draws, shape, dtype)
    return (noise - noise.round()).double()


def test_draws_of_rows_columns_slices_steps_parameters_and_seeds_are_independent():
    """Correlations of half a million pairs are below 6 standard deviations: a right one fails once in 5e8."""
    n = 512 * 1024
    base = fractions(draws(), (2, 512, 1024))
    pairs = {
        "slices": (base[0], base[1]),
        "rows": (base[0], base[0].roll(1, 0)),
        "columns": (base[0], base[0].roll(1, 1)),
        "diagonal": (base[0, :, :512], base[0, :, :512].T.contiguous()),
    }
    for name, other in {"step": draws(step=2), "parameter": draws(position=1), "seed": draws(seed=1)}.items():
        pairs[name] = (base[0], fractions(other, (2, 512, 1024))[0])
    for name, (x, y) in pairs.items():
        correlation = (x * y).mean().item() * 12
        count = x.numel() / (2 if name == "diagonal" else 1)
        assert abs(correlation) <= 6 / math.sqrt(count), name
    assert base.mean().abs().item() <= 6 * math.sqrt(1 / 12 / (2 * n))


@pytest.mark.parametrize("shape", [(1024, 1024), (128, 4096), (4096, 128)])
def test_roundings_have_no_large_pattern(shape):
    """The spectral norm of independent errors is at most 1.05 (sqrt(rows) + sqrt(columns)) times their deviation.

    Errors that repeat from row to row would have one of sqrt(rows * columns), ten times as large.
    """
    x = torch.full(shape, 1.0 + 2**-9)
    errors = (rounded(x, torch.bfloat16, seed=7) - x).double()
    deviation = 2**-9 * math.sqrt(3)  # up by 3/4 of a spacing of 2**-7 once in four times, else down by 1/4
    independent = deviation * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    assert torch.linalg.matrix_norm(errors, 2).item() <= 1.5 * independent


@pytest.mark.parametrize("dtype", HALF)
def test_noise_is_exact_and_never_half_way(dtype):
    """Odd multiples of the last digit that counts, whatever order a compiler adds in."""
    draw = draws(seed=11)
    noise = rounding.noise_of(draw, (500, 3000), dtype)
    rows, columns = (rounding.along(draw, axis, 1, n, dtype) for axis, n in ((1, 500), (2, 3000)))
    exact = rows.scale.double().mT * columns.scale.double() + rows.shift.double().mT + columns.shift.double()
    assert torch.equal(noise.double(), exact)
    assert bool(((exact * 2.0 ** (16 if dtype is torch.bfloat16 else 13)) % 2 == 1).all())


SHAPES = [(6, 8), (6, 8), (5,), (5,), (), (2, 3, 4), (8, 4, 3, 4), (1, 7), (40, 30)]


def optimizer_of(params, **options):
    return Adafactor(params, lr=1e-3, relative_step=False, stochastic_rounding=True, **options)


# Every route, uncompiled; and by Inductor what rounds in other ways, matrices in blocks and vectors.
DRAWN = {
    "every route": (torch.bfloat16, [(260, 520), *SHAPES], {}, uncompiled),
    "bfloat16": (torch.bfloat16, [(260, 520)], {}, graphs.compiled),
    "float16, momentum": (torch.float16, [(260, 520), (5,), (5,)], {"beta1": 0.9, "weight_decay": 0.1}, graphs.compiled),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_paths_draw_alike(name):
    dtype, shapes, options, compiler = DRAWN[name]
    lists = {path: parameters(shapes, dtype) for path in PATHS}
    for params in lists.values() if compiler is uncompiled else ():  # a transposed parameter has its own route
        params.append(torch.nn.Parameter(params[0].detach().T.contiguous().T.clone(memory_format=torch.preserve_format)))
    optimizers = {path: optimizer_of(lists[path], **PATHS[path], **options) for path in PATHS}
    with compiled_by(compiler):
        compare_draws(lists, optimizers)


def compare_draws(lists, optimizers):
    for step in range(4):
        for path, params in lists.items():
            set_gradients(params, step)
            optimizers[path].step()
        for path in ("multi-tensor", "compiled"):
            for index, (p, q) in enumerate(zip(lists["reference"], lists[path], strict=True)):
                # A last digit of float32 seldom decides a rounding; other draws would move a third of the elements.
                differ = (p != q).sum().item()
                assert differ <= 1 + p.numel() // 1000, (path, index, step)
                with torch.no_grad():
                    q.copy_(p)


def test_a_matrix_in_blocks_draws_as_a_whole_one():
    whole, in_blocks = parameters([(36, 16)], torch.bfloat16), parameters([(36, 16)], torch.bfloat16)
    for params, constants in ((whole, {}), (in_blocks, {"BLOCK_NUMEL": 64, "SMALL_NUMEL": 0, "FEW_ROWS": 2})):
        set_gradients(params, 0)
        with compiled_by(uncompiled), viewed_otherwise(**constants):
            optimizer_of(params, compile=True).step()
    assert (whole[0] != in_blocks[0]).sum().item() <= 1


@pytest.mark.parametrize("capturable", [False, True])
def test_a_resumed_run_goes_on_exactly(capturable):
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = optimizer_of(params, compile=False, rounding_seed=5, capturable=capturable)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = Adafactor(copies, compile=False, capturable=not capturable)  # the options are the checkpoint's
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        set_gradients(params, step)
        set_gradients(copies, step)
        optimizer.step()
        resumed.step()
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)


def test_the_seed_and_the_option_matter_and_float32_is_not_touched():
    results = []
    for options in ({}, {"rounding_seed": 1}, {"stochastic_rounding": False}):
        params = [*parameters(SHAPES, torch.bfloat16), *parameters(SHAPES)]
        optimizer = Adafactor(
            params, **{"lr": 1e-3, "relative_step": False, "compile": False, "stochastic_rounding": True} | options
        )
        set_gradients(params, 0)
        optimizer.step()
        results.append(params)
    half, full = slice(0, len(SHAPES)), slice(len(SHAPES), None)
    for other in results[1:]:
        assert not all(torch.equal(p, q) for p, q in zip(results[0][half], other[half], strict=True))
        assert all(torch.equal(p, q) for p, q in zip(results[0][full], other[full], strict=True))


def test_in_backward_draws_alike():
    params, twins = parameters([(6, 8), (5,)], torch.bfloat16), parameters([(6, 8), (5,)], torch.bfloat16)
    optimizer, twin = optimizer_of(params, compile=False), optimizer_of(twins, compile=False)
    StepInBackward(optimizer)
    for chosen in (params, twins):
        sum((p.float() ** 2).sum() for p in chosen).backward()
    twin.step()
    for p, q in zip(params, twins, strict=True):
        assert (p != q).sum() <= 1


@pytest.mark.parametrize("value", [1.5, "7", True, None])
def test_a_wrong_seed(value):
    with pytest.raises(ValueError, match="`rounding_seed` should be an int but is"):
        Adafactor(parameters(SHAPES, torch.bfloat16), stochastic_rounding=True, rounding_seed=value)


def train(dtype, steps=300, **options):
    """A character model that predicts the next letter from the last eight; the mean loss of the last fifty steps."""
    text = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    data = torch.tensor(list(text[:60_000]))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(128, 16), torch.nn.Flatten(), torch.nn.Linear(128, 96), torch.nn.ReLU(), torch.nn.Linear(96, 128)
    ).to(dtype)
    optimizer = Adafactor(
        model.parameters(), lr=1e-4, relative_step=False, scale_parameter=False, compile=False, foreach=True, **options
    )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - 9, (128,), generator=generator)
        windows = data[starts.unsqueeze(1) + torch.arange(9)]
        loss = torch.nn.functional.cross_entropy(model(windows[:, :8]).float(), windows[:, 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


def test_bfloat16_weights_learn_as_float32_ones_do():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        full = train(torch.float32)
        rounded = train(torch.bfloat16, stochastic_rounding=True)
        plain = train(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    assert abs(rounded / full - 1) <= 0.02, (full, rounded, plain)
    assert plain / full - 1 > 0.02, (full, rounded, plain)


def test_what_is_kept_for_graphs_does_not_grow_with_sets_of_gradients(monkeypatch):
    """A tensor for each parameter, however many of them have gradients in a step; here without a GPU."""
    monkeypatch.setattr(rounding, "to_device", lambda x, device: x)
    monkeypatch.setattr(rounding, "_kept", {})
    keys = [(i, i + 1, i + 2, 0, 0, 0) for i in range(16)]
    for step in range(50):
        chosen = [key for i, key in enumerate(keys) if (i * 7 + step) % 5]
        assert rounding._kept_on(chosen, torch.device("cuda")).tolist() == [list(key) for key in chosen]
    assert len(rounding._kept) == len(keys)


def test_draws_of_transposes():
    draws = torch.arange(14, dtype=torch.int32).view(2, 7)
    assert torch.equal(rounding.swapped(draws), draws[:, rounding.SWAPPED])
