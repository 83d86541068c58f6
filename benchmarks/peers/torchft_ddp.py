"""torchft's own DDP loop: one replica a process, and the lighthouse.

    python -m benchmarks.peers.torchft_ddp lighthouse ADDRESS_FILE
    python -m benchmarks.peers.torchft_ddp replica NUMBER LIGHTHOUSE FOLDER ddp|flat

"ddp" is its DistributedDataParallel, as its guide has it; "flat" calls its manager's all-reduce once, on all gradients
together.
"""

from __future__ import annotations

import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.kit.logs import StepLog
from benchmarks.kit.mlp import LEARNING_RATE, MLP, ROWS_PER_WORKER, WEIGHT_DECAY, arrays, batch_of

# Far quicker than its defaults (heartbeats of 5 s, 60 s to join), so that its pause is as short as it can be.
HEARTBEAT_TIMEOUT_MS, JOIN_TIMEOUT_MS, TICK_MS = 500, 200, 20
TIMEOUT = timedelta(seconds=10)
PARTS = 64  # slices of the data; a replica takes those of its number


def lighthouse(address_file: str) -> None:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=JOIN_TIMEOUT_MS, quorum_tick_ms=TICK_MS,
                              heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS)
    Path(address_file).write_text(server.address())
    threading.Event().wait()


def replica(number: int, lighthouse_address: str, folder: str, mode: str) -> None:
    """Trains until it is killed."""
    import torchft

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    module = MLP()
    optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def load(state: dict[str, Any]) -> None:
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=TIMEOUT), load_state_dict=load,
        state_dict=lambda: {"model": module.state_dict(), "optimizer": optimizer.state_dict()}, min_replica_size=1,
        replica_id=f"replica_{number}", store_addr="127.0.0.1", store_port=store.port, rank=0, world_size=1,
        lighthouse_addr=lighthouse_address, timeout=TIMEOUT, quorum_timeout=TIMEOUT, connect_timeout=TIMEOUT)
    model = torchft.DistributedDataParallel(manager, module) if mode == "ddp" else module
    fault_tolerant = torchft.Optimizer(manager, optimizer)
    (x, y), log = map(torch.from_numpy, arrays()), StepLog(folder)
    done = 0
    while True:
        fault_tolerant.zero_grad()
        rows, labels = batch_of(x, y, manager.current_step(), number, PARTS, ROWS_PER_WORKER)
        torch.nn.functional.cross_entropy(model(rows), labels).backward()
        if mode == "flat":
            gradients = [p.grad for p in module.parameters()]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            manager.allreduce(flat).wait()
            for gradient, reduced in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(reduced.view_as(gradient))
        fault_tolerant.step()
        if manager.current_step() > done:
            done = manager.current_step()
            log.write(done, manager.num_participants())


if __name__ == "__main__":
    if sys.argv[1] == "lighthouse":
        lighthouse(sys.argv[2])
    else:
        replica(int(sys.argv[2]), *sys.argv[3:6])
