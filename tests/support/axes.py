"""A framework's ops with collectives, and an axis that counts them or loses one."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.parallel.axis import Axis
from tests.support.frameworks import ops_of


class Watched(Axis):
    """Counts its collectives; the one numbered `dropped` reaches nobody, on any worker."""

    def __init__(self, group: Any, dropped: int | None = None):
        super().__init__("tensor", group)
        self.calls, self.dropped = 0, dropped

    def _drops(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self.dropped

    def sum(self, x: Any) -> Any:
        return x * 1 if self._drops() else super().sum(x)

    def max(self, x: Any) -> Any:
        return x * 1 if self._drops() else super().max(x)

    def gather(self, x: Any) -> Any:
        return [x * 1] * self.size if self._drops() else super().gather(x)

    def exchange(self, x: Any, counts: Any, out_counts: Any) -> Any:
        return x * 1 if self._drops() else super().exchange(x, counts, out_counts)


def split_ops(name: str) -> Any:
    """A framework's ops in float64, or a skip while it has no collectives."""
    ops = ops_of(name, "float64")
    if not hasattr(type(ops), "across"):
        pytest.skip(f"the {name} backend has no kernels between workers yet")
    return ops
