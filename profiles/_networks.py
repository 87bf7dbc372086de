"""The parameter shapes of networks that people train, without the networks."""

from __future__ import annotations

import argparse
import collections
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _shared.character_model import CharacterTransformer, english

Shapes = list[tuple[int, ...]]


def gpt2() -> Shapes:
    """GPT-2 124M: 148 tensors, the output head tied to the embedding."""
    d = 768
    layer = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *layer * 12, (d,), (d,)]


def t5_small() -> Shapes:
    """T5-small, 60M: 131 tensors, one embedding."""
    d, ff = 512, 2048
    attention, feed_forward, bias = [(d, d)] * 4 + [(d,)], [(ff, d), (d, ff), (d,)], [(32, 8)]
    encoder = attention + feed_forward
    decoder = attention * 2 + feed_forward
    return [(32128, d), *bias, *encoder * 6, (d,), *bias, *decoder * 6, (d,)]


def vit_b16() -> Shapes:
    """ViT-B/16, 86M: 152 tensors."""
    d = 768
    layer = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *layer * 12, (d,), (d,), (1000, d), (1000,)]


def lora_8b() -> Shapes:
    """LoRA of rank 16 on all linear layers of an 8B decoder, 42M: 448 small matrices."""
    d, kv, ff, rank = 4096, 1024, 14336, 16
    linear = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)]
    layer = [shape for fan_in, fan_out in linear for shape in ((rank, fan_in), (fan_out, rank))]
    return layer * 32


def resnet50() -> Shapes:
    """ResNet-50, 25.6M: 161 tensors, 53 convolutions."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def decoder_600m() -> Shapes:
    """A 600M decoder with grouped-query attention and a gated feed-forward, untied head left out."""
    d, q, kv, ff, layers, vocabulary = 1024, 2048, 1024, 3072, 28, 151936
    layer = [(d,), (q, d), (kv, d), (kv, d), (128,), (128,), (d, q), (d,), (ff, d), (ff, d), (d, ff)]
    return [(vocabulary, d), *layer * layers, (d,)]


def widths24() -> Shapes:
    """24 linear layers, each of another width: 48 tensors, 48 shape classes."""
    widths = [64 + 16 * i + (i % 3) for i in range(25)]
    return [shape for a, b in itertools.pairwise(widths) for shape in ((b, a), (b,))]


def train() -> Shapes:
    """The character transformer of train.py, 630,000: 42 small tensors."""
    _, _, alphabet = english()
    with torch.device("meta"):
        return [tuple(param.shape) for param in CharacterTransformer(len(alphabet)).parameters()]


class Row(NamedTuple):
    """A parameter list, and how it is stepped."""

    title: str
    shapes: Callable[[], Shapes]
    dtype: torch.dtype = torch.float32
    beta1: float | None = None

    def described(self) -> dict[str, Any]:
        """What every record of it begins with."""
        shapes = self.shapes()
        size = {"shapes": by_shape(shapes), "tensors": len(shapes), "parameters": sum(map(math.prod, shapes))}
        return {"title": self.title, **size, "dtype": self.dtype, "beta1": self.beta1}


ROWS = {
    "gpt2": Row("GPT-2 124M", gpt2),
    "t5-small": Row("T5-small", t5_small),
    "vit-b16": Row("ViT-B/16", vit_b16),
    "lora-8b": Row("LoRA r=16 on an 8B decoder", lora_8b),
    "resnet50": Row("ResNet-50", resnet50),
    "decoder-600m": Row("600M decoder, bfloat16", decoder_600m, dtype=torch.bfloat16),
    "gpt2-beta1": Row("GPT-2 with beta1=0.9", gpt2, beta1=0.9),
    "widths24": Row("24 layers of 24 widths", widths24),
    "train": Row("The main job, train.py", train),
}


def rows_of(options: argparse.Namespace) -> dict[str, Row]:
    """The rows that `--networks` names, else all; one of many small tensors in a quick run."""
    names = options.networks or (["widths24"] if options.quick else list(ROWS))
    return {name: ROWS[name] for name in names}


def by_shape(shapes: Shapes) -> dict[str, int]:
    """How many parameters there are of each shape, named as "768x3072"."""
    return dict(collections.Counter("x".join(map(str, shape)) for shape in shapes))
