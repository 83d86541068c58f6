"""A group of GPUs: torch.distributed's NCCL, non-blocking, aborted on failure.

Written by the libraries' documentation and by the way torchft uses them; more than one rank is unproven until run
somewhere. NCCL's calls return once they are queued on the device, so a wait polls an event; aborting the communicator
lets a device go on that waits for a lost peer. The library's own watchdog, which would end the process, is off: who is
lost is the group's to say.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from elastic.collective.group import SLICE_S, Buffer
from elastic.collective.torch_store import Door, drop
from elastic.collective.torchgroup import OPERATION_S, TorchGroup, brief
from elastic.errors import UserError

FIRST_SLEEP_S = 20e-6  # a small all-gather takes about this long; sleeps double up to a slice
QUIET = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def usable() -> bool:
    return torch.cuda.is_available() and dist.is_nccl_available()


class NcclGroup(TorchGroup):
    """Made by `form`, on the current CUDA device. NumPy arrays, such as votes, go over the device."""

    @staticmethod
    def _connect(store: Door, rank: int, size: int, host: str, timeout_s: float) -> Any:
        if not usable():
            raise UserError("backend.device = 'cuda' needs a CUDA device and a torch built with NCCL; use device = "
                            "'cpu'.")
        device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # devices are per thread, and this one is not the worker's
        os.environ.update(QUIET | {"TORCH_NCCL_NONBLOCKING_TIMEOUT": f"{timeout_s:.0f}"})  # read when a group is made
        options = dist.ProcessGroupNCCL.Options()
        options.config.blocking = 0
        options._timeout = timedelta(seconds=OPERATION_S)
        group = dist.ProcessGroupNCCL(store, rank, size, options)
        group._set_sequence_number_for_group()
        group.eager_connect_single_device(device)
        return group

    @staticmethod
    def _lend(buffer: Buffer) -> torch.Tensor:
        return torch.from_numpy(buffer).cuda() if isinstance(buffer, np.ndarray) else buffer

    def _wait(self, work: Any) -> None:
        try:
            work.wait()  # queues the rest of the stream behind the operation
        except RuntimeError as error:
            raise self._break(f"lost a member: {brief(error)}") from error
        done, sleep_s = torch.cuda.Event(), FIRST_SLEEP_S
        done.record()
        while not done.query():
            self._check()
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, SLICE_S)
        self._check()  # an aborted operation is done too, with nothing in it

    def _hand_over(self) -> None:
        flight, self._flight = self._flight, []
        drop(flight, *(pg.abort for pg in flight[:1]))
