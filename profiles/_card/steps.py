"""One network's parameter list: the first step, the time of a step beside the others', its memory and its kernels."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from _contenders import CONTENDERS, adamw, make_params, ours
from _networks import NETWORKS, Shapes, by_shape
from torch import Tensor
from torch.optim import Optimizer

from _card.checks import SMALL
from _card.clock import Clock, in_turn, synchronize
from _card.errors import recorded, shortened

OURS, ADAMW = "fused", "adamw-fused"
FEW = [OURS, ADAMW]
OTHERS = ["adamw-foreach", "multi-tensor", "torch-foreach", "transformers"]
CAPTURED = {  # those whose step a CUDA graph can hold
    OURS: ours(fused=True, capturable=True),
    ADAMW: adamw(fused=True, capturable=True),
    "adamw-foreach": adamw(foreach=True, capturable=True),
    "multi-tensor": ours(compile=False, capturable=True),
}
HALF = {"decoder-600m": torch.bfloat16}
# Ranges of the host, which a profiler draws out over their kernels on the device's line too.
RANGES = ("Adafactor: ", "Optimizer.", "## ", "Torch-Compiled", "TorchDynamo", "ProfilerStep")
SHOWN = 30  # kernels of a step that are listed on their own

Emit = Callable[[], None]


def shapes_of(network: str) -> Shapes:
    return SMALL if network == "tiny" else NETWORKS[network]()


def dtype_of(network: str) -> torch.dtype:
    return HALF.get(network, torch.float32)


def floor_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """What Adafactor must move: of a matrix parameter and gradient read twice (no element can be updated before the sums of
    all are known) and the parameter written; of a vector read once and written; the float32 state read and written."""
    total = 0
    for shape in shapes:
        numel = math.prod(shape)
        if len(shape) < 2:
            total += 3 * numel * dtype.itemsize + 2 * 4 * numel
        else:
            total += 5 * numel * dtype.itemsize + 2 * 4 * (numel // shape[-1] + numel // shape[-2])
    return total


def adamw_floor_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """What AdamW must move: four tensors read and three written."""
    return 7 * dtype.itemsize * sum(map(math.prod, shapes))


def first_steps(record: dict[str, Any], emit: Emit, network: str, device: str, quick: bool) -> None:
    """The first step of a fresh process; its cache is what the caller has made it."""
    params = make_params(shapes_of(network), dtype_of(network), device=device)
    _first_step(record, params, device)


def _first_step(record: dict[str, Any], params: list[Tensor], device: str) -> Optimizer:
    def done() -> float:
        synchronize(device)
        return time.perf_counter()

    start = done()
    optimizer = CONTENDERS[OURS].make(params, None)
    made = done()
    optimizer.step()
    first = done()
    optimizer.step()
    record.update(
        construction_s=made - start,
        first_step_s=first - made,
        second_step_s=done() - first,
        compile_s=optimizer.summary().compile_seconds,
    )
    return optimizer


def steps(record: dict[str, Any], emit: Emit, network: str, device: str, quick: bool, rounds: int) -> None:
    """First ours and fused AdamW alone: eager calls, memory, replays; then all in turn; then what a profiler sees."""
    shapes, dtype = shapes_of(network), dtype_of(network)
    params = make_params(shapes, dtype, device=device)
    record.update(shapes=by_shape(shapes), tensors=len(shapes), parameters=sum(map(math.prod, shapes)), dtype=str(dtype))
    record["parameter_bytes"] = sum(param.nbytes for param in params)
    errors: dict[str, Any] = record.setdefault("errors", {})
    optimizers: dict[str, Optimizer] = {}

    def make(key: str) -> None:
        try:
            if key == OURS:
                optimizers[key] = _first_step(record.setdefault("first_step", {}), params, device)
            else:
                optimizers[key] = CONTENDERS[key].make(params, None)
                optimizers[key].step()
        except Exception:  # one that does not run here is a result
            optimizers.pop(key, None)
            errors[key] = shortened()
        emit()

    for key in FEW:
        make(key)
    clock = Clock(device)
    floors = {"floor_ms": floor_bytes(shapes, dtype), "adamw_floor_ms": adamw_floor_bytes(shapes, dtype)}
    record["copy_gigabytes_per_second"] = clock.gigabytes_per_second
    record |= {name: count / clock.gigabytes_per_second / 1e6 for name, count in floors.items()}
    record["few"] = in_turn(clock, {key: optimizer.step for key, optimizer in optimizers.items()}, rounds)
    emit()
    if device == "cuda":
        _memory(record, emit, optimizers, FEW)
        _replays(record, emit, clock, params, rounds)
    for key in OTHERS:
        make(key)
    every = {key: CONTENDERS[key].every for key in optimizers}
    record["all"] = in_turn(clock, {key: optimizer.step for key, optimizer in optimizers.items()}, rounds, every)
    emit()
    if device == "cuda":
        _memory(record, emit, optimizers, OTHERS)
        for key in FEW:
            if key in optimizers:
                with recorded(record.setdefault("kernels", {}).setdefault(key, {})):
                    record["kernels"][key] = kernels_of(optimizers[key].step)
                emit()


def _memory(record: dict[str, Any], emit: Emit, optimizers: dict[str, Optimizer], keys: list[str]) -> None:
    """What a step holds at its peak beyond what is there before it."""
    peaks = record.setdefault("peak_bytes", {})
    for key in keys:
        if key in optimizers:
            gc.collect()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            optimizers[key].step()
            torch.cuda.synchronize()
            peaks[key] = torch.cuda.max_memory_allocated() - before
    emit()


def _replays(record: dict[str, Any], emit: Emit, clock: Clock, params: list[Tensor], rounds: int) -> None:
    """Steps captured by hand, replayed in turn."""
    record["replay_errors"], graphs = {}, {}
    optimizers = []  # a graph does not keep the state that it steps
    for key, make in CAPTURED.items():
        try:
            optimizers.append(make(params, None))
            graphs[key] = captured(optimizers[-1].step)
        except Exception:  # a capture that fails is a result
            record["replay_errors"][key] = shortened()
        emit()
    record["replay"] = {}
    with recorded(record["replay"]):
        record["replay"] = in_turn(clock, {key: graph.replay for key, graph in graphs.items()}, rounds)
    emit()


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The step as a CUDA graph, captured as torch's documentation does it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def kernels_of(step: Callable[[], object]) -> dict[str, Any]:
    """The launches of one step, the milliseconds that its kernels take, and the longest of them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    by_name: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(RANGES):
            by_name.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    longest = sorted(by_name, key=lambda name: -sum(by_name[name]))[:SHOWN]
    return {
        "launches": sum(map(len, by_name.values())),
        "ms": sum(map(sum, by_name.values())),
        "longest": [{"name": name[:120], "launches": len(by_name[name]), "ms": sum(by_name[name])} for name in longest],
    }
