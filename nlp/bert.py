"""BERT's encoder and its masked-token head (Devlin et al. 2019): post-norm, learned positions, exact GELU, output tied to the embedding.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch has "tokens", integers (rows, context),
some of them hidden; "places" (rows, hidden), where in each row; "targets" (rows, hidden), what stood there; and "row_weight"
(rows,), 0 for filler rows. The head looks at the hidden places alone. There are no segments: a row is one stretch of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.model import keys
from elastic.model.backend import Spec
from elastic.model.layers import Chained, Layers, one_layer, smoothed

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
        keys.whole(self, "layers", "heads", "width", "context")
        keys.divided(self, "width", "heads")
        keys.share(self, "dropout", "smoothing")
        keys.need(self, "mask", keys.is_number(self.mask) and 0.0 < self.mask < 1.0, "a number above 0 and below 1")
        keys.flag(self, "recompute")


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> BERT:
    """The model for a recipe's `[model]` keys and the data's facts ("vocab_size"). RecipeError names a bad key."""
    return BERT(keys.read("nlp.bert", Config, config), int(info["vocab_size"]) + 1)


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


class BERT(Chained):
    """The model behind `elastic.model.backend.Chain`. `num_tokens` counts the one for hidden tokens too.

    What travels between its pieces is (rows, context, d_model), at the end logits (rows, hidden, vocab).
    """

    layout = {"heads": "tensor", "d_ff": "tensor", "vocab": "tensor"}

    def __init__(self, config: Config, num_tokens: int):
        self.config, self.num_tokens = config, num_tokens
        self.parameters = specs(config, num_tokens)
        self.pieces = ("embed", *(f"h{i}" for i in range(config.layers)), "head")

    def names(self, piece: str) -> tuple[str, ...]:
        """The embedding is the head's last product as well."""
        own = {"embed": ("wte", "wpe", "ln_e."), "head": ("wte", "head.", "ln_h.", "vocab.")}.get(piece, (f"{piece}.",))
        return tuple(name for name in self.parameters if name.startswith(own))

    def run(self, ops: Any, params: Mapping[str, Array], piece: str, x: Array | None, batch: Mapping[str, Array], seed: int | None) -> Array:
        layers = Layers(ops, False, self.config.dropout, seed, EPS)
        if piece == "embed":
            x = ops.add(ops.gather(params["wte"], batch["tokens"], "vocab", self.num_tokens), params["wpe"])
            return layers.drop(layers.norm(params, "ln_e", x), "embedding")
        if piece == "head":
            return self.head(ops, params, layers, x, batch["places"])
        return one_layer(ops, layers.post, params, piece, x, self.config.recompute and seed is not None)

    def head(self, ops: Any, params: Mapping[str, Array], layers: Layers, encoded: Array, places: Array) -> Array:
        rows, context = places.shape[0], self.config.context
        flat = ops.add(places, ops.constant(np.arange(rows, dtype=np.int64)[:, None] * context))
        x = ops.gather(ops.reshape(encoded, (rows * context, self.config.width)), flat)
        x = layers.norm(params, "ln_h", ops.gelu(ops.contract("bnd,de->bne", x, params["head.weight"], params["head.bias"])))
        return ops.contract("bnd,vd->bnv", ops.enter(x, "vocab"), params["wte"], params["vocab.bias"])

    def score(self, ops: Any, x: Array, batch: Mapping[str, Array], seed: int) -> tuple[Array, Array]:
        """The summed loss of hidden tokens and their number in real rows."""
        weights, smoothing = self.weights(ops, batch), self.config.smoothing
        total = ops.cross_entropy(x, batch["targets"], weights, "vocab", self.num_tokens)
        if smoothing:
            total = smoothed(ops, total, ops.collect(x, "vocab", self.num_tokens), weights, smoothing)
        return total, ops.sum(weights)

    def measure(self, ops: Any, x: Array, batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """"loss" and "accuracy" on hidden tokens, without smoothing."""
        weights = self.weights(ops, batch)
        count, whole = ops.sum(weights), ops.collect(x, "vocab", self.num_tokens)
        return {"loss": (ops.cross_entropy(whole, batch["targets"], weights), count),
                "accuracy": (ops.correct(whole, batch["targets"], weights), count)}

    def weights(self, ops: Any, batch: Mapping[str, Array]) -> Array:
        """(rows, hidden): those of the rows."""
        rows, hidden = batch["places"].shape
        return ops.multiply(ops.reshape(batch["row_weight"], (rows, 1)), ops.constant(np.ones((1, hidden))))
