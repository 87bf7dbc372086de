"""The ranks that the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Ranks

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all tests share


CHECKS = 12  # of the same ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n ranks that are kept for the next tests of a file, and made anew after a check has failed on them.

    Not for longer, and none of another number beside them: gloo polls in a thread for each mesh that ever was, and all these
    threads together leave nothing of a machine of two cores in the end.
    """
    kept: list[Ranks] = []
    checks = 0

    def get(size: int) -> Ranks:
        nonlocal checks
        if not kept or kept[0].closed or kept[0].size != size or checks == CHECKS:
            for group in kept:
                group.close()
            kept[:], checks = [Ranks(size)], 0
        checks += 1
        return kept[0]

    yield get
    for group in kept:
        group.close()
