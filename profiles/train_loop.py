"""The whole training step, eager and compiled: forward, backward and optimizer, and the optimizer's share of the time.

Contenders take turns on copies of one character transformer. "Compiled" is torch.compile on the whole step: one graph for ours,
in which the fused step is an operator, and for AdamW. transformers' Adafactor keeps its step count in a Python int, so that
torch.compile would make a graph for each step: there the model is compiled and the optimizer is not. gpu.py measures the same
on a card, with a larger model.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _contenders import CONTENDERS, ours
from _shared import call_ms, compare, dots, markdown_table, parser, run_profile
from _shared.character_model import CharacterTransformer, batches, english
from torch import nn

SEED, BATCH, CONTEXT = 0, 12, 64
NONE = "no optimizer"
MODES = ["eager", "compiled"]
KEYS = ["fused", "compiled", "adamw-fused", "transformers"]
IN_GRAPH = {"fused": ours(fused=True, capturable=True), "compiled": ours(compile=True, capturable=True)}
# The limit of graphs counts by code object; older releases have no way to keep it to one function.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def step_of(key: str, model: nn.Module, batch: tuple[Any, Any], mode: str, backend: str) -> Callable[[], object]:
    """A training step with this optimizer on a copy of the model."""
    model = copy.deepcopy(model)
    params, loss_of, compiled, optimizer = list(model.parameters()), model.loss, mode == "compiled", None
    if key != NONE:
        make = IN_GRAPH.get(key, CONTENDERS[key].make) if compiled else CONTENDERS[key].make
        optimizer = make(params, None)
    if compiled and key == "transformers":
        loss_of = torch.compile(loss_of, backend=backend, **ISOLATED)

    def train() -> Any:
        loss = loss_of(*batch)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            drop_gradients()
        return loss.detach()

    def drop_gradients() -> None:
        for param in params:
            param.grad = None

    whole = torch.compile(train, backend=backend, **ISOLATED) if compiled and key != "transformers" else train

    def step() -> None:
        whole()
        if optimizer is None:  # what a graph drops itself would be dead code in it, and the backward pass with that
            drop_gradients()

    return step


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(
    keys: list[str], rounds: int, calls: int, device: str = "cpu", backend: str = "inductor", **sizes: int
) -> Iterator[dict[str, Any]]:
    """What was measured so far: seconds of the first steps, milliseconds of the others if there are rounds, and errors."""
    torch._dynamo.config.trace_autograd_ops = True
    torch.manual_seed(SEED)
    text, _, alphabet = english()
    count, context = sizes.pop("batch", BATCH), sizes.get("context", CONTEXT)
    model = CharacterTransformer(len(alphabet), **sizes).to(device)
    ((x, y),) = batches(text, 1, count, context, SEED)
    parameters = sum(param.numel() for param in model.parameters())
    result: dict[str, Any] = {"parameters": parameters, "batch": [count, context]}
    result |= {"timings": {}, "first_steps": {}, "errors": {}}

    def clock(step: Callable[[], object]) -> float:  # waits once, so that the host may run ahead
        start = time.perf_counter()
        call_ms(step, calls)
        synchronize(device)
        return (time.perf_counter() - start) * 1e3 / calls

    for mode in MODES:
        steps = {}
        for key in keys:
            name, start = CONTENDERS[key].name if key in CONTENDERS else key, time.perf_counter()
            try:
                step = step_of(key, model, (x.to(device), y.to(device)), mode, backend)
                step()
                synchronize(device)
                steps[name] = step
                result["first_steps"][f"{mode}: {name}"] = time.perf_counter() - start
            except Exception:  # one that does not run here is a result
                result["errors"][f"{mode}: {name}"] = traceback.format_exc()[-1500:]
            yield result
        if rounds:
            result["timings"][mode] = compare(steps, rounds, clock=clock)
            yield result


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.quick:
        return measured([NONE, "fused"], 1, 1, width=16, depth=1)
    return measured([NONE, *KEYS], options.rounds, 5, depth=1)


def table(result: dict[str, Any]) -> str:
    rows = []
    for mode, timings in result["timings"].items():
        for name, timing in timings.items():
            share = max(0.0, 1 - timings[NONE]["median"] / timing["median"]) if NONE in timings else math.nan
            first = result["first_steps"][f"{mode}: {name}"]
            rows.append([f"{mode}: {name}", f"{timing['median']:.1f}", f"{share:.0%}", f"{first:.0f}"])
    errors = [f"- {name}: {error.strip().splitlines()[-1]}" for name, error in result.get("errors", {}).items()]
    return "\n".join([markdown_table(["training step", "ms", "optimizer's share", "first step, s"], rows), *errors])


def draw(result: dict[str, Any]) -> Any:
    rows = {mode: [(name, x["median"]) for name, x in timings.items()] for mode, timings in result["timings"].items()}
    return dots({"A training step": rows}, "ms, logarithmic")


if __name__ == "__main__":
    run_profile("train_loop", parser(__doc__).parse_args(), measure, table, draw)
