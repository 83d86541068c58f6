"""Rows that are there when their step begins: the tables' exchanges run beside the computation.

    while step k computes     its rows for step k + 1 come, as they are before commit k; the owners learn what k + 2 looks up
    while it is reduced       the sums of slopes go to the owners
    while it is applied       of the rows for step k + 1, those that commit k has changed come again

So the bits are those of a step that waits for each of them. All of it belongs to one generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import numpy as np

from elastic.collective.group import CollectiveGroup
from elastic.model.backend import Batch
from elastic.tables.wire import exchange
from elastic.worker.context import StepContext
from elastic.worker.lookups import Lookups, answers, filled, held_by, joined, loaded_early

Work = Callable[[CollectiveGroup], Any]


class LookAhead:
    """One member's side. A thread of its own carries out the exchanges, over a group of its own, in the order in which
    all members begin them; but for them nobody may touch the tables' rows before `idle` has returned.

    Use it as a context: at the end nothing of it runs any more.
    """

    def __init__(self, context: StepContext):
        self.context, self.tables = context, held_by(context)
        world = context.groups.world
        self.group = world.subgroup(range(world.size))
        self.coming: dict[int, Lookups] = {}  # by step
        self.rows: Future[list[Batch]] = Future()  # the batches of the next step
        self._thread = ThreadPoolExecutor(1, "tables")
        self._failed: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if error is None:
                self.idle()
        finally:
            if error is not None:
                self.group.abort()
            self._thread.shutdown(cancel_futures=True)

    def take(self) -> tuple[Lookups, Sequence[Batch]]:
        """What the step at hand looks up, and its batches with rows."""
        context, step, first = self.context, self.context.step, not self.coming
        if first:
            self.coming = {at: self._loaded(at, step) for at in (step, step + 1)}
            self.rows = self._begin("rows", partial(self._open, self.coming[step], self.coming[step + 1]))
        batches = self._wait("rows", self.rows)
        here = self.coming.pop(step)
        if step < context.plan.num_steps:
            self.coming[step + 2] = self._loaded(step + 2, step + 1)
            self._begin("rows", partial(self._ahead, self.coming[step + 1], self.coming[step + 2]))
        if here.error:
            raise here.error
        return here, batches

    def beside(self, phase: str, work: Work) -> Callable[[], None]:
        """Begins another exchange; what it gives waits for its end."""
        return partial(self._wait, phase, self._begin(phase, work))

    def committed(self) -> None:
        """The rows of the step at hand are committed."""
        if self.context.step < self.context.plan.num_steps:
            self.rows = self._begin("rows", partial(self._again, self.coming[self.context.step + 1],
                                                    self.tables.changed))

    def idle(self) -> None:
        """Returns when the rows are nobody's but the caller's."""
        if self.coming:
            self._wait("rows", self.rows)

    def _loaded(self, step: int, answered: int) -> Lookups:
        """`answered`: the step in which the owners first read their rows, and then what its commit has changed."""
        return loaded_early(self.context, step, self.context.holders_at(answered)[0])

    def _begin(self, phase: str, work: Work) -> Future[Any]:
        group = self.context.injector.cut(self.group, self.context.step, phase)
        return self._thread.submit(self._run, partial(work, group))

    def _run(self, work: Callable[[], Any]) -> Any:
        if self._failed:  # others may be in the exchange that failed here
            raise self._failed
        try:
            return work()
        except BaseException as error:
            self._failed = error
            raise

    def _wait(self, phase: str, future: Future[Any]) -> Any:
        with self.context.waiting(phase):
            return future.result()

    # on the thread, each on all members alike
    def _open(self, first: Lookups, second: Lookups, group: CollectiveGroup) -> list[Batch]:
        """A generation's first: of two steps what is looked up, of one the rows."""
        num = len(self.tables.specs)
        received = exchange(group, [[*one, *two] for one, two in zip(first.requests(), second.requests())])
        first.asked, second.asked = [part[:num] for part in received], [part[num:] for part in received]
        first.rows = joined(exchange(group, answers(self.tables, first.asked)))
        return filled(self.tables, first)

    def _ahead(self, coming: Lookups, later: Lookups, group: CollectiveGroup) -> None:
        num = len(self.tables.specs)
        received = exchange(group, [[*ids, *rows] for ids, rows in zip(later.requests(),
                                                                       answers(self.tables, coming.asked))])
        later.asked, coming.rows = [part[:num] for part in received], joined([part[num:] for part in received])

    def _again(self, coming: Lookups, changed: Sequence[np.ndarray], group: CollectiveGroup) -> list[Batch]:
        parts: list[list[np.ndarray]] = [[] for _ in range(group.size)]
        for part, asked in zip(parts, coming.asked):
            for spec, ids, ours in zip(self.tables.specs, asked, changed):
                at = places_in(ids, ours)
                part += [at, self.tables.stores[spec.name].read(ids[at])]
        for rank, part in enumerate(exchange(group, parts)):
            for table in range(len(self.tables.specs)):
                coming.changed(table, rank, part[2 * table], part[2 * table + 1])
        return filled(self.tables, coming)


def places_in(ids: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Where among `ids` those stand that are in `some`; both rise, each id once."""
    if not some.size:
        return np.empty(0, np.int64)
    return np.flatnonzero(some[np.minimum(np.searchsorted(some, ids), some.size - 1)] == ids)
