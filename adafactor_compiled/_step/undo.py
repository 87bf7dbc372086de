"""What a step may have to undo: of a gradient that is not finite under `nonfinite="skip"`, or all, where one has overflowed.

Such a parameter keeps its value and its state, step count included. The fused kernels of a CPU look before they write.
Elsewhere the decision stays on the device: the step runs as always, and what it did is undone, bit for bit; that costs one copy
of the parameters and the state in question, and the same work whatever the gradients are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import own_tensors
from adafactor_compiled._state.placements import local


class Kept(NamedTuple):
    """What a step may have to put back for one entry."""

    stays: Tensor  # 0-dim bool: whether its step does
    tensors: list[Tensor]
    before: list[Tensor]


def kept_of(
    entries: list[Entry], update_rms: list[Tensor], by_themselves: Collection[int], overflowed: Tensor | None
) -> list[Kept | None]:
    """Copies for the entries whose group skips, but those whose kernels do by themselves, or for all.

    Args:
        entries: of the step.
        update_rms: of each.
        by_themselves: the positions of those whose kernels skip.
        overflowed: whether any gradient did, 0-dim, where that is not known on the host.
    """
    no_overflow: dict[torch.device, Tensor] = {}
    if overflowed is not None:
        for device in {entry.param.device for entry in entries}:
            no_overflow[device] = ~overflowed.to(device, non_blocking=True)
    kept: list[Kept | None] = []
    for i, ((_, param, grad, state, group), rms) in enumerate(zip(entries, update_rms, strict=True)):
        stays = no_overflow.get(param.device)
        if group["nonfinite"] == "skip" and i not in by_themselves:
            finite = torch.isfinite(local(grad)).all()
            stays = finite if stays is None else stays & finite
        if stays is None:
            kept.append(None)
            continue
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
        tensors = [local(x).detach() for x in (param, rms, *own_tensors(state))]
        kept.append(Kept(stays, tensors, [x.clone() for x in tensors]))
    return kept


def put_back(kept: list[Kept | None], finite: list[Tensor | None]) -> list[Tensor | None]:
    """Undo the steps that do not stay.

    Args:
        kept: of every entry.
        finite: whether the whole gradient is, where this rank has only a piece of it.

    Returns:
        Whether each entry was skipped, 0-dim; None where it could not be.
    """
    skipped: list[Tensor | None] = [None] * len(kept)
    for i, (x, whole) in enumerate(zip(kept, finite, strict=True)):
        if x is not None:
            stays = x.stays if whole is None else x.stays & whole
            for tensor, before in zip(x.tensors, x.before, strict=True):
                tensor.copy_(torch.where(stays, tensor, before))
            skipped[i] = ~stays
    return skipped
