"""A bare torch loop: `python -m benchmarks.peers.bare RANK SIZE PORT STEPS SHARDS FOLDER`. What must be done, and no more."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.kit.logs import StepLog
from benchmarks.kit.mlp import LEARNING_RATE, MLP, ROWS_PER_WORKER, WEIGHT_DECAY, arrays, batch_of


def train(rank: int, size: int, port: int, steps: int, shards: int, folder: str) -> None:
    """`shards` is how many logical shards a rank computes one after the other."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0)
    group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
    model, (x, y), log = MLP(), map(torch.from_numpy, arrays()), StepLog(folder)
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    gradient, rows = torch.zeros_like(flat), ROWS_PER_WORKER // shards
    at = 0
    for p in parameters:
        p.data, p.grad = flat[at:at + p.numel()].view_as(p), gradient[at:at + p.numel()].view_as(p)
        at += p.numel()
    whole = torch.nn.Parameter(flat)
    whole.grad = gradient
    optimizer = torch.optim.AdamW([whole], LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    for step in range(1, steps + 1):
        gradient.zero_()
        for shard in range(rank * shards, (rank + 1) * shards):
            (model.loss(batch_of(x, y, step, shard, size * shards, rows)) / (size * shards)).backward()
        group.allreduce([gradient]).wait()
        optimizer.step()
        if rank == 0:
            log.write(step, size)


if __name__ == "__main__":
    train(*map(int, sys.argv[1:6]), sys.argv[6])
