"""What `capturable=True` adds: the numbers that a host would keep live in tensors on the parameters' device.

A CUDA graph and a compiled training loop replay what they recorded. A Python number is part of the record; a tensor is read
anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._state.options import Group
from adafactor_compiled._state.placements import split_dims


def lr_to_tensor(group: Group) -> None:
    """Make a capturable group's learning rate a 0-dim tensor, which learning-rate schedulers then change in place.

    A tensor that the user gave stays that tensor: the user may hold it to write to it. On the meta device the number would
    be lost.
    """
    lr, params = group["lr"], group["params"]
    if group["capturable"] and params and isinstance(lr, (int, float)):
        dtype = torch.float64 if any(param.dtype is torch.float64 for param in params) else torch.float32
        device = torch.device("cpu") if params[0].is_meta else params[0].device
        group["lr"] = torch.tensor(float(lr), dtype=dtype, device=device)


def is_captured(groups: Sequence[Group]) -> bool:
    """Whether a CUDA graph is being captured.

    Raises:
        RuntimeError: it would record a step of these groups wrongly.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return False
    for index, group in enumerate(groups):
        lr, params = group["lr"], group["params"]
        if any(isinstance(param, DTensor) and split_dims(param) for param in params):
            raise RuntimeError(
                "a step captured in a CUDA graph should be of parameters that no other rank has a piece of, since ranks look "
                f"on the host whether they agree, but parameter group {index} has some; nothing was stepped"
            )
        if not group["capturable"]:
            raise RuntimeError(
                f"`capturable` should be True to capture a step in a CUDA graph but is: False (parameter group {index})"
            )
        if not group["relative_step"] and isinstance(lr, Tensor) and any(lr.device != param.device for param in params):
            raise RuntimeError(
                "`lr` should be a tensor on the parameters' device to capture a step in a CUDA graph but is on: "
                f"{lr.device} (parameter group {index})"
            )
    return True
