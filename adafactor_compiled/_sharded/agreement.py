"""Which ranks add up together, and whether they mean the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class Groups:
    """Process groups by their ranks, which stay: each has threads of its own."""

    def __init__(self) -> None:
        self._world: dist.ProcessGroup | None = None
        self._of: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def of(self, ranks: list[int]) -> dist.ProcessGroup:
        world = dist.group.WORLD
        assert world is not None
        if world is not self._world:  # another one was set up
            self._world, self._of = world, {}
        if ranks == list(range(dist.get_world_size())):
            return world
        if tuple(ranks) not in self._of:
            self._of[tuple(ranks)] = dist.new_group(ranks, use_local_synchronization=True)
        return self._of[tuple(ranks)]


_groups = Groups()


def group_over(mesh: DeviceMesh, dims: list[int]) -> dist.ProcessGroup | None:
    """The ranks that differ from this one along these mesh dimensions alone; None where there are no others."""
    if len(dims) < 2:
        return mesh.get_group(dims[0]) if dims else None
    coordinate = mesh.get_coordinate() or ()
    # Not DeviceMesh._flatten: from then on DTensor gathers over the flattened dimension, which permutes the rows of what
    # two dimensions split unevenly (torch 2.13).
    ranks = mesh.mesh[tuple(slice(None) if dim in dims else at for dim, at in enumerate(coordinate))]
    return _groups.of(sorted(ranks.flatten().tolist()))


def can_sum(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether a group has a backend for the tensors of a device: where parameters are offloaded, NCCL alone has none."""
    backends = dist.get_backend_config(group).split(",")
    return any(":" not in x or x.split(":")[0] == device.type for x in backends)


def agreed(mesh: DeviceMesh, mine: list[str], wanted: list[int]) -> list[int]:
    """What any rank of a mesh wants, of parameters that are `mine`.

    Raises:
        RuntimeError: on every rank, unless all list the same ones.
    """
    answers = _gathered(mesh, (hashlib.sha256("\n".join(mine).encode()).hexdigest(), wanted))
    if len({digest for digest, _ in answers.values()}) == 1:
        return sorted({i for _, of_rank in answers.values() for i in of_rank})
    lists = _gathered(mesh, mine)
    (a, first), (b, second) = next(((a, x), (b, y)) for a, x in lists.items() for b, y in lists.items() if x != y)
    i = next(i for i in range(max(len(first), len(second))) if first[i : i + 1] != second[i : i + 1])
    was = " and ".join(f"{(x[i : i + 1] or ['nothing'])[0]} on rank {rank}" for rank, x in ((a, first), (b, second)))
    raise RuntimeError(f"every rank should step the same DTensor parameters but there is {was}; nothing was stepped")


def _gathered(mesh: DeviceMesh, value: Any) -> dict[int, Any]:
    """The value of each rank of a mesh, by its global rank."""
    values = {dist.get_rank(): value}
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        received: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(received, values, group=group)
        values = {rank: x for of_rank in received for rank, x in of_rank.items()}
    return dict(sorted(values.items()))
