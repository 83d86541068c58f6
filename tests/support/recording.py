"""A plugin of pytest: each test's outcome and seconds, a line each, in the file that ELASTIC_TEST_RECORD names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

FILE = os.environ.get("ELASTIC_TEST_RECORD", "")


def note(**fields: Any) -> None:
    with open(FILE, "a") as file:
        file.write(json.dumps(fields) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    note(total=len(session.items))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that fails in its setup or its teardown has failed."""
    item.stash[REPORTS] = []
    yield
    reports = item.stash[REPORTS]
    outcomes = {report.outcome for report in reports}
    note(test=item.nodeid, outcome=next((o for o in ("failed", "skipped") if o in outcomes), "passed"),
         seconds=sum(r.duration for r in reports))


REPORTS = pytest.StashKey[list[pytest.TestReport]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    report = yield
    item.stash[REPORTS].append(report)
    return report
