"""Users' own torch modules that no trainer of shards can train faithfully, each by one habit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.torch_modules import Base

ALIVE = Base()
COUNT = [0]


class MaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(10, 4, max_norm=1.0), nn.Linear(4, 1)

    def loss(self, b: Any) -> Any:
        return F.mse_loss(self.head(self.emb(b["id"]).mean(1)), b["y"])


class Clamped(Base):
    """Writes what is there already."""

    def loss(self, b: Any) -> Any:
        with torch.no_grad():
            self.head.weight.clamp_(-100, 100)
        return super().loss(b)


class Hidden(Base):
    """No version counter sees it."""

    def loss(self, b: Any) -> Any:
        self.head.weight.data.mul_(0.5)
        return super().loss(b)


class Late(Base):
    """Writes from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def loss(self, b: Any) -> Any:
        if self.training:
            self.steps += 1
        if self.steps > 2:
            with torch.no_grad():
                self.head.weight.clamp_(-0.01, 0.01)
        return super().loss(b)


class Quiet(Base):
    """Writes from the third step on, where no version counter sees it."""

    size = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.wide = nn.Parameter(torch.ones(self.size))

    def loss(self, b: Any) -> Any:
        if self.training:
            self.steps += 1
        if self.steps > 2:
            self.write()
        return super().loss(b) + self.wide.mean()

    def write(self) -> None:
        self.head.weight.data.mul_(0.5)


class QuietPart(Quiet):
    """One element of many."""

    size = 50_000

    def write(self) -> None:
        self.wide.detach().numpy()[4711] *= 1.5


class QuietEvaluation(Base):
    """While it is evaluated after its first step."""

    def metrics(self, b: Any) -> Any:
        if self.body.bias.grad is None and not torch.equal(self.body.bias, self.begun):
            self.head.bias.data.add_(1.0)
        return {}

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("begun", self.body.bias.detach().clone())


class OwnGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gen = torch.Generator().manual_seed(1)

    def loss(self, b: Any) -> Any:
        return super().loss({"x": b["x"] + torch.randn(4, generator=self.gen), "y": b["y"]})


class NumPyGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.draw = np.random.default_rng(0)

    def loss(self, b: Any) -> Any:
        return super().loss(b) * float(1 + self.draw.random())


class Counting(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, b: Any) -> Any:
        self.calls += 1
        return super().loss(b) / (1 + self.calls // 100)


class Remembering(Base):
    """Centres by the mean of the first rows that it ever saw."""

    mean: Any = None

    def loss(self, b: Any) -> Any:
        if self.mean is None:
            self.mean = b["x"].mean(0)
        return super().loss({"x": b["x"] - self.mean, "y": b["y"]})


class History(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[float]] = {"losses": []}

    def loss(self, b: Any) -> Any:
        found = super().loss(b)
        self.seen["losses"].append(found.item())
        return found


class Worldly(Base):
    """Counts where nobody looks."""

    def loss(self, b: Any) -> Any:
        COUNT[0] += 1
        return super().loss(b) * COUNT[0]


class ClipHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight.register_hook(lambda g: g.clamp(-1, 1))


class AfterHook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight.register_post_accumulate_grad_hook(lambda p: None)


class HookEachTime(Base):
    def loss(self, b: Any) -> Any:
        self.head.weight.register_hook(lambda g: g * 2)
        return super().loss(b)


class Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient / gradient.norm()


class Unlinear(Base):
    def forward(self, b: Any) -> Any:
        return self.head(Normalised.apply(torch.tanh(self.body(b["x"]))))


class Viewing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"rows": [self.body.weight[0]]}

    def loss(self, b: Any) -> Any:
        return super().loss(b) + self.parts["rows"][0].square().sum()


class Doubled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Parameter(self.head.weight.data)


class Growing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, 4))

    def loss(self, b: Any) -> Any:
        self.seen = torch.cat([self.seen, b["x"].detach()])
        return super().loss(b)


class Leaping(Base):
    """Counts further than a mean over shards is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    def loss(self, b: Any) -> Any:
        self.total += 123_456_789
        return super().loss(b)


class Turning(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def loss(self, b: Any) -> Any:
        self.count = self.count + 0.5
        return super().loss(b)


class Lazily(Base):
    def loss(self, b: Any) -> Any:
        if not hasattr(self, "mean"):
            self.register_buffer("mean", b["x"].mean(0))
        return super().loss(b)


class Unmade(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(1)


class SparseBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("links", torch.eye(3).to_sparse())


class Toggling(Base):
    def loss(self, b: Any) -> Any:
        found = super().loss(b)
        self.body.requires_grad_(False)
        return found


class Swapping(Base):
    def loss(self, b: Any) -> Any:
        self.head.weight.data = self.head.weight.data * 0.5
        return super().loss(b)


class Untying(Base):
    """Two buffers that are one until the first loss."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(2))
        self.register_buffer("two", self.one)

    def loss(self, b: Any) -> Any:
        self.two = self.two + 1
        return super().loss(b)


class Slope(Base):
    """The derivative by the input is in the loss."""

    def loss(self, b: Any) -> Any:
        x = b["x"].clone().requires_grad_()
        u = self({"x": x})
        slope, = torch.autograd.grad(u.sum(), x, create_graph=True)
        return F.mse_loss(u, b["y"]) + slope.square().mean()


class Norm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, b: Any) -> Any:
        return self.head(torch.tanh(self.norm(self.body(b["x"]))))


class Paired(Base):
    """Rows by two and two."""

    def loss(self, b: Any) -> Any:
        return (self(b) - b["y"]).reshape(2, -1).square().sum(0).mean()


class Ranked(Base):
    def loss(self, b: Any) -> Any:
        return (self(b) - b["y"]).square().topk(2, dim=0).values.mean()


class Squeezed(Base):
    """Loses the rows' own dim where there is one."""

    def loss(self, b: Any) -> Any:
        return F.nll_loss(self(b).expand(-1, 3).squeeze().log_softmax(-1), b["id"][:, 0] % 3)


class EvenEvaluated(Base):
    def metrics(self, b: Any) -> Any:
        return {"near": ((self(b) - b["y"]).reshape(2, -1).abs().sum(), len(b["y"]))}


class Broken(Base):
    def loss(self, b: Any) -> Any:
        return super().loss(b) + b["z"].sum()


def same() -> Base:
    return ALIVE
