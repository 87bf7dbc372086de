"""Stochastic rounding of the final write to bfloat16 and float16: unbiased, and the same draws on every path.

Plain rounding loses an update that is smaller than half the spacing of the numbers around the weight, every time. Rounded
stochastically, up with a probability equal to the fraction that would be cut off, the weight moves by the update on average.

The random bits are a hash of seed, step count, parameter and the element's slice, row and column: no generator, no state
beyond a seed and the step count, so that replicas draw alike and a resumed run goes on exactly. An element's bits combine a
hash of its slice, of its row and of its column, which are small vectors: any two elements of a step are independent.

The rounding takes float arithmetic alone, since Inductor does not vectorize a bit cast on a CPU (six times slower). All its
operations are exact, and stay so where a compiler contracts a multiplication and an addition into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

GOLDEN = -0x61C88647  # 2**32 / golden ratio, odd, as an int32
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)  # of a 32-bit mixing function, https://github.com/skeeto/hash-prospector
KEYS, FIRST = slice(0, 3), slice(3, 6)  # a parameter's draws: keys of slice, row and column, and where its piece begins
SWAPPED = [0, 2, 1, 3, 5, 4]  # draws of the transpose


def wants_rounding(dtype: torch.dtype, stochastic_rounding: bool) -> bool:
    return stochastic_rounding and dtype in (torch.bfloat16, torch.float16)


def draws_of(
    seeds: Sequence[int], positions: Sequence[int], steps: Sequence[int | Tensor], device: torch.device
) -> list[Tensor]:
    """What determines the random bits of each parameter at its step: an int32 vector of six."""
    base = torch.tensor([_base(*x) for x in zip(seeds, positions, strict=True)], dtype=torch.int32).to(
        device, non_blocking=True
    )
    if any(isinstance(step, Tensor) for step in steps):
        counts = torch.stack([torch.as_tensor(step, device=device).to(torch.int32) for step in steps])
    else:
        counts = torch.tensor(steps, dtype=torch.int32).to(device, non_blocking=True)
    keys = _mixed(base + counts.unsqueeze(-1) * GOLDEN)
    return list(torch.cat([keys, torch.zeros_like(keys)], -1).unbind())


@lru_cache(maxsize=65_536)
def _base(seed: int, position: int) -> tuple[int, ...]:
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


def along(draws: Tensor, axis: int, count: int) -> Tensor:
    """Hashes of `count` slices (axis 0), rows (1) or columns (2); shape [..., count] for draws of shape [..., 6]."""
    places = torch.arange(count, dtype=torch.int32, device=draws.device) + draws[..., FIRST][..., axis, None]
    return _mixed(places * GOLDEN + draws[..., KEYS][..., axis, None])


def bits_of_matrix(draws: Tensor, shape: Sequence[int]) -> Tensor:
    """Random bits for the elements of a parameter, for draws of shape [6]; anything with fewer dimensions is one row."""
    rows, columns = shape[-2:] if len(shape) >= 2 else (1, shape[0] if shape else 1)
    lead = torch.Size(shape[:-2])
    by_row = along(draws, 0, lead.numel()).unsqueeze(-1) ^ along(draws, 1, rows)
    return (by_row.unsqueeze(-1) ^ along(draws, 2, columns)).reshape(tuple(shape))


def bits_of_vectors(draws: Tensor, n: int) -> Tensor:
    """Random bits for k stacked vectors of n elements, for draws of shape [k, 6]; shape [k, n]."""
    return along(draws, 0, 1) ^ along(draws, 1, 1) ^ along(draws, 2, n)


def write(param: Tensor, value: Tensor, bits: Tensor | None) -> None:
    """The final write of a step: to nearest, or stochastically where there are random bits."""
    param.copy_(value if bits is None else rounded(value, bits, param.dtype))


def rounded(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor whose values are float16 or bfloat16 numbers: a neighbour of x, with expectation x.

    NaN, what is beyond the largest finite number and what is below 1e-30 stay as they are.
    """
    digits = 7 if dtype is torch.bfloat16 else 10  # of the significand, behind the point
    cut = 23 - digits  # digits of float32 that are lost
    three_quarters = x * 0.75
    # y + 2**23 y - 2**23 y rounds y = 0.75 x to a power of two, and that is the largest one which is not above x.
    shifted = three_quarters * 2.0**23
    power = ((three_quarters + shifted) - shifted).abs()
    if dtype is torch.float16:
        power = power.clamp(min=2.0**-14)  # the spacing of the subnormal numbers
    spacing = power * 2.0**-digits
    drawn = (((bits * MULTIPLIERS[1]) >> (32 - cut)) & ((1 << cut) - 1)).to(x.dtype)
    above = x + drawn * (power * 2.0**-23)  # x plus a multiple, below 1, of the spacing
    # Adding and subtracting a number this large rounds to a multiple of the spacing.
    large = power * (1.5 * 2.0**cut)
    floor = (above + large) - large
    floor = torch.where(floor > above, floor - spacing, floor)
    least, most = (1e-30, 2.0**100) if dtype is torch.bfloat16 else (0.0, 65504.0)
    size = x.abs()
    return torch.where((size > least) & (size < most), floor, x)
