"""A small character transformer and real English to train it on: the help texts of Python's standard library."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

HELD_OUT = 0.1  # of the text, from its end


def english() -> tuple[Tensor, Tensor, str]:
    """The texts of `pydoc_data.topics`, sorted by topic, as characters.

    Returns:
        Training text and held-out text, int64 vectors of positions in the alphabet; and the alphabet.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    position = {character: i for i, character in enumerate(alphabet)}
    encoded = torch.tensor([position[character] for character in text])
    split = int(len(encoded) * (1 - HELD_OUT))
    return encoded[:split], encoded[split:], alphabet


def batches(text: Tensor, count: int, size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` pairs of characters and those that follow them, each int64 of shape [size, context]; equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)
    for _ in range(count):
        starts = torch.randint(len(text) - context, (size, 1), generator=generator)
        rows = text[starts + window]
        yield rows[:, :-1], rows[:, 1:]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class CharacterTransformer(nn.Module):
    """A decoder of `depth` blocks; characters [N, T] to logits [N, T, len(alphabet)]."""

    def __init__(self, alphabet_size: int, width: int = 128, depth: int = 3, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(alphabet_size, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, alphabet_size)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.characters(x) + self.positions.weight[: x.shape[-1]]
        return self.head(self.norm(self.blocks(hidden)))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, nats per character."""
        return functional.cross_entropy(self(x).flatten(0, 1), y.flatten())
