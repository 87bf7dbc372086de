"""The floors of the house: imports run downwards, never in a circle, and private parts of torch are where they are named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import adafactor_compiled

ROOT = Path(adafactor_compiled.__file__).parent
FLOORS = ["", "_step", "_sharded", "_compile", "_fused", "_update", "_state"]  # from the top, where users come in
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}

# Every private part of torch, by the file that may use it. Each has another way beside it, or is part of a public subclass.
PRIVATE = {
    "_compile.graphs": {"torch._inductor"},  # list_options: which options this release knows
    "_state.guard": {"torch._C._dynamo.guards.TensorGuards"},  # by questions in Python where it is not there
    "_state.moments": {"torch._dynamo"},  # mark_static_address, for CUDA graphs
    "_state.placements": {
        "torch.distributed._functional_collectives",
        "torch.distributed.tensor._dtensor_spec",  # for what lies on another device than its mesh
        "torch.distributed.tensor.placement_types._StridedShard",
    },
    "_step.ranges": {"torch._C"},  # whether a profiler runs
    "step_in_backward": {"torch.Tensor._make_wrapper_subclass"},  # how torch documents wrapper subclasses
}


def imports_of(name: str) -> Iterator[str]:
    """Files of the package that a file imports when it is imported itself."""
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adafactor_compiled"):
            module = (node.module or "").removeprefix("adafactor_compiled").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in FILES else module


def floor_of(name: str) -> int:
    return FLOORS.index(name.split(".")[0] if "." in name else "")


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__init__")])
def test_imports_run_downwards(name: str) -> None:
    for other in imports_of(name):
        assert floor_of(other) >= floor_of(name), f"{name} imports {other}, which is on a floor above"


def test_no_file_imports_itself_through_others() -> None:
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in imports_of(name):
                visit(other, (*path, name))
            done.add(name)

    done: set[str] = set()
    for name in FILES:
        if not name.endswith("__init__"):
            visit(name, ())


def private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if any(part.startswith("_") and not part.startswith(("__", "_foreach")) for part in parts):
                yield name


@pytest.mark.parametrize("name", FILES)
def test_private_parts_of_torch_are_used_where_they_are_named(name: str) -> None:
    allowed = PRIVATE.get(name, set())
    for used in private_names(ast.parse(FILES[name].read_text())):
        assert any(used.startswith(prefix) for prefix in allowed), f"{name} uses {used}"


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_files_are_one_idea_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
