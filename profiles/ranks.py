"""Time the optimizer step of a model under `fully_shard` over the number of ranks, beside AdamW on the same shards.

Measured on this machine with gloo over loopback, one thread a rank: more ranks than cores share them. What a step takes of a
processor for each of many small parameters, kernels included, is the time of a process. For 8 to 1,024 ranks, on paper: the
bytes that a step moves through memory and sends, over the bandwidths and latencies that PAPER states.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from _contenders import adamw, make_params, ours, sharded
from _shared import dots, markdown_table, parser, run_profile, timing_of
from torch import Tensor

from adafactor_compiled import Adafactor

RANKS = (1, 2, 4)
PAPER_RANKS = tuple(8 << i for i in range(8))
ADAFACTOR, UNSHARDED, COMPILED = "Adafactor, fused", "the same, unsharded", "Adafactor, compiled"
ADAMW, FUSED = "AdamW", "fused AdamW"
SMALL = {"150 weights of 128 x 128": [(128, 128)] * 150, "and 150 biases": [(128, 128), (128,)] * 150}

Shape = tuple[int, ...]

PAPER: dict[str, Any] = {
    "model": "decoder of 32 layers, width 4,096, feed-forward width 11,008, 32,000 tokens; float32",
    "memory_bytes_per_second": 1.5e12,  # of an accelerator, as a copy reaches it
    "network_bytes_per_second": 25e9,  # of a rank: 200 Gbit/s
    "hop_seconds": 10e-6,  # of one message between machines
    "adafactor_bytes_per_parameter": 20,  # p and g read twice, p written
    "adamw_bytes_per_parameter": 28,  # p, g and both moments read, p and both moments written
    "all_reduce": "2 (n - 1) / n of the buffer over the network, and 2 log2(n) hops, as in a tree",
}


def decoder(layers: int, width: int, hidden: int, tokens: int) -> list[Shape]:
    """The parameters of a decoder with a gated feed-forward network, without biases."""
    layer: list[Shape] = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 2
    return [(tokens, width), *layer * layers, (width,), (tokens, width)]


def sent_numbers(shapes: list[Shape]) -> int:
    """What a step of row-sharded parameters adds up over the ranks."""
    return 1 + sum(2 * shape[1] + 4 if len(shape) == 2 else 4 for shape in shapes)


def paper(ranks: int) -> dict[str, float]:
    """Seconds of a step on `ranks` ranks."""
    shapes = decoder(32, 4096, 11008, 32000)
    numel, sent = sum(map(math.prod, shapes)), 4 * sent_numbers(shapes)
    local = numel / ranks / PAPER["memory_bytes_per_second"]
    share, network = (ranks - 1) / ranks, PAPER["network_bytes_per_second"]
    all_reduce = 2 * share * sent / network + 2 * math.log2(ranks) * PAPER["hop_seconds"]
    return {
        ADAFACTOR: local * PAPER["adafactor_bytes_per_parameter"] + all_reduce,
        ADAMW: local * PAPER["adamw_bytes_per_parameter"],
        "all_reduce": all_reduce,
        # What FSDP itself sends for the model in a step: parameters gathered twice and gradients scattered, in float32.
        "training's own traffic": 3 * share * 4 * numel / network,
    }


CONTENDERS = {ADAFACTOR: ours(fused=True), COMPILED: ours(compile=True), ADAMW: adamw(), FUSED: adamw(fused=True)}


def steps_of(shapes: list[Shape], names: list[str]) -> dict[str, Callable[[], object]]:
    optimizers = {name: CONTENDERS[name](sharded(make_params(shapes)), None) for name in names}
    for turn in range(dist.get_world_size()):  # the first compiles, and the others find it on the disk
        for optimizer in optimizers.values():
            if turn == dist.get_rank() and isinstance(optimizer, Adafactor):
                optimizer.warm_up()
        dist.barrier()
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def times_of(steps: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> Tensor:
    """Seconds by a clock, contenders by rounds, where all ranks begin together."""
    times = torch.zeros(len(steps), rounds)
    for round_ in range(-2, rounds):
        for i, step in enumerate(steps.values()):
            dist.barrier()
            start = clock()
            step()
            if round_ >= 0:
                times[i, round_] = clock() - start
    return times


def measure_rank(rank: int, ranks: int, store: str, shapes: list[Shape], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Milliseconds of a step of each contender, on the slowest rank; microseconds of this process a small parameter."""
    torch.set_num_threads(1)
    patience = timedelta(minutes=5)  # with a rank that has failed
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=patience)
    steps = steps_of(shapes, list(CONTENDERS))
    if ranks == 1:
        steps[UNSHARDED] = CONTENDERS[ADAFACTOR](make_params(shapes), None).step
    buffer = torch.zeros(sent_numbers(shapes))
    times = times_of({**steps, "all_reduce": lambda: dist.all_reduce(buffer)}, rounds, time.perf_counter)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    timings = {name: timing_of([1e3 * x for x in of]) for name, of in zip([*steps, "all_reduce"], times.tolist(), strict=True)}
    small = {}
    for title, of_title in SMALL.items():
        medians = times_of(steps_of(of_title, [ADAFACTOR, FUSED]), rounds, time.process_time).quantile(0.5, dim=1)
        small[title] = dict(zip([ADAFACTOR, FUSED], (medians * 1e6 / len(of_title)).tolist(), strict=True))
    dist.destroy_process_group()
    return timings, small


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shapes = decoder(1, 64, 160, 200) if options.quick else decoder(4, 512, 1376, 8192)
    of_ranks = {}
    for ranks in RANKS[:2] if options.quick else RANKS:
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(measure_rank, i, ranks, f"{folder}/store", shapes, options.rounds) for i in range(ranks)]
            of_ranks[ranks], *_ = [job.result() for job in jobs]
    yield {
        "rounds": options.rounds,
        "threads_per_rank": 1,
        "shapes": shapes,
        "parameters": sum(map(math.prod, shapes)),
        "sent_bytes_per_step": 4 * sent_numbers(shapes),
        "timings": {ranks: timings for ranks, (timings, _) in of_ranks.items()},
        "processor_microseconds_a_parameter": {ranks: small for ranks, (_, small) in of_ranks.items()},
        "paper": {"assumptions": PAPER, "seconds": {ranks: paper(ranks) for ranks in PAPER_RANKS}},
    }


def table(result: dict[str, Any]) -> str:
    timings, small = result["timings"], result["processor_microseconds_a_parameter"]
    names = list(timings["1"])
    rows = [[n, *(f"{of[name]['median']:.2f}" if name in of else "-" for name in names)] for n, of in timings.items()]
    costs = [[f"{title}, {n} ranks", *(f"{us:.1f}" for us in of[title].values())] for title in SMALL for n, of in small.items()]
    on_paper = result["paper"]["seconds"]
    thought = [[f"{int(n):,}", *(f"{seconds * 1e3:.2f}" for seconds in of.values())] for n, of in on_paper.items()]
    tables = [
        markdown_table(["ranks, ms of a step", *names], rows),
        markdown_table(["processor time, us a parameter", ADAFACTOR, FUSED], costs),
        markdown_table(["ranks, on paper, ms of a step", *on_paper["8"]], thought),
    ]
    return "\n\n".join(tables)


def draw(result: dict[str, Any]) -> Any:
    names = [*CONTENDERS, "all_reduce"]
    measured = {f"{n} ranks": [(name, of[name]["median"]) for name in names] for n, of in result["timings"].items()}
    seconds, names = result["paper"]["seconds"], [ADAFACTOR, ADAMW, "all_reduce"]
    on_paper = {f"{int(n):,} ranks": [(name, 1e3 * of[name]) for name in names] for n, of in seconds.items()}
    panels = {"Measured on 2 cores: the slowest rank": measured, "On paper: a decoder of 6.7 billion": on_paper}
    return dots(panels, "ms of a step, logarithmic")


if __name__ == "__main__":
    run_profile("ranks", parser(__doc__, rounds=15).parse_args(), measure, table, draw)
