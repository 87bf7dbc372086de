"""The package imported twice, or its modules reloaded, in a process of its own: old optimizers and new ones step alike."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import functools, importlib, sys
import torch

def modules():
    return [name for name in sys.modules if name.split(".")[0] == "adafactor_compiled"]

def load():
    package = importlib.import_module("adafactor_compiled")
    graphs = importlib.import_module("adafactor_compiled._compile.graphs")
    graphs.compiled = functools.cache(lambda graph: graphs._step)  # Inductor would cost seconds
    return package.Adafactor

def make(optimizer_class):
    made = []
    for path in ({"foreach": False}, {"compile": False}, {"compile": True}):
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, 8), (7,), (300, 700), (3000, 700), (16, 8, 3, 3)]
        params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        made.append((optimizer_class(params, beta1=0.9, **path), params))
    return made

def step(made):
    for optimizer, params in made:
        for p in params:
            p.grad = p.detach().flip(0) + 1.0
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    for _, params in made[1:]:
        for p, q in zip(params, made[0][1], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

old_class = load()
old = make(old_class)
step(old)
if sys.argv[1] == "twice":
    kept = {name: sys.modules.pop(name) for name in modules()}
    assert load() is not old_class
elif sys.argv[1] == "all":
    for name in modules():
        importlib.reload(sys.modules[name])
else:
    importlib.reload(sys.modules["adafactor_compiled." + sys.argv[1]])
new = make(load())
step(new)
step(old)
step(make(old_class))
new[2][0].load_state_dict(old[2][0].state_dict())
step(old)
"""


@pytest.mark.parametrize("how", ["twice", "all", "adafactor", "_update.multi_tensor", "_compile.calls"])
def test_old_and_new(how: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT, how], check=True, timeout=300)
