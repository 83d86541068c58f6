"""A model as one worker holds it: the parameters of its seat, at the shapes of its parts, and the model's own functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic.backend import Spec
from elastic.mesh import Mesh, Seat
from elastic.parallel.layout import Box, Layout, Shared


class Portion:
    """What a backend is built over. Where a replica is one worker, all of the model."""

    def __init__(self, model: Any, layout: Layout, seat: Seat):
        self.model, self.layout, self.seat = model, layout, seat
        self.parameters: Mapping[str, Spec] = layout.specs(seat)
        self.buffers: Mapping[str, Spec] = model.buffers
        self.whole: Mapping[str, Spec] = layout.parameters
        self.boxes: dict[str, Box] = layout.boxes(seat)
        self.shared: tuple[Shared, ...] = layout.shared(seat)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    @property
    def is_first(self) -> bool:
        """Keeps what every worker of a replica has alike."""
        return (self.seat.pipeline, self.seat.expert, self.seat.tensor) == (0, 0, 0)

    def keeps(self, name: str) -> bool:
        """Whether this worker is the one that counts its part of a parameter in norms, and saves it."""
        return self.layout.is_keeper(name, self.seat)
