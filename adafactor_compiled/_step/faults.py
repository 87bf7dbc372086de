"""What an interrupted step leaves: step counts that tell who was stepped, and a note that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.layout import group_by_key


@contextmanager
def counts_kept_true(entries: Sequence[Entry]) -> Iterator[None]:
    """Take the step counts back of parameters that were not stepped, where the body raises, and note which were.

    A new version of its tensor means that a parameter was stepped, perhaps in part: a matrix in chunks, or what was interrupted
    between its writes. The second moments of a parameter that was not stepped may already hold its gradient, which the
    next step then adds once more.
    """
    versions = [_version(entry.param) for entry in entries]
    before = _copied([entry.state["step"] for entry in entries])
    try:
        yield
    except BaseException as error:
        stepped = []
        for entry, version, step in zip(entries, versions, before, strict=True):
            if _version(entry.param) != version:
                stepped.append(entry.position)
            elif isinstance(step, Tensor):
                entry.state["step"].copy_(step)
            else:
                entry.state["step"] = step
        note(error, stepped, len(entries))
        raise


def _version(param: Tensor) -> int:
    param = param._local_tensor if isinstance(param, DTensor) else param
    return 0 if param.is_inference() else param._version  # what was made in inference mode has none


def _copied(steps: list[int | Tensor]) -> list[int | Tensor]:
    """Of those in tensors, copies: a stack for each device, since a copy of each would be a launch of a GPU each."""
    copies = list(steps)
    in_tensors = [(i, step) for i, step in enumerate(steps) if isinstance(step, Tensor)]
    for at in group_by_key(step.device for _, step in in_tensors).values():
        stack = torch.stack([in_tensors[j][1].reshape(()) for j in at])  # edited by hand, one may have a dimension
        for j, copy in zip(at, stack.unbind(), strict=True):
            copies[in_tensors[j][0]] = copy
    return copies


def note(error: BaseException, stepped: list[int], count: int) -> None:
    """Say on an exception which of so many parameters had been stepped, where it were some."""
    if not stepped or len(stepped) == count:
        return
    text = (
        f"Adafactor was interrupted in a step: of {count} parameters, {_ranges(stepped)} had been stepped and the others had "
        "not; the next step works as usual"
    )
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:  # Python 3.10
        error.args = (*error.args, text)


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
