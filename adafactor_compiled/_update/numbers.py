"""The numbers of a step: every hyperparameter and everything derived from the step count, as data.

Compiled code never sees a Python number that may change: it sees one vector for each parameter, laid out as `Numbers`.
A learning-rate schedule, another weight decay or a parameter that joined late is then new data for the same graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.layout import compute_dtype, group_by_key
from adafactor_compiled._state.options import Group

LEAST_SHARE = 1e-3  # of elements that agree in sign, by which a cautious update is divided


class Numbers(NamedTuple):
    """What a step reads: 0-dim tensors for one parameter, vectors of shape [k] for k stacked ones, or Python numbers."""

    lr: Any  # the learning rate before it is scaled by the parameter's RMS
    beta2: Any
    one_minus_beta2: Any
    eps: Any  # added to the squared gradient
    min_scale: Any  # the least RMS by which the learning rate is scaled
    scale_parameter: Any  # 1 or 0
    clip_threshold: Any  # inf: no clipping
    beta1: Any
    one_minus_beta1: Any
    weight_decay: Any
    decay_by_lr: Any  # 1 where weight decay is scaled by the learning rate in use, or 0
    sign: Any  # -1 to maximize
    skips_nonfinite: Any  # 1 where a gradient with NaN or inf steps nothing, or 0

    @classmethod
    def of(cls, table: Tensor) -> Numbers:
        """Split a table of shape [..., len(Numbers)]."""
        return cls(*table.unbind(-1))

    def unsqueeze(self, ndim: int) -> Numbers:
        """Give [k] vectors `ndim` trailing dimensions of size 1, to broadcast over k stacked tensors."""
        return Numbers(*(x.reshape(x.shape + (1,) * ndim) if isinstance(x, Tensor) else x for x in self))


def unscaled_lr(group: Group, step: Any) -> Any:
    """The learning rate before it is scaled, of a step count that is an int or a tensor."""
    if not group["relative_step"]:
        lr = group["lr"]
        return lr.reshape(()) if isinstance(lr, Tensor) else lr  # it may have a dimension of size 1
    if isinstance(step, Tensor):
        rate = step.rsqrt()
        return torch.minimum(1e-6 * step, rate) if group["warmup_init"] else rate.clamp(max=1e-2)
    return min(1e-6 * step if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(step))


def one_minus_beta2_of(group: Group, step: Any) -> Any:
    """How much of the second moment is new, of a step count that is an int or a tensor."""
    cap, offset = group["beta2_cap"], group["decay_offset"]
    if offset:
        step = (step - offset).clamp(min=1) if isinstance(step, Tensor) else max(step - offset, 1)
    share = step ** group["decay_rate"]
    if cap is None:
        return share
    return share.clamp(min=1.0 - cap) if isinstance(share, Tensor) else max(share, 1.0 - cap)


def plain_numbers(group: Group, step: Any) -> Numbers:
    """The numbers of a group at a step count: Python numbers, or tensors where an input is one."""
    one_minus_beta2 = one_minus_beta2_of(group, step)
    beta1 = group["beta1"] or 0.0
    clip_threshold = group["clip_threshold"]
    return Numbers(
        lr=unscaled_lr(group, step),
        beta2=1.0 - one_minus_beta2,
        one_minus_beta2=one_minus_beta2,
        eps=group["eps"][0],
        min_scale=group["eps"][1],
        scale_parameter=float(group["scale_parameter"]),
        clip_threshold=math.inf if clip_threshold is None else clip_threshold,
        beta1=beta1,
        one_minus_beta1=1.0 - beta1,
        weight_decay=group["weight_decay"],
        decay_by_lr=float(group["weight_decay_scale"] == "lr"),
        sign=-1.0 if group["maximize"] else 1.0,
        skips_nonfinite=float(group["nonfinite"] == "skip"),
    )


def tables_of(entries: Sequence[Entry]) -> list[Tensor]:
    """The numbers of each entry, a vector on its device; made once for entries of one group at one step.

    Nothing is read from a tensor: a learning rate or step count in one reaches the result on its device.
    """
    tables: list[Tensor] = [None] * len(entries)  # type: ignore[list-item]
    keys, index, last = [], -1, None
    for _, param, _, state, group in entries:
        if group is not last:  # its `id` would be guarded by an outer graph, and load_state_dict makes new groups
            index, last = index + 1, group
        count = None if isinstance(state["step"], Tensor) else state["step"]
        keys.append((index, compute_dtype(param.dtype), param.device, count))
    plain: dict[tuple[torch.dtype, torch.device], list[tuple[list[int], Numbers]]] = {}
    for (_, dtype, device, count), positions in group_by_key(keys).items():
        group = entries[positions[0]].group
        if count is None:
            steps = torch.stack([entries[i].state["step"].reshape(()) for i in positions]).to(dtype)
            for i, row in zip(
                positions, _filled(plain_numbers(group, steps), steps.shape, dtype, device).unbind(), strict=True
            ):
                tables[i] = row
        else:
            plain.setdefault((dtype, device), []).append((positions, plain_numbers(group, count)))
    for (dtype, device), rows in plain.items():
        for (positions, _), row in zip(rows, _tables_of([x for _, x in rows], dtype, device), strict=True):
            for i in positions:
                tables[i] = row
    return tables


def _tables_of(rows: Sequence[Numbers], dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
    """A vector for each row on a device; those of numbers by one copy."""
    # A list or a fill of numbers would be constants of a graph, and each learning rate another one; see `_fill`.
    if torch.compiler.is_compiling() or any(isinstance(x, Tensor) for row in rows for x in row):
        return [_filled(row, (), dtype, device) for row in rows]
    return to_device(torch.tensor(rows, dtype=dtype, device="cpu"), device).unbind()


def _filled(row: Numbers, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.stack([_fill(x, shape, dtype, device) for x in row], -1)


def _fill(value: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    filled: Tensor
    if not isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            filled = torch.ones(shape, dtype=dtype, device=device) * value
            return filled
        return torch.full(shape, value, dtype=dtype, device=device)
    if value.numel() == 1:  # edited by hand, it may have a dimension of size 1
        value = value.reshape(())
    filled = value.to(device=device, dtype=dtype, non_blocking=True).expand(shape)
    return filled


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it."""
    if device.type == "cpu":
        return table
    if device.type == "cuda":
        table = table.pin_memory()  # a copy from pageable memory would wait for the device
    return table.to(device, non_blocking=True)


def moving_average(average: Tensor, mean_sq: Tensor, numbers: Numbers) -> Tensor:
    """The new average of squared gradients, of their new means; the old one is left as it is."""
    new: Tensor = average * numbers.beta2 + (mean_sq + numbers.eps) * numbers.one_minus_beta2
    return new


def root_mean(total: Tensor, count: Any) -> Tensor:
    """In float64, as is all that is made of it: an error in these few numbers is an error of every element."""
    mean: Tensor = total.to(torch.float64) / count
    return mean.sqrt()


def step_size(numbers: Numbers, param_rms: Tensor) -> Tensor:
    """The learning rate scaled by the parameter's RMS (a NaN stays NaN)."""
    scale = torch.maximum(param_rms, numbers.min_scale)
    alpha: Tensor = numbers.lr * torch.where(numbers.scale_parameter > 0, scale, 1.0)
    return alpha


def clip_divisor(numbers: Numbers, update_rms: Tensor) -> Tensor:
    """What the update is divided by, so that its RMS does not exceed the threshold; 1 for none, whatever the RMS is."""
    ratio: Tensor = update_rms / numbers.clip_threshold
    return torch.where(numbers.clip_threshold == math.inf, 1.0, ratio.clamp(min=1.0))


def scale_and_decay(numbers: Numbers, param_rms: Tensor, update_rms: Tensor) -> tuple[Tensor, Tensor]:
    """What the update before clipping is multiplied by, and what share of the parameter decays."""
    alpha = step_size(numbers, param_rms)
    decay: Tensor = numbers.weight_decay * torch.where(numbers.decay_by_lr > 0, alpha, 1.0)
    return numbers.sign * alpha / clip_divisor(numbers, update_rms), decay
