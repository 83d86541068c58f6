"""One local Ray per module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray with room for six workers, whatever the cores."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR", namespace="elastic")
    yield
    ray.shutdown()
