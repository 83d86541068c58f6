"""nanoGPT's model as a Gluon user would write it: a hybridised block with static memory, and Gluon's trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

SHAPES = {"static_alloc": True, "static_shape": True}


class Block(gluon.HybridBlock):
    """One layer, pre-norm."""

    def __init__(self, rows: int, time: int, heads: int, width: int):
        super().__init__()
        self.sizes = rows, time, heads, width
        with self.name_scope():
            self.first, self.second = gluon.nn.LayerNorm(center=False,
                                                         in_channels=width), gluon.nn.LayerNorm(center=False, in_channels=width)
            self.qkv, self.out = dense(3 * width, width), dense(width, width)
            self.up, self.down = dense(4 * width, width), dense(width, 4 * width)

    def hybrid_forward(self, F: Any, x: Any, mask: Any) -> Any:
        rows, time, heads, width = self.sizes
        apart = F.transpose(F.reshape(self.qkv(self.first(x)), (rows, time, 3, heads, width // heads)), (2, 0, 3, 1, 4))
        query, key, value = (F.reshape(part, (rows * heads, time, -1))
                             for part in F.split(apart, 3, axis=0, squeeze_axis=True))
        scores = F.broadcast_add(F.batch_dot(query * (width // heads) ** -0.5, key, transpose_b=True), mask)
        mixed = F.transpose(F.reshape(F.batch_dot(F.softmax(scores), value), (rows, heads, time, -1)), (0, 2, 1, 3))
        x = x + self.out(F.reshape(mixed, (rows, time, width)))
        return x + self.down(F.LeakyReLU(self.up(self.second(x)), act_type="gelu"))


class GPT(gluon.HybridBlock):
    """Tied embedding and head; the loss is the mean over the tokens."""

    def __init__(self, rows: int, time: int, model: dict[str, int], vocab_size: int):
        super().__init__()
        width = model["width"]
        self.sizes = vocab_size, width
        with self.name_scope():
            self.tokens, self.positions = self.params.get("tokens",
                                                          shape=(vocab_size, width)), self.params.get("positions", shape=(time, width))
            self.blocks = [Block(rows, time, model["heads"], width) for _ in range(model["layers"])]
            self.last = gluon.nn.LayerNorm(center=False, in_channels=width)
            for block in self.blocks:
                self.register_child(block)

    def hybrid_forward(self, F: Any, inputs: Any, targets: Any, mask: Any, tokens: Any, positions: Any) -> Any:
        vocab_size, width = self.sizes
        x = F.broadcast_add(F.Embedding(inputs, tokens, input_dim=vocab_size, output_dim=width),
                            F.expand_dims(positions, 0))
        for block in self.blocks:
            x = block(x, mask)
        logits = F.FullyConnected(self.last(x), tokens, num_hidden=vocab_size, no_bias=True, flatten=False)
        return -F.mean(F.pick(F.log_softmax(logits), targets))


def dense(units: int, in_units: int) -> Any:
    return gluon.nn.Dense(units, flatten=False, use_bias=False, in_units=in_units)


def stepper(model: dict[str, int], vocab_size: int, tokens: np.ndarray) -> Callable[[], float]:
    """One Adam step on `tokens` (rows, context + 1) a call; gives the mean loss."""
    rows, time = tokens.shape[0], tokens.shape[1] - 1
    gpt = GPT(rows, time, model, vocab_size)
    gpt.initialize(mx.init.Normal(0.02))
    gpt.hybridize(**SHAPES)
    trainer = gluon.Trainer(gpt.collect_params(), "adam", {"learning_rate": 1e-3, "beta2": 0.99, "wd": 0.1},
                            kvstore=None)
    mask = mx.nd.array(np.triu(np.full((1, time, time), -1e30, np.float32), 1))

    def step() -> float:
        inputs, targets = mx.nd.array(tokens[:, :-1], dtype="int32"), mx.nd.array(tokens[:, 1:], dtype="int32")
        with autograd.record():
            loss = gpt(inputs, targets, mask)
        loss.backward()
        trainer.step(1)
        return float(loss.asscalar())

    return step
