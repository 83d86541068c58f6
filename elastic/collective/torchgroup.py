"""What groups on torch.distributed's process groups share: forming, calls that can be left, and being dropped in a thread."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from elastic.collective.group import Buffer
from elastic.collective.kv_store import StoreClient
from elastic.collective.member import Member
from elastic.collective.torch_store import Door, call_leaving, drop
from elastic.errors import GroupBroken

PIECE = 16 * 1024 * 1024  # elements broadcast at a time
OPERATION_S = 86_400.0  # never what ends a wait: that is a broken connection or `abandon`


def brief(error: BaseException) -> str:
    """The library's own word without its source line and advice."""
    return str(error).split("\n")[0].split(". This is typically")[0].rpartition("] ")[2]


class TorchGroup(Member, ABC):
    """Made by `form`. A subclass says how members connect, how a call is waited for, and what a buffer is to the library."""

    def __init__(self, pg: Any, store: Door, rank: int, size: int, abandoned: threading.Event, host: str, timeout_s: float):
        super().__init__(rank, size, abandoned)
        self._store, self._host, self._timeout_s = store, host, timeout_s
        self._flight: list[Any] = [pg]  # the process group, and what a call in flight holds; dropped last first
        self._lock = threading.Lock()
        self._running = False
        self._cut: Callable[[], None] | None = None
        self._pairs: dict[tuple[int, ...], Self] = {}
        self._formed: dict[tuple[int, ...], int] = {}

    @staticmethod
    @abstractmethod
    def _connect(store: Door, rank: int, size: int, host: str, timeout_s: float) -> Any:
        """A process group; blocks until all `size` members are connected to each other."""

    @abstractmethod
    def _wait(self, work: Any) -> None:
        """Until `work` is done; looks in slices whether the group was abandoned. `GroupBroken` if it failed."""

    @staticmethod
    def _lend(buffer: Buffer) -> torch.Tensor:
        """What the library works on: shares memory with `buffer`, or is copied back when the call is over."""
        return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer

    @staticmethod
    def _return(buffer: Buffer, tensor: torch.Tensor) -> None:
        if isinstance(buffer, np.ndarray) and tensor.device.type != "cpu":
            buffer[:] = tensor.cpu().numpy()

    @classmethod
    def form(cls, rank: int, size: int, store_address: str, prefix: str, abandoned: threading.Event, timeout_s: float,
             host: str = "") -> Self:
        """Meets the other members at the store under `prefix`. `host`: this member's own address; "" lets the library find it."""

        def connect() -> tuple[Door, Any]:
            store = Door(StoreClient(store_address, prefix, abandoned, timeout_s))
            return store, cls._connect(store, rank, size, host, timeout_s)

        store, pg = call_leaving(connect, abandoned, timeout_s, f"Forming group {prefix} as rank {rank} of {size}")
        return cls(pg, store, rank, size, abandoned, host, timeout_s)._complete()

    def _complete(self) -> Self:
        """Until every member has connected: one that is done and leaves at once would break it for those still connecting."""
        self.barrier()
        return self

    def _call(self, start: Callable[..., Any], *buffers: Buffer) -> None:
        """Starts one operation, `start(pg, *tensors)`, and waits for it."""
        with self._lock:
            self._running = True
        try:
            self._check()
            tensors = [self._lend(buffer) for buffer in buffers]
            self._flight += tensors
            try:
                self._flight.append(start(self._flight[0], *tensors))
            except RuntimeError as error:
                raise self._break(f"lost a member: {brief(error)}") from error
            if self._cut:
                self._cut()
            self._wait(self._flight[-1])
            del self._flight[1:]
            for buffer, tensor in zip(buffers, tensors, strict=True):
                self._return(buffer, tensor)
        finally:
            with self._lock:
                self._running = False
                if self._reason:
                    self._hand_over()

    def _hand_over(self) -> None:
        flight, self._flight = self._flight, []
        drop(flight)

    def abandon(self) -> None:
        super().abandon()
        with self._lock:
            if not self._running:
                self._break("was abandoned")
                self._hand_over()
        for pair in list(self._pairs.values()):
            pair.abandon()

    def cut_short(self, delivered_to: Collection[int], then: Callable[[], None]) -> None:
        """For fault injection: `then()`, which ends the process, comes in the midst of the next call. Chance says whom it reached."""
        self._cut = then

    def all_reduce(self, buffer: Buffer) -> None:
        self._call(lambda pg, tensor: pg.allreduce([tensor]), buffer)

    def reduce_scatter(self, out: Buffer, buffer: Buffer) -> None:
        mine = self._lend(out)
        parts = torch.empty(self.size * out.shape[0], dtype=mine.dtype, device=mine.device)
        counts = [out.shape[0]] * self.size
        self.all_to_all(parts, counts, buffer, counts)
        total, *others = parts.view(self.size, -1)
        for part in others:
            total += part
        mine.copy_(total)
        self._return(out, mine)

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        self._call(lambda pg, whole, mine: pg._allgather_base(whole, mine), out, part)

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        self._call(lambda pg, to, source: pg.alltoall_base(to, source, list(out_counts), list(counts)), out, buffer)

    def broadcast(self, buffer: Buffer, root: int) -> None:
        """Received beside and copied: a state that is being healed must not be written by a root that was only stopped."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        whole = self._lend(buffer)
        for low in range(0, max(1, whole.shape[0]), PIECE):
            piece = whole[low:low + PIECE]
            moved = piece if self.rank == root else torch.empty_like(piece)
            self._call(lambda pg, tensor: pg.broadcast([tensor], options), moved)
            if self.rank != root:
                piece.copy_(moved)
        if self.rank != root:
            self._return(buffer, whole)

    def barrier(self) -> None:
        self._call(lambda pg, tensor: pg.allreduce([tensor]), np.zeros(1, np.float32))

    def send(self, buffer: Buffer, to: int) -> None:
        self._pair(to).broadcast(buffer, int(self.rank > to))

    def receive(self, buffer: Buffer, source: int) -> None:
        self._pair(source).broadcast(buffer, int(source > self.rank))

    def _pair(self, peer: int) -> Self:
        ranks = (min(self.rank, peer), max(self.rank, peer))
        if ranks not in self._pairs:
            self._pairs[ranks] = self._form_sub(ranks, "pair")
        return self._pairs[ranks]

    def subgroup(self, ranks: Sequence[int]) -> Self:
        """The group of these members only; each of them calls it, with the same ranks. It shares this group's fate."""
        number = self._formed[tuple(ranks)] = self._formed.get(tuple(ranks), 0) + 1
        return self._form_sub(tuple(ranks), f"sub{number}")

    def _form_sub(self, ranks: tuple[int, ...], kind: str) -> Self:
        self._check()
        store, rank, size = self._store.under(kind, *ranks), ranks.index(self.rank), len(ranks)
        try:
            pg = call_leaving(lambda: self._connect(store, rank, size, self._host, self._timeout_s), self._abandoned,
                              self._timeout_s, f"Forming the group of ranks {list(ranks)}")
        except GroupBroken as error:
            raise self._break(f"fell apart: {error}") from error
        return type(self)(pg, store, rank, size, self._abandoned, self._host, self._timeout_s)._complete()
