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
from _shared import compare, dots, markdown_table, parser, run_profile
from _shared.character_model import CharacterTransformer, batches, english
from torch import nn

from adafactor_compiled import Adafactor

SEED, BATCH, CONTEXT = 0, 12, 64
OURS = {"lr": 1e-3, "scale_parameter": False, "relative_step": False}
NONE, TRANSFORMERS = "no optimizer", "transformers"
MODES = ["eager", "compiled"]
# The limit of graphs counts by code object; older releases have no way to keep it to one function.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}

Step = Callable[[], object]
Make = Callable[[Any, bool], Any]  # of parameters, and whether its step is to be a part of a graph


def _transformers(params: Any, in_graph: bool) -> Any:
    from transformers.optimization import Adafactor as Original

    return Original(params, **OURS)


CONTENDERS: dict[str, Make] = {
    NONE: lambda params, in_graph: None,
    "Adafactor, fused": lambda params, in_graph: Adafactor(params, **OURS, fused=True, capturable=in_graph),
    "Adafactor, compiled": lambda params, in_graph: Adafactor(params, **OURS, compile=True, capturable=in_graph),
    "fused AdamW": lambda params, in_graph: torch.optim.AdamW(params, lr=1e-3, fused=True),
    TRANSFORMERS: _transformers,
}


def contender(name: str, model: nn.Module, batch: tuple[Any, Any], mode: str, device: str, backend: str) -> Step:
    model = copy.deepcopy(model)
    params, loss_of = list(model.parameters()), model.loss
    optimizer = CONTENDERS[name](params, mode == "compiled")
    if mode == "compiled" and name == TRANSFORMERS:
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

    whole = torch.compile(train, backend=backend, **ISOLATED) if mode == "compiled" and name != TRANSFORMERS else train

    def step() -> None:
        whole()
        if optimizer is None:  # what a graph drops itself would be dead code in it, and the backward pass with that
            drop_gradients()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measured(
    names: list[str], rounds: int, calls: int, device: str = "cpu", backend: str = "inductor", **sizes: int
) -> Iterator[dict[str, Any]]:
    """What was measured so far: seconds of the first steps, milliseconds of the others if there are rounds, and errors."""
    torch._dynamo.config.trace_autograd_ops = True
    torch.manual_seed(SEED)
    text, _, alphabet = english()
    count, context = sizes.pop("batch", BATCH), sizes.get("context", CONTEXT)
    model = CharacterTransformer(len(alphabet), **sizes).to(device)
    ((x, y),) = batches(text, 1, count, context, SEED)
    batch = (x.to(device), y.to(device))
    parameters = sum(param.numel() for param in model.parameters())
    result: dict[str, Any] = {"parameters": parameters, "batch": [count, context]}
    result |= {"timings": {}, "first_steps": {}, "errors": {}}
    for mode in MODES:
        steps = {}
        for name in names:
            start, key = time.perf_counter(), f"{mode}: {name}"
            try:
                step = contender(name, model, batch, mode, device, backend)
                step()
                steps[name] = step
                result["first_steps"][key] = time.perf_counter() - start
            except Exception:  # one that does not run here is a result
                result["errors"][key] = traceback.format_exc()[-1500:]
            yield result
        if rounds:
            result["timings"][mode] = compare(steps, rounds, calls=calls)
            yield result


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.quick:
        return measured([NONE, "Adafactor, fused"], 1, 1, width=16, depth=1)
    return measured(list(CONTENDERS), options.rounds, 5, depth=1)


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
