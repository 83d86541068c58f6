"""Where a worker is placed that replaces one of a tensor group: on its node while there is room, else anywhere."""

from __future__ import annotations

import queue
from typing import Any

from ray.cluster_utils import Cluster

from elastic.controller import membership as m
from elastic.controller.ray_fleet import RayFleet, Slot
from elastic.messages import Job

LIMIT_S = 60.0


class Empty(RayFleet):
    """Workers without a process: only where they are placed matters."""

    def serve(self, slot: Slot, place: Any) -> tuple[str, bool]:
        slot.let_go.wait()
        return "let go", False


def test_beside_its_group_or_anywhere(nodes: Cluster) -> None:
    first, second = [nodes.add_node(num_cpus=2).node_id for _ in range(2)]
    nodes.wait_for_nodes()
    said: queue.Queue[Any] = queue.Queue()
    fleet = Empty(Job("run", "", {}, "", ""), said.put, device="cpu", threads=1, hang_timeout_s=1.0,
                  orphan_timeout_s=1.0)
    try:
        where = []
        for wanted, near in ((1, second), (2, second), (3, second), (4, first)):
            fleet.want(wanted, (), (near,))
            started = said.get(timeout=LIMIT_S)
            assert isinstance(started, m.Starting)
            where.append(started.node)
        assert where == [second, second, first, first], "the third found its node full, and was asked for again without it"
        assert said.empty(), "nobody counts as lost who was never placed"
    finally:
        fleet.close()
