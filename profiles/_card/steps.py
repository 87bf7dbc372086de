"""One network's parameter list: the first step, the time of a step beside the others', and its memory; the training step."""

from __future__ import annotations

import atexit
import gc
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from _contenders import CONTENDERS, make_optimizers, make_params, sharded
from _networks import ROWS, Row
from _shared import call_ms, compare
from torch import Tensor
from torch.optim import Optimizer
from train_loop import KEYS, NONE, measured, synchronize

from _card.checks import SHAPES
from _card.jobs import Emit, Record, recorded

OURS, ADAMW = FEW = ["fused", "adamw-fused"]
OTHERS = ["adamw-foreach", "adamw-8bit", "multi-tensor", "torch-foreach", "transformers"]
SHARDED = "-sharded"  # behind the name of a row: under fully_shard, on one rank
MOST_AHEAD_MS, SECONDS = 40.0, 3.0  # of copies before a step, and of the rounds of a comparison
COPIED = 1 << 28  # float32 elements, 1 GB: many times the cache of a card

LISTS = {**ROWS, "tiny": Row("tiny", lambda: SHAPES[:-1])}
LISTS |= {f"{name}{SHARDED}": row._replace(title=f"{row.title}, fully_shard") for name, row in LISTS.items()}


class Clock:
    """Milliseconds on the host and on the device, each to be measured in this order.

    On the host: until the call returns, which waits for nothing. On the device: between two CUDA events, behind copies that
    keep it busy until the host is ahead, as it is in training behind a backward pass; without them a step of many launches
    is measured by how fast Python launches. On a CPU both are the same.
    """

    def __init__(self, device: str) -> None:
        self.device, self.ahead = device, dict[Any, int]()
        if device == "cuda":
            self._from, self._to = (torch.zeros(COPIED, device=device) for _ in range(2))
            self.copy_ms = sorted(self._between(self._copy) for _ in range(12))[4]

    def host(self, step: Any) -> float:
        synchronize(self.device)
        ms = call_ms(step)
        synchronize(self.device)
        if self.device == "cuda":
            self.ahead[step] = math.ceil(min(1.0 + 2 * ms, MOST_AHEAD_MS) / self.copy_ms)
        return ms

    def on_device(self, step: Any) -> float:
        if self.device == "cpu":
            return call_ms(step)
        for _ in range(self.ahead[step]):
            self._copy()
        return self._between(step)

    def _copy(self) -> None:
        self._to.copy_(self._from)

    def _between(self, step: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def compare(self, optimizers: dict[str, Optimizer], rounds: int) -> dict[str, Any]:
        """host_ms and device_ms by contender, in turn, the slow ones in some rounds."""
        calls = {key: optimizer.step for key, optimizer in optimizers.items()}
        every = {key: CONTENDERS[key].every for key in calls}
        host = compare(calls, rounds, every=every, clock=self.host, seconds=SECONDS)
        device = compare(calls, rounds, 0, every=every, clock=self.on_device, seconds=SECONDS)
        return {key: {"host_ms": host[key], "device_ms": device[key]} for key in calls}


def params_of(network: str, device: str) -> list[Tensor]:
    row = LISTS[network]
    params = make_params(row.shapes(), row.dtype, device=device)
    if network.endswith(SHARDED):
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
        return sharded(params)
    return params


def first_step(record: Record, key: str, params: list[Tensor], beta1: float | None, device: str) -> dict[str, Optimizer]:
    """The contender, after a step whose seconds and its construction's the record has; without one that is not for these."""
    start = time.perf_counter()
    made, missing = make_optimizers([key], params, beta1)
    for optimizer in made.values():
        optimizer.step()
        synchronize(device)
        record["first_step_s"] = time.perf_counter() - start
    if missing:
        record["missing"] = missing[key]
    return made


def first_steps(record: Record, emit: Emit, network: str, device: str) -> None:
    """The first step of a fresh process; its cache is what the caller has made it."""
    first_step(record, OURS, params_of(network, device), LISTS[network].beta1, device)


def steps(record: Record, emit: Emit, network: str, device: str, rounds: int) -> None:
    """First ours and fused AdamW alone, then all in turn; for each of both its memory."""
    row, params = LISTS[network], params_of(network, device)
    record |= {**row.described(), "parameter_bytes": sum(param.nbytes for param in params), "peak_bytes": {}, "first": {}}
    clock, optimizers = Clock(device), dict[str, Optimizer]()
    for group, keys in (("few", FEW), ("all", OTHERS)):
        for key in keys:
            with recorded(record["first"].setdefault(key, {})):  # one that does not run here is a result
                optimizers |= first_step(record["first"][key], key, params, row.beta1, device)
            emit()
        record[group] = clock.compare(optimizers, rounds)
        if device == "cuda":
            record["peak_bytes"] |= {key: peak_of(optimizers[key]) for key in keys if key in optimizers}
        emit()
        if network.endswith(SHARDED):  # the others do not know pieces
            break


def peak_of(optimizer: Optimizer) -> int:
    """What a step holds at its peak beyond what is there before it."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def training(record: Record, emit: Emit, device: str, rounds: int, quick: bool) -> None:
    """train_loop.py on the device; without rounds everything is compiled, for the cache, and nothing is measured."""
    torch.set_float32_matmul_precision("high")
    sizes = {"width": 16, "depth": 1, "heads": 2, "context": 16, "batch": 2}
    if device == "cuda" and not quick:
        sizes = {"width": 512, "depth": 2, "heads": 8, "context": 256, "batch": 32}
    keys, backend = ([NONE, *KEYS[:1]], "aot_eager") if quick else ([NONE, *KEYS], "inductor")
    for so_far in measured(keys, rounds, 10, device, backend, **sizes):
        record.update(so_far)
        emit()
