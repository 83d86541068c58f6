"""Which ids a commit forgets. Pure: it looks at one bucket, and at nothing of where rows lie.

What has not appeared for `ttl_steps` goes at its bucket's next sweep, of which there are `SWEEPS` in that time, on a
step of its own for each bucket. Where a bucket is over its share of `max_rows` it gives up, of its least counted, a
`SWEEPS`th of the share more than it must: so a full bucket is not looked through at every step. Stored and waiting ids
are counted apart, each up to the share: newcomers cannot crowd out rows, nor rows newcomers.
"""

from __future__ import annotations

import numpy as np

from elastic.tables.spec import SWEEPS, TableSpec


def sweeps(spec: TableSpec, step: int, buckets: np.ndarray) -> np.ndarray:
    """bool: which buckets look for old ids in the commit of `step`."""
    if not spec.ttl_steps:
        return np.zeros(np.shape(buckets), bool)
    return (step + buckets) % max(1, spec.ttl_steps // SWEEPS) == 0


def evicted(spec: TableSpec, step: int, bucket: int, ids: np.ndarray, counts: np.ndarray, lasts: np.ndarray,
            is_stored: np.ndarray) -> np.ndarray:
    """The ids, in no order, that go in the commit of `step`, of one bucket's as they are after its updates."""
    gone = (step - lasts > spec.ttl_steps) & sweeps(spec, step, np.array(bucket))
    for kind in (is_stored, ~is_stored):
        left = np.flatnonzero(kind & ~gone)
        if spec.bucket_rows and left.size > spec.bucket_rows:
            surplus = left.size - (spec.bucket_rows - spec.bucket_rows // SWEEPS)
            gone[left[lowest(counts[left], lasts[left], ids[left], surplus)]] = True
    return ids[gone]


def lowest(counts: np.ndarray, lasts: np.ndarray, ids: np.ndarray, num: int) -> np.ndarray:
    """Where the `num` lowest by (count, last, id) lie; 1 <= num <= how many there are."""
    ranks = (counts.astype(np.int64) << 32) | lasts
    bound = np.partition(ranks, num - 1)[num - 1]
    below, equal = np.flatnonzero(ranks < bound), np.flatnonzero(ranks == bound)
    return np.concatenate([below, equal[np.argsort(ids[equal])[:num - below.size]]])
