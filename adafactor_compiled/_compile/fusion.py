"""One loop over the blocks of a matrix, in which their rows and then their columns are summed.

Inductor gives each of these sums a loop over all blocks of its own. The sums over columns then read a gradient that has left
the second-level cache long since: the first reads of 3072 x 768 take a quarter less in one loop.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode
from torch._inductor.dependencies import MemoryDep
from torch._inductor.scheduler import BaseSchedulerNode

try:  # from torch 2.13 on, Inductor's cache asks a pass who it is
    from torch._inductor.custom_graph_pass import CustomSchedulerPass as Base
except ImportError:
    Base = object  # type: ignore[assignment, misc]

OPTION = "_post_fusion_custom_pass"
PROVEN = ("2.11", "2.13", "2.14", "2.15")  # releases on which the tests have seen loops joined and results right

Nodes = list[BaseSchedulerNode]
Loops = tuple[tuple[Any, ...], tuple[Any, ...]]  # the sizes of a nest of loops, and of those inside it that sum


class JoinBlockLoops(Base):
    """Runs after Inductor's own fusion; a graph in which it does not find what it looks for stays as it is."""

    def __call__(self, nodes: Nodes) -> Nodes:
        try:
            for blocks in _blocks_of(dict.fromkeys(loops for node in nodes for loops in _loops_of(node))):
                nodes = _join(nodes, blocks)
            return nodes
        except Exception:  # another release has other nodes: the loops are then as Inductor made them, slower and right
            logging.getLogger(__name__).warning("loops over blocks were not joined", exc_info=True)
            return nodes

    def uuid(self) -> str:
        """For the key of Inductor's cache."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def options() -> dict[str, Callable[[Nodes], Nodes]]:
    """Inductor's option, where this release of torch is a proven one."""
    release = ".".join(torch.__version__.split(".")[:2])
    return {OPTION: JoinBlockLoops()} if release in PROVEN else {}


def _loops_of(node: BaseSchedulerNode) -> list[Loops]:
    nests = node.outer_fused_nodes if isinstance(node, OuterLoopFusedSchedulerNode) else [node]
    # What only stands for memory has no group.
    return [(loops, summed) for loops, summed in (nest.group[1] for nest in nests if hasattr(nest, "group"))]


def _blocks_of(all_loops: Collection[Loops]) -> list[tuple[Any, ...]]:
    """Of each member the sizes of its loops over blocks: around sums of rows, (..., n, B | C), and columns, (..., n, C | B)."""
    both = [
        loops[:-1]
        for loops, summed in all_loops
        if len(loops) > 1 and len(summed) == 1 and ((*loops[:-1], *summed), loops[-1:]) in all_loops
    ]
    return list(dict.fromkeys(both))


def _join(nodes: Nodes, blocks: tuple[Any, ...]) -> Nodes:
    """Make one node of those that loop over blocks, as far as none between them needs the earlier ones as a whole."""
    joined: BaseSchedulerNode | None = None
    others: Nodes = []
    for node in nodes:
        of_node = _loops_of(node)
        over_blocks = bool(of_node) and all(loops[: len(blocks)] == blocks for loops, _ in of_node)
        if over_blocks and joined is None:
            joined = node
        elif over_blocks and joined is not None and _can_join(joined, node, others, blocks):
            joined = OuterLoopFusedSchedulerNode.fuse(joined, node, len(blocks))
        else:
            others.append(node)
    if joined is None:
        return nodes
    scheduler = joined.scheduler
    scheduler.name_to_fused_node.update({node.get_name(): joined for node in joined.get_nodes()})
    return scheduler.topological_sort_schedule([joined, *others])


def _can_join(joined: BaseSchedulerNode, node: BaseSchedulerNode, others: Nodes, blocks: tuple[Any, ...]) -> bool:
    written, needed = joined.get_operation_names(), node.ancestors
    if any(other.ancestors & written and other.get_operation_names() & needed for other in others):
        return False
    buffers = joined.get_buffer_names()
    return all(_within_block(node, dep, blocks) for dep in node.read_writes.reads if dep.name in buffers)


def _within_block(node: BaseSchedulerNode, read: Any, blocks: tuple[Any, ...]) -> bool:
    """Whether each block reads only what it has written itself."""
    layout, total = node.scheduler.name_to_buf[read.name].node.get_layout(), math.prod(blocks)
    # The dimensions of the blocks; Inductor may have merged the loops over slices and their blocks.
    count = next((i for i in range(1, len(layout.size) + 1) if math.prod(layout.size[:i]) == total), 0)
    if not isinstance(read, MemoryDep) or not count:
        return False
    if len(read.size) == 1 and read.index == read.var_names[0]:  # in the order in which it lies
        return True
    leading = 1 if read.size[0] == total else len(blocks)
    block_stride = read.index.coeff(read.var_names[leading - 1])
    return bool(math.prod(read.size[:leading]) == total and block_stride == layout.stride[count - 1])
