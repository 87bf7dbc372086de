"""The ranks that the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Ranks

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all tests share


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n ranks that are kept for the next test of a file, and made anew after a check has failed on them.

    Not for longer: gloo polls in a thread for each mesh that ever was, all together half of a two-core machine in the end.
    """
    kept: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in kept or kept[size].closed:
            kept[size] = Ranks(size)
        return kept[size]

    yield get
    for group in kept.values():
        group.close()
