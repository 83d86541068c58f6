"""The log of what each commit evicts, and what it says of a time in between."""

from __future__ import annotations

import numpy as np
import pytest

from elastic.tables.removed import Removed
from tests.support.held_tables import SPECS


def test_the_log_of_what_went_away_forgets_rather_than_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.tables.removed.MOST_IDS", 10)
    log, spec = Removed(), SPECS[1]
    log.begin(range(16), 3)
    log.note(4, "users", np.array([1, 17, 2]))
    log.note(5, "users", np.array([1]))
    log.note(5, "ads", np.array([5]))
    assert {b: ids.tolist() for b, ids in log.between(spec, 3, 5).items()} == {1: [1, 17], 2: [2]}
    assert {b: ids.tolist() for b, ids in log.between(spec, 4, 5).items()} == {1: [1]}
    assert {b: ids.tolist() for b, ids in log.between(spec, 3, 4).items()} == {1: [1, 17], 2: [2]}
    log.forget(4)
    assert not log.between(spec, 3, 4) and log.since == dict.fromkeys(range(16), 4)
    log.note(6, "users", np.arange(20))
    assert not log.since and not log.between(spec, 0, 9)
