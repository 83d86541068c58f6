"""BERT's encoder and its masked-token head (Devlin et al. 2019): post-norm, learned positions, exact GELU, output tied to the embedding.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch has "tokens", integers (rows,
context), some of them hidden; "places" (rows, hidden), where in each row; "targets" (rows, hidden), what stood there;
and "row_weight" (rows,), 0 for filler rows. The head looks at the hidden places alone. There are no segments: a row is
one piece of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.model import config as checks
from elastic.model.backend import Spec
from elastic.model.layers import Chained, Layers, Specs, one_layer
from nlp.metrics import loss_of, weights_of

Array = Any
EPS = 1e-12  # of the norms, as in the original


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `mask` is the share of tokens to predict; at least one a row is. `recompute` as in
    `nlp.gpt`."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    dropout: float = 0.0
    mask: float = 0.15
    smoothing: float = 0.0
    recompute: bool = False

    def __post_init__(self) -> None:
        checks.whole(self, "layers", "heads", "width", "context")
        checks.multiple(self, "width", "heads")
        checks.share(self, "dropout", "smoothing")
        checks.number(self, "mask", "a number above 0 and below 1", lambda value: 0.0 < value < 1.0)
        checks.flag(self, "recompute")


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> BERT:
    """The model for a recipe's `[model]` keys and the data's facts ("vocab_size"). RecipeError names a bad key."""
    return BERT(checks.read("nlp.bert", Config, config), int(info["vocab_size"]) + 1)


def specs(config: Config, num_tokens: int) -> dict[str, Spec]:
    """Every parameter by name. The last row of the embedding stands for a hidden token."""
    width, out = config.width, Specs()
    out["wte"] = Spec((num_tokens, width), ("vocab", "d_model"))
    out["wpe"] = Spec((config.context, width), ("position", "d_model"))
    out.norm("ln_e", width)
    for i in range(config.layers):
        out.attention(f"h{i}", width, config.heads)
        out.norm(f"h{i}.ln1", width)
        out.mlp(f"h{i}", width, 4 * width)
        out.norm(f"h{i}.ln2", width)
    out.dense("head", (width, width), ("d_model", "d_out"))
    out.norm("ln_h", width)
    out["vocab.bias"] = Spec((num_tokens,), ("vocab",), "zeros")
    return out


class BERT(Chained):
    """The model behind `elastic.model.backend.Chain`. `num_tokens` counts the one for hidden tokens too.

    What travels between its pieces is (rows, context, d_model), at the end logits (rows, hidden, vocab).
    """

    layout = {"heads": "tensor", "d_ff": "tensor", "vocab": "tensor"}
    # the embedding is the head's last product as well
    reads = {"embed": ("wte", "wpe", "ln_e."), "head": ("wte", "head.", "ln_h.", "vocab.")}

    def __init__(self, config: Config, num_tokens: int):
        self.config, self.num_tokens = config, num_tokens
        self.parameters = specs(config, num_tokens)
        self.pieces = ("embed", *(f"h{i}" for i in range(config.layers)), "head")

    def run(self, ops: Any, params: Mapping[str, Array], piece: str, x: Array | None, batch: Mapping[str, Array],
            seed: int | None) -> Array:
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
        x = layers.norm(params, "ln_h", ops.gelu(ops.contract("bnd,de->bne", x, params["head.weight"],
                                                              params["head.bias"])))
        return ops.contract("bnd,vd->bnv", ops.enter(x, "vocab"), params["wte"], params["vocab.bias"])

    def score(self, ops: Any, x: Array, batch: Mapping[str, Array], seed: int) -> tuple[Array, Array]:
        """The summed loss of hidden tokens and their number in real rows."""
        weights = weights_of(ops, batch["row_weight"], batch["places"].shape[1])
        return loss_of(ops, x, batch["targets"], weights, self.num_tokens, self.config.smoothing)

    def measure(self, ops: Any, x: Array, batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """"loss" and "accuracy" on hidden tokens, without smoothing."""
        weights = weights_of(ops, batch["row_weight"], batch["places"].shape[1])
        count, whole = ops.sum(weights), ops.collect(x, "vocab", self.num_tokens)
        return {"loss": (ops.cross_entropy(whole, batch["targets"], weights), count),
                "accuracy": (ops.correct(whole, batch["targets"], weights), count)}
