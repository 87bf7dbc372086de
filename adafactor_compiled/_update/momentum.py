"""The momentum of a step, kept in a dtype of its own, and the mask of cautious updates."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adafactor_compiled._update.numbers import Numbers
from adafactor_compiled._update.rounding import write

LEAST_SHARE = 1e-3  # of elements that agree, by which an update is divided


def with_momentum(exp_avg: Tensor, update: Tensor, numbers: Numbers, noise: Tensor | None) -> Tensor:
    """Bring a momentum up to date; gives it as it was before it was rounded to its dtype."""
    update = momentum(exp_avg, update, numbers)
    write(exp_avg, update, noise)
    return update


def momentum(exp_avg: Tensor, update: Tensor, numbers: Numbers) -> Tensor:
    """The new momentum; the old one is left as it is."""
    new: Tensor = exp_avg.to(update.dtype) * numbers.beta1 + update * numbers.one_minus_beta1
    return new


def cautious(update: Tensor, g: Tensor, numbers: Numbers, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The elements of an update that agree in sign with their gradient, as much larger as there are fewer of them.

    Liang et al., Cautious Optimizers: Improving Training with One Line of Code, https://arxiv.org/abs/2411.16085.

    Args:
        update: the update, which is subtracted.
        g: the gradient, of the same shape.
        numbers: the numbers, of which the sign counts.
        mean: of all elements.
    """
    agree = agreeing(update, g, numbers)
    masked: Tensor = update * (agree / mean(agree).clamp(min=LEAST_SHARE))
    return masked


def agreeing(update: Tensor, g: Tensor, numbers: Numbers) -> Tensor:
    """1 for the elements of an update that agree in sign with their gradient, 0 for the others."""
    agree: Tensor = update.sign() * g.sign() * numbers.sign > 0
    return agree.to(update.dtype)
