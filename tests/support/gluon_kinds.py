"""Users' Gluon blocks of many kinds, by which in-process runs train: those that gluon.Trainer trains alike, and those to be refused."""

from __future__ import annotations

from typing import Any

import backends.mxnet  # noqa: F401  (before MXNet itself)

# isort: split
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

ROWS = 36


class Rows:
    """{x, y, id}, drawn once."""

    draws = False

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.x, self.y = (draw.standard_normal((ROWS, n)).astype(np.float32) for n in (4, 1))
        self.id = draw.integers(0, 9, (ROWS, 3)).astype(np.float32)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "y": self.y[index], "id": self.id[index]}


class Base(nn.HybridSequential):
    """Two layers; the loss is one value a row."""

    def __init__(self, *between: Any, hybrid: bool = False, **options: Any):
        super().__init__()
        self.add(nn.Dense(5, in_units=4, activation="tanh"), *between, nn.Dense(1, in_units=5))
        self.initialize(mx.init.Normal(0.5))
        self.told: list[int] = []
        self.count = 0
        if hybrid:
            self.hybridize(**options)

    def loss(self, batch: Any) -> Any:
        return gluon.loss.L2Loss()(self(batch["x"]), batch.pop("y"))

    def metrics(self, batch: Any) -> Any:
        return {"far": ((self(batch["x"]) - batch.pop("y")).abs().sum(), len(batch["x"]))}


def plain() -> Any:
    return Base()


def slow() -> Any:
    """The first layer's rate is multiplied by 0, as one freezes in Gluon, and the last bias learns faster."""
    block = Base()
    block[0].collect_params().setattr("lr_mult", 0.0)
    block[1].bias.lr_mult = 3.0
    return block


def no_decay() -> Any:
    block = Base(hybrid=True)
    block.collect_params(".*bias").setattr("wd_mult", 0.0)
    return block


def mixed() -> Any:
    block = Base(nn.LayerNorm(in_channels=5))
    block[0].weight.wd_mult, block[0].bias.lr_mult, block[2].weight.lr_mult = 2.5, 0.5, 0.1
    block[2].weight.wd_mult = 0.0
    return block


def frozen() -> Any:
    block = Base()
    block[0].collect_params().setattr("grad_req", "null")
    return block


def normed() -> Any:
    return Base(nn.BatchNorm(in_channels=5, momentum=0.8), hybrid=True, static_alloc=True, static_shape=True)


def still() -> Any:
    """A batch norm that keeps its statistics."""
    return Base(nn.BatchNorm(in_channels=5, use_global_stats=True, scale=False))


class Mean(Base):
    def loss(self, batch: Any) -> Any:
        penalty = sum((p.data() ** 2).sum() for p in self.collect_params(".*weight").values())
        return gluon.loss.HuberLoss()(self(batch["x"]), batch["y"]).mean() + 0.05 * penalty


def penalized() -> Any:
    return Mean()


class Pairs(Base):
    def loss(self, batch: Any) -> Any:
        far = (self(batch["x"]) - batch["y"]).abs()
        return (far * 2).sum(), 2.0 * len(far)


def paired() -> Any:
    return Pairs()


class Tied(Base):
    """One layer twice."""

    def __init__(self) -> None:
        super().__init__(nn.Dense(5, in_units=5, activation="tanh"))
        again = nn.Dense(5, in_units=5, params=self[1].params)
        self._children["again"] = again

    def forward(self, x: Any) -> Any:
        return self[2](self._children["again"](self[1](self[0](x))))


def tied() -> Any:
    return Tied()


class Words(nn.Block):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(9, 4, sparse_grad=sparse), gluon.rnn.LSTM(3, input_size=4, layout="NTC")
        self.last = nn.Dense(1, in_units=9)
        self.initialize(mx.init.Normal(0.5))

    def loss(self, batch: Any) -> Any:
        return gluon.loss.L2Loss()(self.last(self.cell(self.words(batch["id"])).reshape((0, -1))), batch["y"])


def recurrent() -> Any:
    return Words()


class Teacher(Base):
    """Trained towards a moving average of its last layer, which is frozen and written in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Dense(1, in_units=5)
        self.slow.initialize(mx.init.Zero())
        self.slow.collect_params().setattr("grad_req", "null")
        self._children.popitem()  # called by name alone
        self._children["slow"] = self.slow

    def forward(self, x: Any) -> Any:
        body = self[0](x)
        if autograd.is_training():
            with autograd.pause():
                kernel = self.slow.weight.data()
                kernel[:] = 0.9 * kernel + 0.1 * self[1].weight.data()
        return self[1](body) + 0.5 * self.slow(body)


def teacher() -> Any:
    return Teacher()


class Listed(Base):
    """A penalty over a list of parameters that it takes where it is made, and what a hook has kept of a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.penalised = [*self.collect_params(".*weight").values()]
        self.seen: dict[str, Any] = {}
        self[0].register_forward_hook(lambda layer, inputs, out: self.seen.update(out=out))

    def loss(self, batch: Any) -> Any:
        return super().loss(batch).mean() + 0.1 * sum((p.data() ** 2).sum() for p in self.penalised) + 0.1 * (self.seen["out"] ** 2).mean()


def listed() -> Any:
    return Listed()


class Squared(autograd.Function):
    def forward(self, x: Any) -> Any:
        self.save_for_backward(x)
        return x * x

    def backward(self, slope: Any) -> Any:
        x, = self.saved_tensors
        return 2 * x * slope


class Custom(Base):
    """A gradient of its own, which is linear."""

    def forward(self, x: Any) -> Any:
        return self[1](Squared()(self[0](x)))


def custom() -> Any:
    return Custom()


class Sloped(nn.Block):
    """The slope by the input is in the loss; of few of MXNet's kernels there is a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Dense(5, in_units=4), nn.Dense(1, in_units=5)
        self.initialize(mx.init.Normal(0.5))

    def loss(self, batch: Any) -> Any:
        x = batch["x"]
        x.attach_grad()
        with autograd.record(train_mode=autograd.is_training()):
            u = self.last(nd.sigmoid(self.first(x)))
            slope, = autograd.grad(u, [x], create_graph=True)
        return gluon.loss.L2Loss()(u, batch["y"]).mean() + (slope ** 2).mean()


def sloped() -> Any:
    return Sloped()


LARGE = 2.0 ** 30  # in float32 an eighth beside it is lost
NUMBERS = ("float64", "float16", "int64", "int32", "int8", "uint8")


class Counted(nn.Block):
    """Parameters of many kinds without gradients that move with every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Dense(1, in_units=4)
        self.initialize(mx.init.Normal(0.5))
        self.kept = [self.params.get(kind, shape=(2,), dtype=kind, init=mx.init.Constant(LARGE if kind == "float64" else 0), grad_req="null",
                                     differentiable=False) for kind in NUMBERS]
        for kind, parameter in zip(NUMBERS, self.kept, strict=True):
            parameter.initialize()
            self._reg_params[kind] = parameter

    def loss(self, batch: Any) -> Any:
        if autograd.is_training():
            with autograd.pause():
                for p in self.kept:
                    p.data()[:] = p.data() + (0.125 if np.dtype(p.dtype).kind == "f" else 3)
        return gluon.loss.L2Loss()(self.line(batch["x"]) * (self.kept[0].data()[0] - LARGE).astype("float32"), batch["y"])


def counted() -> Any:
    return Counted()


class Always(Base):
    """A batch norm that trains where it evaluates, too."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm(in_channels=5))

    def loss(self, batch: Any) -> Any:
        with autograd.train_mode():
            return super().loss(batch)


def always() -> Any:
    return Always()


def dropped() -> Any:
    return Base(nn.Dropout(0.4), nn.BatchNorm(in_channels=5), hybrid=True)


ALIKE = ["plain", "slow", "no_decay", "mixed", "frozen", "normed", "still", "penalized", "paired", "tied", "recurrent", "teacher",
         "listed", "custom", "sloped", "counted"]


# What is refused.

def adding() -> Any:
    block = Base()
    block.collect_params().setattr("grad_req", "add")
    return block


def sparse() -> Any:
    return Words(sparse=True)


class Clipped(autograd.Function):
    def forward(self, x: Any) -> Any:
        return x * 1

    def backward(self, slope: Any) -> Any:
        return slope.clip(-1e-3, 1e-3)


class Late(Teacher):
    """Writes to what trains once its average has moved far enough, which it has not when it is first looked at."""

    def loss(self, batch: Any) -> Any:
        found = super().loss(batch)
        with autograd.pause():
            if self.slow.weight.data().abs().sum().asscalar() > 1.9 * 0.1 * self[1].weight.data().abs().sum().asscalar():
                self[0].weight.data()[:] = self[0].weight.data() * 0.5
        return found


class together(Base):  # noqa: N801 (as the other kinds are called)
    """Cannot take any number of rows, each in its own way."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def loss(self, batch: Any) -> Any:
        return (getattr(self, self.how)(self(batch["x"]) - batch["y"]) ** 2).mean()

    def metrics(self, batch: Any) -> Any:
        return {}

    def pairs(self, off: Any) -> Any:
        return off.reshape((2, -1))

    def best(self, off: Any) -> Any:
        return off[0:3, 0].reshape((3,))

    def fixed(self, off: Any) -> Any:
        return off.reshape((4, 1) if len(off) < 32 else (32, 1))


class Odd(Base):
    """One of the things that a loss should not do, by name."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.draws = what, np.random.default_rng(3)
        if what == "holding":
            self.held = self[0].weight.data()
        if what == "viewing":
            self.held = {"rows": [self[1].bias.data()[0:1]]}

    def loss(self, batch: Any) -> Any:
        return getattr(self, "do_" + self.what)(gluon.loss.L2Loss()(self(batch["x"]), batch["y"]), batch)

    def do_counter(self, loss: Any, batch: Any) -> Any:
        self.count += 1
        return loss

    def do_listing(self, loss: Any, batch: Any) -> Any:
        self.told.append(len(batch))
        return loss

    def do_keeping(self, loss: Any, batch: Any) -> Any:
        self.kept = getattr(self, "kept", 0) * 0.9 + loss.detach()
        return loss

    def do_generator(self, loss: Any, batch: Any) -> Any:
        return loss * self.draws.uniform(0.5, 1.5)

    def do_clipped(self, loss: Any, batch: Any) -> Any:
        return Clipped()(loss)

    def do_writing(self, loss: Any, batch: Any) -> Any:
        with autograd.pause():
            self[0].weight.data()[:] = self[0].weight.data().clip(-0.1, 0.1)
        return loss

    def do_holding(self, loss: Any, batch: Any) -> Any:
        return loss + (self.held ** 2).sum()

    def do_viewing(self, loss: Any, batch: Any) -> Any:
        return loss + (self.held["rows"][0] ** 2).sum()

    def do_broken(self, loss: Any, batch: Any) -> Any:
        raise ValueError("so many cats")

    def do_shapes(self, loss: Any, batch: Any) -> Any:
        return nd.dot(loss, batch["x"].T)

    def do_requests(self, loss: Any, batch: Any) -> Any:
        self[0].weight.lr_mult = 2.0
        return loss

    def do_measuring(self, loss: Any, batch: Any) -> Any:
        return loss

    def metrics(self, batch: Any) -> Any:
        if self.what == "measuring":
            raise KeyError("no such figure")
        return {"accuracy": mx.metric.Accuracy()} if self.what == "clipped" else {}


def odd(what: str) -> Any:
    return Odd(what)
