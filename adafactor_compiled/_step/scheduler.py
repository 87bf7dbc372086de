"""The `step` that torch's learning-rate schedulers see."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.optim import Optimizer


def check_scheduler(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError for a scheduler that found no number to multiply; it has noted what it found as "initial_lr"."""
    if any(group.get("initial_lr", 0.0) is None for group in groups):
        raise ValueError(
            "a learning-rate scheduler needs a number but `lr` is: None; pass `lr=..., relative_step=False`, or "
            "report the learning rate that the optimizer chooses with `AdafactorSchedule`"
        )


def _step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        optimizer._opt_called = True
    return type(optimizer).step(optimizer, *args, **kwargs)


_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def traceable_step(optimizer: Optimizer) -> MethodType:
    """`optimizer.step` with a note that it was called, as schedulers wrap it.

    Their own wrapper lies in a file that Dynamo refuses to trace: the optimizer of a compiled loop could not have a scheduler.
    """
    # A traced step loses the note (torch 2.13): where steps are likely to be traced it is made here, once.
    optimizer._opt_called = any(group["capturable"] for group in optimizer.param_groups)  # type: ignore[attr-defined]
    return MethodType(_step, optimizer)
