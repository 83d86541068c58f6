"""BERT's encoder and its masked-token head (Devlin et al. 2019): post-norm, learned positions, exact GELU, output tied to the embedding.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch has "tokens", integers (rows, context),
some of them hidden; "places" (rows, hidden), where in each row; "targets" (rows, hidden), what stood there; and "row_weight"
(rows,), 0 for filler rows. The head looks at the hidden places alone. There are no segments: a row is one stretch of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from elastic.backend import Spec
from elastic.errors import RecipeError
from elastic.layers import one_layer, smoothed

Array = Any
EPS = 1e-12  # of the norms, as in the original


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `mask` is the share of tokens to predict; at least one a row is. `recompute` as in `nlp.gpt`."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    dropout: float = 0.0
    mask: float = 0.15
    smoothing: float = 0.0
    recompute: bool = False

    def __post_init__(self) -> None:
        for key in ("layers", "heads", "width", "context"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"model.{key} = {value!r} must be a whole number of at least 1.")
        if self.width % self.heads:
            raise RecipeError(f"model.width = {self.width} must be a multiple of model.heads = {self.heads}.")
        for key in ("dropout", "smoothing"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
                raise RecipeError(f"model.{key} = {value!r} must be a number of at least 0 and below 1.")
        if isinstance(self.mask, bool) or not isinstance(self.mask, (int, float)) or not 0.0 < self.mask < 1.0:
            raise RecipeError(f"model.mask = {self.mask!r} must be a number above 0 and below 1.")
        if not isinstance(self.recompute, bool):
            raise RecipeError(f"model.recompute = {self.recompute!r} must be true or false.")


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> BERT:
    """The model for a recipe's `[model]` keys and the data's facts ("vocab_size"). RecipeError names a bad key."""
    known = [field.name for field in fields(Config)]
    for key in config:
        if key not in known:
            raise RecipeError(f"model.{key} = {config[key]!r} is not a key of nlp.bert; its keys are {', '.join(known)}.")
    return BERT(Config(**config), int(info["vocab_size"]) + 1)


def specs(config: Config, num_tokens: int) -> dict[str, Spec]:
    """Every parameter by name. The last row of the embedding stands for a hidden token."""
    width, heads, d_head = config.width, config.heads, config.width // config.heads
    out = {"wte": Spec((num_tokens, width), ("vocab", "d_model")), "wpe": Spec((config.context, width), ("position", "d_model"))}

    def norm(name: str) -> None:
        out[f"{name}.weight"] = Spec((width,), ("d_model",), "ones")
        out[f"{name}.bias"] = Spec((width,), ("d_model",), "zeros")

    def dense(name: str, shape: tuple[int, ...], dims: tuple[str, ...], num_in: int = 1) -> None:
        out[f"{name}.weight"] = Spec(shape, dims)
        out[f"{name}.bias"] = Spec(shape[num_in:], dims[num_in:], "zeros")

    norm("ln_e")
    for i in range(config.layers):
        dense(f"h{i}.attn.qkv", (width, 3, heads, d_head), ("d_model", "qkv", "heads", "d_head"))
        dense(f"h{i}.attn.out", (heads, d_head, width), ("heads", "d_head", "d_model"), 2)
        norm(f"h{i}.ln1")
        dense(f"h{i}.mlp.up", (width, 4 * width), ("d_model", "d_ff"))
        dense(f"h{i}.mlp.down", (4 * width, width), ("d_ff", "d_model"))
        norm(f"h{i}.ln2")
    dense("head", (width, width), ("d_model", "d_out"))
    norm("ln_h")
    out["vocab.bias"] = Spec((num_tokens,), ("vocab",), "zeros")
    return out


class BERT:
    """The model behind `elastic.backend.Model`. It has no buffers. `num_tokens` counts the one for hidden tokens too."""

    def __init__(self, config: Config, num_tokens: int):
        self.config = config
        self.parameters = specs(config, num_tokens)
        self.buffers: dict[str, Spec] = {}

    def loss(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array], batch: Mapping[str, Array],
             seed: int) -> tuple[Array, Array, Mapping[str, Array]]:
        """The summed loss of hidden tokens, their number in real rows, and no new buffers."""
        scores, weights = forward(ops, params, batch, self.config, seed)
        total = ops.cross_entropy(scores, batch["targets"], weights)
        return smoothed(ops, total, scores, weights, self.config.smoothing), ops.sum(weights), {}

    def metrics(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array],
                batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """"loss" and "accuracy" on hidden tokens, without dropout and smoothing."""
        scores, weights = forward(ops, params, batch, self.config, None)
        count = ops.sum(weights)
        return {"loss": (ops.cross_entropy(scores, batch["targets"], weights), count),
                "accuracy": (ops.correct(scores, batch["targets"], weights), count)}


def forward(ops: Any, params: Mapping[str, Array], batch: Mapping[str, Array], config: Config, seed: int | None) -> tuple[Array, Array]:
    """(rows, hidden, vocab) logits at the hidden places and their weights (rows, hidden). `seed` None means no dropout."""
    rows, hidden = batch["places"].shape
    encoded = ops.reshape(encode(ops, params, batch["tokens"], config, seed), (rows * config.context, config.width))
    flat = ops.add(batch["places"], ops.constant(np.arange(rows, dtype=np.int64)[:, None] * config.context))
    x = ops.gelu(ops.contract("bnd,de->bne", ops.gather(encoded, flat), params["head.weight"], params["head.bias"]))
    x = ops.layer_norm(x, params["ln_h.weight"], params["ln_h.bias"], EPS)
    scores = ops.contract("bnd,vd->bnv", x, params["wte"], params["vocab.bias"])
    return scores, ops.multiply(ops.reshape(batch["row_weight"], (rows, 1)), ops.constant(np.ones((1, hidden))))


def encode(ops: Any, params: Mapping[str, Array], tokens: Array, config: Config, seed: int | None) -> Array:
    """(rows, context) tokens -> (rows, context, width)."""
    rate = 0.0 if seed is None else config.dropout

    def drop(x: Array, tag: str) -> Array:
        return ops.dropout(x, rate, seed, tag) if rate else x

    def norm(p: Mapping[str, Array], name: str, x: Array) -> Array:
        return ops.layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], EPS)

    def dense(p: Mapping[str, Array], equation: str, name: str, x: Array) -> Array:
        return ops.contract(equation, x, p[f"{name}.weight"], p[f"{name}.bias"])

    def layer(p: Mapping[str, Array], x: Array, h: str) -> Array:
        query, key, value = ops.unbind(dense(p, "btd,dqhe->btqhe", f"{h}.attn.qkv", x), 2)
        mixed = ops.attention(query, key, value, False, rate, 0 if seed is None else seed, f"{h}.attn.weights")
        x = norm(p, f"{h}.ln1", ops.add(x, drop(dense(p, "bthe,hed->btd", f"{h}.attn.out", mixed), f"{h}.attn")))
        inner = ops.gelu(dense(p, "btd,df->btf", f"{h}.mlp.up", x))
        return norm(p, f"{h}.ln2", ops.add(x, drop(dense(p, "btf,fd->btd", f"{h}.mlp.down", inner), f"{h}.mlp")))

    x = drop(norm(params, "ln_e", ops.add(ops.gather(params["wte"], tokens), params["wpe"])), "embedding")
    for i in range(config.layers):
        x = one_layer(ops, layer, params, f"h{i}", x, config.recompute and seed is not None)
    return x
