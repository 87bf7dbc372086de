"""Times of contenders, taken in turn in one process, so that what slows the machine down slows all of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of the rounds, and the quartiles as the spread."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.low:.2f} to {self.high:.2f})"


def timing_of(milliseconds: Sequence[float]) -> Timing:
    """The summary of single measurements, at least one."""
    if len(milliseconds) == 1:
        return Timing(milliseconds[0], milliseconds[0], milliseconds[0])
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median, low, high)


def call_ms(step: Callable[[], object], calls: int = 1) -> float:
    """Milliseconds until a call returns, the mean of some."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) * 1e3 / calls


def compare(
    steps: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    warm_up: int = 2,
    calls: int = 1,
    every: Mapping[str, int] | None = None,
    clock: Callable[[Callable[[], object]], float] | None = None,
    seconds: float = math.inf,
) -> dict[str, Timing]:
    """Time each contender once a round, for `rounds` rounds, each in an order of its own.

    In one order for all rounds a contender would always find the caches as the same other one left them: to follow AdamW, which
    leaves three large tensors to be written to memory, costs a step 5 to 10 %. The orders are the same in every run.

    Args:
        steps: what to time, by name; called without arguments, and finished when it returns.
        rounds: measurements of each contender.
        warm_up: unmeasured calls of each contender before the first round; compilation belongs there.
        calls: calls to a measurement, for steps that are too short for the clock.
        every: contenders that take part only in every n-th round, the first included, because they are slow; and that n.
        clock: measures one step in milliseconds (default: `calls` of them, until they return).
        seconds: after which no round begins but the first `LEAST_ROUNDS`.

    Returns:
        Milliseconds of one call, by name, in the order of `steps`.
    """
    for name, value, least in (("rounds", rounds, 1), ("warm_up", warm_up, 0), ("calls", calls, 1)):
        if value < least:
            raise ValueError(f"`{name}` should be at least {least} but is: {value}")
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    orders, start = random.Random(0), time.monotonic()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall on whichever contender happens to run
    try:
        for done in range(rounds):
            if done >= LEAST_ROUNDS and time.monotonic() - start > seconds:
                break
            for name, step in orders.sample(list(steps.items()), len(steps)):
                if done % (every or {}).get(name, 1) == 0:
                    times[name].append(clock(step) if clock else call_ms(step, calls))
    finally:
        if collecting:
            gc.enable()
    return {name: timing_of(values) for name, values in times.items()}
