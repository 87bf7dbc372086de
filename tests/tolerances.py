"""How far two paths may be apart, by dtype, and the comparisons that use it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    param: float  # of the largest |p|
    state: float  # of each element of a second moment, of the largest element of a momentum


# A half-precision parameter is rounded once a step: two results on either side of a midpoint are one unit apart.
TOLERANCES = {
    torch.float32: Tolerance(1e-6, 1e-5),
    torch.float64: Tolerance(1e-14, 1e-13),
    torch.bfloat16: Tolerance(2**-7, 1e-5),
    torch.float16: Tolerance(2**-10, 1e-5),
}

largest_errors: dict[tuple[str, torch.dtype], float] = {}  # (path, dtype of the parameter): what a run has seen


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def assert_same_parameter(actual: Tensor, expected: Tensor, path: str, scale: float = 0.0, where: str = "") -> None:
    """Within the tolerance of the dtype, relative to the largest element (or to `scale`, where that is larger)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    wide_actual, wide_expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(wide_actual.isfinite(), wide_expected.isfinite()), f"{path} {where}: not finite in other places"
    scale = max(scale, largest(wide_expected))
    error = largest(wide_actual - wide_expected) / scale if scale > 0 else largest(wide_actual)
    key = (path, actual.dtype)
    largest_errors[key] = max(error, largest_errors.get(key, 0.0))
    limit = TOLERANCES[actual.dtype].param
    assert error <= limit, f"{path} {where}: parameters differ by {error:.2e} of the largest, more than {limit:.1e}"


def assert_same_state(
    actual: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype, where: str = "", momentum: float = 0.0
) -> None:
    """The state of one parameter of `dtype`: the same keys, shapes and dtypes, and values within its tolerance.

    That of a momentum is relative to its largest element, or to that of the `momentum` before the step, where that is larger:
    the update may cancel nearly all of it.
    """
    assert set(actual) == set(expected), where
    assert int(actual["step"]) == int(expected["step"]), where
    limit = TOLERANCES[dtype].state
    for key in set(expected) - {"step"}:
        a, e = torch.as_tensor(actual[key]), torch.as_tensor(expected[key])
        assert a.shape == e.shape, (where, key)
        assert a.dtype == e.dtype or not isinstance(expected[key], Tensor), (where, key)
        error, magnitude = (a.double() - e.double()).abs(), e.double().abs()
        if key == "exp_avg":
            magnitude = magnitude.new_tensor(max(largest(magnitude), momentum))
        same = (error <= limit * magnitude) | (a.isnan() & e.isnan())
        assert same.all(), f"{where}: `{key}` differs by {largest(error / magnitude):.2e}, more than {limit:.1e}"
