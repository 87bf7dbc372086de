"""One step of many slices of a few elements each: the kernels of convolutions.

A 3 x 3 slice is too small for loops over its rows and columns. Its elements are unrolled and the loop goes over the slices, one
lane of a vector each; what is written goes over the elements as they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adafactor_compiled._update.matrices import materialize, static, sum_twice, total
from adafactor_compiled._update.members import Member, Members
from adafactor_compiled._update.momentum import cautious, with_momentum
from adafactor_compiled._update.numbers import Numbers, moving_average, root_mean, scale_and_decay
from adafactor_compiled._update.rounding import half_of, noise_of, noise_of_member, write

MOST = 16  # elements of a slice that are worth unrolling: the graph and its compile time grow with them


def kernel_statistics(p: Tensor, g: Tensor, row: Tensor, col: Tensor, table: Tensor) -> Tensor:
    """First reads of p, shape [m, n] as a vector is cut, and of g, [N, R, C], N dynamic.

    Brings `row`, [N, R], and `col`, [N, C], up to date; gives the sums of the squares of parameter and update, shape [2].
    """
    numbers = Numbers.of(table)
    rows, columns = (static(size) for size in g.shape[1:])
    for size in (*row.shape[1:], *col.shape[1:]):
        static(size)  # strides of a number that is not known take three times as long
    squared = [[g[:, i, j].to(table.dtype).square() for j in range(columns)] for i in range(rows)]
    new_row = [moving_average(row[:, i], _mean(squared[i]), numbers) for i in range(rows)]
    new_col = [moving_average(col[:, j], _mean([squared[i][j] for i in range(rows)]), numbers) for j in range(columns)]
    # The sum of the rows last: beside large ones, its ratio to a row or column without gradient would overflow.
    weight = [1.0 / x for x in new_col]
    terms = [_sum([squared[i][j] * weight[j] for j in range(columns)]) / new_row[i] for i in range(rows)]
    update_sq = (_sum(terms) * _sum(new_row)).sum() / rows
    row.copy_(torch.stack(new_row, 1))
    col.copy_(torch.stack(new_col, 1))
    return torch.stack([sum_twice(p.to(table.dtype).square()), update_sq])


def apply_kernels(
    p: Tensor,
    g: Tensor,
    row: Tensor,
    col: Tensor,
    exp_avg: Tensor | None,
    sums: Tensor,
    table: Tensor,
    draws: Tensor | None,
    numel: int,
) -> Tensor:
    """Second reads of p and g, shape [N, R * C], and the only write of p; the factors of few slices stay in cache.

    Gives the RMS of parameter and update from the sums over all `numel` elements. One loop over the elements of a slice: as
    [N, R, C] each row of a slice would be a short, slow vector of its own.
    """
    numbers = Numbers.of(table)
    rows, columns = static(row.shape[1]), static(col.shape[1])
    for x in (p, g) if exp_avg is None else (p, g, exp_avg):
        static(x.shape[1])
    measured = root_mean(sums, numel)
    scale, decay = scale_and_decay(numbers, *measured.unbind())
    scale, decay = (materialize(x.to(table.dtype)) for x in (scale / rows**0.5, decay))

    # Roots go over rows and columns as they lie, in whole vectors. What is left to the loop over slices, whose reads and writes
    # with a stride are no vectors, is a few products: all in one loop would take half as long again.
    row_root, col_root = materialize(row.rsqrt()), materialize(col.rsqrt())
    of_slice = _sum([row[:, i] for i in range(rows)]).sqrt() * scale
    row_factor = [row_root[:, i] * of_slice for i in range(rows)]
    factor = materialize(torch.stack([x * col_root[:, j] for x in row_factor for j in range(columns)], 1))
    update = g.to(table.dtype) * factor
    shape = p.shape[0], rows, columns
    noise = None if draws is None else noise_of(draws, shape, half_of(p, exp_avg)).reshape(p.shape)
    if exp_avg is not None:
        update = with_momentum(exp_avg, update, numbers, noise)
    wide_p = p.to(table.dtype)
    write(p, wide_p - (wide_p * decay + update), noise)
    return measured.to(table.dtype)


def step_kernels(members: Members) -> Tensor:
    """A whole step of k parameters of shape [N, R, C] on a GPU, R and C constants: sums over them are unrolled there.

    Gives the RMS of each and of its update, shape [2, k].
    """
    return torch.stack([_step(x) for x in members.each()], 1)


def _step(x: Member) -> Tensor:
    numbers, numel = Numbers.of(x.table), x.p.numel()
    rows, columns = (static(size) for size in x.g.shape[1:])
    p, g = x.p.to(x.table.dtype), x.g.to(x.table.dtype)
    squared = g.square()
    row = materialize(moving_average(x.row, squared.sum(-1) / columns, numbers))
    col = materialize(moving_average(x.col, squared.sum(-2) / rows, numbers))
    row_mean = row.sum(-1) / rows
    of_slices = (squared / row.unsqueeze(-1) / col.unsqueeze(-2)).sum(-1).sum(-1) * row_mean
    rms, update_rms = (root_mean(total(of), numel) for of in (p.square().sum(-1).sum(-1), of_slices))
    scale, decay = (materialize(of.to(x.table.dtype)) for of in scale_and_decay(numbers, rms, update_rms))
    # Not of their ratio: beside large rows, that of one without gradient would underflow.
    row_factor = row.rsqrt() * (row_mean.sqrt() * scale).unsqueeze(-1)
    update = g * row_factor.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
    noise = noise_of_member(x.draws, x.p, x.exp_avg, True)
    if x.exp_avg is not None:
        update = with_momentum(x.exp_avg, update, numbers, noise)
    if x.cautious:
        update = cautious(update, x.g, numbers, lambda agree: total(agree.sum(-1).sum(-1)) / numel)
    write(x.p, p - (p * decay + update), noise)
    x.row.copy_(row)
    x.col.copy_(col)
    return torch.stack([rms, update_rms]).to(x.table.dtype)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _mean(terms: list[Tensor]) -> Tensor:
    return _sum(terms) * (1 / len(terms))  # seven divisions less in a loop that has six others
