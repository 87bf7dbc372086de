"""Do the variations help? Two small networks, trained with each variation alone, beside what it varies and beside peers.

A character transformer on English and a convolutional network on scikit-learn's digits. Each contender trains at three learning
rates from three seeds, warmed up and then lowered linearly to zero; what counts is its best rate by mean held-out loss. A
difference to what is varied counts where the means lie further apart than the seeds of either do. Of two contenders that are
equal up to chance, one pair in twenty does so.

As many runs train at once as torch has threads, one thread each.
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
from _shared import COLORS, dots, markdown_table, parser, run_profile, show_progress
from _shared import character_model as character
from _shared import digits_model as digit
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from train import T5, WARM_UP, state_bytes

from adafactor_compiled import Adafactor, AdafactorSchedule

SEEDS = (0, 1, 2)
BATCH, CONTEXT = 16, 32
HELD_OUT_BATCHES = 80
QUICK_STEPS, QUICK_HELD_OUT_BATCHES = 4, 2


class Task(NamedTuple):
    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]  # of how many, and the seed
    held_out: list[tuple[Tensor, Tensor]]
    steps: int
    rates: Sequence[float]


@functools.cache
def characters() -> Task:
    text, held_out, alphabet = character.english()
    return Task(
        lambda: character.CharacterTransformer(len(alphabet), width=64, depth=2, context=CONTEXT),
        lambda count, seed: character.batches(text, count, BATCH, CONTEXT, seed),
        list(character.batches(held_out, HELD_OUT_BATCHES, BATCH, CONTEXT, seed=0)),
        700,
        (1e-3, 3e-3, 1e-2),
    )


@functools.cache
def digits() -> Task:
    scans, labels, *held_out = digit.digits()
    held_out_batches = list(zip(*(x.split(2 * BATCH) for x in held_out), strict=True))
    batches = functools.partial(digit.batches, scans, labels, size=2 * BATCH)
    return Task(digit.DigitNetwork, batches, held_out_batches, 600, (3e-3, 1e-2, 3e-2))


TASKS: dict[str, Callable[[], Task]] = {"characters": characters, "digits": digits}
Make = Callable[[Any, "float | None"], Optimizer]  # of parameters and learning rate


class Contender(NamedTuple):
    make: Make
    base: str | None  # what it varies
    scale: float | None = 1.0  # of the task's rates; None where it has a rate of its own
    tasks: Sequence[str] = tuple(TASKS)  # where it is another optimizer than its base

    def rates(self, task: Task) -> list[float | None]:
        return [None] if self.scale is None else [self.scale * lr for lr in task.rates]


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


def train(job: Job) -> tuple[float, float, int]:
    """Loss, inf where it is NaN, and accuracy on what was held out; the bytes kept between steps."""
    task = TASKS[job.task]()
    torch.manual_seed(job.seed)
    model: Any = task.model()
    optimizer = CONTENDERS[job.name].make(model.parameters(), job.lr)
    by_rate = functools.partial(share_of_rate, job.steps)
    schedule = AdafactorSchedule(optimizer) if job.lr is None else LambdaLR(optimizer, by_rate)
    for x, y in task.batches(job.steps, job.seed):
        optimizer.zero_grad()
        model.loss(x, y).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pairs = [(model(x).flatten(0, -2), y.flatten()) for x, y in task.held_out[: job.held_out]]
    logits, labels = map(torch.cat, zip(*pairs, strict=True))
    loss, accuracy = functional.cross_entropy(logits, labels).item(), (logits.argmax(-1) == labels).float().mean().item()
    return loss if math.isfinite(loss) else math.inf, accuracy, state_bytes(optimizer)


def measure(options: Namespace) -> Iterator[dict[str, Any]]:
    start, workers, tasks = time.perf_counter(), torch.get_num_threads(), {}
    payload = {"seeds": SEEDS, "runs_at_once": workers, "tasks": tasks}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for name_of_task in options.tasks or TASKS:
            task = TASKS[name_of_task]()
            rest = (QUICK_STEPS, QUICK_HELD_OUT_BATCHES) if options.quick else (task.steps, None)
            rates = {name: contender.rates(task) for name, contender in CONTENDERS.items() if name_of_task in contender.tasks}
            jobs = [Job(name_of_task, name, lr, seed, *rest) for name in rates for lr in rates[name] for seed in SEEDS]
            parameters = sum(param.numel() for param in task.model().parameters())
            contenders: dict[str, Any] = {}
            tasks[name_of_task] = {"steps": rest[0], "parameters": parameters, "contenders": contenders}
            with closing(pool.map(train, jobs)) as outcomes:  # closed, it drops the runs that have not begun
                for name in rates:
                    show_progress(f"training {name_of_task}: {name}")
                    of_rates = []
                    for lr in rates[name]:
                        losses, accuracies, (held, *_) = zip(*islice(outcomes, len(SEEDS)), strict=True)
                        of_rates.append({"lr": lr, "held_out_losses": losses, "accuracies": accuracies})
                    means = [statistics.fmean(of["held_out_losses"]) for of in of_rates]
                    best = means.index(min(means))
                    contenders[name] = {"base": CONTENDERS[name].base, "best": best, "rates": of_rates, "state_bytes": held}
                    yield {**payload, "seconds": time.perf_counter() - start}
    show_progress()


def losses_of(contender: dict[str, Any]) -> list[float]:
    """Those of the seeds at its best rate, where what JSON has as null is infinite."""
    losses = contender["rates"][contender["best"]]["held_out_losses"]
    return [math.inf if loss is None else loss for loss in losses]


def verdict(contender: dict[str, Any], base: dict[str, Any]) -> str:
    """Better or worse where means lie further apart than the seeds of either; the same where all losses are, at all rates."""
    if contender["rates"] == base["rates"]:
        return "the same"
    losses, of_base = losses_of(contender), losses_of(base)
    difference = statistics.fmean(losses) - statistics.fmean(of_base)
    spread = max(max(losses) - min(losses), max(of_base) - min(of_base))
    if abs(difference) <= spread < math.inf:
        return f"no difference, {difference:+.4f}"
    return f"{'better' if difference < 0 else 'worse'}, {difference:+.4f}"


def rate_text(contender: dict[str, Any]) -> str:
    """The best rate; and whether it is the least or the largest that was tried, so that one beyond it may be better."""
    rates = [rate["lr"] for rate in contender["rates"]]
    lr = rates[contender["best"]]
    return "its own" if lr is None else f"{lr:g}" + {min(rates): ", least tried", max(rates): ", largest tried"}.get(lr, "")


def table(result: dict[str, Any]) -> str:
    header = ["learning rate", "held-out loss (least to most)", "accuracy", "against its base", "state, bytes"]
    tables = []
    for task, of_task in result["tasks"].items():
        contenders, rows = of_task["contenders"], []
        for name, contender in contenders.items():
            losses = losses_of(contender)
            accuracy = statistics.fmean(contender["rates"][contender["best"]]["accuracies"])
            against = verdict(contender, contenders[contender["base"]]) if contender["base"] else ""
            loss = f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
            rows.append([name, rate_text(contender), loss, f"{accuracy:.1%}", against, f"{contender['state_bytes']:,}"])
        title = f"{task}: {of_task['parameters']:,} parameters, {of_task['steps']} steps"
        tables.append(markdown_table([title, *header], rows))
    return "\n\n".join(tables)


def draw(result: dict[str, Any]) -> Any:
    """The held-out loss of every seed at the best rate."""
    panels = {
        f"{task}, {len(result['seeds'])} seeds": {
            name: [(name if name in COLORS else "fused", loss) for loss in losses_of(contender)]
            for name, contender in of_task["contenders"].items()
        }
        for task, of_task in result["tasks"].items()
    }
    return dots(panels, "held-out loss, logarithmic")


if __name__ == "__main__":
    run_profile("variations", parser(__doc__, tasks=TASKS).parse_args(), measure, table, draw)
