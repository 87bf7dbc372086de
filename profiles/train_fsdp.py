"""Train a small character transformer on English, sharded by `fully_shard`; save; resume on any number of processes.

    torchrun --nproc-per-node 2 profiles/train_fsdp.py --steps 100
    python profiles/train_fsdp.py --steps 200 --resume

Each process steps its own shard of every parameter. The losses are those of one process that sees the whole batch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _shared.character_model import CharacterTransformer, batches, english
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from adafactor_compiled import Adafactor

BATCH, CONTEXT = 16, 64  # the batch is that of all processes together


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="train up to this step (default %(default)s)")
    parser.add_argument("--checkpoint", default="fsdp_checkpoint", help="directory to save to (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    options = parser.parse_args(arguments)

    sharded = "RANK" in os.environ  # set by torchrun
    if sharded:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)

    text, _, alphabet = english()
    torch.manual_seed(0)
    model = CharacterTransformer(len(alphabet), context=CONTEXT)
    if sharded:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = Adafactor(
        model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False, compile=False if options.eager else None
    )

    start = 0
    if options.resume:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        checkpoint = {"model": model_state, "optimizer": optimizer_state, "steps": torch.tensor(0)}
        dcp.load(checkpoint, checkpoint_id=options.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        start = int(checkpoint["steps"])

    losses = []
    for step, (x, y) in enumerate(batches(text, options.steps, BATCH, CONTEXT, seed=0)):
        if step < start:
            continue
        loss = model.loss(x[rank::ranks], y[rank::ranks])  # each process has its part of the batch
        loss.backward()  # gradients are averaged and each process gets those of its shards
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        if sharded:
            dist.all_reduce(mean)
        losses.append(mean.item())
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)

    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint = {"model": model_state, "optimizer": optimizer_state, "steps": torch.tensor(options.steps)}
    # A group of its own, whose threads end with it. Those of the group that FSDP uses live as long as the process, and a
    # thread that lets go of the last tensor sent while Python shuts down aborts the process.
    savers = dist.new_group() if sharded else None
    dcp.save(checkpoint, checkpoint_id=options.checkpoint, process_group=savers)
    if rank == 0:
        print(f"steps {start} to {options.steps} on {ranks} processes; saved {options.checkpoint}")
    if sharded:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
