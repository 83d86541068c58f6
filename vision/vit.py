"""Vision transformers (Dosovitskiy et al. 2021): patches as tokens, learned positions, pre-norm, the mean of all places before the head.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch is as `vision.resnet` has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.errors import RecipeError
from elastic.model import keys
from elastic.model.backend import Spec
from elastic.model.layers import Chained, Layers, one_layer
from vision.config import BIASES, head_bias
from vision.metrics import loss_of, scores_of

Array = Any


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `patch` is the side of a patch in pixels, `mlp` the hidden width in multiples of `width`. `recompute`
    keeps what comes between layers alone and computes the rest again for the gradient (Chen et al. 2016). `bias_init` as `vision.resnet` has it.
    """

    layers: int = 6
    heads: int = 4
    width: int = 128
    patch: int = 4
    mlp: int = 4
    dropout: float = 0.0
    smoothing: float = 0.0
    recompute: bool = False
    bias_init: str = "zeros"

    def __post_init__(self) -> None:
        keys.whole(self, "layers", "heads", "width", "patch", "mlp")
        keys.one_of(self, "bias_init", BIASES)
        keys.share(self, "dropout", "smoothing")
        keys.flag(self, "recompute")
        keys.divided(self, "width", "heads")


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> ViT:
    """The model for a recipe's `[model]` keys and the data's facts ("shape", "num_classes"). RecipeError names a bad key."""
    read, (height, width, channels) = keys.read("vision.vit", Config, config), info["shape"]
    if height % read.patch or width % read.patch:
        raise RecipeError(f"model.patch = {read.patch} must divide the images' height {height} and width {width}.")
    return ViT(read, (height, width, channels), int(info["num_classes"]), info.get("class_counts", ()))


def specs(config: Config, shape: tuple[int, ...], num_classes: int, counts: Sequence[int] = ()) -> dict[str, Spec]:
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
    out["head.bias"] = head_bias(config, num_classes, counts)
    return out


class ViT(Chained):
    """The model behind `elastic.model.backend.Chain`. What travels between its pieces is (rows, places, d_model), at the end logits."""

    layout = {"heads": "tensor", "d_ff": "tensor"}

    def __init__(self, config: Config, shape: tuple[int, ...], num_classes: int, counts: Sequence[int] = ()):
        self.config, self.shape, self.num_classes = config, shape, num_classes
        self.parameters = specs(config, shape, num_classes, counts)
        self.pieces = ("embed", *(f"h{i}" for i in range(config.layers)), "head")

    def names(self, piece: str) -> tuple[str, ...]:
        own = {"embed": ("patch.", "position"), "head": ("ln_f.", "head.")}.get(piece, (f"{piece}.",))
        return tuple(name for name in self.parameters if name.startswith(own))

    def run(self, ops: Any, params: Mapping[str, Array], piece: str, x: Array | None, batch: Mapping[str, Array], seed: int | None) -> Array:
        layers = Layers(ops, False, self.config.dropout, seed)
        if piece == "embed":
            images = batch["image"]
            patches = ops.conv2d(images, params["patch.weight"], params["patch.bias"], self.config.patch)
            x = ops.reshape(patches, (images.shape[0], -1, self.config.width))
            return layers.drop(ops.add(x, params["position"]), "embedding")
        if piece == "head":
            return ops.contract("bd,dk->bk", ops.mean(layers.norm(params, "ln_f", x), (1,)), params["head.weight"], params["head.bias"])
        return one_layer(ops, layers.pre, params, piece, x, self.config.recompute and seed is not None)

    def score(self, ops: Any, x: Array, batch: Mapping[str, Array], seed: int) -> tuple[Array, Array]:
        """The summed loss and the number of real rows."""
        return loss_of(ops, x, batch, self.config.smoothing)

    def measure(self, ops: Any, x: Array, batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """loss, accuracy and top5."""
        return scores_of(ops, x, batch)
