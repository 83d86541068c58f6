"""A group of processes over TCP: torch.distributed's gloo, one fresh process group a generation.

Hazards, each measured: `abort()` does not wake a waiter, so waits are sliced; reduce_scatter ignores sliced waits, so it is
all-to-all and an ordered sum; send and recv break the pair, so they are a broadcast in a group of two; freeing a group whose
peer hangs blocks, so a thread does it; a peer that was only stopped writes into the old buffers when it goes on. The first
send or receive between two ranks forms their group: a peer that dies before it has come is noticed by the others' word alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elastic.collective.group import SLICE_S
from elastic.collective.rendezvous import Door
from elastic.collective.torchgroup import OPERATION_S, TorchGroup, brief

SLICE = timedelta(seconds=SLICE_S)


class GlooGroup(TorchGroup):
    """Made by `form`. Buffers are NumPy arrays or CPU tensors."""

    @staticmethod
    def _connect(store: Door, rank: int, size: int, host: str, timeout_s: float) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
        options._timeout = timedelta(seconds=timeout_s)
        group = gloo(store, rank, size, options)
        group._set_default_timeout(timedelta(seconds=OPERATION_S))
        return group

    def _wait(self, work: Any) -> None:
        while True:
            finished = work.is_completed()  # before the wait: one that ends between the two is waited for once more
            try:
                work.wait(SLICE)
                return
            except RuntimeError as error:
                if finished:
                    raise self._break(f"lost a member: {brief(error)}") from None
            self._check()
