"""The `step` that torch's learning-rate schedulers see."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def check_scheduler(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError for a scheduler that found no number to multiply; it has noted what it found as "initial_lr"."""
    if any(group.get("initial_lr", 0.0) is None for group in groups):
        raise ValueError(
            "a learning-rate scheduler needs a number but `lr` is: None; pass `lr=..., relative_step=False`, or "
            "report the learning rate that the optimizer chooses with `AdafactorSchedule`"
        )


def traceable_step(optimizer: Optimizer) -> Callable[..., Any]:
    """`optimizer.step` with a note that it was called, as schedulers wrap it.

    Their own wrapper lies in a file that Dynamo refuses to trace: the optimizer of a compiled loop could not have a scheduler.
    """
    reference = weakref.ref(optimizer)  # as theirs: an optimizer that refers to itself is freed late

    @functools.wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        stepped: Any = reference()
        stepped._opt_called = True
        return type(stepped).step(stepped, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step
