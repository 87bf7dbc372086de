"""How a pass is compiled: Inductor's options and the number of members of a call, for each device in one place."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from adafactor_compiled._update import kernels, matrices, pieces, vectors

CPU: dict[str, Any] = {
    # Inductor fuses a pointwise node into a reduction's loop only where it stands before it: keep program order.
    "reorder_for_locality": False,
    # Fuse loops that share as little as one number (10 bytes otherwise): a parallel loop costs a small matrix 2 us.
    "score_fusion_memory_threshold": 1,
    # An update with momentum is read twice. Written out in between it would take the memory of a parameter and three passes.
    "realize_reads_threshold": 16,
    # Fused multiply-add: statistics of 768 x 3072 in 0.25 ms instead of 0.38.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Checks of what the guards have established already.
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}
if matrices.AVX2:
    # Inductor tries vector instructions out, with the C++ compiler: 4 s. All compilers know these; of newer ones that is open.
    CPU["cpp.vec_isa_ok"] = True
if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
    # As Inductor chooses by itself, but its cache does not tell by which choice code was made, and would give it to the others.
    CPU["cpp.simdlen"] = 1
# Loads with a stride, which Inductor would rather not vectorize at all: the sums of 3 x 3 kernels take half the time with it. A
# load of less than a vector takes as much code as eight others: they compile in half the time without.
STRIDED = {"cpp.enable_tiling_heuristics": False, "cpp.enable_loop_tail_vec": False}
# What is stepped before a second thread has begun.
ON_ONE_THREAD = {"cpp.threads": 1}

CUDA: dict[str, Any] = {  # what is sharded is stepped by passes there too
    # It would put guards on sizes, and so compile in a step; with dynamic sizes it never applies.
    "triton.mix_order_reduction": False,
}

# Members of a call; 1 where nothing is said. Guards and calls cost a small member as much as its step, and eight share them.
# Code, and the time to generate it, grow with each.
MEMBERS: dict[Callable[..., Any], int] = {
    matrices.step_matrices: 4,
    matrices.step_small_matrices: 8,
    vectors.step_vectors: 8,
}
SUMS_ALONE = {  # momentum and stochastic rounding are nothing to them
    matrices.statistics,
    pieces.plain_sums,
    pieces.weighted_rows,
    kernels.kernel_statistics,
    vectors.vector_sums,
}
IN_BLOCKS = {matrices.step_matrices, matrices.statistics}  # go over the blocks of a matrix, in one loop: see fusion.py
OVER_ROWS = {matrices.step_matrices, matrices.step_small_matrices, matrices.statistics}  # see `fills_two_vectors`


def members_of_a_call(function: Callable[..., Any], dynamic: int) -> int:
    """By the number of dynamic sizes.

    A network has few matrices with slices, a convolution of 7 x 7 perhaps, and code for many members would be half of its first
    step.
    """
    in_slices = dynamic > (3 if function in IN_BLOCKS else 2)
    return 1 if in_slices else MEMBERS.get(function, 1)


@functools.cache
def options_of(function: Callable[..., Any], device_type: str, short: bool) -> dict[str, Any]:
    """Inductor's options for a pass, as far as this release of torch has them; `short`: its members are short vectors."""
    if device_type != "cpu":
        wanted = CUDA
    elif function is kernels.kernel_statistics:
        wanted = {**CPU, **STRIDED}
    else:
        wanted = {**CPU, **ON_ONE_THREAD} if short else CPU
    known = torch._inductor.list_options()
    options = {name: value for name, value in wanted.items() if name in known}
    if device_type == "cpu" and function in IN_BLOCKS:
        from adafactor_compiled._compile import fusion  # it imports Inductor, which takes seconds

        options |= fusion.options()
    return options
