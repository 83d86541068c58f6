"""Which implementation of the group serves a generation, and its formation."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from elastic.collective.group import CollectiveGroup
from elastic.collective.segment import MOST_READERS
from elastic.collective.solo import SoloGroup
from elastic.messages import Ready


def transport_of(members: Sequence[Ready], device: str = "cpu") -> str:
    """What serves these members best: shared memory where all are on one node and as many as a segment has counters
    for."""
    if device == "cuda":
        return "nccl"
    is_near = len({ready.node for ready in members}) == 1 and all(ready.shares for ready in members)
    return "shared" if is_near and len(members) <= MOST_READERS else "gloo"


def form(transport: str, rank: int, size: int, endpoint: str, prefix: str, aborted: threading.Event, timeout_s: float,
         host: str) -> CollectiveGroup:
    """The group of `size` members that meet at `endpoint` under `prefix`. Raises `GroupBroken`."""
    if size == 1:
        return SoloGroup(aborted)
    if transport == "nccl":
        from elastic.collective.nccl import NcclGroup

        return NcclGroup.form(rank, size, endpoint, prefix, aborted, timeout_s)
    if transport == "shared":
        from elastic.collective.shared import SharedGroup

        return SharedGroup.form(rank, size, endpoint, prefix, aborted, timeout_s)
    from elastic.collective.gloo import GlooGroup

    return GlooGroup.form(rank, size, endpoint, prefix, aborted, timeout_s, host)
