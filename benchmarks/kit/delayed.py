"""A model with a large dense part beside a table, whose workers wait before every exchange of the tables: a slow network."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from elastic.tables import wire
from elastic.worker import embedding, look_ahead, lookups


class Wide(nn.Module):
    """`delay_ms`: that each exchange of rows, ids or sums takes longer, in every worker that makes one of these."""

    def __init__(self, width: int = 32, hidden: int = 2400, delay_ms: float = 0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                    nn.Linear(hidden, 1))

        def exchange(*arguments: Any) -> Any:
            time.sleep(delay_ms / 1e3)
            return wire.exchange(*arguments)

        for module in (embedding, look_ahead, lookups):
            module.exchange = exchange if delay_ms else wire.exchange  # type: ignore[attr-defined]

    def loss(self, batch: Any) -> Any:
        return (self.layers(batch["rows"]["ids"])[:, 0] - batch["y"]).square().mean()
