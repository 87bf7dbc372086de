"""Loss scaling without a host decision: what torch.amp.GradScaler hands to a step, used on the device.

GradScaler unscales gradients and skips steps by itself, at the price of one wait for the device; it refuses float16
parameters. Where an optimizer declares `_step_supports_amp_scaling` it leaves both to the step instead, and hands over two
tensors: `grad_scale`, by which gradients are too large (None: unscaled already), and `found_inf`, above 0 if any overflowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.layout import compute_dtype
from adafactor_compiled._state.options import Group
from adafactor_compiled._step.record import Record
from adafactor_compiled._update.numbers import tables_of


def wanted(groups: Sequence[Group]) -> bool:
    """Whether a step takes over: for float16 parameters, and where a host decision is ruled out.

    Elsewhere GradScaler's own way is cheaper: undoing a step on the device takes a copy of what it changes. It is also the
    one for sharded parameters, since it asks all ranks whether a gradient overflowed.
    """
    if any(isinstance(param, DTensor) for group in groups for param in group["params"]):
        return False
    return any(group["capturable"] or any(param.dtype is torch.float16 for param in group["params"]) for group in groups)


class Scaling(NamedTuple):
    grad_scale: Tensor | None
    found_inf: Tensor

    @classmethod
    def of(cls, optimizer: Any) -> Scaling | None:
        found_inf = getattr(optimizer, "found_inf", None)
        return None if found_inf is None else cls(getattr(optimizer, "grad_scale", None), found_inf)

    def unscaled(self, entries: list[Entry]) -> list[Entry]:
        """The entries with unscaled gradients in the dtype of the arithmetic: in float16 they would underflow again."""
        if self.grad_scale is None:
            return entries
        scale = {entry.param.device: self.grad_scale.to(entry.param.device, non_blocking=True) for entry in entries}
        return [
            entry._replace(grad=entry.grad.to(compute_dtype(entry.param.dtype)) / scale[entry.param.device])
            for entry in entries
        ]

    def is_on_host(self, entries: list[Entry]) -> bool:
        """Whether the host may look, and without waiting: what a step would change is then not copied."""
        on_host = self.found_inf.device.type == "cpu" and all(entry.param.device.type == "cpu" for entry in entries)
        return on_host and not any(entry.group["capturable"] for entry in entries)

    @property
    def overflowed(self) -> Tensor:
        """Whether any gradient did, 0-dim."""
        return (self.found_inf > 0).reshape(())

    def record_of_none(self, entries: list[Entry], update_rms: list[Tensor]) -> Record:
        """That no parameter was stepped."""
        ahead = [entry._replace(state={**entry.state, "step": entry.state["step"] + 1}) for entry in entries]
        params, rms = [entry.param for entry in entries], [entry.state["RMS"] for entry in entries]
        return Record(params, tables_of(ahead), rms, update_rms, [self.overflowed] * len(entries))
