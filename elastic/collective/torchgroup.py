"""What groups on torch.distributed's process groups share: forming, calls that can be left, and being dropped in a thread."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from elastic.collective.group import Buffer, Pending
from elastic.collective.kv_store import StoreClient
from elastic.collective.member import Meeting
from elastic.collective.torch_store import Door, call_leaving, drop

PIECE = 16 * 1024 * 1024  # elements broadcast at a time
OPERATIONS: dict[str, Callable[..., Any]] = {  # on a process group and tensors
    "all_reduce": lambda pg, tensor: pg.allreduce([tensor]), "all_gather": lambda pg, whole,
    mine: pg._allgather_base(whole, mine)}
OPERATION_S = 86_400.0  # never what ends a wait: that is a broken connection or `abort`


def brief(error: BaseException) -> str:
    """The library's own message without its source line and advice."""
    return str(error).split("\n")[0].split(". This is typically")[0].rpartition("] ")[2]


class TorchGroup(Meeting):
    """Made by `form`. A subclass says how members connect, how a call is waited for, and what a buffer is to the
    library."""

    def __init__(self, pg: Any, store: Door, rank: int, size: int, aborted: threading.Event, host: str,
                 timeout_s: float):
        super().__init__(rank, size, aborted)
        self._store, self._host, self._timeout_s = store, host, timeout_s
        self._flight: list[Any] = [pg]  # the process group, and what a call in flight holds; dropped last first
        self._lock = threading.Lock()
        self._running = False
        self._cut: Callable[[], None] | None = None

    @staticmethod
    @abstractmethod
    def _connect(store: Door, rank: int, size: int, host: str, timeout_s: float) -> Any:
        """A process group; blocks until all `size` members are connected to each other."""

    @abstractmethod
    def _wait(self, work: Any) -> None:
        """Until `work` is done; looks in slices whether the group was aborted. `GroupBroken` if it failed."""

    @staticmethod
    def _lend(buffer: Buffer) -> torch.Tensor:
        """What the library works on: shares memory with `buffer`, or is copied back when the call is over."""
        return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer

    @staticmethod
    def _return(buffer: Buffer, tensor: torch.Tensor) -> None:
        if isinstance(buffer, np.ndarray) and tensor.device.type != "cpu":
            buffer[:] = tensor.cpu().numpy()

    @classmethod
    def form(cls, rank: int, size: int, store_address: str, prefix: str, aborted: threading.Event, timeout_s: float,
             host: str = "") -> Self:
        """Meets the other members at the store under `prefix`. `host`: this member's own address; "" lets the library
        find it."""
        return cls._join(f"group {prefix} as rank {rank} of {size}",
                         lambda: Door(StoreClient(store_address, prefix, aborted, timeout_s)),
                         rank, size, aborted, host, timeout_s)

    @classmethod
    def _join(cls, what: str, door: Callable[[], Door], rank: int, size: int, aborted: threading.Event, host: str,
              timeout_s: float) -> Self:
        def connect() -> tuple[Any, Door]:
            store = door()
            return cls._connect(store, rank, size, host, timeout_s), store

        group = cls(*call_leaving(connect, aborted, timeout_s, f"Forming {what}"), rank, size, aborted, host, timeout_s)
        group.barrier()  # a member that is done and leaves at once would break it for those still connecting
        return group

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """While this member is in a call: what that holds is dropped by whoever breaks the group, once nobody is in it.
        """
        with self._lock:
            self._running = True
        try:
            self._check()
            yield
        finally:
            with self._lock:
                self._running = False
                if self._reason:
                    self._hand_over()

    def _begin(self, start: Callable[..., Any], *buffers: Buffer) -> Pending:
        """Starts one operation, `start(pg, *tensors)`."""
        with self._inside():
            tensors = [self._lend(buffer) for buffer in buffers]
            self._flight += tensors
            try:
                self._flight.append(start(self._flight[0], *tensors))
            except RuntimeError as error:
                raise self._break(f"lost a member: {brief(error)}") from error
            if self._cut:
                self._cut()
        return Pending(partial(self._finish, buffers))

    def _finish(self, buffers: Sequence[Buffer]) -> None:
        with self._inside():
            self._wait(self._flight[-1])
            tensors = self._flight[1:-1]
            del self._flight[1:]
            for buffer, tensor in zip(buffers, tensors, strict=True):
                self._return(buffer, tensor)

    def start(self, call: str, *arguments: Any) -> Pending:
        return self._begin(OPERATIONS[call], *arguments) if call in OPERATIONS else super().start(call, *arguments)

    def _hand_over(self) -> None:
        flight, self._flight = self._flight, []
        drop(flight)

    def abort(self) -> None:
        super().abort()
        with self._lock:
            if not self._running:
                self._break("was aborted")
                self._hand_over()

    def cut_short(self, delivered_to: Collection[int], then: Callable[[], None]) -> None:
        self._cut = then

    def all_reduce(self, buffer: Buffer) -> None:
        self.start("all_reduce", buffer).finish()

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        self.start("all_gather", out, part).finish()

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        self._begin(lambda pg, to, source: pg.alltoall_base(to, source, list(out_counts), list(counts)), out,
                    buffer).finish()

    def broadcast(self, buffer: Buffer, root: int) -> None:
        """Received beside and copied: a state that is being healed must not be written by a root that was only stopped.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        whole = self._lend(buffer)
        for low in range(0, max(1, whole.shape[0]), PIECE):
            piece = whole[low:low + PIECE]
            moved = piece if self.rank == root else torch.empty_like(piece)
            self._begin(lambda pg, tensor: pg.broadcast([tensor], options), moved).finish()
            if self.rank != root:
                piece.copy_(moved)
        if self.rank != root:
            self._return(buffer, whole)

    def barrier(self) -> None:
        self.all_reduce(np.zeros(1, np.float32))

    def _form_at(self, key: str, ranks: Sequence[int]) -> Self:
        return self._join(f"the group of ranks {list(ranks)}", lambda: self._store.under(key), ranks.index(self.rank),
                          len(ranks), self._aborted,
                          self._host, self._timeout_s)
