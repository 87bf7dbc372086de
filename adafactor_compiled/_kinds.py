"""The kinds of parameters that networks are made of, each a graph or two.

Their shapes are what graphs are compiled for, whichever network comes first, and what is compiled in the background for others.
"""

from __future__ import annotations

from collections.abc import Sequence

from adafactor_compiled import _routes
from adafactor_compiled._compile import Call
from adafactor_compiled._shape_class import ShapeClass, contiguous_stride

SHAPES = (
    (64,),  # biases and norms
    (64, 512),  # small matrices
    (512, 8),  # small and large ones with rows shorter than two vectors, as in LoRA of rank 8
    (4096, 8),
    (1024, 1024),  # linear layers
    (4096, 4096),  # embeddings, and linear layers of which two do not fit in cache
    (64, 64, 1, 1),  # convolutions: 1 x 1,
    (64, 64, 3, 3),  # 3 x 3,
    (64, 3, 7, 7),  # the first of a network for images,
    (768, 3, 16, 16),  # and one of its patches
)


def calls_like(classes: Sequence[ShapeClass]) -> list[Call]:
    """The compiled calls for all kinds, with the dtypes and options of these classes."""
    calls = []
    for shape in SHAPES:
        stride = contiguous_stride(shape)
        for kind in dict.fromkeys(x._replace(shape=shape, stride=stride, grad_stride=stride) for x in classes):
            calls += _routes.calls_of(kind, 1)
    return calls
