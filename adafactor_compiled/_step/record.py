"""What a step leaves for telemetry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Record(NamedTuple):
    """Each field a list over the parameters that took part."""

    params: list[Tensor]
    tables: Sequence[Tensor | Sequence[float]]  # their numbers
    rms: list[Tensor]  # of the parameter before the step
    update_rms: list[Tensor]
    skipped: list[Tensor | None]  # whether for a gradient that was not finite; None where it could not be
