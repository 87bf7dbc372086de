"""The kernels of a step of parameters that are said to be on a GPU. gpu_kernels.py runs this in a process of its own:

    python profiles/_gpu_step.py '{"shapes": [[768, 3072], [768]], "dtype": "float32", "beta1": null}'

It prints one line of JSON. The optimizer, its plan, `warm_up` and the steps are the package's own; parameters are fake.
"""

from __future__ import annotations

import collections
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _shared import fake_gpu

# ruff: noqa: E402
fake_gpu.install()  # before the package looks for a GPU

import torch._inductor.config as inductor_config
from _generated import Eager, Graph, Launch, recorded
from _networks import by_shape
from torch._subclasses.fake_tensor import FakeTensorMode

from adafactor_compiled import Adafactor
from adafactor_compiled._compile import passes
from adafactor_compiled._compile.examples import Pass
from adafactor_compiled._step import plan

LARGE = 1.0  # bytes an element that make a kernel a large one


class Compiled(NamedTuple):
    """A graph, the pass that it is of, and the seconds that compiling it took, up to the sources of its kernels."""

    key: Pass
    graph: Graph
    seconds: float  # of the processor: other work on the machine does not count


class Compilations:
    """What this process compiles."""

    def __init__(self) -> None:
        self.done: list[Compiled] = []
        self._new: list[Graph] = []
        self._compiled = passes.compiled
        self.note = self._new.append

    def compiled(self, key: Pass) -> Any:
        """In place of `passes.compiled`."""

        def call(*arguments: Any) -> Any:
            start = time.process_time()
            result = self._compiled(key)(*arguments)
            self.done += [Compiled(key, graph, time.process_time() - start) for graph in self._new]
            self._new.clear()
            return result

        return call


def plain_class_of(*of: Any) -> Any:
    """A fake tensor is a subclass, which the package would step by operations."""
    return _class_of(*of)._replace(plain=True)


_class_of = plan.shape_class_of


def record(case: dict[str, Any]) -> dict[str, Any]:
    inductor_config.force_disable_caches = True
    compilations, dtype = Compilations(), getattr(torch, case["dtype"])
    passes.compiled, plan.shape_class_of = compilations.compiled, plain_class_of
    with FakeTensorMode(allow_non_fake_inputs=True), recorded(compilations.note):
        params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda")) for shape in case["shapes"]]
        for param in params:
            param.grad = torch.empty_like(param)
        options = case.get("options", {})
        if "momentum_dtype" in options:
            options |= {"momentum_dtype": getattr(torch, options["momentum_dtype"])}
        optimizer = Adafactor(params, beta1=case["beta1"], compile=True, **options)
        optimizer.warm_up()
        ahead = len(compilations.done)
        optimizer.step()  # makes what later ones keep
        for _, graph, _ in compilations.done:
            graph.calls.clear()
        with Eager() as eager:
            optimizer.step()
    members = members_of(optimizer, params)
    of_graphs = [of_graph(done, members[done.key], case.get("build", False)) for done in compilations.done]
    if case.get("sources"):
        keep([done.graph for done in compilations.done], of_graphs, Path(case["sources"]))
    result = summary(of_graphs, eager.launches, sum(param.numel() for param in params))
    return {"graphs": ahead, "graphs_in_steps": len(compilations.done) - ahead, **result}


def members_of(optimizer: Any, params: list[torch.Tensor]) -> dict[Pass, list[torch.Tensor]]:
    """The parameters that a step steps by each pass."""
    members: dict[Pass, list[torch.Tensor]] = collections.defaultdict(list)
    for call in optimizer._stepper._plans[None].calls:
        for key in call.keys:
            members[key] += [params[i] for i in call.positions]
    return members


def of_graph(compiled: Compiled, members: list[torch.Tensor], build: bool) -> dict[str, Any]:
    """What a call of a graph launches, and what all its calls of a step move, an element of what they step."""
    key, graph, seconds = compiled
    elements = max(1, sum(x.numel() for x in members))
    moved = list(graph.moved())
    kernels: dict[str, list[int]] = collections.defaultdict(list)
    for launch, size in moved:
        kernels[launch.name].append(size)
    result = {
        "function": key.function.__name__,
        "k": key.k,
        "sizes": key.sizes,
        "shapes": by_shape([tuple(x.shape) for x in members]),
        "calls": len(graph.calls),
        "triton_launches": sum(launch.times for launch in graph.launches if launch.source),
        "aten_launches": sum(launch.times for launch in graph.launches if not launch.source),
        "bytes": sum(size for _, size in moved),
        "bytes_per_element": sum(size for _, size in moved) / elements,
        "codegen_s": seconds,
        "device_ms": sum(fake_gpu.milliseconds(size, launch.times) for launch, size in moved),
        # How often each is launched in a step, and the bytes of all that.
        "kernels": {name: [len(sizes), round(sum(sizes) / elements, 3)] for name, sizes in kernels.items()},
    }
    if build:
        from _triton_build import build_all

        large = {name for name, (_, size) in result["kernels"].items() if size >= LARGE}
        result["build"] = build_all({launch.name: launch.source for launch in graph.launches if launch.source}, large)
    return result


def summary(of_graphs: list[dict[str, Any]], eager: list[Launch], elements: int) -> dict[str, Any]:
    of_eager = sum(int(launch.moved) for launch in eager)
    eager_ms = sum(fake_gpu.milliseconds(int(launch.moved), launch.times) for launch in eager)
    times: collections.Counter[str] = collections.Counter()
    for launch in eager:
        times[launch.name] += launch.times
    return {
        "triton_launches": sum(graph["calls"] * graph["triton_launches"] for graph in of_graphs),
        "aten_launches": sum(graph["calls"] * graph["aten_launches"] for graph in of_graphs),
        "eager_launches": times.total(),
        "bytes_per_element": (sum(graph["bytes"] for graph in of_graphs) + of_eager) / elements,
        "codegen_s": sum(graph["codegen_s"] for graph in of_graphs),
        "device_ms": sum(graph["device_ms"] for graph in of_graphs) + eager_ms,
        "of_eager": times,
        "of_graphs": of_graphs,
    }


def keep(graphs: list[Graph], of_graphs: list[dict[str, Any]], directory: Path) -> None:
    """Write what was generated, a file a graph."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, (graph, described) in enumerate(zip(graphs, of_graphs, strict=True)):
        (directory / f"{i}_{described['function']}.py").write_text(graph.code)


if __name__ == "__main__":
    print(json.dumps(record(json.loads(sys.argv[1]))))
