"""Users' own torch modules, and what a loop in torch alone makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Batch norm, dropout, a counter by assignment, a constant buffer, tied weights."""

    def __init__(self, dropout: float = 0.0, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.second.weight = self.first.weight
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -float("inf"), 0.1]))

    def forward(self, x: Any) -> Any:
        self.calls = self.calls + 1
        x = self.second(self.drop(self.norm(self.first(x))).relu())
        return x.masked_fill(torch.isinf(self.mask), 0.0)

    def loss(self, batch: Any) -> Any:
        return F.mse_loss(self(batch["x"]), batch["y"])

    def metrics(self, batch: Any) -> Any:
        return {"close": ((self(batch["x"]) - batch["y"]).abs().amax(1).lt(1).sum(), batch["x"].shape[0])}


class Sums(Net):
    """A batch of two columns without names."""

    def loss(self, batch: Any) -> Any:
        x, y = batch
        return F.mse_loss(self(x), y, reduction="sum"), x.shape[0] * 2


FORMS: tuple[dict[str, Any], ...] = ({}, {"tied": True})
WEIGHTS = {"loss": 6.0, "close": 6.0}


def batch(rows: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((rows, 4)).astype(np.float32), "y": rng.standard_normal((rows, 4))}


def tensors() -> dict[str, Any]:
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in batch().items()}


def plainly(net: Net) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(mean loss, its gradients, buffers afterwards) by name."""
    net.train()
    net.zero_grad()
    loss = net.loss(tensors())
    loss.backward()
    return loss.item(), {n: p.grad.numpy().copy()
                         for n, p in net.named_parameters()}, {n: b.numpy().copy() for n, b in net.named_buffers()}


def evaluated(net: Net) -> dict[str, float]:
    net.eval()
    close, rows = net.metrics(tensors())["close"]
    return {"loss": net.loss(tensors()).item(), "close": close.item() / rows}


def sums_batch() -> Any:
    return tuple(batch().values())


def plain_sums(net: Net) -> tuple[float, float, dict[str, np.ndarray]]:
    """(sum, weight, gradients of the sum) by name."""
    loss, weight = net.loss(tuple(tensors().values()))
    loss.backward()
    return loss.item(), weight, {n: p.grad.numpy() for n, p in net.named_parameters()}


def draw() -> Any:
    """The process's own generator."""
    torch.manual_seed(11)
    return lambda: torch.rand(3).tolist()


class Empty(nn.Module):
    def loss(self, batch: Any) -> Any:
        return batch["x"].sum()


class Vector(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch["x"])


class Detached(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch["x"]).sum().detach()


REFUSED: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
    "no loss": (nn.Module, "loss", batch), "no parameters": (Empty, "no parameters", batch),
    "float64": (lambda: Net().double(), "must be float32", batch),
    "a vector": (Vector, "shape", batch), "detached": (Detached, "trainable", batch)}
