"""PyTorch's ways to save, in a process of their own: `python -m benchmarks.peers.checkpoints NAME FOLDER SAVES SCALE RESULT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.kit.steploop import Durable, make_arrays, measure, report


class Peer:
    """One thread, as the steps have, unless `threads` says otherwise."""

    def __init__(self, arrays: dict[str, np.ndarray], threads: int = 1):
        self.state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.threads = threads

    def save(self, path: Path, step: int) -> Durable:
        torch.set_num_threads(self.threads)
        try:
            return self.write(path)
        finally:
            torch.set_num_threads(1)

    def write(self, path: Path) -> Durable:
        dcp.save(self.state, checkpoint_id=path)
        return Durable().set()

    def load(self, path: Path, step: int) -> None:
        dcp.load(self.state, checkpoint_id=path)


class Async(Peer):
    """Beside the training. A stager that is kept keeps its buffers."""

    def __init__(self, arrays: dict[str, np.ndarray], kept: bool, threads: int = 1):
        super().__init__(arrays, threads)
        self.stager = DefaultStager(StagingOptions(False, False, False, False)) if kept else None

    def write(self, path: Path) -> Durable:
        durable = Durable()
        future = dcp.async_save(self.state, checkpoint_id=path, async_stager=self.stager)
        future.add_done_callback(lambda done: durable.set(str(done.exception() or "")))
        return durable


class TorchSave(Peer):
    """One file, synced; loaded without running code."""

    def write(self, path: Path) -> Durable:
        with open(path / "state.pt", "wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        return Durable().set()

    def load(self, path: Path, step: int) -> None:
        for name, value in torch.load(path / "state.pt", weights_only=True).items():
            self.state[name].copy_(value)


PEERS = {"DCP save": Peer, "DCP async_save, kept stager": lambda arrays: Async(arrays, True),
         "DCP async_save, kept stager, all cores": lambda arrays: Async(arrays, True, os.cpu_count() or 1),
         "DCP async_save": lambda arrays: Async(arrays, False), "torch.save + fsync": TorchSave}


def main(name: str, folder: str, saves: str, scale: str, result: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    arrays = make_arrays(float(scale))
    report(measure(PEERS[name](arrays), arrays, Path(folder), int(saves)), result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
