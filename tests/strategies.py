"""What the property tests draw: groups of parameters, their options, and gradients that come and go.

Hypothesis draws shapes, layouts, options and one integer seed; a torch.Generator fills the tensors. A failure therefore
shrinks, and replays from what is printed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRADIENTS = ("normal", "none", "zero", "tiny", "huge", "zero_column", "transposed", "expanded")

sizes = st.sampled_from([1, 2, 3, 4, 7, 16])
shapes = st.one_of(
    st.lists(sizes, max_size=4).map(tuple),
    st.tuples(st.integers(2, 40), st.integers(2, 40)),
    st.sampled_from([(), (1,), (0,), (3, 0), (2, 0, 3), (5, 1), (1, 5), (1, 1), (2, 3, 3, 3), (64, 33)]),
)
seeds = st.integers(0, 2**31 - 1)


class Parameter(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str  # contiguous, transposed, channels_last, strided
    grad_dtype: torch.dtype
    pattern: tuple[str, ...]  # the kind of its gradient at steps 0, 1, ...; then from the start again

    def make(self, generator: torch.Generator) -> Tensor:
        values = _random(self.shape, generator).to(self.dtype)
        param = values if self.layout == "contiguous" else _laid_out(self.shape, self.layout, self.dtype).copy_(values)
        param.grad_dtype = self.grad_dtype
        return param.requires_grad_()

    def gradient(self, t: int, param: Tensor, generator: torch.Generator) -> Tensor | None:
        kind = self.pattern[t % len(self.pattern)]
        grad = _random(self.shape, generator)
        if kind == "none":
            return None
        if kind == "zero":
            grad.zero_()
        elif kind == "tiny":
            grad *= 1e-6 if self.grad_dtype == torch.float16 else 1e-12
        elif kind == "huge":
            grad *= 1e3 if self.grad_dtype == torch.float16 else 1e12
        elif kind == "zero_column" and grad.ndim:
            grad *= 1e3 if self.grad_dtype == torch.float16 else 1e8
            grad[..., :1] = 0
        elif kind == "transposed" and grad.ndim >= 2:
            return grad.to(self.grad_dtype).mT.contiguous().mT
        elif kind == "expanded":
            return _random((), generator).to(self.grad_dtype).expand(self.shape)
        return torch.empty_like(param, dtype=self.grad_dtype).copy_(grad)


class Group(NamedTuple):
    options: dict[str, Any]
    parameters: tuple[Parameter, ...]


class Problem(NamedTuple):
    groups: tuple[Group, ...]
    seed: int

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for an optimizer, with new parameters; the same values each time."""
        generator = torch.Generator().manual_seed(self.seed)
        return [{"params": [p.make(generator) for p in group.parameters], **group.options} for group in self.groups]

    def set_gradients(self, param_groups: list[dict[str, Any]], t: int) -> None:
        """Give the parameters their gradients of step t, new tensors each time."""
        generator = torch.Generator().manual_seed(self.seed + 1 + t)
        for group, tensors in zip(self.groups, param_groups, strict=True):
            for parameter, param in zip(group.parameters, tensors["params"], strict=True):
                param.grad = parameter.gradient(t, param, generator)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "transposed":
        return torch.empty((*shape[:-2], shape[-1], shape[-2]), dtype=dtype).mT
    if layout == "channels_last":
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return torch.empty((*shape, 2), dtype=dtype)[..., 0]  # strided: every second element


def variations(momentum: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Options of other Adafactors, some of them."""
    return st.fixed_dictionaries(
        {},
        optional={
            "min_dim_size_to_factor": st.sampled_from([2, 3, 4, 20]),
            "factor_dims": st.just("largest"),
            "beta2_cap": st.sampled_from([0.5, 0.99]),
            "decay_offset": st.sampled_from([1, 5]),
            "weight_decay_scale": st.just("none"),
            **({"cautious": st.just(True)} if momentum else {}),
        },
    )


@st.composite
def options(draw: st.DrawFn, ours: bool) -> dict[str, Any]:
    """Options of one group; with `ours`, also those that transformers lacks."""
    relative_step = draw(st.booleans())
    drawn = {
        "lr": None if relative_step else draw(st.sampled_from([1e-3, 3e-2, 0.0])),
        "relative_step": relative_step,
        "warmup_init": relative_step and draw(st.booleans()),
        "scale_parameter": draw(st.booleans()),
        "eps": draw(st.sampled_from([(1e-30, 1e-3), (1e-12, 0.0), [1e-3, 0.5]])),
        "clip_threshold": draw(st.sampled_from([1.0, 0.1, 4.0])),
        "decay_rate": draw(st.sampled_from([-0.8, -0.5, -1.0, 0.0])),
        "beta1": draw(st.sampled_from([None, 0.9, 0.0])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5])),
    }
    if ours:
        drawn["maximize"] = draw(st.booleans())
        drawn |= draw(st.one_of(st.just({}), variations(drawn["beta1"] is not None)))
        if draw(st.integers(0, 4)) == 4:
            drawn["clip_threshold"] = None
        if not relative_step and draw(st.booleans()):
            drawn["lr"] = torch.tensor(drawn["lr"])
    return drawn


@st.composite
def parameters(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], shapes: st.SearchStrategy[tuple[int, ...]]) -> Parameter:
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    layouts = [
        "contiguous",
        "contiguous",
        "strided",
        *["transposed"] * (len(shape) >= 2),
        *["channels_last"] * (len(shape) == 4),
    ]
    wide_grad = dtype in (torch.bfloat16, torch.float16) and draw(st.integers(0, 3)) == 3
    pattern = draw(st.lists(st.sampled_from(GRADIENTS), min_size=1, max_size=3).map(tuple))
    return Parameter(shape, dtype, draw(st.sampled_from(layouts)), torch.float32 if wide_grad else dtype, pattern)


@st.composite
def problems(
    draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = DTYPES, ours: bool = True, max_groups: int = 2, max_params: int = 6
) -> Problem:
    """One or two groups over a small pool of shapes, so that shape classes with several members are the rule."""
    pool = st.sampled_from(draw(st.lists(shapes, min_size=1, max_size=3)))
    groups = draw(
        st.lists(
            st.builds(
                Group,
                options(ours=ours),
                st.lists(parameters(dtypes, pool), min_size=1, max_size=max_params).map(tuple),
            ),
            min_size=1,
            max_size=max_groups,
        )
    )
    return Problem(tuple(groups), draw(seeds))
