"""GPT as nanoGPT has it (Radford et al. 2019; Karpathy's nanoGPT, model.py): tied embedding and head, learned positions, pre-norm.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch has "tokens", integers (rows,
context + 1): the first `context` are the input, the last `context` the targets; and "row_weight" (rows,), 0 for filler
rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic.errors import RecipeError
from elastic.model import config as checks
from elastic.model.backend import Spec
from elastic.model.layers import Chained, Layers, Specs, one_layer
from nlp.experts import Experts
from nlp.metrics import loss_of, weights_of

Array = Any


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `bias` adds biases to the projections and norms; nanoGPT trains small models without.
    `recompute` keeps what comes between layers alone and computes the rest again for the gradient (Chen et al. 2016).
    With `experts`, every `expert_every`th layer has that many MLPs instead of one; for the other keys see
    `nlp.experts`.
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    dropout: float = 0.0
    bias: bool = field(default=False, metadata={"written": False})
    smoothing: float = 0.0
    recompute: bool = False
    experts: int = 0
    expert_every: int = 2
    top: int = 1
    capacity: float = 1.25
    balance: float = 0.01

    def __post_init__(self) -> None:
        checks.whole(self, "layers", "heads", "width", "context", "expert_every", "top")
        checks.whole(self, "experts", least=0)
        checks.multiple(self, "width", "heads")
        checks.share(self, "dropout", "smoothing")
        checks.flag(self, "bias", "recompute")
        checks.number(self, "capacity", "a finite number above 0", lambda value: 0 < value < math.inf)
        checks.number(self, "balance", "a finite number of at least 0", lambda value: 0 <= value < math.inf)
        if self.top > 2 or self.experts and self.top > self.experts:
            raise RecipeError(f"model.top = {self.top} must be 1 or 2, and no more than model.experts = "
                              f"{self.experts}.")
        if self.experts and self.expert_every > self.layers:
            raise RecipeError(f"model.expert_every = {self.expert_every} must be at most model.layers = {self.layers}, "
                              "or no layer has experts.")

    def has_experts(self, layer: int) -> bool:
        return self.experts > 0 and layer % self.expert_every == self.expert_every - 1


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> GPT:
    """The model for a recipe's `[model]` keys and the data's facts ("vocab_size"). RecipeError names a bad key."""
    return GPT(checks.read("nlp.gpt", Config, config), int(info["vocab_size"]))


def specs(config: Config, vocab_size: int) -> dict[str, Spec]:
    """Every parameter by name. Projections back into the residual stream start smaller, by 1/sqrt(2 layers)."""
    width, residual = config.width, 0.02 / math.sqrt(2 * config.layers)
    out = Specs(config.bias)
    out["wte"] = Spec((vocab_size, width), ("vocab", "d_model"))
    out["wpe"] = Spec((config.context, width), ("position", "d_model"))
    for i in range(config.layers):
        out.norm(f"h{i}.ln1", width)
        out.attention(f"h{i}", width, config.heads, scale_out=residual)
        out.norm(f"h{i}.ln2", width)
        if config.has_experts(i):
            num, wide = config.experts, 4 * width
            out[f"h{i}.moe.gate.weight"] = Spec((width, num), ("d_model", "experts"))
            out[f"h{i}.moe.up.weight"] = Spec((num, width, wide), ("expert", "d_model", "d_ff_expert"))
            out[f"h{i}.moe.down.weight"] = Spec((num, wide, width), ("expert", "d_ff_expert", "d_model"), "normal",
                                                residual)
        else:
            out.mlp(f"h{i}", width, 4 * width, scale_out=residual)
    out.norm("ln_f", width)
    return out


class GPT(Chained):
    """The model behind `elastic.model.backend.Chain`. What travels between its pieces is (rows, time, d_model), at the
    end logits."""

    reads = {"embed": ("wte", "wpe"), "head": ("wte", "ln_f.")}  # the embedding is the head as well

    def __init__(self, config: Config, vocab_size: int):
        self.config = config
        self.layout = {"heads": "tensor", "d_ff": "tensor", "vocab": "tensor"}
        if config.experts:
            self.layout |= {"expert": "expert", "d_ff_expert": "tensor"}
        self.vocab_size = vocab_size
        self.parameters = specs(config, vocab_size)
        self.pieces = ("embed", *(f"h{i}" for i in range(config.layers)), "head")

    def run(self, ops: Any, params: Mapping[str, Array], piece: str, x: Array | None, batch: Mapping[str, Array],
            seed: int | None) -> Array:
        if piece == "embed":
            tokens = batch["tokens"]
            return self.embed(ops, params, ops.narrow(tokens, 1, 0, tokens.shape[1] - 1), seed)
        layers = self.layers(ops, seed, batch)
        if piece == "head":
            return ops.contract("btd,vd->btv", ops.enter(layers.norm(params, "ln_f", x), "vocab"), params["wte"])
        return one_layer(ops, layers.pre, params, piece, x, self.config.recompute and seed is not None)

    def score(self, ops: Any, x: Array, batch: Mapping[str, Array], seed: int) -> tuple[Array, Array]:
        """The summed token loss and the number of real tokens."""
        return self.token_loss(ops, x, batch, self.config.smoothing)

    def measure(self, ops: Any, x: Array, batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """{"loss": (sum over tokens, number of real tokens)} without smoothing."""
        return {"loss": self.token_loss(ops, x, batch, 0.0)}

    def logits(self, ops: Any, params: Mapping[str, Array], tokens: Array) -> Array:
        """(rows, time) integers, time at most `context` -> (rows, time, vocab): scores of each next token."""
        x = self.through(ops, params, self.embed(ops, params, tokens, None), {}, None, 1)
        return ops.collect(x, "vocab", self.vocab_size)

    def layers(self, ops: Any, seed: int | None, batch: Mapping[str, Array]) -> Layers:
        config = self.config
        if not config.experts:
            return Layers(ops, True, config.dropout, seed)
        return Experts(ops, True, config.dropout, seed, top=config.top, capacity=config.capacity,
                       balance=config.balance,
                       weights=None if seed is None else batch["row_weight"])

    def embed(self, ops: Any, params: Mapping[str, Array], tokens: Array, seed: int | None) -> Array:
        time, positions = tokens.shape[1], params["wpe"]
        if time < self.config.context:
            positions = ops.narrow(positions, 0, 0, time)
        x = ops.add(ops.gather(params["wte"], tokens, "vocab", self.vocab_size), positions)
        return Layers(ops, True, self.config.dropout, seed).drop(x, "embedding")

    def token_loss(self, ops: Any, logits: Array, batch: Mapping[str, Array], smoothing: float) -> tuple[Array, Array]:
        time = logits.shape[1]
        weights = weights_of(ops, batch["row_weight"], time)
        return loss_of(ops, logits, ops.narrow(batch["tokens"], 1, 1, time), weights, self.vocab_size, smoothing)


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
