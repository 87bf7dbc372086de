"""What graphs are compiled from: tensors of chosen sizes, never those of a step.

Sizes are dynamic. Two that are equal in an example would have to be equal in every call: each size here differs from all
others, and from the constants of a graph. Which loops get several threads is decided by the sizes of an example too, whatever
network comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._state.layout import compute_dtype
from adafactor_compiled._state.moments import Momentum, is_cautious
from adafactor_compiled._update import kernels, matrices, pieces, vectors
from adafactor_compiled._update.members import Members
from adafactor_compiled._update.numbers import Numbers
from adafactor_compiled._update.rounding import DRAWS

ONE, MANY, LONG = 1, 2, 3  # what a graph depends on of a size, see `magnitude`
LONG_SUM = 4096  # elements, at most, of a sum that is not long
ANY, NARROW = "any", "narrow"  # what a graph depends on of the columns, see `Pass`
FEW = (3, 4, 5, 6, 9, 10, 11, 13)  # columns that do not fill two vectors
OF_KERNELS = {kernels.kernel_statistics, kernels.apply_kernels, kernels.step_kernels}  # their first two sizes are constants


class Typical(NamedTuple):
    """The sizes of the last dimensions of a first member."""

    first: tuple[int, ...]
    more: tuple[int, ...]  # how much larger those of each next one are


BLOCKS = Typical((100, 40, 24, 1024), (1, 1, 1, 16))
SMALL, VECTOR = Typical((100, 64, 512), (1, 1, 16)), Typical((30, 2064), (1, 16))
OF_SLICES = Typical((4000, *VECTOR.first), (0, *VECTOR.more))  # and as which rows their parameters are summed


def magnitude(size: int) -> int:
    """What a graph depends on of a size: 1 is none to Inductor, and of long sums it makes other loops."""
    return ONE if size == 1 else MANY if size <= LONG_SUM else LONG


class Pass(NamedTuple):
    """A function to compile, and all that its graph depends on."""

    function: Callable[..., Any]
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    momentum: Momentum | None
    rounding: bool
    k: int  # members of a call
    sizes: tuple[int, ...]  # magnitudes of its dynamic sizes, those of kernels of convolutions in front as they are
    columns: str = ANY  # NARROW: fewer than fill two vectors of AVX2


def example_of(key: Pass, tiny: bool = False) -> tuple[Any, ...]:
    """Arguments of zeros to compile a pass with.

    Args:
        key: the pass.
        tiny: of the smallest sizes that its graph serves, all members alike.
    """
    make = Make(key, tiny)
    members = MEMBERS.get(key.function)
    return (make.members(*members),) if members else ARGUMENTS[key.function](make)


class Make:
    """Makes tensors for a pass."""

    def __init__(self, key: Pass, tiny: bool) -> None:
        self.key, self.tiny = key, tiny
        self.dtype, self.device = compute_dtype(key.dtype), key.device

    def sizes(self, typical: Typical, i: int = 0) -> tuple[int, ...]:
        """The dynamic sizes of member i."""
        sizes = self.key.sizes[-len(typical.first) :]
        chosen = [
            1 if size == ONE else (2 if self.tiny else first + i * more) + (LONG_SUM if size == LONG else 0)
            for size, first, more in zip(sizes, typical.first[-len(sizes) :], typical.more[-len(sizes) :], strict=True)
        ]
        if self.key.columns == NARROW:
            chosen[-1] = FEW[i]
        elif self.tiny and matrices.AVX2:
            chosen[-1] = max(chosen[-1], 16)
        return tuple(chosen)

    def of(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def p_and_g(self, *shape: int) -> tuple[Tensor, Tensor]:
        return self.of(*shape, dtype=self.key.dtype), self.of(*shape, dtype=self.key.grad_dtype)

    def exp_avg(self, *shape: int) -> Tensor | None:
        return self.of(*shape, dtype=self.key.momentum.dtype) if self.key.momentum else None

    def ones(self, shape: tuple[int, ...]) -> Tensor | None:
        ones = matrices.ones_for(shape, self.key.grad_dtype, self.device)
        return None if ones is None else ones.clone()

    def table(self, *k: int) -> Tensor:
        return self.of(*k, len(Numbers._fields)).fill_(0.5)

    def draws(self, *k: int) -> Tensor | None:
        return self.of(*k, DRAWS, dtype=torch.int32) if self.key.rounding else None

    def members(self, typical: Typical, second_moments: str) -> Members:
        k = self.key.k
        shapes = [self.sizes(typical, i) for i in range(k)]
        lists: dict[str, list[Any]] = {name: [] for name in Members._fields[:7]}
        for shape in shapes:
            p, g = self.p_and_g(*shape)
            exp_avg = self.exp_avg(*shape)
            lists["params"].append(p)
            lists["grads"].append(g)
            if second_moments == "whole":
                lists["exp_avg_sqs"].append(self.of(*shape))
            else:
                lead = shape[: -3 if typical is BLOCKS else -2]  # slices, where there are dimensions of them
                twice = second_moments == "twice"
                ones = self.ones(shape) if typical is BLOCKS else None
                lists["ones"] += [] if ones is None else [ones]
                lists["rows"].append(self.of(*(shape if twice else shape[:-1])))
                lists["cols"].append(self.of(*(shape if twice else (*lead, shape[-1]))))
            if exp_avg is not None:
                lists["exp_avgs"].append(exp_avg)
        return Members(**lists, table=self.table(k), draws=self.draws(k), cautious=is_cautious(self.key.momentum))


MEMBERS: dict[Any, tuple[Typical, str]] = {
    matrices.step_matrices: (BLOCKS, "factored"),
    matrices.step_small_matrices: (SMALL, "factored"),
    vectors.step_vectors: (VECTOR, "whole"),
    vectors.step_pointwise: (VECTOR, "twice"),
}


def _step_kernels(make: Make) -> tuple[Any, ...]:
    (rows, columns), (n,) = make.key.sizes[:2], make.sizes(Typical((4000,), (0,)))
    exp_avg = make.exp_avg(n, rows, columns)
    member = *make.p_and_g(n, rows, columns), make.of(n, rows), make.of(n, columns), None, exp_avg, None
    table = make.of(1, len(Numbers._fields)).fill_(0.5)
    return (Members.of([member], table, make.draws(1), is_cautious(make.key.momentum)),)


def _lead(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[: len(shape) == len(BLOCKS.first)]


def _statistics(make: Make) -> tuple[Any, ...]:
    shape = make.sizes(BLOCKS)
    return *make.p_and_g(*shape), make.of(*shape[:-1]), make.ones(shape), make.table()


def _apply(make: Make) -> tuple[Any, ...]:
    shape = make.sizes(BLOCKS)
    p_and_g, row, lead = make.p_and_g(*shape), make.of(*shape[:-1]), _lead(shape)
    factors = make.of(*lead), make.of(*lead, shape[-1]), make.of()
    return *p_and_g, row, make.exp_avg(*shape), *factors, make.table(), make.draws()


def _plain_sums(make: Make) -> tuple[Any, ...]:
    return *make.p_and_g(*make.sizes(BLOCKS)), make.table()


def _weighted_rows(make: Make) -> tuple[Any, ...]:
    shape = make.sizes(BLOCKS)
    return make.p_and_g(*shape)[1], make.of(*_lead(shape), shape[-1]), make.table()


def _kernel_statistics(make: Make) -> tuple[Any, ...]:
    rows, columns = make.key.sizes[:2]
    n, *as_vector = make.sizes(OF_SLICES)
    g = make.of(n, rows, columns, dtype=make.key.grad_dtype)
    return make.of(*as_vector, dtype=make.key.dtype), g, make.of(n, rows), make.of(n, columns), make.table()


def _apply_kernels(make: Make) -> tuple[Any, ...]:
    rows, columns = make.key.sizes[:2]
    n, size = make.sizes(OF_SLICES)[0], rows * columns
    factors = make.of(n, rows), make.of(n, columns), make.exp_avg(n, size)
    return *make.p_and_g(n, size), *factors, make.of(2), make.table(), make.draws(), 1_000_003


def _vector_sums(make: Make) -> tuple[Any, ...]:
    shape = make.sizes(VECTOR)
    return *make.p_and_g(*shape), make.of(*shape), make.table()


def _apply_vector(make: Make) -> tuple[Any, ...]:
    shape = make.sizes(VECTOR)
    state = make.of(*shape), make.exp_avg(*shape)
    return *make.p_and_g(*shape), *state, make.of(), make.of(), make.table(), make.draws(), 1_000_003


ARGUMENTS: dict[Any, Callable[[Make], tuple[Any, ...]]] = {
    matrices.statistics: _statistics,
    matrices.apply: _apply,
    pieces.plain_sums: _plain_sums,
    pieces.weighted_rows: _weighted_rows,
    kernels.kernel_statistics: _kernel_statistics,
    kernels.step_kernels: _step_kernels,
    kernels.apply_kernels: _apply_kernels,
    vectors.vector_sums: _vector_sums,
    vectors.apply_vector: _apply_vector,
}
