"""Time the optimizer step of a model under `fully_shard` over the number of ranks, beside AdamW on the same shards.

Measured on this machine with gloo over loopback, one thread a rank: more ranks than cores share them. What a step takes of a
processor for each of many small parameters, kernels included, is the time of a process. For 8 to 1,024 ranks, on paper: the
bytes that a step moves through memory and sends, over the bandwidths and latencies that PAPER states.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _shared import color_of, figures, markdown_table, parser, save_figure, timing_of, write_result
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

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
    all_reduce = (
        2 * (ranks - 1) / ranks * sent / PAPER["network_bytes_per_second"] + 2 * math.log2(ranks) * PAPER["hop_seconds"]
    )
    return {
        ADAFACTOR: local * PAPER["adafactor_bytes_per_parameter"] + all_reduce,
        ADAMW: local * PAPER["adamw_bytes_per_parameter"],
        "all_reduce": all_reduce,
        # What FSDP itself sends for the model in a step: parameters gathered twice and gradients scattered, in float32.
        "training's own traffic": 3 * (ranks - 1) / ranks * 4 * numel / PAPER["network_bytes_per_second"],
    }


class Bag(nn.Module):
    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.bag = nn.ParameterList(0.02 * torch.randn(shape, generator=generator) for shape in shapes)


def sharded_parameters(shapes: list[Shape]) -> list[Tensor]:
    model = Bag(shapes)
    fully_shard(model)
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    for p in params:
        local = torch.randn(p.to_local().shape, generator=generator)
        p.grad = torch.empty_like(p)
        p.grad.to_local().copy_(local)
    return params


def adafactor(params: list[Tensor], **options: Any) -> Adafactor:
    return Adafactor(params, lr=1e-3, relative_step=False, show_progress=False, **options)


def makers() -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    return {
        ADAFACTOR: adafactor,
        COMPILED: lambda params: adafactor(params, compile=True),
        ADAMW: lambda params: torch.optim.AdamW(params, lr=1e-3),
        FUSED: lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    }


def whole(params: list[Tensor]) -> list[Tensor]:
    copies = [nn.Parameter(p.full_tensor().detach().clone()) for p in params]  # type: ignore[attr-defined]
    for p in copies:
        p.grad = torch.randn_like(p)
    return copies


def measure(rank: int, ranks: int, store: str, shapes: list[Shape], rounds: int, answers: Any) -> None:
    """Milliseconds of each round of each contender, the slowest rank's; rank 0 answers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    optimizers = {name: make(sharded_parameters(shapes)) for name, make in makers().items()}
    if ranks == 1:
        optimizers[UNSHARDED] = adafactor(whole(sharded_parameters(shapes)))
    for turn in range(ranks):  # the first compiles, and the others find it on the disk
        if turn == rank:
            for name in (ADAFACTOR, COMPILED):
                optimizers[name].warm_up()  # type: ignore[attr-defined]
        dist.barrier()
    buffer = torch.zeros(sent_numbers(shapes))
    steps: dict[str, Callable[[], Any]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    steps["all_reduce"] = lambda: dist.all_reduce(buffer)
    times = torch.zeros(len(steps), rounds)
    for round_ in range(-2, rounds):
        for i, step in enumerate(steps.values()):
            dist.barrier()
            start = time.perf_counter()
            step()
            if round_ >= 0:
                times[i, round_] = (time.perf_counter() - start) * 1e3
    dist.all_reduce(times, dist.ReduceOp.MAX)
    small = {name: processor_time(shapes, rounds) for name, shapes in SMALL.items()}
    if rank == 0:
        answers.put((dict(zip(steps, times.tolist(), strict=True)), small))
    dist.destroy_process_group()


def processor_time(shapes: list[Shape], rounds: int) -> dict[str, float]:
    """Microseconds of this process for each of these parameters, of a step of each contender."""
    chosen = {name: make for name, make in makers().items() if name in (ADAFACTOR, FUSED)}
    optimizers = {name: make(sharded_parameters(shapes)) for name, make in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_ in range(-2, rounds):
        for name, optimizer in optimizers.items():
            dist.barrier()
            start = time.process_time()
            optimizer.step()
            if round_ >= 0:
                times[name].append((time.process_time() - start) * 1e6 / len(shapes))
    return {name: statistics.median(of) for name, of in times.items()}


def measured(ranks: int, shapes: list[Shape], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    context = mp.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (ranks, f"{folder}/store", shapes, rounds, answers), ranks)
        times, small = answers.get(timeout=10)
        return {name: timing_of(of) for name, of in times.items()}, small


def draw(timings: dict[int, dict[str, Any]], on_paper: dict[int, dict[str, float]]) -> Any:
    figure, (left, right) = figures().subplots(1, 2, figsize=(11, 4.4))
    for name in (ADAFACTOR, COMPILED, ADAMW, FUSED, "all_reduce"):
        style = {"linestyle": "--"} if name in (ADAMW, "all_reduce") else {}
        label = "the all_reduce alone" if name == "all_reduce" else name
        values = [timings[n][name] for n in timings]
        left.plot(list(timings), [x.median for x in values], marker="o", color=color_of(name), label=label, **style)
        left.fill_between(list(timings), [x.low for x in values], [x.high for x in values], color=color_of(name), alpha=0.15)
    for name in (ADAFACTOR, ADAMW, "all_reduce", "training's own traffic"):
        style = {"linestyle": ":"} if name.startswith("training") else {"linestyle": "--"} if name == "all_reduce" else {}
        label = "the all_reduce alone" if name == "all_reduce" else name
        right.plot(list(on_paper), [x[name] * 1e3 for x in on_paper.values()], color=color_of(name), label=label, **style)
    left.set(title="Measured: gloo, one thread a rank, 2 cores", xlabel="ranks", ylabel="ms a step, slowest rank", xticks=RANKS)
    right.set(title="On paper: a decoder of 6.7 billion", xlabel="ranks", ylabel="ms a step", xscale="log", yscale="log")
    right.set_xticks(PAPER_RANKS, [f"{n:,}" for n in PAPER_RANKS], minor=False)
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.legend()
    return figure


def main() -> None:
    options = parser(__doc__, rounds=15)
    arguments = options.parse_args()
    shapes = decoder(1, 64, 160, 200) if arguments.quick else decoder(4, 512, 1376, 8192)
    ranks = RANKS[:2] if arguments.quick else RANKS
    of_ranks = {n: measured(n, shapes, 3 if arguments.quick else arguments.rounds) for n in ranks}
    timings, small = ({n: x[i] for n, x in of_ranks.items()} for i in (0, 1))
    on_paper = {n: paper(n) for n in PAPER_RANKS}
    names = list(timings[1])
    rows = [[str(n), *(str(timings[n].get(name, "")) for name in names)] for n in ranks]
    print(markdown_table(["ranks", *names], rows))
    rows = [[f"{name}, {n} ranks", *(f"{x:.1f}" for x in small[n][name].values())] for name in SMALL for n in ranks]
    print(markdown_table(["processor time, us a parameter", ADAFACTOR, FUSED], rows))
    rows = [[f"{n:,}", *(f"{seconds * 1e3:.2f}" for seconds in times.values())] for n, times in on_paper.items()]
    print(markdown_table(["ranks, on paper", *(f"{name}, ms" for name in on_paper[8])], rows))
    payload = {
        "rounds": arguments.rounds,
        "threads_per_rank": 1,
        "shapes": shapes,
        "parameters": sum(map(math.prod, shapes)),
        "sent_bytes_per_step": 4 * sent_numbers(shapes),
        "timings": timings,
        "processor_microseconds_a_parameter": small,
        "paper": {"assumptions": PAPER, "seconds": on_paper},
    }
    written = write_result("ranks", payload, arguments.results)
    drawn = save_figure(draw(timings, on_paper), "ranks", arguments.results)
    print(f"wrote {written} and {drawn}")


if __name__ == "__main__":
    main()
