"""Parameters that become ones of another dtype, and their state with them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from safety.cases import case, check_steps, made

NAMES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "half"}


def change_dtype(path: str, first: torch.dtype, then: torch.dtype, before: int) -> None:
    model, optimizer = made(path, first, before)
    getattr(model, NAMES[then])()
    check_steps(optimizer, path)
    wide = torch.float64 if then is torch.float64 else torch.float32
    for state in optimizer.state.values():
        assert {x.dtype for x in state.values() if isinstance(x, Tensor)} == {wide}


for first in NAMES:
    for then in NAMES:
        for before in (0, 2):
            if first is not then:
                of_dtypes = functools.partial(change_dtype, first=first, then=then, before=before)
                case("dtypes", f"{NAMES[first]} then {NAMES[then]}, {before} steps before")(of_dtypes)
