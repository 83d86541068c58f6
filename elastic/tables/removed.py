"""Which ids went away, and when: what an increment of a checkpoint says beside its rows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from elastic.tables.buckets import buckets_of
from elastic.tables.spec import TableSpec

MOST_IDS = 1 << 22  # that are remembered; where there are more, the next checkpoint is a whole one


class Removed:
    """A log of one worker's evictions. For bucket b it is complete from step `since[b]` on; of others nothing is known.

    Whoever commits a step notes what each table evicts in it, of all buckets that are held.
    """

    def __init__(self) -> None:
        self.since: dict[int, int] = {}
        self._noted: list[tuple[int, str, np.ndarray]] = []
        self._size = 0

    def begin(self, buckets: Iterable[int], step: int) -> None:
        """Their rows are those of `step`, and what goes from now on will be noted."""
        self.since |= dict.fromkeys(buckets, step)

    def end(self, buckets: Iterable[int]) -> None:
        """They are held no more, or come from elsewhere."""
        for bucket in buckets:
            self.since.pop(bucket, None)

    def note(self, step: int, table: str, ids: np.ndarray) -> None:
        """The commit of `step` has evicted these."""
        if ids.size:
            self._noted.append((step, table, ids))
            self._size += ids.size
        if self._size > MOST_IDS:
            self.clear()

    def clear(self) -> None:
        """The rows are others."""
        self.since.clear()
        self._keep([])

    def forget(self, step: int) -> None:
        """Nothing will be asked of what went at `step` or before."""
        self.since = {bucket: max(since, step) for bucket, since in self.since.items()}
        self._keep([noted for noted in self._noted if noted[0] > step])

    def _keep(self, noted: list[tuple[int, str, np.ndarray]]) -> None:
        self._noted, self._size = noted, sum(ids.size for _, _, ids in noted)

    def between(self, spec: TableSpec, base: int, step: int) -> dict[int, np.ndarray]:
        """By bucket, the ids (ascending) that have gone since `base`, up to `step`; some may have come again. A bucket of
        which none has is left out."""
        noted = [ids for at, table, ids in self._noted if base < at <= step and table == spec.name]
        if not noted:
            return {}
        ids = np.unique(np.concatenate(noted))
        buckets = buckets_of(spec, ids)
        ids = ids[np.argsort(buckets, kind="stable")]
        numbers, firsts = np.unique(np.sort(buckets), return_index=True)
        return dict(zip(numbers.tolist(), np.split(ids, firsts[1:])))
