"""One loop over the blocks of a matrix, in which their rows and then their columns are summed.

Inductor gives each of these sums a loop over all blocks of its own. The sums over columns then read a gradient that has left
the second-level cache long since: the first reads of 3072 x 768 take a quarter less in one loop.
"""

from __future__ import annotations

import math
from typing import Any

from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode
from torch._inductor.dependencies import MemoryDep
from torch._inductor.scheduler import BaseSchedulerNode

Nodes = list[BaseSchedulerNode]
Loops = tuple[tuple[Any, ...], tuple[Any, ...]]  # the sizes of a nest of loops, and of those inside it that sum


def join_block_loops(nodes: Nodes) -> Nodes:
    """Runs after Inductor's own fusion; a graph in which it does not find what it looks for stays as it is."""
    blocks = _blocks_of({loops for node in nodes for loops in _loops_of(node)})
    return nodes if blocks is None else _join(nodes, blocks)


def _loops_of(node: BaseSchedulerNode) -> list[Loops]:
    nests = node.outer_fused_nodes if isinstance(node, OuterLoopFusedSchedulerNode) else [node]
    return [(loops, summed) for _, (loops, summed) in (nest.group for nest in nests)]


def _blocks_of(all_loops: set[Loops]) -> tuple[Any, ...] | None:
    """The sizes of the loops over blocks: those around sums over rows, (..., n, B | C), and over columns, (..., n, C | B)."""
    for loops, summed in all_loops:
        if len(loops) > 1 and len(summed) == 1 and ((*loops[:-1], *summed), loops[-1:]) in all_loops:
            return loops[:-1]
    return None


def _join(nodes: Nodes, blocks: tuple[Any, ...]) -> Nodes:
    """Make one node of those that loop over blocks, as far as none between them needs the earlier ones as a whole."""
    joined: BaseSchedulerNode | None = None
    others: Nodes = []
    for node in nodes:
        over_blocks = all(loops[: len(blocks)] == blocks for loops, _ in _loops_of(node))
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
    layout = node.scheduler.name_to_buf[read.name].node.get_layout()
    if not isinstance(read, MemoryDep) or tuple(layout.size[: len(blocks)]) != blocks:
        return False
    if len(read.size) == 1 and read.index == read.var_names[0]:  # in the order in which it lies
        return True
    # Inductor may have merged the loops over slices and their blocks; the last of them goes from block to block either way.
    leading = 1 if read.size[0] == math.prod(blocks) else len(blocks)
    block_stride = read.index.coeff(read.var_names[leading - 1])
    return bool(math.prod(read.size[:leading]) == math.prod(blocks) and block_stride == layout.stride[len(blocks) - 1])
