"""What the last step did, group by group, for a logger: computed on the device and fetched in one small transfer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._state.options import Group
from adafactor_compiled._step.record import Record
from adafactor_compiled._update.numbers import Numbers, step_size


class GroupTelemetry(NamedTuple):
    """Means over the parameters of a group that took part in the last step; NaN where none did.

    Parameters that are stepped one by one count from then to the next step of all.

    Args:
        parameters: how many parameters the means are over.
        lr: the learning rate in use, scaled by the parameter's RMS where `scale_parameter` is set.
        param_rms: RMS of the parameter before the step.
        update_rms: RMS of the update before clipping and before the learning rate.
        clipped: share of the parameters whose update was clipped, from 0 to 1.
        skipped: share of the parameters that were skipped for a NaN, an inf or a GradScaler's overflow, from 0 to 1.
    """

    parameters: int
    lr: float
    param_rms: float
    update_rms: float
    clipped: float
    skipped: float


def telemetry_of(groups: list[Group], records: Iterable[Record]) -> list[GroupTelemetry]:
    """Telemetry of each group; reads one small tensor."""
    last: dict[int, Sequence[Any]] = {id(param): line for record in records for param, *line in zip(*record, strict=True)}
    # An empty parameter has no RMS.
    stepped = [[param for param in group["params"] if id(param) in last and param.numel()] for group in groups]
    chosen = [[last[id(param)] for param in params] for params in stepped]
    values = [[float("nan")] * 5] * len(groups)
    if occupied := [i for i, lines in enumerate(chosen) if lines]:
        device = chosen[occupied[0]][0][1].device
        means = torch.stack([_means(chosen[i], device) for i in occupied]).tolist()
        for i, value in zip(occupied, means, strict=True):
            values[i] = value
    return [GroupTelemetry(len(lines), *value) for lines, value in zip(chosen, values, strict=True)]


def _means(lines: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
    *fields, flags = zip(*lines, strict=True)
    tables, rms, update_rms = (
        torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device).detach() for x in field]) for field in fields
    )
    numbers = Numbers.of(tables)
    clipped = (update_rms > numbers.clip_threshold).to(torch.float32)
    skipped = torch.stack([rms.new_zeros(()) if x is None else x.to(device, torch.float32) for x in flags])
    return torch.stack([step_size(numbers, rms), rms, update_rms, clipped, skipped]).mean(-1)


def flat(telemetry: Sequence[GroupTelemetry], prefix: str = "adafactor/") -> Mapping[str, float]:
    """A flat dict for any logger: `adafactor/lr` and so on, with `group0/` and so on where there are several groups.

    Args:
        telemetry: what `Adafactor.telemetry` returned.
        prefix: how each key begins.
    """
    several = len(telemetry) > 1
    return {
        f"{prefix}{f'group{index}/' if several else ''}{name}": value
        for index, group in enumerate(telemetry)
        for name, value in group._asdict().items()
    }
