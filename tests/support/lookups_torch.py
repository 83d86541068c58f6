"""`tests.support.lookups.Lookups` in plain torch, and users' own modules that read what was looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support.lookups import HIDDEN, READ, WIDTH


def loss_of(params: Mapping[str, Any], rows: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    user, history = rows["user"], rows["history"]
    attended = torch.einsum("rd,rtd->rt", user, history).softmax(1)
    mixed = torch.einsum("rt,rtd->rd", attended, history)
    score = (torch.tanh(mixed @ params["weight"] + params["bias"]) @ params["out"] * user).sum(1)
    return ((score - batch["label"]).square() * batch["row_weight"]).sum()


def plainly(params: Mapping[str, np.ndarray], batch: Mapping[str, Any]) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The loss sum, its gradient with respect to the parameters, and that with respect to the rows that are read."""
    weights = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    rows = {feature: torch.tensor(batch["rows"][feature], requires_grad=True) for feature in READ}
    loss = loss_of(weights, rows, {name: torch.tensor(batch[name]) for name in ("label", "row_weight")})
    slopes = torch.autograd.grad(loss, [*weights.values(), *rows.values()])
    found = {name: slope.numpy() for name, slope in zip((*weights, *rows), slopes, strict=True)}
    return loss.item(), {name: found[name] for name in weights}, {feature: found[feature] for feature in rows}


class Net(nn.Module):
    """`takes`: its loss takes the rows out of the batch that it is given."""

    def __init__(self, takes: bool = False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(WIDTH, HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))
        self.out = nn.Parameter(torch.zeros(HIDDEN, WIDTH))
        self.takes = takes

    def rows_of(self, batch: Any) -> Any:
        rows = batch.pop("rows") if self.takes else batch["rows"]
        return {feature: rows.pop(feature) if self.takes else rows[feature] for feature in READ}

    def loss(self, batch: Any) -> Any:
        return loss_of(dict(self.named_parameters()), self.rows_of(batch), batch), batch["row_weight"].sum()

    def metrics(self, batch: Any) -> Any:
        return {"size": (batch["rows"]["user"].square().sum(), batch["row_weight"].sum())}


class Clipped(Net):
    """A hook on rows that is not linear."""

    def loss(self, batch: Any) -> Any:
        batch["rows"]["user"].register_hook(lambda slope: slope.clamp(-0.1, 0.1))
        return super().loss(batch)


class Unsteady(Net):
    """A hook on rows that counts."""

    calls = 0

    def loss(self, batch: Any) -> Any:
        type(self).calls += 1
        factor = float(type(self).calls)
        batch["rows"]["user"].register_hook(lambda slope: slope * factor)
        return super().loss(batch)
