"""One step of many slices of a few elements each: the kernels of convolutions.

A 3 x 3 slice is too small for loops over its rows and columns. For the statistics its elements are unrolled and the loop goes
over the slices, one lane of a vector each; the application goes over the elements as they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._blocked import materialize
from adafactor_compiled._numbers import Numbers, clip_divisor, step_size
from adafactor_compiled._rounding import bits_of_matrix, write

MOST = 16  # elements of a slice that are worth unrolling: the graph and its compile time grow with them


class KernelFactors(NamedTuple):
    row: Tensor  # [N, R]
    col: Tensor  # [N, C]
    update_sq: Tensor  # []
    param_sq: Tensor  # []


def kernel_factors(p: Tensor, g: Tensor, row: Tensor, col: Tensor, table: Tensor) -> KernelFactors:
    """First reads of p and g, shape [N, R, C], N dynamic; brings `row`, [N, R], and `col`, [N, C], up to date."""
    numbers = Numbers.of(table)
    rows, columns = (_static(size) for size in g.shape[1:])
    for size in (*p.shape[1:], *row.shape[1:], *col.shape[1:]):
        _static(size)  # strides of a number that is not known take three times as long
    squared = [[g[:, i, j].to(table.dtype).square() for j in range(columns)] for i in range(rows)]
    new_row = [_average(row[:, i], _mean(squared[i]), numbers) for i in range(rows)]
    new_col = [_average(col[:, j], _mean([squared[i][j] for i in range(rows)]), numbers) for j in range(columns)]
    row_mean = _mean(new_row)
    # The mean last: beside large rows, its ratio to a row or column without gradient would overflow.
    row_weight, col_weight = [1.0 / x for x in new_row], [1.0 / x for x in new_col]
    terms = [squared[i][j] * row_weight[i] * col_weight[j] for i in range(rows) for j in range(columns)]
    update_sq = (_sum(terms) * row_mean).sum()
    param_terms = [p[:, i, j].to(table.dtype).square() for i in range(rows) for j in range(columns)]
    row.copy_(torch.stack(new_row, 1))
    col.copy_(torch.stack(new_col, 1))
    row_factor = [row_mean.sqrt() * x.sqrt() for x in row_weight]
    col_factor = [x.sqrt() for x in col_weight]
    return KernelFactors(torch.stack(row_factor, 1), torch.stack(col_factor, 1), update_sq, _sum(param_terms).sum())


def apply_kernels(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor | None,
    rms: Tensor,
    update_rms: Tensor,
    f: KernelFactors,
    table: Tensor,
    draws: Tensor | None = None,
) -> None:
    """Second reads of p and g, shape [N, R * C], and the only write of p.

    One loop over the elements of a slice: as [N, R, C] each row of a slice would be a short, slow vector of its own.
    """
    numbers = Numbers.of(table)
    new_rms, new_update_rms = (f.param_sq / p.numel()).sqrt(), (f.update_sq / p.numel()).sqrt()
    alpha = step_size(numbers, new_rms)
    scale = materialize(numbers.sign * alpha / clip_divisor(numbers, new_update_rms))
    decay = materialize(numbers.weight_decay * alpha)
    slice_shape = (p.shape[0], _static(f.row.shape[1]), _static(f.col.shape[1]))
    row, col = (x.expand(slice_shape).reshape(p.shape) for x in (f.row.unsqueeze(-1), f.col.unsqueeze(-2)))
    update = g.to(table.dtype) * row * col * scale
    if exp_avg is not None:
        update = exp_avg * numbers.beta1 + update * numbers.one_minus_beta1
        exp_avg.copy_(update)
    wide_p = p.to(table.dtype)
    bits = None if draws is None else bits_of_matrix(draws, slice_shape).reshape(p.shape)
    write(p, wide_p - (wide_p * decay + update), bits)
    rms.copy_(new_rms)
    update_rms.copy_(new_update_rms)


def _static(size: int) -> int:
    """A size as a constant of the graph: iterating over it specializes the graph on it."""
    return len([None for _ in range(size)])


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _mean(terms: list[Tensor]) -> Tensor:
    return _sum(terms) / len(terms)


def _average(old: Tensor, mean: Tensor, numbers: Numbers) -> Tensor:
    new: Tensor = old * numbers.beta2 + (mean + numbers.eps) * numbers.one_minus_beta2
    return new
