"""The model and the data of the timings: a perceptron of 3.4 million parameters on rows made up from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

WIDTHS = (784, 1024, 1024, 1024, 512, 10)
ROWS_PER_WORKER = 32
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


class MLP(torch.nn.Module):
    """For every contestant the same module, with the same starting values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)

    def loss(self, batch: Any) -> torch.Tensor:
        """The mean over the rows of a batch (x, y)."""
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


def arrays(num_rows: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """(num_rows, 784) float32 and (num_rows,) int64 labels that a linear map decides."""
    generator = np.random.Generator(np.random.Philox(key=1))
    x = generator.standard_normal((num_rows, WIDTHS[0]), dtype=np.float32)
    return x, (x @ generator.standard_normal((WIDTHS[0], WIDTHS[-1]), dtype=np.float32)).argmax(1)


class Rows:
    """The same rows as a map-style data set."""

    def __init__(self) -> None:
        self.x, self.y = arrays()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int64]:
        return self.x[index], self.y[index]


def batch_of(x: torch.Tensor, y: torch.Tensor, step: int, part: int, num_parts: int,
             rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of part `part` of `num_parts` of a step's global batch, `rows` each, going round the data for ever."""
    index = (torch.arange(rows) + (step * num_parts + part) * rows) % len(x)
    return x[index], y[index]
