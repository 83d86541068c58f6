"""The oracle of own Gluon blocks: Gluon by itself, with its own Trainer, over the same logical shards one after another."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from elastic.data.collate import stacked
from elastic.data.dataset import batch_seed
from elastic.worker.gradients import shard_seed
from tests.support.frameworks import load

STEPS, BATCH, LR, DECAY, EPS = 20, 12, 0.05, 0.1, 1e-3


class AdamW:
    """Loshchilov and Hutter 2019, algorithm 2, with what Gluon's parameters multiply: MXNet's own decays otherwise."""

    def __init__(self, parameters: Any):
        self.moments, self.count = {name: np.zeros((2, *p.shape)) for name, p in parameters.items()}, 0

    def step(self, parameters: Any) -> None:
        self.count += 1
        for name, parameter in parameters.items():
            slope, value = parameter.grad().asnumpy().astype(np.float64), parameter.data().asnumpy()
            rate = LR * parameter.lr_mult
            for moment, beta, new in zip(self.moments[name], (0.9, 0.95), (slope, slope ** 2), strict=True):
                moment += (1 - beta) * (new - moment)
            mean, square = (moment / (1 - beta ** self.count)
                            for moment, beta in zip(self.moments[name], (0.9, 0.95), strict=True))
            parameter.data()[:] = value * (1 - rate * DECAY * parameter.wd_mult) - rate * mean / (np.sqrt(square) + EPS)


class Plain:
    """Gluon by itself, with its own Trainer, over the same logical shards one after another; one shard is the whole
    batch."""

    def __init__(self, factory: Any, rows: Any, rule: str):
        import mxnet

        self.mx, self.rows = mxnet, rows
        self.block = load("mxnet", "backend").framework.construct(factory, {}, 0)
        named = load("mxnet", "adapter").named_parameters(self.block)
        self.trained = {name: p for name, p in named.items() if p.grad_req != "null"}
        self.kept = {name: p for name, p in named.items() if p.grad_req == "null"}
        self.named = named
        self.trainer = self.mx.gluon.Trainer(self.block.collect_params(), "sgd",
                                             {"learning_rate": LR, "momentum": 0.9, "wd": DECAY})
        self.adamw = AdamW(self.trained) if rule == "adamw" else None

    def train(self, shards: int, steps: int = STEPS, seed: int = 0) -> dict[str, np.ndarray]:
        size = BATCH // shards
        for step in range(steps):
            first = step * BATCH % len(self.rows)
            before = {name: p.data().asnumpy() for name, p in self.kept.items()}
            found = [self.shard(range(first + i * size, first + (i + 1) * size),
                                batch_seed(seed, step * BATCH // len(self.rows), first + i * size),
                                shard_seed(seed, step + 1, i), before) for i in range(shards)]
            whole = sum(weight for *_, weight in found)
            for name, parameter in self.kept.items():
                moved = np.sum([changes[name].astype(np.float64) * weight for _, changes, weight in found],
                               axis=0) / whole
                parameter.data()[:] = (before[name] + moved).astype(before[name].dtype)
            for name, parameter in self.trained.items():
                parameter.grad()[:] = np.sum([slopes[name] for slopes, *_ in found], axis=0) / whole
            if self.adamw:
                self.adamw.step(self.trained)
            else:
                self.trainer.step(1)
        return {name: p.data().asnumpy() for name, p in self.named.items()}

    def shard(self, numbers: range, items_seed: int, seed: int, before: Any) -> Any:
        """The gradients of the sum, what the parameters without a gradient changed by, and the weight."""
        mx = self.mx
        for name, parameter in self.kept.items():
            parameter.data()[:] = before[name]
        self.start(items_seed)
        batch = self.arrays(stacked([self.rows[i] for i in numbers]))
        self.start(seed)
        with mx.autograd.record():
            loss = self.block.loss(batch)
            total, weight = loss if isinstance(loss, tuple) else (loss.mean() * len(numbers), len(numbers))
        total.backward()
        changes = {name: p.data().asnumpy() - before[name] for name, p in self.kept.items()}
        weight = weight.asscalar() if isinstance(weight, mx.nd.NDArray) else weight
        return {name: p.grad().asnumpy() for name, p in self.trained.items()}, changes, float(weight)

    def arrays(self, batch: Any) -> Any:
        if isinstance(batch, (dict, tuple)):
            return {name: self.arrays(v) for name, v in batch.items()} if isinstance(batch, dict) else tuple(map(self.arrays, batch))
        return self.mx.nd.array(batch, dtype=np.float32 if batch.dtype == np.float64 else batch.dtype)

    def start(self, seed: int) -> None:
        self.mx.random.seed(seed & (1 << 31) - 1)
        np.random.seed(seed & (1 << 32) - 1)
        random.seed(seed)
