"""Do the variations help? Two small networks, trained with each variation alone, beside what it varies and beside peers.

A character transformer on English and a convolutional network on scikit-learn's digits. Each contender trains at three learning
rates from three seeds, warmed up and then lowered linearly to zero; what counts is its best rate by mean held-out loss. A
difference to what is varied counts where the means lie further apart than the seeds of either do. Of two contenders that are
equal up to chance, one pair in twenty does so.

As many runs train at once as torch has threads, one thread each. The steps are timed before, by themselves and in turn.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import torch
from _shared import ProgressLine, compare, parser, run_profile
from _shared import character_model as character
from _shared import digits_model as digit
from _verdicts import draw, table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from train import T5, WARM_UP, Run

from adafactor_compiled import Adafactor, AdafactorSchedule

SEEDS = (0, 1, 2)
BATCH, CONTEXT = 16, 32
HELD_OUT_BATCHES = 80
QUICK_STEPS, QUICK_HELD_OUT_BATCHES = 4, 2


class Data(NamedTuple):
    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]  # of how many, and the seed
    held_out: list[tuple[Tensor, Tensor]]


@functools.cache
def characters() -> Data:
    text, held_out, alphabet = character.english()
    return Data(
        lambda: character.CharacterTransformer(len(alphabet), width=64, depth=2, context=CONTEXT),
        lambda count, seed: character.batches(text, count, BATCH, CONTEXT, seed),
        list(character.batches(held_out, HELD_OUT_BATCHES, BATCH, CONTEXT, seed=0)),
    )


@functools.cache
def digits() -> Data:
    scans, labels, *held_out = digit.digits()
    return Data(
        digit.DigitNetwork,
        lambda count, seed: digit.batches(scans, labels, count, 2 * BATCH, seed),
        list(zip(*(x.split(2 * BATCH) for x in held_out), strict=True)),
    )


class Task(NamedTuple):
    data: Callable[[], Data]
    steps: int
    rates: Sequence[float]


TASKS = {"characters": Task(characters, 700, (1e-3, 3e-3, 1e-2)), "digits": Task(digits, 600, (3e-3, 1e-2, 3e-2))}
Make = Callable[[Any, "float | None"], Optimizer]  # of parameters and learning rate


class Contender(NamedTuple):
    make: Make
    base: str | None  # what it varies
    scale: float | None = 1.0  # of the task's rates; None where it has a rate of its own
    tasks: Sequence[str] = tuple(TASKS)  # where it is another optimizer than its base

    def rates(self, task: str) -> list[float | None]:
        return [None] if self.scale is None else [self.scale * lr for lr in TASKS[task].rates]


def ours(**options: Any) -> Make:
    return lambda params, lr: Adafactor(params, **{**T5, "lr": lr, "fused": True, **options})


BASE, MOMENTUM = "Adafactor, T5 setting", "beta1=0.9"
CONTENDERS: dict[str, Contender] = {
    BASE: Contender(ours(), None),
    "relative_step, scale_parameter": Contender(ours(relative_step=True, scale_parameter=True), BASE, None),
    "min_dim_size_to_factor=128": Contender(ours(min_dim_size_to_factor=128), BASE, tasks=("characters",)),
    "min_dim_size_to_factor=16": Contender(ours(min_dim_size_to_factor=16), BASE, tasks=("digits",)),
    'factor_dims="largest"': Contender(ours(factor_dims="largest"), BASE, tasks=("digits",)),
    "beta2_cap=0.999": Contender(ours(beta2_cap=0.999), BASE),
    "beta2_cap=0.99": Contender(ours(beta2_cap=0.99), BASE),
    "decay_offset=50": Contender(ours(decay_offset=50), BASE),
    "weight_decay=0.01": Contender(ours(weight_decay=0.01), BASE),
    # As much as the one above at a rate of 0.003 that is neither warmed up nor lowered.
    'weight_decay=3e-5, scale "none"': Contender(ours(weight_decay=3e-5, weight_decay_scale="none"), BASE),
    MOMENTUM: Contender(ours(beta1=0.9), BASE),
    "beta1=0.9, momentum in bfloat16": Contender(ours(beta1=0.9, momentum_dtype=torch.bfloat16), MOMENTUM),
    "beta1=0.9, cautious": Contender(ours(beta1=0.9, cautious=True), MOMENTUM),
    # torch scales the rate by the RMS of the parameter.
    "torch.optim.Adafactor": Contender(lambda params, lr: torch.optim.Adafactor(params, lr=lr), BASE, 10.0),
    "AdamW": Contender(lambda params, lr: torch.optim.AdamW(params, lr=lr), BASE),
}


class Job(NamedTuple):
    task: str
    name: str
    lr: float | None
    seed: int
    steps: int
    held_out: int | None  # batches, None for all


def share_of_rate(steps: int, step: int) -> float:
    """1 after the warm-up, and 0 behind the last step."""
    warm_up = max(1.0, WARM_UP * steps)
    return min((step + 1) / warm_up, (steps - step) / max(1.0, steps - warm_up))


def train(job: Job) -> tuple[float, float]:
    """Loss, inf where it is NaN, and accuracy on what was held out."""
    data = TASKS[job.task].data()
    torch.manual_seed(job.seed)
    model: Any = data.model()
    optimizer = CONTENDERS[job.name].make(model.parameters(), job.lr)
    by_rate = functools.partial(share_of_rate, job.steps)
    schedule = AdafactorSchedule(optimizer) if job.lr is None else LambdaLR(optimizer, by_rate)
    run = Run(job.name, model, optimizer, schedule, job.lr or 0.0, "")
    for x, y in data.batches(job.steps, job.seed):
        run.train_step(x, y)
    with torch.no_grad():
        pairs = [(model(x).flatten(0, -2), y.flatten()) for x, y in data.held_out[: job.held_out]]
    logits, labels = map(torch.cat, zip(*pairs, strict=True))
    loss = functional.cross_entropy(logits, labels).item()
    return loss if math.isfinite(loss) else math.inf, (logits.argmax(-1) == labels).float().mean().item()


def time_steps(task: str, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of `optimizer.step()` alone, in turn, and the bytes kept between steps."""
    data, runs = TASKS[task].data(), {}
    (batch,) = data.batches(1, 0)
    for name in names:
        torch.manual_seed(0)
        model: Any = data.model()
        model.loss(*batch).backward()
        optimizer = CONTENDERS[name].make(model.parameters(), CONTENDERS[name].rates(task)[0])
        runs[name] = Run(name, model, optimizer, None, 0.0, "")
    timings = compare({name: run.optimizer.step for name, run in runs.items()}, rounds, calls=5)
    return {name: {"step_ms": timings[name], "state_bytes": runs[name].state_bytes} for name in names}


def measure(options: Namespace) -> Iterator[dict[str, Any]]:
    start, workers, tasks = time.perf_counter(), torch.get_num_threads(), {}
    payload = {"seeds": SEEDS, "rounds": options.rounds, "runs_at_once": workers, "tasks": tasks}
    parameters = {task: sum(param.numel() for param in TASKS[task].data().model().parameters()) for task in options.tasks}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool, ProgressLine("training") as line:
        for task in options.tasks:
            steps = QUICK_STEPS if options.quick else TASKS[task].steps
            rest = (steps, QUICK_HELD_OUT_BATCHES if options.quick else None)
            rates = {name: contender.rates(task) for name, contender in CONTENDERS.items() if task in contender.tasks}
            jobs = [Job(task, name, lr, seed, *rest) for name in rates for lr in rates[name] for seed in SEEDS]
            timed = time_steps(task, list(rates), 1 if options.quick else options.rounds)
            tasks[task] = {"steps": steps, "parameters": parameters[task], "contenders": {}}
            with closing(pool.map(train, jobs)) as outcomes:  # closed, it drops the runs that have not begun
                for done, name in enumerate(rates):
                    line.show(done, len(rates), f"{task}: {name}")
                    of_rates = [of_rate(lr, list(islice(outcomes, len(SEEDS)))) for lr in rates[name]]
                    means = [statistics.fmean(of["held_out_losses"]) for of in of_rates]
                    found = {"base": CONTENDERS[name].base, "best": means.index(min(means)), "rates": of_rates}
                    tasks[task]["contenders"][name] = {**found, **timed[name]}
                    yield {**payload, "seconds": time.perf_counter() - start}


def of_rate(lr: float | None, outcomes: list[tuple[float, float]]) -> dict[str, Any]:
    losses, accuracies = zip(*outcomes, strict=True)
    return {"lr": lr, "held_out_losses": losses, "accuracies": accuracies}


def main() -> None:
    options = parser(__doc__, rounds=15, redraw=True)
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to train (default: both)")
    run_profile("variations", options.parse_args(), measure, table, draw)


if __name__ == "__main__":
    main()
