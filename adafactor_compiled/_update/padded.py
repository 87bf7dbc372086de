"""Short vectors of any lengths, stepped together by eager operations: those of each alone would take longer than their step.

They are laid end to end, each padded to whole blocks of 64 elements: [n, 64]. A block belongs to one vector, so that sums of
blocks add up to those of their vectors, and each block reads the numbers of its vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._update.members import Members
from adafactor_compiled._update.momentum import cautious, with_momentum
from adafactor_compiled._update.numbers import Numbers, root_mean, scale_and_decay
from adafactor_compiled._update.rounding import DRAWS, FIRST, half_of, noise_of_vectors, write

BLOCK = 64


LEAST = 4  # vectors are cheaper to copy together than to step one by one where there are so many of them


class Padded(NamedTuple):
    """k vectors in n blocks, each field [n, BLOCK]."""

    params: Tensor
    grads: Tensor
    exp_avg_sqs: Tensor
    exp_avgs: Tensor | None


class Places(NamedTuple):
    """How k vectors lie in n blocks."""

    owner: Tensor  # [n]: the vector of a block
    filled: Tensor  # [n]: how many elements of a block are its vector's
    begins: Tensor  # [n, DRAWS]: where in its vector a block begins, as what is added to a vector's draws
    blocks: Tensor  # [k, m]: the blocks of a vector, n for none
    numel: Tensor  # [k], float64


class Room(NamedTuple):
    """Where k vectors lie in blocks. It is kept from step to step: to make it takes longer than to step what is in it."""

    x: Padded
    places: Places
    inputs: list[Tensor]  # of each vector: parameters, gradients, second moments, momenta
    outputs: list[Tensor]  # of each vector: parameters, second moments, momenta


def step_vectors(members: Members, room: Room) -> Tensor:
    """Step k vectors in their room; gives the RMS of each and of its update, shape [2, k]."""
    room.x.params.zero_()  # where a second moment of padding is 0 the last step has divided 0 by 0
    torch._foreach_copy_(room.inputs, [*members.params, *members.grads, *members.exp_avg_sqs, *members.exp_avgs])
    measured = _step(room.x, members.table, members.draws, members.cautious, room.places)
    torch._foreach_copy_([*members.params, *members.exp_avg_sqs, *members.exp_avgs], room.outputs)
    return measured


def room_of(members: Members) -> Room:
    """Room for these vectors, or others of the same lengths."""
    params, of_params = _blocks_like(members.params)
    grads, of_grads = _blocks_like(members.grads)
    exp_avg_sqs, of_sqs = _blocks_like(members.exp_avg_sqs)
    exp_avgs, of_avgs = _blocks_like(members.exp_avgs) if members.exp_avgs else (None, [])
    places = _places_of([x.numel() for x in members.params], params.device)
    outputs = [*of_params, *of_sqs, *of_avgs]
    return Room(Padded(params, grads, exp_avg_sqs, exp_avgs), places, [*of_params, *of_grads, *of_sqs, *of_avgs], outputs)


def _blocks_like(vectors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Room for vectors in blocks of zeros, and for each of them."""
    ends = list(accumulate(-(-x.numel() // BLOCK) for x in vectors))
    blocks = vectors[0].new_zeros(ends[-1], BLOCK)
    begins = [BLOCK * end for end in (0, *ends[:-1])]
    return blocks, [blocks.view(-1)[i : i + x.numel()].view(x.shape) for i, x in zip(begins, vectors, strict=True)]


def _step(x: Padded, table: Tensor, vector_draws: Tensor | None, is_cautious: bool, places: Places) -> Tensor:
    """Step k vectors in n blocks in place; what is one number for each has shape [k]."""
    numbers = Numbers.of(table)

    def of_blocks(x: Tensor) -> Tensor:
        return x[places.owner].unsqueeze(1)

    p, g = x.params.to(torch.float64), x.grads.to(torch.float64)  # vectors are few, and it costs no passes over memory
    v = x.exp_avg_sqs * of_blocks(numbers.beta2) + (g * g + of_blocks(numbers.eps)) * of_blocks(numbers.one_minus_beta2)  # 5
    update = g * v.rsqrt()
    inside = torch.arange(BLOCK, device=p.device) < places.filled.unsqueeze(1)  # padding is 0 / 0 without eps
    rms = root_mean(_sums(p * p, places), places.numel)  # 2
    update_rms = root_mean(_sums(torch.where(inside, update * update, 0.0), places), places.numel)  # 6
    scale, decay = scale_and_decay(numbers, rms, update_rms)  # 3, 4

    update = update * of_blocks(scale)  # 7
    draws = None if vector_draws is None else vector_draws[places.owner] + places.begins
    noise = None if draws is None else noise_of_vectors(draws, BLOCK, half_of(x.params, x.exp_avgs))
    if x.exp_avgs is not None:  # 8
        of_numbers = numbers._replace(
            **{name: of_blocks(getattr(numbers, name)) for name in ("beta1", "one_minus_beta1", "sign")}
        )
        update = with_momentum(x.exp_avgs, update, of_numbers, noise)
        if is_cautious:
            update = cautious(update, x.grads, of_numbers, lambda agree: of_blocks(_sums(agree, places) / places.numel))
    write(x.params, (p - (p * of_blocks(decay) + update)).to(table.dtype), noise)  # 9, 10
    x.exp_avg_sqs.copy_(v)
    return torch.stack([rms, update_rms]).to(table.dtype)


def _sums(x: Tensor, places: Places) -> Tensor:
    """The sum of each vector, shape [k]."""
    of_blocks = x.sum(-1)
    return torch.cat([of_blocks, of_blocks.new_zeros(1)])[places.blocks].sum(-1)


def _places_of(sizes: Sequence[int], device: torch.device) -> Places:
    """Where vectors of these sizes lie."""
    owner: list[int] = []
    begins: list[int] = []
    blocks: list[range] = []
    for i, size in enumerate(sizes):
        count = -(-size // BLOCK)
        blocks.append(range(len(owner), len(owner) + count))
        owner += [i] * count
        begins += range(0, count * BLOCK, BLOCK)
    n, most = len(owner), max(2, *map(len, blocks))
    columns = FIRST.stop - 1
    return Places(
        torch.tensor(owner, device=device),
        torch.tensor([min(BLOCK, sizes[i] - begin) for i, begin in zip(owner, begins, strict=True)], device=device),
        torch.tensor([[begin * (j == columns) for j in range(DRAWS)] for begin in begins], dtype=torch.int32, device=device),
        torch.tensor([[*of_vector, *[n] * (most - len(of_vector))] for of_vector in blocks], device=device),
        torch.tensor(sizes, dtype=torch.float64, device=device),
    )
