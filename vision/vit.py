"""Vision transformers (Dosovitskiy et al. 2021): patches as tokens, learned positions, pre-norm, the mean of all places before the head.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch is as `vision.resnet` has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.errors import RecipeError
from elastic.model import config as checks
from elastic.model.backend import Spec
from elastic.model.layers import Chained, Layers, Specs, one_layer
from vision.metrics import BIASES, head_bias, loss_of, scores_of

Array = Any


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `patch` is the side of a patch in pixels, `mlp` the hidden width in multiples of `width`.
    `recompute` keeps what comes between layers alone and computes the rest again for the gradient (Chen et al. 2016).
    `bias_init` as `vision.resnet` has it.
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
        checks.whole(self, "layers", "heads", "width", "patch", "mlp")
        checks.one_of(self, "bias_init", BIASES)
        checks.share(self, "dropout", "smoothing")
        checks.flag(self, "recompute")
        checks.multiple(self, "width", "heads")


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> ViT:
    """The model for a recipe's `[model]` keys and the data's facts ("shape", "num_classes"). RecipeError names a bad
    key."""
    read, (height, width, channels) = checks.read("vision.vit", Config, config), info["shape"]
    if height % read.patch or width % read.patch:
        raise RecipeError(f"model.patch = {read.patch} must divide the images' height {height} and width {width}.")
    return ViT(read, (height, width, channels), int(info["num_classes"]), info.get("class_counts", ()))


def specs(config: Config, shape: tuple[int, ...], num_classes: int, counts: Sequence[int] = ()) -> dict[str, Spec]:
    """Every parameter by name. A projection starts with the variance 1 / its inputs, whatever the width (a deviation of
    0.02 learns small models slowly); one back into the residual stream smaller, by 1/sqrt(2 layers).
    """
    width, patch, (height, wide, channels) = config.width, config.patch, shape
    scale, residual, out = 1.0 / math.sqrt(width), 1.0 / math.sqrt(2 * config.layers), Specs()
    out.dense("patch", (patch, patch, channels, width), ("kernel_h", "kernel_w", "channels_in", "d_model"), 3,
              1.0 / math.sqrt(patch * patch * channels))
    out["position"] = Spec((height // patch * (wide // patch), width), ("position", "d_model"))
    for i in range(config.layers):
        out.norm(f"h{i}.ln1", width)
        out.attention(f"h{i}", width, config.heads, scale, residual / math.sqrt(width))
        out.norm(f"h{i}.ln2", width)
        out.mlp(f"h{i}", width, config.mlp * width, scale, residual / math.sqrt(config.mlp * width))
    out.norm("ln_f", width)
    out.dense("head", (width, num_classes), ("d_model", "classes"), 1, scale)
    out["head.bias"] = head_bias(config, num_classes, counts)
    return out


class ViT(Chained):
    """The model behind `elastic.model.backend.Chain`. What travels between its pieces is (rows, places, d_model), at
    the end logits."""

    layout = {"heads": "tensor", "d_ff": "tensor"}
    reads = {"embed": ("patch.", "position"), "head": ("ln_f.", "head.")}

    def __init__(self, config: Config, shape: tuple[int, ...], num_classes: int, counts: Sequence[int] = ()):
        self.config, self.shape, self.num_classes = config, shape, num_classes
        self.parameters = specs(config, shape, num_classes, counts)
        self.pieces = ("embed", *(f"h{i}" for i in range(config.layers)), "head")

    def run(self, ops: Any, params: Mapping[str, Array], piece: str, x: Array | None, batch: Mapping[str, Array],
            seed: int | None) -> Array:
        layers = Layers(ops, False, self.config.dropout, seed)
        if piece == "embed":
            images = batch["image"]
            patches = ops.conv2d(images, params["patch.weight"], params["patch.bias"], self.config.patch)
            x = ops.reshape(patches, (images.shape[0], -1, self.config.width))
            return layers.drop(ops.add(x, params["position"]), "embedding")
        if piece == "head":
            return ops.contract("bd,dk->bk", ops.mean(layers.norm(params, "ln_f", x), (1,)), params["head.weight"],
                                params["head.bias"])
        return one_layer(ops, layers.pre, params, piece, x, self.config.recompute and seed is not None)

    def score(self, ops: Any, x: Array, batch: Mapping[str, Array], seed: int) -> tuple[Array, Array]:
        """The summed loss and the number of real rows."""
        return loss_of(ops, x, batch, self.config.smoothing)

    def measure(self, ops: Any, x: Array, batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """loss, accuracy and top5."""
        return scores_of(ops, x, batch)
