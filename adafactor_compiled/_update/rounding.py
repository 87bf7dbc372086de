"""Stochastic rounding of the final write to bfloat16 and float16: unbiased, and the same draws on every path.

Plain rounding loses an update that is smaller than half the spacing of the numbers around the weight, every time. Rounded
stochastically, up with a probability equal to the fraction that would be cut off, the weight moves by the update on average.

The noise is a hash of seed, step count, parameter and the element's slice, row and column: no generator, no state beyond a
seed and the step count, so that replicas draw alike and a resumed run goes on exactly. In each slice a row i and a column j
are hashed to a scale a and a shift b, and the noise of an element is the fraction of a_i a_j + b_i + b_j. It is uniform, and
any two elements are independent because of the shifts, so that the sum of any elements' errors has the variance of independent
noise. The product keeps larger patterns away: of all matrices of signs that a step can draw, the spectral norm is 1.2 to 1.5
times that of independent signs, where shifts alone would give 10 to 16 times.

The arithmetic is that of floats, since Inductor vectorizes neither a bit cast nor a conversion between integers and bfloat16
on a CPU: a hash for each element took longer than the rest of a step. All of it is exact, and stays so where a compiler
contracts a multiplication and an addition into one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.layout import HALF, group_by_key
from adafactor_compiled._state.placements import Origin
from adafactor_compiled._update.numbers import to_device

GOLDEN = -0x61C88647  # 2**32 / golden ratio, odd, as an int32
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)  # of a 32-bit mixing function, https://github.com/skeeto/hash-prospector
# A parameter's draws: keys of its slices, rows and columns, where its piece begins in each, and the step count.
DRAWS, FIRST, STEP = 7, slice(3, 6), 6
SWAPPED = [0, 2, 1, 3, 5, 4, 6]  # draws of the transpose: see `swapped`


def draws_of(
    seeds: Sequence[int],
    positions: Sequence[int],
    origins: Sequence[tuple[int, int, int]],
    steps: Sequence[int | Tensor],
    device: torch.device,
) -> list[Tensor]:
    """What determines the noise of each parameter at its step: an int32 vector of seven."""
    keys = [(*_keys(seed, position), *origin) for seed, position, origin in zip(seeds, positions, origins, strict=True)]
    if any(isinstance(step, Tensor) for step in steps):
        on_device = [x if isinstance(x, Tensor) else to_device(torch.tensor(x, device="cpu"), device) for x in steps]
        counts = torch.stack([x.to(torch.int32) for x in on_device])
        return list(torch.cat([_kept_on(keys, device), counts.unsqueeze(-1)], -1).unbind())
    rows = [(*x, step) for x, step in zip(keys, steps, strict=True)]
    return list(to_device(torch.tensor(rows, dtype=torch.int32, device="cpu"), device).unbind())


def draws_of_entries(entries: Sequence[Entry], origins: Sequence[Origin]) -> list[Tensor]:
    """What determines the noise of entries, or of their pieces, at their step, on the device of each."""
    draws: list[Tensor] = [None] * len(entries)  # type: ignore[list-item]
    for device, at in group_by_key(entry.param.device for entry in entries).items():
        chosen = [entries[i] for i in at]
        seeds, positions = [entry.group["rounding_seed"] for entry in chosen], [entry.position for entry in chosen]
        steps, of_device = [entry.state["step"] for entry in chosen], [origins[i] for i in at]
        for i, of_entry in zip(at, draws_of(seeds, positions, of_device, steps, device), strict=True):
            draws[i] = of_entry
    return draws


def swapped(draws: Tensor) -> Tensor:
    """Those of the transposes, for draws of shape [k, 7]; a list of places would be sent to the device, and waited for."""
    columns = draws.unbind(1)
    return torch.stack([columns[i] for i in SWAPPED], 1)


def _kept_on(keys: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """A CUDA graph that copied them from the host would, replayed, find something else there: each parameter's stay."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return to_device(torch.tensor(keys, dtype=torch.int32, device="cpu"), device)
    missing = [key for key in dict.fromkeys(keys) if (key, device) not in _kept]
    new = to_device(torch.tensor(missing, dtype=torch.int32, device="cpu"), device).unbind() if missing else ()
    known = dict(zip(missing, new, strict=True))
    if all(type(x) is Tensor for x in new):  # not what a mode has made of them
        _kept.update({(key, device): x for key, x in known.items()})
    return torch.stack([known[key] if key in known else _kept[key, device] for key in keys])


_kept: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


@lru_cache(maxsize=65_536)
def _keys(seed: int, position: int) -> tuple[int, ...]:
    """Three int32 for a parameter under a seed of any size."""
    keys = []
    for axis in range(3):
        x = (seed * 0x9E3779B97F4A7C15 + (3 * position + axis + 1) * 0xD1B54A32D192ED03) % 2**64
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64
            x = (x ^ (x >> 30)) * multiplier % 2**64
        keys.append((x >> 32) - 2**31)
    return tuple(keys)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int32 in which every bit depends on every bit; multiplication wraps around, and `>>` keeps the sign."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MULTIPLIERS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * MULTIPLIERS[1]
    return x ^ ((x >> 15) & 0x1FFFF)


class Along(NamedTuple):
    """What rows or columns contribute to the noise of their elements."""

    scale: Tensor
    shift: Tensor


def along(draws: Tensor, axis: int, slices: int, count: int, dtype: torch.dtype) -> Along:
    """The contributions of `count` rows (axis 1) or columns (2), each of shape [..., slices, count] for draws [..., 7]."""
    of_slice = _mixed(_places(draws, 0, slices))
    bits = _mixed(_places(draws, axis, count).unsqueeze(-2) ^ of_slice.unsqueeze(-1))
    # A product and two shifts add up to an odd multiple of 2**-cut below 2**8: exact, and its fraction is never a half.
    scale = ((bits & 2047) - 1024).clamp(-1020, 1020).to(torch.float32) * 2.0**-6
    shift = (((bits >> (33 - _cut(dtype))) * 2).to(torch.float32) + 0.5) * 2.0 ** -_cut(dtype)
    return Along(scale, shift)


def _places(draws: Tensor, axis: int, count: int) -> Tensor:
    places = torch.arange(count, dtype=torch.int32, device=draws.device) + draws[..., FIRST][..., axis, None]
    key = _mixed(draws[..., axis] + draws[..., STEP] * GOLDEN)
    return places * GOLDEN + key.unsqueeze(-1)


def _cut(dtype: torch.dtype) -> int:
    """The digits of float32 that are lost."""
    return 16 if dtype is torch.bfloat16 else 13


def noise_between(rows: Along, columns: Along) -> Tensor:
    """Of contributions of shapes [..., R] and [..., C]; of the result, shape [..., R, C], only the fraction counts."""
    shift = rows.shift.unsqueeze(-1) + columns.shift.unsqueeze(-2)
    return rows.scale.unsqueeze(-1) * columns.scale.unsqueeze(-2) + shift


def noise_of(draws: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """For a parameter with draws of shape [7]; anything with fewer than two dimensions is one row."""
    rows, columns = shape[-2:] if len(shape) >= 2 else (1, math.prod(shape))
    slices = math.prod(shape[:-2])
    parts = (along(draws, axis, slices, count, dtype) for axis, count in ((1, rows), (2, columns)))
    return noise_between(*parts).reshape(tuple(shape))


def noise_of_member(draws: Tensor | None, p: Tensor, exp_avg: Tensor | None, factored: bool) -> Tensor | None:
    """For a whole parameter with draws, and its momentum; a second moment that is kept whole makes one row of any shape."""
    if draws is None:
        return None
    noise = noise_of(draws, p.shape if factored else (p.numel(),), half_of(p, exp_avg))
    return noise.reshape(p.shape)


def half_of(p: Tensor, exp_avg: Tensor | None) -> torch.dtype:
    """The dtype that the noise of a parameter and its momentum is for."""
    return p.dtype if p.dtype in HALF or exp_avg is None else exp_avg.dtype


def write(to: Tensor, value: Tensor, noise: Tensor | None) -> None:
    """The final write to a parameter or a momentum: to nearest, or stochastically where there is noise and half precision."""
    to.copy_(value if noise is None or to.dtype not in HALF else rounded(value.to(torch.float32), noise, to.dtype))


def rounded(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor whose values are float16 or bfloat16 numbers: a neighbour of x, with expectation x.

    The expectation holds to half a digit of float32. float16 or bfloat16 numbers stay as they are, and so does what is beyond
    the largest finite float16. As bfloat16, what is beyond 2**110, whose square is not finite, becomes NaN, and what is below
    2**-118 may be rounded to nearest.
    """
    fraction = noise - noise.round()
    # y + 2**23 y - 2**23 y rounds y = 0.75 x to a power of two, and that is the largest one which is not above x.
    digits = 23 - _cut(dtype)  # behind the point of a significand
    shifted = x * (0.75 * 2.0 ** (23 - digits))
    spacing = (x * (0.75 * 2.0**-digits) + shifted) - shifted  # of the numbers of `dtype` around x, with the sign of x
    if dtype is torch.float16:
        spacing = spacing.abs().clamp(min=2.0**-24)  # of the subnormal numbers
    # Adding and subtracting a number this large rounds to a multiple of the spacing.
    large = spacing * (1.5 * 2.0**23)
    result = ((x + fraction * spacing) + large) - large
    return torch.where(x.abs() < 65504.0, result, x) if dtype is torch.float16 else result
