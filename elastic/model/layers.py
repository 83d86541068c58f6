"""What models of several domains share, written in ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.model.backend import Chain, Spec

Array = Any
Layer = Callable[[Mapping[str, Array], Array, str], Array]


class Specs(dict[str, Spec]):
    """A transformer's arrays by name, in the order in which they are declared; `bias`: norms and projections have one.
    Scales are deviations."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self._has_bias = bias

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = Spec((width,), ("d_model",), "ones")
        if self._has_bias:
            self[f"{name}.bias"] = Spec((width,), ("d_model",), "zeros")

    def dense(self, name: str, shape: tuple[int, ...], dims: tuple[str, ...], num_in: int = 1,
              scale: float = 0.02) -> None:
        """A product that sums over the first `num_in` dims."""
        self[f"{name}.weight"] = Spec(shape, dims, "normal", scale)
        if self._has_bias:
            self[f"{name}.bias"] = Spec(shape[num_in:], dims[num_in:], "zeros")

    def attention(self, h: str, width: int, heads: int, scale_in: float = 0.02, scale_out: float = 0.02) -> None:
        self.dense(f"{h}.attn.qkv", (width, 3, heads, width // heads), ("d_model", "qkv", "heads", "d_head"), 1,
                   scale_in)
        self.dense(f"{h}.attn.out", (heads, width // heads, width), ("heads", "d_head", "d_model"), 2, scale_out)

    def mlp(self, h: str, width: int, d_ff: int, scale_in: float = 0.02, scale_out: float = 0.02) -> None:
        self.dense(f"{h}.mlp.up", (width, d_ff), ("d_model", "d_ff"), 1, scale_in)
        self.dense(f"{h}.mlp.down", (d_ff, width), ("d_ff", "d_model"), 1, scale_out)


class Chained(Chain):
    """A `Model` made of an `elastic.model.backend.Chain`: whoever derives from it brings `parameters, layout, pieces,
    run, score, measure`.

    It has no buffers. `reads`: what the names of a piece's parameters begin with, where that is not the piece's own
    name.
    """

    buffers: Mapping[str, Spec] = {}
    reads: Mapping[str, tuple[str, ...]] = {}

    def names(self, piece: str) -> tuple[str, ...]:
        return tuple(name for name in self.parameters if name.startswith(self.reads.get(piece, (f"{piece}.",))))

    def loss(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array], batch: Mapping[str, Array],
             seed: int) -> tuple[Array, Array, Mapping[str, Array]]:
        return *self.score(ops, self.through(ops, params, None, batch, seed), batch, seed), {}

    def metrics(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array],
                batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        return self.measure(ops, self.through(ops, params, None, batch, None), batch)

    def through(self, ops: Any, params: Mapping[str, Array], x: Array | None, batch: Mapping[str, Array], seed: int
                | None,
                start: int = 0) -> Array:
        """What the last piece makes of `x`, which piece `start` takes."""
        for piece in self.pieces[start:]:
            x = self.run(ops, params, piece, x, batch, seed)
        return x


def dense_into(ops: Any, params: Mapping[str, Array], equation: str, name: str, x: Array, dim: str) -> Array:
    """A product whose result may be split along `dim`, with its bias; `x` is whole (Shoeybi et al. 2019, section 3)."""
    return ops.contract(equation, ops.enter(x, dim), params[f"{name}.weight"], params.get(f"{name}.bias"))


def dense_from(ops: Any, params: Mapping[str, Array], equation: str, name: str, x: Array, dim: str) -> Array:
    """A product that sums over `dim`, along which `x` may be split; the result is whole, and its bias added once."""
    weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
    if ops.degree(dim) == 1:
        return ops.contract(equation, x, weight, bias)
    total = ops.leave(ops.contract(equation, x, weight), dim)
    return total if bias is None else ops.add(total, bias)


def part_tag(ops: Any, tag: str, dim: str) -> str:
    """A tag for dropout of what may be split along `dim`: its parts must not be dropped alike."""
    return tag if ops.degree(dim) == 1 else f"{tag}.{ops.part(dim)}"


@dataclass(frozen=True)
class Layers:
    """Transformer layers (Vaswani et al. 2017) for one pass: NAME.attn.qkv, attn.out, ln1, mlp.up, mlp.down and ln2,
    biases where there are some.

    "heads" and "d_ff" may be split. `seed` None means no dropout.
    """

    ops: Any
    causal: bool
    rate: float
    seed: int | None
    eps: float = 1e-5

    def pre(self, p: Mapping[str, Array], x: Array, h: str) -> Array:
        """The norm before each half, (rows, time, d_model) -> the same."""
        x = self.ops.add(x, self.attention(p, self.norm(p, f"{h}.ln1", x), h))
        return self.ops.add(x, self.mlp(p, self.norm(p, f"{h}.ln2", x), h))

    def post(self, p: Mapping[str, Array], x: Array, h: str) -> Array:
        """The norm behind each half, (rows, time, d_model) -> the same."""
        x = self.norm(p, f"{h}.ln1", self.ops.add(x, self.attention(p, x, h)))
        return self.norm(p, f"{h}.ln2", self.ops.add(x, self.mlp(p, x, h)))

    def attention(self, p: Mapping[str, Array], x: Array, h: str) -> Array:
        ops = self.ops
        query, key, value = ops.unbind(dense_into(ops, p, "btd,dqhe->btqhe", f"{h}.attn.qkv", x, "heads"), 2)
        rate, seed, tag = (self.rate, self.seed,
                           part_tag(ops, f"{h}.attn.weights",
                                    "heads")) if self.rate and self.seed is not None else (0.0, 0, "")
        mixed = ops.attention(query, key, value, self.causal, rate, seed, tag)
        return self.drop(dense_from(ops, p, "bthe,hed->btd", f"{h}.attn.out", mixed, "heads"), f"{h}.attn")

    def mlp(self, p: Mapping[str, Array], x: Array, h: str) -> Array:
        hidden = self.ops.gelu(dense_into(self.ops, p, "btd,df->btf", f"{h}.mlp.up", x, "d_ff"))
        return self.drop(dense_from(self.ops, p, "btf,fd->btd", f"{h}.mlp.down", hidden, "d_ff"), f"{h}.mlp")

    def norm(self, p: Mapping[str, Array], name: str, x: Array) -> Array:
        return self.ops.layer_norm(x, p[f"{name}.weight"], p.get(f"{name}.bias"), self.eps)

    def drop(self, x: Array, tag: str) -> Array:
        return self.ops.dropout(x, self.rate, self.seed, tag) if self.rate and self.seed is not None else x


def one_layer(ops: Any, layer: Layer, params: Mapping[str, Array], name: str, x: Array, recompute: bool) -> Array:
    """`layer(params, x, name)`, which reads the parameters called NAME.* alone; with `recompute`, of its results only
    the last is kept."""
    if not recompute:
        return layer(params, x, name)
    own = [key for key in params if key.startswith(f"{name}.")]

    def function(x: Array, *weights: Array) -> Array:
        return layer(dict(zip(own, weights)), x, name)

    return ops.recompute(function, x, *(params[key] for key in own))


def smoothed(ops: Any, total: Array, logits: Array, weights: Array, smoothing: float) -> Array:
    """`total`, the weighted cross-entropy of logits (..., classes) with weights (...), with smoothing / classes of the
    target for every class.

    Szegedy et al. 2016, section 7.
    """
    if not smoothing:
        return total
    *lead, num_classes = logits.shape
    even = ops.multiply(ops.reshape(weights, (*lead, 1)),
                        ops.constant(np.full((1, num_classes), -smoothing / num_classes)))
    return ops.add(ops.multiply(total, ops.constant(1.0 - smoothing)),
                   ops.sum(ops.multiply(ops.log_softmax(logits), even)))
