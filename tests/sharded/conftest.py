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
    """`ranks(n)`: n ranks that are kept for the next tests of a file, and made anew after a check has failed on them.

    None of another number are kept beside them: their threads, which poll, would take the cores of these.
    """
    kept: list[Ranks] = []

    def get(size: int) -> Ranks:
        if not kept or kept[0].closed or kept[0].size != size:
            for group in kept:
                group.close()
            kept[:] = [Ranks(size)]
        return kept[0]

    yield get
    for group in kept:
        group.close()
