"""Users' own torch modules, each with one thing that plain torch does and a trainer may lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Rows:
    """Four numbers, a target and three ids below 10."""

    def __init__(self, size: int = 160):
        draw = np.random.default_rng(0)
        self.x = draw.standard_normal((size, 4)).astype(np.float32)
        self.y = draw.standard_normal((size, 1)).astype(np.float32)
        self.id = draw.integers(0, 10, (size, 3))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.x[i], "y": self.y[i], "id": self.id[i]}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, b: Any) -> Any:
        return self.head(torch.tanh(self.body(b["x"])))

    def loss(self, b: Any) -> Any:
        return F.mse_loss(self(b), b["y"])


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)


class Recomputed(Base):
    """Draws in the part that is computed again."""

    reentrant = False

    def forward(self, b: Any) -> Any:
        x = b["x"].clone().requires_grad_()
        return self.head(checkpoint(lambda x: F.dropout(torch.tanh(self.body(x)), 0.2), x,
                                    use_reentrant=self.reentrant))


class Reentrant(Recomputed):
    reentrant = True

    def forward(self, b: Any) -> Any:
        return super().forward(b) + super().forward({"x": -b["x"]})


class Hooked(Base):
    """A mask and a scaling on gradients, and hooks of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.body.weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0, 1.0, 1.0]))
        self.head.weight.register_hook(lambda g: g * 0.5)
        self.body.register_forward_hook(lambda module, inputs, out: out * 2)
        self.head.register_full_backward_hook(lambda module, into,
                                              out: tuple(g if g is None else g * 0.25 for g in into))


class Masked(Base):
    """Draws in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body.weight.register_hook(lambda g: g * (torch.rand_like(g) > 0.3))


class Penalised(Base):
    def __init__(self) -> None:
        super().__init__()
        self.penalised = [p for n, p in self.named_parameters() if n.endswith("weight")]

    def loss(self, b: Any) -> Any:
        return super().loss(b) + 0.5 * sum(p.square().sum() for p in self.penalised)


class Spectral(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = parametrizations.spectral_norm(self.body)


class Weighed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = parametrizations.weight_norm(self.body)


class OldWeighed(Base):
    """Keeps the product in a plain attribute, made anew before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.utils.weight_norm(self.body)


class OldSpectral(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.utils.spectral_norm(self.body)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def loss(self, b: Any) -> Any:
        return (self.two(self.one(b["x"]).relu()).sum(1, keepdim=True) - b["y"]).square().mean()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 6, num_layers=2, batch_first=True, dropout=0.1), nn.Linear(6, 1)

    def loss(self, b: Any) -> Any:
        return F.mse_loss(self.head(self.lstm(b["x"].unsqueeze(2))[0][:, -1]), b["y"])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * gradient


class Custom(Base):
    def forward(self, b: Any) -> Any:
        return self.head(Square.apply(self.body(b["x"])))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1)

    def loss(self, b: Any) -> Any:
        return F.mse_loss(self.head(self.emb(b["id"]).mean(1)), b["y"])


class Rotary(Base):
    """A complex buffer that turns further with every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.tensor([0.3, 1.1])))

    def forward(self, b: Any) -> Any:
        turned = torch.view_as_complex(b["x"].reshape(-1, 2, 2)) * self.turn
        if self.training:
            self.turn = self.turn * torch.polar(torch.ones(2), torch.tensor([0.1, 0.2]))
        return super().forward({"x": torch.view_as_real(turned).reshape(-1, 4)})


class Brain(Base):
    """Buffers of bfloat16, of numbers that say yes or no, and small whole ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.5, 0.25, 1.0, 3.0], dtype=torch.bfloat16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("count", torch.zeros(2, dtype=torch.uint8))

    def forward(self, b: Any) -> Any:
        if self.training:
            self.seen.fill_(True)
            self.count += 1
            self.scale.add_(0.5)
        return super().forward({"x": b["x"] * self.scale})


class Slow(Base):
    """A slowly following copy of the body, moved in place at each loss."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(4, 5)
        self.slow.load_state_dict(self.body.state_dict())
        self.slow.requires_grad_(False)

    def loss(self, b: Any) -> Any:
        with torch.no_grad():
            for s, p in zip(self.slow.parameters(), self.body.parameters()):
                s.mul_(0.9).add_(p, alpha=0.1)
            wanted = torch.tanh(self.slow(b["x"]))
        return F.mse_loss(torch.tanh(self.body(b["x"])), wanted + 0.1) + super().loss(b)


class Noted(Base):
    """Keeps what it made last, and reads it only after."""

    def forward(self, b: Any) -> Any:
        self.hidden = torch.tanh(self.body(b["x"]))
        return self.head(self.hidden)

    def loss(self, b: Any) -> Any:
        return super().loss(b) + 0.1 * self.hidden.square().mean()


class EvalNorm(Base):
    """A batch norm put into evaluation mode where it is made, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.live = nn.BatchNorm1d(5), nn.BatchNorm1d(4)
        self.norm.running_mean += 0.3
        self.norm.eval()

    def forward(self, b: Any) -> Any:
        return self.head(torch.tanh(self.norm(self.body(self.live(b["x"])))))


class Pops(Base):
    """Takes the target out of the batch."""

    def loss(self, b: Any) -> Any:
        y = b.pop("y")
        return F.mse_loss(self(b), y)

    def metrics(self, b: Any) -> Any:
        y = b.pop("y")
        return {"mae": ((self(b) - y).abs().sum(), len(y))}


class Sloped(Base):
    """The derivative by the input is in the loss, also where it is evaluated."""

    def loss(self, b: Any) -> Any:
        with torch.enable_grad():
            x = b["x"].clone().requires_grad_()
            u = self({"x": x})
            slope, = torch.autograd.grad(u.sum(), x, create_graph=True)
            return F.mse_loss(u, b["y"]) + slope.square().mean()


class Seen(Base):
    """A buffer that moves where it is evaluated, too, and the loss with it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, b: Any) -> Any:
        self.mean = 0.5 * self.mean + 0.5 * b["x"].mean(0).detach()
        return super().forward({"x": b["x"] - self.mean})

    def metrics(self, b: Any) -> Any:
        return {"far": (self(b).abs().sum() + self(b).abs().sum(), 1.0)}


class Switching(Base):
    """Sets its parts' modes as it likes, and leaves them so."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, b: Any) -> Any:
        self.norm.train(not self.norm.training)
        return self.head(torch.tanh(self.norm(self.body(b["x"]))))

    def metrics(self, b: Any) -> Any:
        self.train()
        return {"mae": ((self(b) - b["y"]).abs().sum(), len(b["y"]))}


class Sampling(Base):
    """Dropout that is on where it is evaluated, with several draws."""

    def metrics(self, b: Any) -> Any:
        return {"spread": (torch.stack([F.dropout(self(b), 0.5) for _ in range(4)]).std(0).sum(), len(b["y"]))}
