"""GPT as nanoGPT has it (Radford et al. 2019; Karpathy's nanoGPT, model.py): tied embedding and head, learned positions, pre-norm.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch has "tokens", integers (rows,
context + 1): the first `context` are the input, the last `context` the targets; and "row_weight" (rows,), 0 for filler rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from elastic.backend import Spec
from elastic.errors import RecipeError
from elastic.layers import one_layer, smoothed

Array = Any


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `bias` adds biases to the projections and norms; nanoGPT trains small models without. `recompute` keeps what
    comes between layers alone and computes the rest again for the gradient (Chen et al. 2016).
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    dropout: float = 0.0
    bias: bool = False
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
        for key in ("bias", "recompute"):
            if not isinstance(getattr(self, key), bool):
                raise RecipeError(f"model.{key} = {getattr(self, key)!r} must be true or false.")


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> GPT:
    """The model for a recipe's `[model]` keys and the data's facts ("vocab_size"). RecipeError names a bad key."""
    known = [field.name for field in fields(Config)]
    for key in config:
        if key not in known:
            raise RecipeError(f"model.{key} = {config[key]!r} is not a key of nlp.gpt; its keys are {', '.join(known)}.")
    return GPT(Config(**config), int(info["vocab_size"]))


def specs(config: Config, vocab_size: int) -> dict[str, Spec]:
    """Every parameter by name. Projections back into the residual stream start smaller, by 1/sqrt(2 layers)."""
    width, heads, d_head = config.width, config.heads, config.width // config.heads
    residual = 0.02 / math.sqrt(2 * config.layers)
    out = {
        "wte": Spec((vocab_size, width), ("vocab", "d_model")),
        "wpe": Spec((config.context, width), ("position", "d_model")),
    }

    def norm(name: str) -> None:
        out[f"{name}.weight"] = Spec((width,), ("d_model",), "ones")
        if config.bias:
            out[f"{name}.bias"] = Spec((width,), ("d_model",), "zeros")

    def dense(name: str, shape: tuple[int, ...], dims: tuple[str, ...], num_in: int, scale: float = 0.02) -> None:
        out[f"{name}.weight"] = Spec(shape, dims, "normal", scale)
        if config.bias:
            out[f"{name}.bias"] = Spec(shape[num_in:], dims[num_in:], "zeros")

    for i in range(config.layers):
        norm(f"h{i}.ln1")
        dense(f"h{i}.attn.qkv", (width, 3, heads, d_head), ("d_model", "qkv", "heads", "d_head"), 1)
        dense(f"h{i}.attn.out", (heads, d_head, width), ("heads", "d_head", "d_model"), 2, residual)
        norm(f"h{i}.ln2")
        dense(f"h{i}.mlp.up", (width, 4 * width), ("d_model", "d_ff"), 1)
        dense(f"h{i}.mlp.down", (4 * width, width), ("d_ff", "d_model"), 1, residual)
    norm("ln_f")
    return out


class GPT:
    """The model behind `elastic.backend.Model`. It has no buffers."""

    def __init__(self, config: Config, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size
        self.parameters = specs(config, vocab_size)
        self.buffers: dict[str, Spec] = {}

    def loss(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array], batch: Mapping[str, Array],
             seed: int) -> tuple[Array, Array, Mapping[str, Array]]:
        """The summed token loss, the number of real tokens, and no new buffers."""
        total, weight = token_loss(ops, params, batch, self.config, seed)
        return total, weight, {}

    def metrics(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array],
                batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """{"loss": (sum over tokens, number of real tokens)} without dropout and smoothing."""
        return {"loss": token_loss(ops, params, batch, self.config, None)}

    def logits(self, ops: Any, params: Mapping[str, Array], tokens: Array) -> Array:
        """(rows, time) integers, time at most `context` -> (rows, time, vocab): scores of each next token."""
        return forward(ops, params, tokens, self.config, None)


def token_loss(ops: Any, params: Mapping[str, Array], batch: Mapping[str, Array], config: Config,
               seed: int | None) -> tuple[Array, Array]:
    tokens = batch["tokens"]
    rows, time = tokens.shape[0], tokens.shape[1] - 1
    logits = forward(ops, params, ops.narrow(tokens, 1, 0, time), config, seed)
    weights = ops.multiply(ops.reshape(batch["row_weight"], (rows, 1)), ops.constant(np.ones((1, time))))
    total = ops.cross_entropy(logits, ops.narrow(tokens, 1, 1, time), weights)
    return smoothed(ops, total, logits, weights, 0.0 if seed is None else config.smoothing), ops.sum(weights)


def forward(ops: Any, params: Mapping[str, Array], tokens: Array, config: Config, seed: int | None) -> Array:
    """(rows, time) tokens -> (rows, time, vocab) logits. `seed` None means no dropout."""
    rate = 0.0 if seed is None else config.dropout

    def drop(x: Array, tag: str) -> Array:
        return ops.dropout(x, rate, seed, tag) if rate else x

    def norm(p: Mapping[str, Array], name: str, x: Array) -> Array:
        return ops.layer_norm(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def dense(p: Mapping[str, Array], equation: str, name: str, x: Array) -> Array:
        return ops.contract(equation, x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def layer(p: Mapping[str, Array], x: Array, h: str) -> Array:
        query, key, value = ops.unbind(dense(p, "btd,dqhe->btqhe", f"{h}.attn.qkv", norm(p, f"{h}.ln1", x)), 2)
        mixed = ops.attention(query, key, value, True, rate, 0 if seed is None else seed, f"{h}.attn.weights")
        x = ops.add(x, drop(dense(p, "bthe,hed->btd", f"{h}.attn.out", mixed), f"{h}.attn"))
        hidden = ops.gelu(dense(p, "btd,df->btf", f"{h}.mlp.up", norm(p, f"{h}.ln2", x)))
        return ops.add(x, drop(dense(p, "btf,fd->btd", f"{h}.mlp.down", hidden), f"{h}.mlp"))

    time, positions = tokens.shape[1], params["wpe"]
    if time < config.context:
        positions = ops.narrow(positions, 0, 0, time)
    x = drop(ops.add(ops.gather(params["wte"], tokens), positions), "embedding")
    for i in range(config.layers):
        x = one_layer(ops, layer, params, f"h{i}", x, config.recompute and seed is not None)
    return ops.contract("btd,vd->btv", norm(params, "ln_f", x), params["wte"])


def generate(logits_of: Callable[[np.ndarray], np.ndarray], prompt: list[int], num_tokens: int, context: int,
             temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> list[int]:
    """`num_tokens` tokens that go on after `prompt` (at least one token), drawn one by one.

    `logits_of` maps (1, time) int64 with time <= context to (1, time, vocab). Temperature 0 takes the likeliest.
    """
    if not prompt:
        raise ValueError("a prompt needs at least one token")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature = {temperature} must be at least 0 and top_k = {top_k} at least 1")
    generator = np.random.Generator(np.random.Philox(key=seed))
    tokens = list(prompt)
    for _ in range(num_tokens):
        scores = np.asarray(logits_of(np.asarray([tokens[-context:]], np.int64)), np.float64)[0, -1]
        tokens.append(choose(scores, temperature, top_k, generator))
    return tokens[len(prompt):]


def choose(scores: np.ndarray, temperature: float, top_k: int | None, generator: np.random.Generator) -> int:
    """One token id drawn from softmax(scores / temperature) over the `top_k` likeliest."""
    if temperature == 0:
        return int(scores.argmax())
    if top_k is not None and top_k < scores.size:
        scores = np.where(scores < np.sort(scores)[-top_k], -np.inf, scores)
    weights = np.exp((scores - scores.max()) / temperature)
    return int(generator.choice(scores.size, p=weights / weights.sum()))
