"""`nonfinite="skip"`: a parameter whose gradient has a NaN or inf keeps its value and its state, step count included.

The fused kernels of a CPU look before they write. Elsewhere the decision stays on the device: the step runs as always, and
what it did to such a parameter is undone; that costs one copy of the parameters and the state of the groups with this option,
and the same work whatever the gradients are.
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

    finite: Tensor  # 0-dim bool: whether the gradient is
    tensors: list[Tensor]
    before: list[Tensor]


def kept_of(entries: list[Entry], update_rms: list[Tensor], by_themselves: Collection[int]) -> list[Kept | None]:
    """Copies for the entries whose group skips; None for the others, and for those whose kernels skip by themselves."""
    return [
        _kept(entry, rms) if entry.group["nonfinite"] == "skip" and i not in by_themselves else None
        for i, (entry, rms) in enumerate(zip(entries, update_rms, strict=True))
    ]


def _kept(entry: Entry, update_rms: Tensor) -> Kept:
    entry.state["step"] = torch.as_tensor(entry.state["step"], dtype=torch.float32, device=entry.param.device)
    tensors = [local(x).detach() for x in (entry.param, update_rms, *own_tensors(entry.state))]
    return Kept(torch.isfinite(local(entry.grad)).all(), tensors, [x.clone() for x in tensors])


def put_back(kept: list[Kept | None], finite: list[Tensor | None]) -> list[Tensor | None]:
    """Undo the steps of gradients that were not finite.

    Args:
        kept: of every entry.
        finite: whether the whole gradient is, where this rank has only a piece of it.

    Returns:
        Whether each entry was skipped, 0-dim; None where it could not be.
    """
    return [
        None if x is None else _undone(x, x.finite if whole is None else whole) for x, whole in zip(kept, finite, strict=True)
    ]


def _undone(kept: Kept, finite: Tensor) -> Tensor:
    for tensor, before in zip(kept.tensors, kept.before, strict=True):
        tensor.copy_(torch.where(finite, tensor, before))
    return ~finite
