"""The whole training step, eager and compiled: forward, backward and optimizer, and the optimizer's share of the time.

Contenders take turns on copies of one character transformer. "Compiled" is torch.compile on the whole step: one graph for ours,
in which the fused step is an operator, and for AdamW. transformers' Adafactor keeps its step count in a Python int, so that
torch.compile would make a graph for each step: there the model is compiled and the optimizer is not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from _shared import color_of, compare, figures, markdown_table, parser, save_figure, write_result
from _shared.character_model import CharacterTransformer, batches, english
from torch import Tensor, nn

from adafactor_compiled import Adafactor

SEED, BATCH, CONTEXT = 0, 12, 64
OURS = {"lr": 1e-3, "scale_parameter": False, "relative_step": False}
NONE = "no optimizer"


def transformers_adafactor(params: Any) -> Any:
    from transformers.optimization import Adafactor as Original

    return Original(params, **OURS)


# name: (optimizer in an eager loop, optimizer in a compiled one, whether its step can be part of the graph)
Make = Callable[[Any], Any]
CONTENDERS: dict[str, tuple[Make, Make, bool]] = {
    NONE: (lambda params: None, lambda params: None, True),
    "Adafactor, fused": (
        lambda params: Adafactor(params, **OURS, fused=True),
        lambda params: Adafactor(params, **OURS, fused=True, capturable=True),
        True,
    ),
    "Adafactor, compiled": (
        lambda params: Adafactor(params, **OURS, compile=True),
        lambda params: Adafactor(params, **OURS, compile=True, capturable=True),
        True,
    ),
    "fused AdamW": (
        lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        True,
    ),
    "transformers": (transformers_adafactor, transformers_adafactor, False),
}


def training_step(model: Any, loss_of: Callable[..., Tensor], optimizer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    params = list(model.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(x, y)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            for param in params:
                param.grad = None
        return loss.detach()

    return step


def contender(name: str, model: nn.Module, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    model = copy.deepcopy(model)
    eager, in_graph, traceable = CONTENDERS[name]
    optimizer = (in_graph if compiled else eager)(model.parameters())
    loss_of: Any = model.loss
    if not compiled and optimizer is not None:
        return training_step(model, loss_of, optimizer)
    if optimizer is None:
        # Gradients that the graph itself drops would be dead code, and the backward pass with them.
        keeping, params = training_step(model, loss_of, None), list(model.parameters())
        if compiled:
            keeping = torch.compile(keeping, isolate_recompiles=True)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = keeping(x, y)
            for param in params:
                param.grad = None
            return loss

        return step
    if traceable:
        return torch.compile(training_step(model, loss_of, optimizer), isolate_recompiles=True)
    return training_step(model, torch.compile(loss_of), optimizer)


def main() -> None:
    options = parser(__doc__).parse_args()
    torch._dynamo.config.trace_autograd_ops = True
    torch.manual_seed(SEED)
    text, _, alphabet = english()
    model = CharacterTransformer(len(alphabet), **({"width": 16, "depth": 1} if options.quick else {"depth": 1}))
    (batch,) = batches(text, 1, BATCH, CONTEXT, SEED)
    names = [NONE, "Adafactor, fused"] if options.quick else list(CONTENDERS)

    timings, first_steps, rows = {}, {}, []
    for mode in ("eager", "compiled"):
        steps = {}
        for name in names:
            step = contender(name, model, mode == "compiled")
            start = time.perf_counter()
            step(*batch)
            first_steps[f"{mode}: {name}"] = time.perf_counter() - start
            steps[name] = lambda step=step: step(*batch)
        timings[mode] = compare(steps, 1 if options.quick else options.rounds, calls=1 if options.quick else 5)
        bare = timings[mode][NONE].median
        for name, timing in timings[mode].items():
            share = max(0.0, 1 - bare / timing.median)
            rows.append([f"{mode}: {name}", f"{timing.median:.1f}", f"{share:.0%}", f"{first_steps[f'{mode}: {name}']:.0f}"])
    table = markdown_table(["training step", "ms", "optimizer's share", "first step, s"], rows)
    print(table)

    parameters = sum(param.numel() for param in model.parameters())
    result = {"parameters": parameters, "batch": [BATCH, CONTEXT], "timings": timings, "first_steps": first_steps}
    write_result("train_loop", result, options.results)

    plt = figures()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True)
    for ax, (mode, of_mode) in zip(axes, timings.items(), strict=True):
        bare = of_mode[NONE].median
        shown = [name for name in reversed(of_mode) if name != NONE]
        rest = [max(0.0, of_mode[name].median - bare) for name in shown]
        ax.barh(shown, [bare] * len(shown), color="#d0d0d0", label="forward and backward")
        ax.barh(shown, rest, left=bare, color=[color_of(name) for name in shown], label="optimizer")
        ax.set_title(f"{mode} training step")
        ax.set_xlabel("ms")
        ax.grid(axis="y", visible=False)
    axes[1].tick_params(labelleft=False)
    save_figure(figure, "train_loop", options.results)


if __name__ == "__main__":
    main()
