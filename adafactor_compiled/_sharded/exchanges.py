"""The exchanges of a step, one for each mesh and device, which agree on gradients together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._sharded.exchange import Exchange, Kind, Slot, device_of
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.options import Group

Exchanges = Sequence[Exchange]


def slots_of(exchanges: Exchanges) -> dict[int, Slot]:
    """By the positions of parameters."""
    return {position: slot for exchange in exchanges for position, slot in exchange.slots.items()}


def exchanges_of(groups: list[Group], known: Sequence[Exchanges]) -> Exchanges:
    """The exchanges of all DTensor parameters, that of the most ranks last; known ones, the last ones first, for the same.

    Raises:
        RuntimeError: the ranks' parameters differ; or their gradients did, in the last step.
    """
    params = [(param, group) for group in groups for param in group["params"]]
    sharded = [(i, param, Kind.of(param, group)) for i, (param, group) in enumerate(params) if isinstance(param, DTensor)]
    if not sharded:
        return ()
    wanted = {(i, id(x), kind, device_of(x)) for i, x, kind in sharded}
    found = next((x for x in known if {of for exchange in x for of in exchange.described()} == wanted), None)
    if known and found is not known[0]:
        begin(known[0])  # or what is yet to be told never would be
    if found is not None:
        return found
    made = []
    for (mesh, _), chosen in group_by_key((x.device_mesh, device_of(x)) for _, x, _ in sharded).items():
        of_mesh = [sharded[j] for j in chosen]
        made.append(Exchange(mesh, [x[:2] for x in of_mesh], [x[2] for x in of_mesh]))
    return sorted(made, key=lambda exchange: exchange.ranks)


def begin(exchanges: Exchanges) -> None:
    """Start a step.

    Raises:
        RuntimeError: ranks have disagreed in the last one.
    """
    _raise_first([x.told() for x in exchanges])
    for exchange in exchanges:
        exchange.clear()


def agree(exchanges: Exchanges, positions: Collection[int]) -> None:
    """Add up what ranks add up first, on all meshes before anything is said: who hears of it first leaves no others waiting.

    Raises:
        RuntimeError: on all ranks of the largest mesh, where some disagree on gradients.
    """
    disagreed: Tensor | None = None
    for exchange in exchanges:
        here = exchange.sum_first(positions, disagreed)
        disagreed = here if len(exchanges) > 1 else None
    _raise_first([x.found() for x in exchanges])


def admit(exchanges: Exchanges, positions: Collection[int]) -> None:
    """Have ranks agree on parameters that have a gradient for the first time; the others are then in the same all_reduce.

    Raises:
        RuntimeError: where they disagree.
    """
    begin(exchanges)
    agree(exchanges, positions)
    _raise_first([x.told() for x in exchanges])
    for exchange in exchanges:
        exchange.admit(positions)


def _raise_first(errors: list[RuntimeError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error
