"""Vision transformers (Dosovitskiy et al. 2021): patches as tokens, learned positions, pre-norm, the mean of all places before the head.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch is as `vision.resnet` has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic.backend import Spec
from elastic.errors import RecipeError
from elastic.layers import one_layer
from vision import config as checks
from vision.metrics import loss_of, scores_of

Array = Any


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `patch` is the side of a patch in pixels, `mlp` the hidden width in multiples of `width`. `recompute`
    keeps what comes between layers alone and computes the rest again for the gradient (Chen et al. 2016).
    """

    layers: int = 6
    heads: int = 4
    width: int = 128
    patch: int = 4
    mlp: int = 4
    dropout: float = 0.0
    smoothing: float = 0.0
    recompute: bool = False

    def __post_init__(self) -> None:
        checks.whole(self, "layers", "heads", "width", "patch", "mlp")
        checks.share(self, "dropout", "smoothing")
        checks.flag(self, "recompute")
        if self.width % self.heads:
            raise RecipeError(f"model.width = {self.width} must be a multiple of model.heads = {self.heads}.")


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> ViT:
    """The model for a recipe's `[model]` keys and the data's facts ("shape", "num_classes"). RecipeError names a bad key."""
    read, (height, width, channels) = checks.read("vision.vit", Config, config), info["shape"]
    if height % read.patch or width % read.patch:
        raise RecipeError(f"model.patch = {read.patch} must divide the images' height {height} and width {width}.")
    return ViT(read, (height, width, channels), int(info["num_classes"]))


def specs(config: Config, shape: tuple[int, ...], num_classes: int) -> dict[str, Spec]:
    """Every parameter by name. A projection starts with the variance 1 / its inputs, whatever the width (a deviation of 0.02 learns small
    models slowly); one back into the residual stream smaller, by 1/sqrt(2 layers).
    """
    width, heads, d_head, patch = config.width, config.heads, config.width // config.heads, config.patch
    height, wide, channels = shape
    residual = 1.0 / math.sqrt(2 * config.layers)
    out = {
        "patch.weight": Spec((patch, patch, channels, width), ("kernel_h", "kernel_w", "channels_in", "d_model"), "normal",
                             1.0 / math.sqrt(patch * patch * channels)),
        "patch.bias": Spec((width,), ("d_model",), "zeros"),
        "position": Spec((height // patch * (wide // patch), width), ("position", "d_model")),
    }

    def norm(name: str) -> None:
        out[f"{name}.weight"] = Spec((width,), ("d_model",), "ones")
        out[f"{name}.bias"] = Spec((width,), ("d_model",), "zeros")

    def dense(name: str, shape: tuple[int, ...], dims: tuple[str, ...], num_in: int, scale: float = 1.0) -> None:
        out[f"{name}.weight"] = Spec(shape, dims, "normal", scale / math.sqrt(math.prod(shape[:num_in])))
        out[f"{name}.bias"] = Spec(shape[num_in:], dims[num_in:], "zeros")

    for i in range(config.layers):
        norm(f"h{i}.ln1")
        dense(f"h{i}.attn.qkv", (width, 3, heads, d_head), ("d_model", "qkv", "heads", "d_head"), 1)
        dense(f"h{i}.attn.out", (heads, d_head, width), ("heads", "d_head", "d_model"), 2, residual)
        norm(f"h{i}.ln2")
        dense(f"h{i}.mlp.up", (width, config.mlp * width), ("d_model", "d_ff"), 1)
        dense(f"h{i}.mlp.down", (config.mlp * width, width), ("d_ff", "d_model"), 1, residual)
    norm("ln_f")
    dense("head", (width, num_classes), ("d_model", "classes"), 1)
    return out


class ViT:
    """The model behind `elastic.backend.Model`. It has no buffers."""

    def __init__(self, config: Config, shape: tuple[int, ...], num_classes: int):
        self.config, self.shape, self.num_classes = config, shape, num_classes
        self.parameters = specs(config, shape, num_classes)
        self.buffers: dict[str, Spec] = {}

    def loss(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array], batch: Mapping[str, Array],
             seed: int) -> tuple[Array, Array, Mapping[str, Array]]:
        """The summed loss, the number of real rows, and no new buffers."""
        return *loss_of(ops, forward(ops, params, batch["image"], self.config, seed), batch, self.config.smoothing), {}

    def metrics(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array],
                batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """loss, accuracy and top5, without dropout."""
        return scores_of(ops, forward(ops, params, batch["image"], self.config, None), batch)


def forward(ops: Any, params: Mapping[str, Array], images: Array, config: Config, seed: int | None) -> Array:
    """(rows, height, width, channels) -> (rows, classes) logits. `seed` None means no dropout."""
    rate = 0.0 if seed is None else config.dropout

    def drop(x: Array, tag: str) -> Array:
        return ops.dropout(x, rate, seed, tag) if rate else x

    def norm(p: Mapping[str, Array], name: str, x: Array) -> Array:
        return ops.layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def dense(p: Mapping[str, Array], equation: str, name: str, x: Array) -> Array:
        return ops.contract(equation, x, p[f"{name}.weight"], p[f"{name}.bias"])

    def layer(p: Mapping[str, Array], x: Array, h: str) -> Array:
        query, key, value = ops.unbind(dense(p, "btd,dqhe->btqhe", f"{h}.attn.qkv", norm(p, f"{h}.ln1", x)), 2)
        mixed = ops.attention(query, key, value, False, rate, 0 if seed is None else seed, f"{h}.attn.weights")
        x = ops.add(x, drop(dense(p, "bthe,hed->btd", f"{h}.attn.out", mixed), f"{h}.attn"))
        hidden = ops.gelu(dense(p, "btd,df->btf", f"{h}.mlp.up", norm(p, f"{h}.ln2", x)))
        return ops.add(x, drop(dense(p, "btf,fd->btd", f"{h}.mlp.down", hidden), f"{h}.mlp"))

    patches = ops.conv2d(images, params["patch.weight"], params["patch.bias"], config.patch)
    x = ops.reshape(patches, (images.shape[0], -1, config.width))
    x = drop(ops.add(x, params["position"]), "embedding")
    for i in range(config.layers):
        x = one_layer(ops, layer, params, f"h{i}", x, config.recompute and seed is not None)
    return dense(params, "bd,dk->bk", "head", ops.mean(norm(params, "ln_f", x), (1,)))
