"""nanoGPT's model as a Keras user would write it, and its train step in a `tf.function`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers


def norm() -> Any:
    return layers.LayerNormalization(epsilon=1e-5, center=False)


def gelu(x: Any) -> Any:
    return keras.activations.gelu(x, approximate=False)


class Block(layers.Layer):
    """One layer, pre-norm."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads, self.first, self.second = heads, norm(), norm()
        self.qkv, self.out = layers.Dense(3 * width, use_bias=False), layers.Dense(width, use_bias=False)
        self.up, self.down = layers.Dense(4 * width, gelu, use_bias=False), layers.Dense(width, use_bias=False)

    def call(self, x: Any) -> Any:
        rows, time, width = x.shape
        apart = tf.transpose(tf.reshape(self.qkv(self.first(x)), (rows, time, 3, self.heads, width // self.heads)),
                             (2, 0, 3, 1, 4))
        query, key, value = tf.unstack(apart)
        scores = tf.matmul(query, key, transpose_b=True) * (width // self.heads) ** -0.5
        scores += np.triu(np.full((time, time), -np.inf, np.float32), 1)
        mixed = tf.transpose(tf.matmul(tf.nn.softmax(scores), value), (0, 2, 1, 3))
        x += self.out(tf.reshape(mixed, (rows, time, width)))
        return x + self.down(self.up(self.second(x)))


class GPT(keras.Model):
    """Tied embedding and head."""

    def __init__(self, num_layers: int, heads: int, width: int, context: int, vocab_size: int):
        super().__init__()
        self.tokens, self.positions = layers.Embedding(vocab_size, width), layers.Embedding(context, width)
        self.blocks, self.last = [Block(heads, width) for _ in range(num_layers)], norm()

    def call(self, tokens: Any) -> Any:
        x = self.tokens(tokens) + self.positions(tf.range(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return tf.matmul(self.last(x), self.tokens.embeddings.value, transpose_b=True)


def stepper(model: dict[str, int], vocab_size: int, tokens: np.ndarray) -> Callable[[], float]:
    """One AdamW step on `tokens` (rows, context + 1) a call; gives the mean loss."""
    gpt = GPT(model["layers"], model["heads"], model["width"], model["context"], vocab_size)
    gpt(tf.constant(tokens[:, :-1]))
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.1, beta_2=0.99)
    optimizer.build(gpt.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(tokens: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(tokens[:, 1:], gpt(tokens[:, :-1], training=True))
        optimizer.apply_gradients(zip(tape.gradient(loss, gpt.trainable_variables), gpt.trainable_variables))
        return loss

    return lambda: float(step(tf.constant(tokens)))
