"""A group of processes over TCP: torch.distributed's gloo, one fresh process group a generation.

Hazards, each measured: `abort()` does not wake a waiter, so waits are sliced; send and recv break the pair, so they are
a broadcast in a group of two; freeing a group whose peer hangs blocks, so a thread does it; a peer that was only
stopped writes into the old buffers when it goes on. The first send or receive between two ranks forms their group: a
peer that dies before it has come is noticed by the others' report alone. A malformed address record ends the process,
so each is looked at before the library sees it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from elastic.collective.group import SLICE_S
from elastic.collective.torch_store import Door
from elastic.collective.torchgroup import OPERATION_S, TorchGroup, brief

SLICE = timedelta(seconds=SLICE_S)


def is_card(card: bytes, mine: bytes) -> bool:
    """Whether another member's address record is built as this one's; the library reads beyond the end of one that is
    not.

    Each is a host's name, an address and one number for each member; name and address have their sizes before them.
    """
    return shape_of(mine) is None or shape_of(card) == shape_of(mine)


def shape_of(card: bytes) -> tuple[int, int, bytes] | None:
    """Bytes of the address and behind it, and the address's kind; None for what is built in another way."""
    start = 8 + int.from_bytes(card[:8], "little")
    size = int.from_bytes(card[start:start + 8], "little")
    rest = len(card) - start - 8 - size
    return (size, rest, card[start + 8:start + 10]) if size and rest > 0 and rest % 8 == 0 else None


class GlooGroup(TorchGroup):
    """Made by `form`. Buffers are NumPy arrays or CPU tensors."""

    @staticmethod
    def _connect(store: Door, rank: int, size: int, host: str, timeout_s: float) -> Any:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
        options._timeout = timedelta(seconds=timeout_s)
        group = gloo(store.checked(is_card), rank, size, options)
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
