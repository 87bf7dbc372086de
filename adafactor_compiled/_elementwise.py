"""One step of one parameter whose second moment is as large as it is: of a vector, or of kernels of one element."""

from __future__ import annotations

import torch
from torch import Tensor

from adafactor_compiled._blocked import materialize, sum_twice
from adafactor_compiled._numbers import Numbers, root_mean, scale_and_decay
from adafactor_compiled._rounding import noise_of, write


def step_elementwise(
    p: Tensor,
    g: Tensor,
    second_moment: Tensor,
    twin: Tensor | None,
    exp_avg: Tensor | None,
    rms: Tensor,
    update_rms: Tensor,
    table: Tensor,
    draws: Tensor | None = None,
) -> None:
    """A whole step of a parameter that is not factored, as a vector: shape [m, n], cut into rows for its sums alone, or [n].

    A vector of shape [n] is short, and is stepped in float64, which costs little where it is in cache. `twin`, if any, is a
    second copy of the second moment: the parameter is then as many slices of one element.
    """
    numbers = Numbers.of(table)
    wide, total = (torch.float64, torch.sum) if p.ndim == 1 else (table.dtype, sum_twice)
    wide_p, wide_g = p.to(wide), g.to(wide)
    squared = wide_g.square()
    new = second_moment * numbers.beta2 + (squared + numbers.eps) * numbers.one_minus_beta2
    update_sq = total(squared / new)  # rather than of g / sqrt(new): a square root less
    new_rms, new_update_rms = root_mean(total(wide_p.square()), p.numel()), root_mean(update_sq, p.numel())
    scale, decay = (materialize(x.to(wide)) for x in scale_and_decay(numbers, new_rms, new_update_rms))
    update = wide_g * (new.rsqrt() * scale)
    if exp_avg is not None:
        update = exp_avg * numbers.beta1 + update * numbers.one_minus_beta1
        exp_avg.copy_(update)
    elements = (p.numel(), 1, 1) if twin is not None else (p.numel(),)
    noise = None if draws is None else noise_of(draws, elements, p.dtype).reshape(p.shape)
    write(p, (wide_p - (wide_p * decay + update)).to(table.dtype), noise)
    second_moment.copy_(new)
    if twin is not None:
        twin.copy_(new)
    rms.copy_(new_rms)
    update_rms.copy_(new_update_rms)


def step_short_vector(
    p: Tensor,
    g: Tensor,
    second_moment: Tensor,
    twin: None,
    exp_avg: Tensor | None,
    rms: Tensor,
    update_rms: Tensor,
    table: Tensor,
    draws: Tensor | None = None,
) -> None:
    """The same of a short vector, shape [n], for options of its own (`_compile.py`).

    A call takes 2.5 us, and a bias of 768 elements 3 us more. No size is broadcast: a graph for two elements is one for one.
    """
    step_elementwise(p, g, second_moment, twin, exp_avg, rms, update_rms, table, draws)
