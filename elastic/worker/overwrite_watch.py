"""Nothing but the optimizer may change what trains: writes by a user's own model are seen in the values, for no framework counts all of them.

Values are looked at before and after users' code computes. Where a checkpoint follows, and around an evaluation, at all
of them. Else at all of a small parameter and at one cache line in STRIDE of a large one, each step at others: what
changes a whole array shows at once, what goes on changing a part of one shows within STRIDE steps and before it is
saved. A part of a large array that is written to once and never again may stay unseen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from elastic.buffers import to_numpy
from elastic.errors import Overwritten
from elastic.model.backend import Buffer
from elastic.state.flat_layout import FlatLayout

SMALL, LINE = 2048, 16  # elements
STRIDE = 2048  # lines
TURN = 389  # odd, so that STRIDE steps look everywhere


class Watch:
    """Over the parameters of one layout."""

    def __init__(self, kind: str, layout: FlatLayout):
        self.kind = kind
        self._places = sorted((place.offset, place.size, name) for name, place in layout.places.items() if place.size)
        looks = [lines(low, low + size) if size > SMALL else (np.arange(low, low + size),) * 2
                 for low, size, _ in self._places]
        self._base, self._last = (np.concatenate(part) for part in zip(*looks, strict=True))

    @contextmanager
    def over(self, param: Buffer, step: int, whole: bool) -> Iterator[None]:
        """Overwritten, by the name of one, if parameters change inside."""
        index = None if whole else np.minimum(self._base + step * TURN % STRIDE * LINE, self._last)
        before = self._look(param, index)
        try:
            yield
        except Overwritten:
            raise
        except Exception:  # whoever leaves with an error is asked for its state, too
            self._compare(before, param, step, index)
            raise
        self._compare(before, param, step, index)

    def _compare(self, before: np.ndarray, param: Buffer, step: int, index: np.ndarray | None) -> None:
        changed = np.flatnonzero(before != self._look(param, index))
        if len(changed):
            name = self._places[changed[0]][2] if index is None else self._holder(int(index[changed[0]]))
            raise Overwritten(f'model.kind = "{self.kind}" changes its parameter {name} while it computes (seen at '
                              f'step {step}), as a write through '
                              ".data does; a parameter changes once a step, by the optimizer: compute the changed "
                              "values from it instead.")

    def _look(self, param: Buffer, index: np.ndarray | None) -> np.ndarray:
        """Bits of what is looked at: values, or hashes of all parameters."""
        if index is None:
            import xxhash  # the loop's own modules need NumPy only

            return np.array([xxhash.xxh3_64_intdigest(bits(param[low:low + size]).data)
                             for low, size, _ in self._places], np.uint64)
        return bits(param[index])

    def _holder(self, position: int) -> str:
        return self._places[bisect_right(self._places, position, key=lambda place: place[0]) - 1][2]


def lines(low: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the first line of every STRIDE begins, element by element, and how far up it may be moved."""
    starts, within = np.arange(low, end, LINE * STRIDE)[:, None], np.arange(LINE)
    return (starts + within).ravel(), (np.minimum(starts + LINE * STRIDE, end) - LINE + within).ravel()


def bits(buffer: Any) -> np.ndarray:
    values = to_numpy(buffer)
    return values.view(f"u{values.itemsize}")
