"""The algorithm, one parameter at a time, in plain eager operations: what every other path is held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adafactor_compiled._state.moments import factored_dims
from adafactor_compiled._state.options import Group
from adafactor_compiled._update.numbers import LEAST_SHARE, one_minus_beta2_of, unscaled_lr
from adafactor_compiled._update.rounding import noise_of_member, write


def step_parameter(
    param: Tensor, grad: Tensor, state: dict[str, Any], group: Group, update_rms: Tensor, draws: Tensor | None = None
) -> None:
    """Step one parameter in place; `state["step"]` has already been raised (1).

    `update_rms`, 0-dim, receives the RMS of the update before clipping. `draws` are for stochastic rounding.
    """
    compute_dtype, param = state["RMS"].dtype, param.detach()  # what was made in inference mode can be written to so
    g = grad.to(compute_dtype)
    if type(param) is Tensor:
        p = param.to(compute_dtype)  # param itself unless that is half-precision
    else:  # a subclass, as of weights that are kept quantized, which know how to be copied and little else
        p = torch.empty(param.shape, dtype=compute_dtype, device=param.device).copy_(param)
    step, (eps, min_scale) = state["step"], group["eps"]
    step = step.to(compute_dtype) if isinstance(step, torch.Tensor) else step

    rms(p, state["RMS"])  # 2
    if "get_lr" in group:  # see `_state/overrides.py`
        get_lr, of_user = group["get_lr"]
        alpha = get_lr(of_user, state)
    else:
        alpha = unscaled_lr(group, step)  # 3
        alpha = alpha.to(compute_dtype) if isinstance(alpha, Tensor) else alpha
        if group["scale_parameter"]:
            alpha = alpha * state["RMS"].clamp(min=min_scale)
    one_minus_beta2 = one_minus_beta2_of(group, step)  # 4
    beta2 = 1.0 - one_minus_beta2

    squared = (g * g).add_(eps)  # 5
    factored = factored_dims(param.shape, group) is not None
    if factored:
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        _move(row, beta2, squared.mean(-1), one_minus_beta2)
        _move(col, beta2, squared.mean(-2), one_minus_beta2)
        update = approx_sq_grad(row, col).mul_(g)
    else:
        v = state["exp_avg_sq"]
        _move(v, beta2, squared, one_minus_beta2)
        update = v.rsqrt().mul_(g)

    rms(update, update_rms)
    if group["clip_threshold"] is not None:  # 6
        update.div_((update_rms / group["clip_threshold"]).clamp_(min=1.0))
    update.mul_(alpha)  # 7
    if group["maximize"]:
        update.neg_()

    noise = noise_of_member(draws, param, state.get("exp_avg"), factored)
    if group["beta1"] is not None:  # 8
        exp_avg = state["exp_avg"]
        update = exp_avg.to(compute_dtype).mul_(group["beta1"]).add_(update, alpha=1.0 - group["beta1"])
        if exp_avg is not update:
            write(exp_avg, update, noise)
    if group["cautious"] and group["beta1"] is not None:
        agree = (update.sign() * grad.sign() * (-1 if group["maximize"] else 1) > 0).to(compute_dtype)
        update = update * (agree / agree.mean().clamp(min=LEAST_SHARE))
    if group["weight_decay"] != 0:  # 9
        scale = alpha if group["weight_decay_scale"] == "lr" else 1.0
        p.sub_(p * (group["weight_decay"] * scale))
    p.sub_(update)  # 10
    if p is not param:
        write(param, p, noise)


def approx_sq_grad(row: Tensor, col: Tensor) -> Tensor:
    """One over the root of the second moment that its factors stand for."""
    row_factor = (row / row.mean(-1, keepdim=True)).rsqrt()
    return row_factor.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)


def _move(average: Tensor, beta2: Any, new: Tensor, one_minus_beta2: Any) -> None:
    average.mul_(beta2)
    if isinstance(one_minus_beta2, Tensor):
        average.add_(new * one_minus_beta2)
    else:
        average.add_(new, alpha=one_minus_beta2)


def rms(x: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.div(torch.linalg.vector_norm(x), x.numel() ** 0.5, out=out)
