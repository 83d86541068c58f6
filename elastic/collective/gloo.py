"""A group of processes over TCP: torch.distributed's gloo, one fresh store prefix and process group a generation.

Hazards, each measured: `abort()` does not wake a waiter, so waits are sliced; reduce_scatter ignores sliced waits, so it is
all-to-all and an ordered sum; send and recv break the pair, so they are a broadcast in a group of two; freeing a group whose
peer hangs blocks, so a thread does it; a peer that was only stopped writes into the old buffers when it goes on. The first
send or receive between two ranks forms their group: a peer that dies before it has come is noticed by the others' word alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from elastic.collective.group import SLICE_S, Buffer
from elastic.collective.member import Member
from elastic.collective.rendezvous import Door, call_leaving, drop
from elastic.collective.store import StoreClient

OPERATION_S = 86_400.0  # never what ends a wait: that is a broken connection or `abandon`
SLICE = timedelta(seconds=SLICE_S)


def tensor(buffer: Buffer) -> torch.Tensor:
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer


def brief(error: RuntimeError) -> str:
    """gloo's own word without its source line and advice."""
    return str(error).split(". This is typically")[0].rpartition("] ")[2]


def process_group(store: Door, rank: int, size: int, host: str, timeout_s: float) -> Any:
    """Blocks until all `size` members are connected to each other."""
    gloo = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
    options._timeout = timedelta(seconds=timeout_s)
    group = gloo(store, rank, size, options)
    group._set_default_timeout(timedelta(seconds=OPERATION_S))
    return group


class GlooGroup(Member):
    """Made by `form`. Buffers are NumPy arrays or CPU tensors."""

    def __init__(self, pg: Any, store: Door, rank: int, size: int, abandoned: threading.Event, host: str, timeout_s: float):
        super().__init__(rank, size, abandoned)
        self._store, self._host, self._timeout_s = store, host, timeout_s
        self._flight: list[object] = [pg]  # the process group, and what a call in flight holds; dropped last first
        self._lock = threading.Lock()
        self._running = False
        self._cut: Callable[[], None] | None = None
        self._groups: dict[tuple[int, ...], GlooGroup] = {}
        self._formed: dict[tuple[int, ...], int] = {}

    @classmethod
    def form(cls, rank: int, size: int, store_address: str, prefix: str, abandoned: threading.Event, timeout_s: float,
             host: str = "") -> GlooGroup:
        """Meets the other members at the store under `prefix`. `host`: this member's own address; "" lets gloo find it."""

        def connect() -> tuple[Door, Any]:
            store = Door(StoreClient(store_address, prefix, abandoned, timeout_s))
            return store, process_group(store, rank, size, host, timeout_s)

        store, pg = call_leaving(connect, abandoned, timeout_s, f"Forming group {prefix} as rank {rank} of {size}")
        return cls(pg, store, rank, size, abandoned, host, timeout_s)

    def _call(self, start: Callable[[Any], Any], *buffers: Buffer) -> None:
        """Starts one operation and waits for it in slices."""
        with self._lock:
            self._running = True
        try:
            self._check()
            self._flight.extend(buffers)
            try:
                self._flight.append(start(self._flight[0]))
                if self._cut:
                    self._cut()
            except RuntimeError as error:
                raise self._break(f"lost a member: {brief(error)}") from error
            self._wait()
            del self._flight[1:]
        finally:
            with self._lock:
                self._running = False
                if self._reason:
                    self._hand_over()

    def _wait(self) -> None:
        while True:
            finished = self._flight[-1].is_completed()
            try:
                self._flight[-1].wait(SLICE)
                return
            except RuntimeError as error:
                if finished:
                    raise self._break(f"lost a member: {brief(error)}") from None
            self._check()

    def _hand_over(self) -> None:
        flight, self._flight = self._flight, []
        drop(flight)

    def abandon(self) -> None:
        super().abandon()
        with self._lock:
            if not self._running:
                self._break("was abandoned")
                self._hand_over()
        for group in list(self._groups.values()):
            group.abandon()

    def cut_short(self, delivered_to: Collection[int], then: Callable[[], None]) -> None:
        """For fault injection: `then()`, which ends the process, comes in the midst of the next call. Chance says whom it reached."""
        self._cut = then

    def all_reduce(self, buffer: Buffer) -> None:
        self._call(lambda pg: pg.allreduce([tensor(buffer)]), buffer)

    def reduce_scatter(self, out: Buffer, buffer: Buffer) -> None:
        parts = torch.empty(self.size * out.shape[0], dtype=tensor(out).dtype)
        counts = [out.shape[0]] * self.size
        self.all_to_all(parts, counts, buffer, counts)
        total, *others = parts.view(self.size, -1)
        for part in others:
            total += part
        tensor(out).copy_(total)

    def all_gather(self, out: Buffer, part: Buffer) -> None:
        self._call(lambda pg: pg._allgather_base(tensor(out), tensor(part)), out, part)

    def all_to_all(self, out: Buffer, out_counts: Sequence[int], buffer: Buffer, counts: Sequence[int]) -> None:
        self._call(lambda pg: pg.alltoall_base(tensor(out), tensor(buffer), list(out_counts), list(counts)), out, buffer)

    def broadcast(self, buffer: Buffer, root: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        self._call(lambda pg: pg.broadcast([tensor(buffer)], options), buffer)

    def send(self, buffer: Buffer, to: int) -> None:
        self._pair(to).broadcast(buffer, int(self.rank > to))

    def receive(self, buffer: Buffer, source: int) -> None:
        self._pair(source).broadcast(buffer, int(source > self.rank))

    def _pair(self, peer: int) -> GlooGroup:
        ranks = (min(self.rank, peer), max(self.rank, peer))
        if ranks not in self._groups:
            self._groups[ranks] = self._form_sub(ranks, "pair")
        return self._groups[ranks]

    def barrier(self) -> None:
        self._call(lambda pg: pg.barrier())

    def subgroup(self, ranks: Sequence[int]) -> GlooGroup:
        """The group of these members only; each of them calls it, with the same ranks. It shares this group's fate."""
        number = self._formed[tuple(ranks)] = self._formed.get(tuple(ranks), 0) + 1
        return self._form_sub(tuple(ranks), f"sub{number}")

    def _form_sub(self, ranks: tuple[int, ...], kind: str) -> GlooGroup:
        self._check()
        store = self._store.under(kind, *ranks)
        rank, size = ranks.index(self.rank), len(ranks)
        pg = call_leaving(lambda: process_group(store, rank, size, self._host, self._timeout_s), self._abandoned,
                          self._timeout_s, f"Forming the group of ranks {list(ranks)}")
        return GlooGroup(pg, store, rank, size, self._abandoned, self._host, self._timeout_s)
