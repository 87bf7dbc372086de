"""Checkpoints of other Adafactors, as checkpoints of this one.

Each function takes the `state_dict()` of another optimizer and an `Adafactor` over the same parameters, and returns what its
`load_state_dict` takes. The second moments are those that this optimizer would have after the same gradients. What cannot be
carried over raises `Refused`, a ValueError that says why; `refusals` gives all reasons. (transformers' and fairseq's
checkpoints load as they are.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adafactor_compiled._state.conversion import Refused, converted, factored_as, field, last_two
from adafactor_compiled._state.moments import State, factored_dims, largest_dims
from adafactor_compiled._state.options import Group

RELATIVE_LR = 1e-2  # the most that `relative_step` chooses


def refusals(
    converter: Callable[[Mapping[str, Any], Optimizer], dict[str, Any]], state_dict: Mapping[str, Any], optimizer: Optimizer
) -> list[str]:
    """Why a converter (`from_torch`, say) would refuse a checkpoint: every reason, or none if it would not."""
    try:
        converter(state_dict, optimizer)
    except Refused as refused:
        return refused.reasons
    return []


def from_torch(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Convert a checkpoint of `torch.optim.Adafactor`.

    Its learning rate is `min(lr, 1 / sqrt(step))`, scaled by the parameter's RMS. With `lr` 0.01 and no scheduler, or once
    `1 / sqrt(step)` is below both `lr` and 0.01, that is `relative_step`. Before step `1 / lr ** 2` it is `lr`, and so it
    stays here: a run that goes on beyond that step keeps `lr`. Its `eps[0]`, a floor under the second moment, becomes 1e-30,
    which is added to the squared gradient; updates agree wherever its floor is not in use.

    Args:
        state_dict: `state_dict()` of a `torch.optim.Adafactor`.
        optimizer: an `Adafactor` over the same parameters in the same groups.

    Returns:
        A state for `optimizer.load_state_dict`; `state_dict` is left as it was.

    Its weight decay, which `lr` alone scales, becomes their product with `weight_decay_scale="none"`.

    Raises:
        Refused: weight decay under a scheduler, which changes `lr`; a learning rate that has no counterpart; another number of
            parameters; or a state without the second moments.
    """

    def options(saved: Group, _: Group, steps: list[int], where: str) -> Group:
        if saved["weight_decay"] and "initial_lr" in saved:
            raise ValueError(
                f"`weight_decay` should be 0 under a scheduler but is: {saved['weight_decay']!r}{where}; torch scales it by "
                "`lr` alone, so set it to 0 in the checkpoint and choose one after loading"
            )
        return {
            **_torch_lr(saved, max(steps, default=0), where),
            "clip_threshold": saved["d"],
            "eps": (1e-30, saved["eps"][1]),
            "decay_rate": saved["beta2_decay"],
            "beta1": None,
            "weight_decay": float(saved["lr"]) * saved["weight_decay"],
            "weight_decay_scale": "none",
            "scale_parameter": True,
            "warmup_init": False,
            "maximize": saved["maximize"],
        }

    def state(saved: State, _: Group, group: Group, param: Tensor, where: str) -> State:
        step = int(field(saved, "step", where))
        if param.ndim < 2:
            return {"step": step, "exp_avg_sq": field(saved, "variance", where)}
        row, col = field(saved, "row_var", where), field(saved, "col_var", where)
        if row.ndim != param.ndim or col.ndim != param.ndim or row.shape[-1] != 1 or col.shape[-2] != 1:
            raise ValueError(
                f"`row_var` and `col_var` {where} should have shapes {(*param.shape[:-1], 1)} and "
                f"{(*param.shape[:-2], 1, param.shape[-1])} but have {tuple(row.shape)} and {tuple(col.shape)}"
            )
        return {"step": step, **factored_as({-1: row.squeeze(-1), -2: col.squeeze(-2)}, group, param, where)}

    return converted(state_dict, optimizer, options, state)


def from_timm(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Convert a checkpoint of timm's `Adafactor` or `AdafactorBigVision`.

    Both leave short dimensions unfactored and factor others than the last two: construct `optimizer` with
    `factor_dims="largest"` and their `min_dim_size_to_factor` (`Adafactor` factors what is larger than it: one more here). The
    whole second moment of a matrix that is factored here becomes its row and column means. An external `lr` is not scaled by
    the parameter's RMS there, so `scale_parameter` becomes False. The momentum of `AdafactorBigVision` is one of updates before
    the learning rate: it is multiplied by `lr`, and runs agree while that stays.

    Args, Returns: as `from_torch`.

    Raises:
        Refused: a parameter that is factored over other dimensions than here; `corrected_weight_decay`; another number of
            parameters; or a state without the second moments.
    """

    def options(saved: Group, group: Group, _: list[int], where: str) -> Group:
        if saved.get("corrected_weight_decay") and saved["weight_decay"]:
            raise ValueError(f"`corrected_weight_decay` should be False but is: True{where}; nothing here scales decay like it")
        if "beta2_cap" in saved:
            least = 1e-7 if all(param.dtype is torch.float16 for param in group["params"]) else 1e-30
            return {
                **{key: saved[key] for key in ("lr", "weight_decay", "decay_offset", "momentum_dtype")},
                "beta2_cap": saved["beta2_cap"] if saved["beta2_cap"] < 1 else None,
                "eps": (least if saved["eps"] is None else saved["eps"], 1e-3),
                "clip_threshold": saved["clipping_threshold"],
                "decay_rate": -saved["decay_rate"],
                "beta1": saved["momentum"],
                "cautious": bool(saved.get("caution")) and saved["momentum"] is not None,
                "weight_decay_scale": "none" if saved["unscaled_wd"] else "lr",
                **dict.fromkeys(("scale_parameter", "relative_step", "warmup_init", "maximize"), False),
            }
        relative = saved["relative_step"]
        return {
            "lr": None if relative else saved["lr"],
            "eps": (saved["eps"], saved["eps_scale"]),
            **{key: saved[key] for key in ("clip_threshold", "decay_rate", "beta1", "weight_decay", "warmup_init")},
            "scale_parameter": bool(relative and saved["scale_parameter"]),
            "relative_step": relative,
            "maximize": False,
            "cautious": bool(saved.get("caution")) and saved["beta1"] is not None,  # it changes nothing without momentum
        }

    def state(saved: State, saved_group: Group, group: Group, param: Tensor, where: str) -> State:
        kept: State = {key: saved[key] for key in ("RMS", "exp_avg") if key in saved}
        least = saved_group.get("min_dim_size_to_factor", 16)
        if "beta2_cap" in saved_group:
            if "exp_avg" in saved:
                kept["exp_avg"] = saved["exp_avg"].to(torch.float32) * saved_group["lr"]
            if "exp_avg_sq" in saved:
                moment: Any = saved["exp_avg_sq"]
            else:
                rows, columns = largest_dims(param.shape)
                row, col = (field(saved, key, where) for key in ("exp_avg_sq_r", "exp_avg_sq_c"))
                moment = {columns: row.squeeze(columns), rows: col.squeeze(rows)}
        elif param.ndim > 2 and min(param.shape[:2]) > least:
            moment = {1: field(saved, "exp_avg_sq_row", where), 0: field(saved, "exp_avg_sq_col", where)}
        else:
            moment = last_two(saved, param, where)
        return {**kept, "step": int(field(saved, "step", where)), **factored_as(moment, group, param, where)}

    return converted(state_dict, optimizer, options, state)


def from_optax(
    count: int,
    v_row: Sequence[Any],
    v_col: Sequence[Any],
    v: Sequence[Any],
    optimizer: Optimizer,
    ema: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Convert the arrays of `optax.scale_by_factored_rms`, for parameters that have the same shapes there.

    Construct `optimizer` with `factor_dims="largest"` and optax's `min_dim_size_to_factor` (128 there unless given), and with
    the options that stand for its chain: none of them are in its state.

    Args:
        count: the steps that were taken.
        v_row: of each parameter the second moment without its largest dimension; for what is not factored anything.
        v_col: of each parameter the second moment without its second largest dimension.
        v: of each parameter that is not factored the whole second moment.
        optimizer: an `Adafactor` over these parameters in this order.
        ema: of each parameter the momentum, of updates with the learning rate, if there is one.

    Returns: as `from_torch`.

    Raises:
        Refused: another number of parameters or other shapes.
    """
    params = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    for name, arrays in (("v_row", v_row), ("v_col", v_col), ("v", v), ("ema", ema)):
        if arrays is not None and len(arrays) != len(params):
            raise Refused([f"`{name}` should have {len(params)} arrays but has {len(arrays)}"])
    saved, states = optimizer.state_dict(), {}
    for i, (param, group) in enumerate(params):
        factored = factored_dims(param.shape, group) is not None
        moment: Any = torch.as_tensor(v[i])
        if factored:
            second, largest = largest_dims(param.shape)
            moment = {largest: torch.as_tensor(v_row[i]), second: torch.as_tensor(v_col[i])}
        states[i] = {"step": int(count), **factored_as(moment, group, param, f"of parameter {i} (shape {tuple(param.shape)})")}
        if ema is not None:
            states[i]["exp_avg"] = torch.as_tensor(ema[i])
    return {**saved, "state": states}


def from_pytorch_optimizer(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Convert a checkpoint of pytorch_optimizer's `AdaFactor`.

    Its checkpoints hold no `decay_rate`, `clip_threshold` and `maximize`: those of `optimizer` stay. `betas[1]` becomes
    `beta2_cap`. Its `cautious` divides by another mean.

    Args, Returns: as `from_torch`.

    Raises:
        Refused: `ams_bound` or `cautious`; weight decay that is coupled or fixed; another number of parameters; or a state
            without the second moments.
    """

    def options(saved: Group, _: Group, __: list[int], where: str) -> Group:
        for name in ("ams_bound", "cautious"):
            if saved.get(name):
                raise ValueError(f"`{name}` should be False but is: True{where}; this optimizer does not have it")
        if saved["weight_decay"] and (saved["fixed_decay"] or not saved["weight_decouple"]):
            raise ValueError(
                f"`weight_decay` should be decoupled and scaled by the learning rate but is not{where}; set it to 0 in the "
                "checkpoint and choose one after loading"
            )
        beta1, cap = saved["betas"][:2]
        relative = saved["relative_step"]
        return {
            "lr": None if relative else saved["lr"],
            "eps": (saved["eps1"], saved["eps2"]),
            "beta1": beta1,
            "beta2_cap": cap if cap < 1 else None,
            **{key: saved[key] for key in ("weight_decay", "scale_parameter", "relative_step", "warmup_init")},
        }

    def state(saved: State, saved_group: Group, group: Group, param: Tensor, where: str) -> State:
        kept: State = {key: saved[key] for key in ("RMS", "exp_avg") if key in saved}
        moment = factored_as(last_two(saved, param, where), group, param, where)
        return {**kept, "step": int(saved_group.get("step", 0)), **moment}

    return converted(state_dict, optimizer, options, state)


def _torch_lr(saved: Group, step: int, where: str) -> Group:
    """`lr` and `relative_step` that go on as torch's `min(lr, 1 / sqrt(step))` does."""
    lr = float(saved["lr"])
    scheduled = "initial_lr" in saved
    if lr == RELATIVE_LR and not scheduled:
        return {"lr": None, "relative_step": True}
    next_rate = (step + 1) ** -0.5
    if next_rate >= lr:
        return {"lr": saved["lr"], "relative_step": False}
    if next_rate <= RELATIVE_LR and not scheduled:
        return {"lr": None, "relative_step": True}
    raise ValueError(
        f"`lr` should be at most 1 / sqrt(step) = {next_rate:.4g} or 0.01 but is: {lr}{where}; torch lowers it by the step "
        "count and this optimizer takes it as it is, so set `lr` in the checkpoint to what it should be from here on"
    )
