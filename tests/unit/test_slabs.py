"""Memory of rows that is made ready beside the training."""

from __future__ import annotations

import threading

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed")

from recommender import slabs
from recommender.slabs import MANY, Slabs


def test_a_slab_is_nobodys_before_its_memory_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    may, ready, touch = threading.Event(), list[int](), slabs.touch

    def slow(arrays: list[np.ndarray]) -> None:
        may.wait(10)
        touch(arrays)
        ready.append(len(arrays))

    monkeypatch.setattr(slabs, "touch", slow)
    room = Slabs(32, 2, 1 << 15)
    room.add(MANY, ahead=True)
    assert room.nbytes == (MANY + 1) * room.slab_bytes and room.values.size == MANY, "one is on its way"
    may.set()
    room.add(1)
    assert ready == [2] and room.nbytes == (MANY + 1) * room.slab_bytes
    room.add(1, ahead=True)
    room.cut(2)
    assert room.nbytes == 2 * room.slab_bytes


def test_few_slabs_or_a_limit_have_none_ready() -> None:
    few, limited = Slabs(32, 2, 1 << 15), Slabs(32, 2, 1 << 15)
    few.add(MANY - 1, ahead=True)
    limited.add(MANY)
    assert [one.nbytes // one.slab_bytes for one in (few, limited)] == [MANY - 1, MANY]
