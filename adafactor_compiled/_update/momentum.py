"""The momentum of a step, kept in a dtype of its own, and the mask of cautious updates."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adafactor_compiled._update.numbers import Numbers
from adafactor_compiled._update.rounding import write

LEAST_SHARE = 1e-3  # of elements that agree, by which an update is divided


def with_momentum(exp_avg: Tensor, update: Tensor, numbers: Numbers, noise: Tensor | None) -> Tensor:
    """Bring a momentum up to date; gives it as it was before it was rounded to its dtype."""
    update = exp_avg.to(update.dtype) * numbers.beta1 + update * numbers.one_minus_beta1
    write(exp_avg, update, noise)
    return update


def cautious(update: Tensor, g: Tensor, numbers: Numbers, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The elements of an update that agree in sign with their gradient, as much larger as there are fewer of them.

    Liang et al., Cautious Optimizers: Improving Training with One Line of Code, https://arxiv.org/abs/2411.16085.

    Args:
        update: the update, which is subtracted.
        g: the gradient, of the same shape.
        numbers: the numbers, of which the sign counts.
        mean: of all elements.
    """
    agree = (update.sign() * g.sign() * numbers.sign > 0).to(update.dtype)
    masked: Tensor = update * (agree / mean(agree).clamp(min=LEAST_SHARE))
    return masked
