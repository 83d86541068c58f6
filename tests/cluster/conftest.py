"""One Ray for all tests of a run, and one of several nodes for those that add and take away nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

NAMESPACE = "elastic"


@dataclass
class Rays:
    """Each started when it is asked for. A process is the driver of one at a time."""

    clusters: dict[str, Cluster] = field(default_factory=dict)
    joined: str = ""

    def join(self, name: str, num_cpus: int) -> Cluster:
        if name not in self.clusters:
            self.clusters[name] = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus})
        if self.joined != name:
            self.leave()
            ray.init(address=self.clusters[name].address, log_to_driver=False, logging_level="ERROR",
                     namespace=NAMESPACE)
            self.joined = name
        return self.clusters[name]

    def leave(self) -> None:
        ray.shutdown()
        self.joined = ""

    def end(self) -> None:
        self.leave()
        for cluster in self.clusters.values():
            cluster.shutdown()


@pytest.fixture(scope="session")
def rays() -> Iterator[Rays]:
    found = Rays()
    yield found
    found.end()


@pytest.fixture
def cluster(rays: Rays) -> Any:
    """A Ray with room for eight workers, whatever the cores."""
    return rays.join("one", 10)


@pytest.fixture
def no_ray(rays: Rays) -> None:
    """For a run that starts one of its own: it would take the one that its process is connected to."""
    rays.leave()


@pytest.fixture
def nodes(rays: Rays) -> Iterator[Cluster]:
    """A Ray whose head takes no workers. The nodes that a test adds are gone after it."""
    found = rays.join("several", 0)
    yield found
    for node in list(found.worker_nodes):
        found.remove_node(node)
