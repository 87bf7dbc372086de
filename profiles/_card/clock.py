"""Milliseconds on the device and on the host, of contenders in turn.

On the device: between two CUDA events, behind copies that keep the device busy until the host is ahead, as it is in training
behind a backward pass. Without them a step of many launches is measured by how fast Python launches. On the host: until the
call returns, which waits for nothing. Alone: until an idle device has finished. On a CPU all three are the same.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from _shared import Timing, timing_of

LEAST_ROUNDS = 3
MOST_AHEAD_MS = 40.0
COPIED = {"cuda": 1 << 28, "cpu": 1 << 20}  # float32 elements; on the card 1 GB, many times its cache

Step = Callable[[], object]


class Times(NamedTuple):
    device_ms: float
    host_ms: float
    alone_ms: float


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Measures on one device; its copy is the floor of everything that moves bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._from, self._to = (torch.zeros(COPIED[device], device=device) for _ in range(2))
        for _ in range(3):
            self._copy()
        self.copy_ms = sorted(self._between(self._copy) for _ in range(9))[4]

    @property
    def gigabytes_per_second(self) -> float:
        """Of a copy: what is read and what is written both count."""
        return 2 * self._from.nbytes / self.copy_ms / 1e6

    def measure(self, step: Step, ahead_ms: float) -> Times:
        """Call twice: once alone, and once behind so many milliseconds of copies."""
        synchronize(self.device)
        start = time.perf_counter()
        step()
        host_ms = (time.perf_counter() - start) * 1e3
        synchronize(self.device)
        alone_ms = (time.perf_counter() - start) * 1e3
        if self.device == "cpu":
            return Times(host_ms, host_ms, host_ms)
        for _ in range(math.ceil(min(ahead_ms, MOST_AHEAD_MS) / self.copy_ms)):
            self._copy()
        return Times(self._between(step), host_ms, alone_ms)

    def _copy(self) -> None:
        self._to.copy_(self._from)

    def _between(self, step: Step) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def in_turn(
    clock: Clock, steps: Mapping[str, Step], rounds: int, every: Mapping[str, int] | None = None, seconds: float = 6.0
) -> dict[str, dict[str, Timing]]:
    """Measure each contender once a round, as `_shared.compare` does.

    Args:
        clock: of the device.
        steps: what to measure, by name.
        rounds: at most; fewer, but LEAST_ROUNDS, once the seconds have passed.
        every: contenders that take part only in every n-th round, and that n.
        seconds: see rounds.

    Returns:
        device_ms, host_ms and alone_ms by name.
    """
    ahead = dict.fromkeys(steps, 0.0)
    for _ in range(2):
        for name, step in steps.items():
            ahead[name] = 1.0 + 2 * clock.measure(step, 0.0).host_ms
    times: dict[str, list[Times]] = {name: [] for name in steps}
    orders = random.Random(0)
    gc.collect()
    gc.disable()  # a collection would fall on whichever contender happens to run
    start = time.monotonic()
    try:
        for done in range(rounds):
            if done >= LEAST_ROUNDS and time.monotonic() - start > seconds:
                break
            for name, step in orders.sample(list(steps.items()), len(steps)):
                if done % (every or {}).get(name, 1) == 0:
                    times[name].append(clock.measure(step, ahead[name]))
    finally:
        gc.enable()
    return {
        name: {field: timing_of([getattr(x, field) for x in values]) for field in Times._fields}
        for name, values in times.items()
    }
