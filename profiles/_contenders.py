"""The optimizers that the profiles compare, and parameters to step.

Every one steps at a learning rate of 1e-9, so that contenders can take turns on one list of parameters whose values stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _networks import Shapes
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from adafactor_compiled import Adafactor

LR = 1e-9
FIXED = {"lr": LR, "scale_parameter": True, "relative_step": False}

Make = Callable[[list[Tensor], "float | None"], Optimizer]  # of parameters and beta1; ImportError where it is not installed


class Contender(NamedTuple):
    """An optimizer under a name that a figure has a colour for."""

    name: str
    make: Make
    momentum: bool = True  # whether it knows beta1
    every: int = 1  # takes part in every n-th round of a timing
    half_only: bool = False  # whether it is another one only for half-precision parameters
    momentum_only: bool = False  # whether it is another one only with beta1


def ours(**path: Any) -> Make:
    return lambda params, beta1: Adafactor(params, beta1=beta1, **FIXED, **path)


def _transformers(params: list[Tensor], beta1: float | None) -> Optimizer:
    from transformers.optimization import Adafactor as TransformersAdafactor

    return TransformersAdafactor(params, beta1=beta1, **FIXED)


def _pytorch_optimizer(params: list[Tensor], beta1: float | None) -> Optimizer:
    from pytorch_optimizer import AdaFactor

    return AdaFactor(params, betas=(beta1, 0.999), momentum_dtype=torch.float32, **FIXED)


def _timm(params: list[Tensor], beta1: float | None) -> Optimizer:
    from timm.optim import Adafactor as TimmAdafactor

    return TimmAdafactor(params, lr=LR, betas=None if beta1 is None else (beta1, 0.999))


def _torchao(params: list[Tensor], beta1: float | None) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=LR)


def _torch(foreach: bool) -> Make:
    return lambda params, beta1: torch.optim.Adafactor(params, lr=LR, foreach=foreach)


def adamw(**path: bool) -> Make:
    return lambda params, beta1: torch.optim.AdamW(params, lr=LR, **path)


CONTENDERS: dict[str, Contender] = {
    "fused": Contender("Adafactor, fused", ours(fused=True)),
    "stochastic-rounding": Contender(
        "Adafactor, fused, stochastic rounding", ours(fused=True, stochastic_rounding=True), half_only=True
    ),
    "bfloat16-momentum": Contender(
        "Adafactor, fused, momentum in bfloat16", ours(fused=True, momentum_dtype=torch.bfloat16), momentum_only=True
    ),
    "compiled": Contender("Adafactor, compiled", ours(compile=True)),
    "adamw-fused": Contender("fused AdamW", adamw(fused=True)),
    "adamw-foreach": Contender("foreach AdamW", adamw(foreach=True)),
    "adamw-8bit": Contender("torchao AdamW8bit", _torchao, every=3),
    "multi-tensor": Contender("Adafactor, multi-tensor", ours(compile=False), every=3),
    "reference": Contender("Adafactor, reference path", ours(foreach=False), every=3),
    "transformers": Contender("transformers", _transformers, every=3),
    "torch-loop": Contender("torch.optim.Adafactor, for-loop", _torch(foreach=False), momentum=False, every=3),
    "torch-foreach": Contender("torch.optim.Adafactor, foreach", _torch(foreach=True), momentum=False, every=3),
    "pytorch-optimizer": Contender("pytorch_optimizer", _pytorch_optimizer, every=3),
    "timm": Contender("timm", _timm, every=3),
}


def make_params(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    """Parameters of these shapes with gradients, normal and equal for equal seeds on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator))
        param.grad = torch.empty(shape, dtype=dtype, device=device).normal_(0, 1e-3, generator=generator)
        params.append(param)
    return params


def sharded(params: list[Tensor]) -> list[Tensor]:
    """The pieces of a rank under `fully_shard`, with gradients of its own; in the process group that there is."""
    bag = torch.nn.Module()
    bag.params = torch.nn.ParameterList(param.detach() for param in params)
    fully_shard(bag)
    pieces = list(bag.parameters())
    generator = torch.Generator(params[0].device).manual_seed(1 + dist.get_rank())
    for piece in pieces:
        piece.grad = torch.empty_like(piece)
        piece.grad.to_local().normal_(0, 1e-3, generator=generator)
    return pieces


def make_optimizers(keys: list[str], params: list[Tensor], beta1: float | None) -> tuple[dict[str, Optimizer], dict[str, str]]:
    """The contenders that can step these parameters, by key; and why the others cannot."""
    made, missing = {}, {}
    for key in keys:
        contender = CONTENDERS[key]
        if beta1 is not None and not contender.momentum:
            missing[key] = "has no beta1"
        elif beta1 is None and contender.momentum_only:
            missing[key] = "is for a momentum"
        elif contender.half_only and params[0].dtype.itemsize > 2:
            missing[key] = "is for half precision"
        else:
            try:
                made[key] = contender.make(params, beta1)
            except ImportError as error:
                missing[key] = str(error)
    return made, missing
