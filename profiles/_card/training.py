"""A whole training step of a small transformer: forward, backward and optimizer, compiled."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from _contenders import CONTENDERS, adamw, ours
from _shared import Timing, compare
from _shared.character_model import CharacterTransformer
from torch import Tensor

from _card.clock import synchronize
from _card.errors import shortened

ALPHABET, SEED, CALLS = 128, 0, 10
SIZES = {"width": 512, "depth": 2, "heads": 8, "context": 256}
TINY_SIZES = {"width": 16, "depth": 1, "heads": 2, "context": 16}
BATCH, TINY_BATCH = 32, 2
NONE = "no optimizer"
KEYS = ["fused", "compiled", "adamw-fused", "adamw-foreach", "multi-tensor", "torch-foreach", "transformers"]
IN_GRAPH = {"fused": ours(capturable=True), "adamw-fused": adamw(fused=True)}
# The limit of graphs counts by code object; older releases have no way to keep it to one function.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}

Step = Callable[[], object]


def training(record: dict[str, Any], emit: Callable[[], None], device: str, quick: bool, rounds: int) -> None:
    """Milliseconds of a step with each optimizer behind one compiled model, then with both in one graph, then as CUDA graphs.

    Without `rounds` everything is compiled, for the cache, and nothing is measured.
    """
    torch._dynamo.config.trace_autograd_ops = True
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    sizes, batch = (SIZES, BATCH) if device == "cuda" and not quick else (TINY_SIZES, TINY_BATCH)
    model = CharacterTransformer(ALPHABET, **sizes).to(device)
    x, y = torch.randint(ALPHABET, (2, batch, sizes["context"]), device=device)
    options: dict[str, Any] = {"backend": "aot_eager"} if quick else {}
    record.update(sizes, batch=batch, parameters=sum(param.numel() for param in model.parameters()))
    record.update(first_step_s={}, ms={}, errors={})

    def measured(mode: str, makes: dict[str, Callable[[], Step]]) -> None:
        ready = {}
        for name, make in makes.items():
            start = time.perf_counter()
            try:
                step = make()
                step()
                synchronize(device)
                ready[name] = lambda step=step: _several(step, device)
                record["first_step_s"][f"{mode}: {name}"] = time.perf_counter() - start
            except Exception:  # one that does not run here is a result
                record["errors"][f"{mode}: {name}"] = shortened()
            emit()
        if rounds:
            timings = compare(ready, rounds)
            record["ms"][mode] = {name: Timing(*(ms / CALLS for ms in _values(x))) for name, x in timings.items()}
            emit()

    # One model for all: their learning rate is so small that its values stay.
    loss_of: Any = torch.compile(model.loss, **options, **ISOLATED)
    params = list(model.parameters())

    def behind_model(key: str) -> Step:
        optimizer = None if key == NONE else CONTENDERS[key].make(params, None)
        return lambda: _train(loss_of, x, y, params, optimizer)

    keys = [NONE, "adamw-fused", "multi-tensor"] if quick else [NONE, *KEYS]  # what Inductor compiles takes longer
    measured("compiled model", {key: lambda key=key: behind_model(key) for key in keys})
    modes = {} if quick else {"one graph": {}}
    if device == "cuda" and not quick:
        modes["one graph, reduce-overhead"] = {"mode": "reduce-overhead"}
    for mode, chosen in modes.items():
        makes = {
            key: lambda key=key, chosen=chosen: _in_one_graph(copy.deepcopy(model), x, y, IN_GRAPH[key], chosen)
            for key in IN_GRAPH
        }
        measured(mode, makes)


def _train(loss_of: Callable[..., Tensor], x: Tensor, y: Tensor, params: list[Tensor], optimizer: Any) -> Tensor:
    loss = loss_of(x, y)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    for param in params:
        param.grad = None
    return loss.detach()


def _in_one_graph(model: Any, x: Tensor, y: Tensor, make: Callable[..., Any], options: dict[str, Any]) -> Step:
    params = list(model.parameters())
    optimizer = make(params, None)
    step = torch.compile(lambda x, y: _train(model.loss, x, y, params, optimizer), **options, **ISOLATED)
    return lambda: step(x, y)


def _several(step: Step, device: str) -> None:
    for _ in range(CALLS):
        step()
    synchronize(device)


def _values(timing: Timing) -> tuple[float, float, float]:
    return timing.median, timing.low, timing.high
