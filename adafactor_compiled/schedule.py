"""The learning rate that Adafactor chooses for itself, in the form of a scheduler, for loops and loggers that want one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class AdafactorSchedule(LambdaLR):
    """Reports the learning rate in use: one value per group, that of its first parameter that has been stepped.

    Before the first step it reports `initial_lr`. With `relative_step` the report in `group["lr"]` is never read back.

    Args:
        optimizer: an `Adafactor`, with any options.
        initial_lr: what to report before the first step.

    Differs from transformers: a group whose first parameter is frozen, and a call after `zero_grad()` or before the first step,
    report a value too.

    Source: `transformers.optimization.AdafactorSchedule`.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float = 0.0) -> None:
        self.initial_lr = initial_lr
        # LambdaLR wants a number in group["lr"] and keeps it as group["initial_lr"]: lend it one, and take it back.
        lent = [group.get("lr") for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["initial_lr"] = initial_lr
        super().__init__(optimizer, lambda _: initial_lr)
        for group, lr in zip(optimizer.param_groups, lent, strict=True):
            del group["initial_lr"]
            if not group["relative_step"]:
                group["lr"] = lr

    def get_lr(self) -> list[Any]:
        optimizer: Any = self.optimizer
        return [self._report(optimizer, group) for group in optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Refresh the report; a learning rate that the user set is reported, never overwritten."""
        manual = [(group, group["lr"]) for group in self.optimizer.param_groups if not group["relative_step"]]
        for group, lr in manual:
            if isinstance(lr, Tensor):
                group["lr"] = lr.clone()  # LambdaLR fills a tensor in place
        super().step(epoch)
        for group, lr in manual:
            group["lr"] = lr

    def _report(self, optimizer: Any, group: dict[str, Any]) -> Any:
        for param in group["params"]:
            state = optimizer.state.get(param)
            if state and isinstance(state["step"], Tensor):  # reading the step count would wait for the device
                return torch.where(state["step"] > 0, optimizer._get_lr(group, state), self.initial_lr)
            if state and state["step"] > 0:
                return optimizer._get_lr(group, state)
        return self.initial_lr


def get_adafactor_schedule(optimizer: Optimizer, initial_lr: float = 0.0) -> AdafactorSchedule:
    """A schedule that reports the learning rate of an `Adafactor`.

    Args:
        optimizer: the optimizer to report on.
        initial_lr: what to report before the first step.

    Source: `transformers.optimization.get_adafactor_schedule`.
    """
    return AdafactorSchedule(optimizer, initial_lr)
