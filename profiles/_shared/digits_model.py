"""A small convolutional network and real digits to train it on: 1,797 scans of 8 x 8 pixels that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

HELD_OUT = 0.2  # of the scans, from their end


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scans in scikit-learn's order.

    Returns:
        Scans to train on, float32 of shape [N, 1, 8, 8] from 0 to 1, and their digits, int64; the same of those held out.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("the digits need scikit-learn: pip install 'adafactor-compiled[variations]'") from error
    loaded = load_digits()
    scans = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    split = int(len(labels) * (1 - HELD_OUT))
    return scans[:split], labels[:split], scans[split:], labels[split:]


def batches(scans: Tensor, labels: Tensor, count: int, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` pairs of `size` scans and their digits, drawn with replacement; equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        drawn = torch.randint(len(labels), (size,), generator=generator)
        yield scans[drawn], labels[drawn]


class DigitNetwork(nn.Module):
    """Three convolutions and two linear layers; scans [N, 1, 8, 8] to logits [N, 10]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.hidden, self.head = nn.Linear(2 * width * 4, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.second(functional.relu(self.first(x))))
        x = functional.relu(self.third(functional.max_pool2d(x, 2)))
        return self.head(functional.relu(self.hidden(functional.max_pool2d(x, 2).flatten(1))))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, nats per digit."""
        return functional.cross_entropy(self(x), y)
