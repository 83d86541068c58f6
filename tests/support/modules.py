"""A user's own modules and data set, by which the in-process runs train."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import torch
from torch import nn


class Rows:
    """Row i is (i, a few numbers drawn from i)."""

    def __init__(self, size: int = 100, width: int = 6):
        self.size, self.width = size, width

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = np.random.default_rng(index).standard_normal(self.width + 1).astype(np.float32)
        return {"id": np.int64(index), "x": values[:-1], "y": values[-1:]}


class Augmented(Rows):
    """Built by chance, and every look at a row gives another one: drawn from all the generators that a user may draw
    from."""

    def __init__(self, size: int = 100, width: int = 6):
        super().__init__(size, width)
        self.shift = np.random.rand() + random.random() + torch.rand(()).item()

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        noise = np.random.standard_normal(self.width) + random.gauss(0, 1) + torch.randn(self.width).numpy()
        return {**row, "x": (row["x"] + self.shift + 0.1 * noise).astype(np.float32)}


class Net(nn.Module):
    """Batch norm (float and integer buffers), dropout, and a constant buffer with an infinity in it."""

    def __init__(self, width: int = 6, dropout: float = 0.2):
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(width,
                                                                8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 1)
        self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))

    def loss(self, batch: Any) -> Any:
        hidden = self.drop(self.norm(self.first(batch["x"])).relu()) + self.mask.exp().sum()
        return (self.last(hidden) - batch["y"]).square().mean()


class Small(nn.Module):
    """The cheapest model whose bits still depend on the order of summation."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.line = nn.Linear(width, 1)

    def loss(self, batch: Any) -> Any:
        return (self.line(batch["x"]) - batch["y"]).square().mean()


class Held(Small):
    """Each shard takes `seconds`, and nothing of a processor, as long as the file `by` is there: a run lasts while a
    test does something to it."""

    def __init__(self, by: str, seconds: float = 0.05, width: int = 6):
        super().__init__(width)
        self.by, self.seconds = by, seconds

    def loss(self, batch: Any) -> Any:
        if os.path.exists(self.by):
            time.sleep(self.seconds)
        return super().loss(batch)


class Told(Held):
    """Says in its worker's log that it has computed."""

    def loss(self, batch: Any) -> Any:
        print(f"process {os.getpid()} computes", flush=True)
        return super().loss(batch)


class Line(nn.Module):
    """A line through the column y."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(1))

    def loss(self, batch: Any) -> Any:
        return (self.at - batch["y"].tanh()).square().mean()


class Counter(nn.Module):
    """Counts in `fed` how often each row was fed: its gradient is -1 for each, so plain SGD with lr = batch size adds
    1."""

    def __init__(self, size: int):
        super().__init__()
        self.fed = nn.Parameter(torch.zeros(size))

    def loss(self, batch: Any) -> Any:
        return -self.fed[batch["id"]].sum(), batch["id"].shape[0]


class Trap(Small):
    """Fails, or loses its numbers, when the row `row` comes by; `once` per process, as a machine does: a redo goes
    well."""

    caught: list[str] = []

    def __init__(self, row: int, what: str, once: bool = False, width: int = 6):
        super().__init__(width)
        self.row, self.what, self.once = row, what, once

    def loss(self, batch: Any) -> Any:
        found = super().loss(batch)
        if self.row not in batch["id"].tolist() or (self.once and self.what in self.caught):
            return found
        self.caught.append(self.what)
        if self.what == "nan":
            return found * float("nan")
        raise (OSError if self.once else ValueError)(f"row {self.row}: {self.what}")


class Fragile(Small):
    """Fails in the way that is `armed`. Disarmed, it is what it was: whoever resumes has mended it. `wide`: parameters
    beside, to share out."""

    armed: set[str] = set()

    def __init__(self, wide: int = 1, width: int = 6):
        super().__init__(width)
        self.wide = nn.Parameter(torch.zeros(wide))

    def loss(self, batch: Any) -> Any:
        found = super().loss(batch) + (self.wide - 1).square().mean()
        if "warm-up" in self.armed or ("evaluation" in self.armed and not self.training):
            raise ValueError("no such layer")
        if not self.training or 70 not in batch["id"].tolist():
            return found
        if "loss" in self.armed:
            raise ValueError("row 70 is poison")
        if "gradient" in self.armed:
            found = found + (self.line.bias - self.line.bias.detach()).pow(0.5).sum()  # 0, and infinitely steep
        return found * float("nan") if "nan" in self.armed else found

    def metrics(self, batch: Any) -> Any:
        if "metrics" in self.armed:
            raise KeyError("recall")
        return {"off": ((self.line(batch["x"]) - batch["y"]).abs().sum(), len(batch["y"]))}


class FragileRows(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if "data" in Fragile.armed and index == 70:
            raise OSError("row 70 cannot be read")
        return super().__getitem__(index)


class Appearances(nn.Module):
    """What is looked up counts how often it was: the slope of every row is -1 for each time. `w` is of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def loss(self, batch: Any) -> Any:
        return -sum(rows.sum() for rows in batch["rows"].values()) - 0 * self.w.sum(), batch["age"].shape[0]


class Steep(Appearances):
    """While it is `armed`, rows of users older than 99 have no finite slope; the loss is finite."""

    armed: set[str] = set()

    def loss(self, batch: Any) -> Any:
        found, weight = super().loss(batch)
        old = batch["rows"]["user"][batch["age"] > 99] if self.armed else torch.zeros(0)
        return found + (old - old.detach()).pow(0.5).sum(), weight
