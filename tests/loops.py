"""Training loops for the tests: small models, a compiled training step, and the eager reference loop it is held to.

Before each step the reference takes over the parameters and the state of the compiled loop, so that both start from the same
bits and rounding does not pile up over a trajectory.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from parameters import take_over
from tolerances import assert_same_parameter, assert_same_state
from torch import Tensor, nn
from torch._dynamo import lookup_backend

from adafactor_compiled import Adafactor

VOCABULARY, LENGTH = 17, 6
# The limit of graphs counts by code object; older releases have no way to keep it to one function.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        # No bias: a key's has a gradient of pure rounding, which Adafactor scales up to a full step.
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self, layers: int = 1, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x)))

    def loss(self, text: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def batch(self, generator: torch.Generator) -> Tensor:
        return torch.randint(VOCABULARY, (4, LENGTH), generator=generator).to(self.head.weight.device)


class Mixed(nn.Module):
    """A convolution, two matrices of one class, vectors and a 0-dim parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, padding=1)
        self.hidden = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).flatten(1)
        for linear in self.hidden:
            x = torch.tanh(linear(x))
        return x * self.scale

    def loss(self, x: Tensor) -> Tensor:
        return (self(x) - x.sum((1, 2, 3)).unsqueeze(1)).square().mean()

    def batch(self, generator: torch.Generator) -> Tensor:
        return torch.randn(6, 2, 2, 2, generator=generator).to(self.scale)


@contextmanager
def compiled_loops() -> Iterator[None]:
    """The one setting that a compiled step with `loss.backward()` needs, and one thread: these models are tiny."""
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch.set_num_threads(threads)


class CountingBackend:
    """A backend that counts its graphs; an attempt that Dynamo starts over, with a float as a constant this time, is none."""

    def __init__(self, backend: str) -> None:
        self.backend, self.graphs = lookup_backend(backend), 0

    def __call__(self, graph: Any, examples: Any) -> Any:
        compiled = self.backend(graph, examples)
        self.graphs += 1
        return compiled


@contextmanager
def no_recompile() -> Iterator[None]:
    """Dynamo raises for a recompile, and says which guard failed."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


Step = Callable[..., Tensor]


_numbers = itertools.count()


def with_own_code(function: Any) -> Any:
    """The same function, of which Dynamo counts the graphs apart where `isolate_recompiles` is not known."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def training_step(
    model: Any, optimizer: Any, micro_batches: int = 1, max_norm: float | None = None, set_to_none: bool = True
) -> Step:
    """A step of a training loop: forward, backward, step, zero_grad."""

    def train_step(batch: Tensor) -> Tensor:
        losses = []
        for part in batch.chunk(micro_batches):
            loss = model.loss(part) / micro_batches
            loss.backward()
            losses.append(loss.detach())
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        return torch.stack(losses).sum()

    return train_step


class Loop:
    """A model whose training step is compiled, beside the reference loop."""

    def __init__(
        self,
        model: Any,
        options: dict[str, Any],
        schedule: Callable[[Any], Any] | None = None,
        backend: str = "eager",
        compare_state: bool = True,
        **step_options: Any,
    ) -> None:
        self.model, self.reference_model = model, copy.deepcopy(model)
        options = {"capturable": True, **options}
        plain = {key: float(x) if isinstance(x, Tensor) else x for key, x in options.items()}
        plain |= {"foreach": False, "compile": None, "fused": None, "capturable": False}
        self.optimizer = Adafactor(model.parameters(), **options)
        self.reference = Adafactor(self.reference_model.parameters(), **plain)
        self.compare_state = compare_state
        self.schedules = [schedule(x) for x in (self.optimizer, self.reference)] if schedule else []
        self.counter = CountingBackend(backend)
        self.eager_step = training_step(self.reference_model, self.reference, **step_options)
        step = training_step(model, self.optimizer, **step_options)
        self.step: Step = torch.compile(step, fullgraph=True, backend=self.counter, **ISOLATED)
        self.generator = torch.Generator().manual_seed(7)

    @property
    def compiles(self) -> int:
        return self.counter.graphs

    def run(self, steps: int, compare: bool = True, set_lr: Callable[[int], float] | None = None) -> None:
        for t in range(steps):
            batch = self.model.batch(self.generator)
            if set_lr is not None:
                self.optimizer.param_groups[0]["lr"].fill_(set_lr(t))
                self.reference.param_groups[0]["lr"] = set_lr(t)
            if compare:
                take_over(self.reference, self.optimizer)
                self.eager_step(batch)
            self.step(batch)
            for schedule in self.schedules:
                schedule.step()
            if compare:
                self.assert_alike(f"step {t}")

    def assert_alike(self, where: str) -> None:
        for param, reference in zip(self.model.parameters(), self.reference_model.parameters(), strict=True):
            assert_same_parameter(param, reference, "in a compiled loop", where=where)
            if self.compare_state:
                assert_same_state(self.optimizer.state[param], self.reference.state[reference], param.dtype, where)
