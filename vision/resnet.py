"""Residual networks (He et al. 2016), with batch or group norm, for large images and for small ones.

The model is a neutral function of named arrays; a framework enters through `ops`. A batch has "image" (rows, height,
width, channels), normalised, "label" (rows,) and "row_weight" (rows,), 0 for filler rows; see `vision.metrics`.

Batch norm's means and variances are buffers: each logical shard normalises by its own rows, and the platform moves the
running ones by the mean of what the shards moved them, weighted by their rows. Filler rows of a run's last batch count
in a shard's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic.errors import RecipeError, UserError
from elastic.model import config as checks
from elastic.model.backend import Spec
from vision.metrics import BIASES, head_bias, loss_of, scores_of

Array = Any
EXPANSION = 4  # a bottleneck's outer channels for each inner one


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `blocks` are the residual blocks of each stage: [2, 2, 2, 2] is ResNet-18, [3, 4, 6, 3]
    ResNet-34, and with `bottleneck` ResNet-50.

    `width` is the channels of the first stage; each further one halves the image and doubles them. The "large" stem, 7
    x 7 and pooled, quarters the image first; the "small" one, 3 x 3, does not. `momentum` is how much of a batch goes
    into batch norm's running statistics, `groups` the groups of group norm. `bias_init` "mean" starts the logits' bias
    at the logarithms of the classes' shares of the training images.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    bottleneck: bool = False
    stem: str = "large"
    norm: str = "batch"
    groups: int = field(default=8, metadata={"written": False})
    momentum: float = field(default=0.1, metadata={"written": False})
    smoothing: float = 0.0
    bias_init: str = "zeros"

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, (list, tuple)) or not self.blocks or not all(map(checks.is_whole, self.blocks)):
            raise RecipeError(f"model.blocks = {self.blocks!r} must be a list of whole numbers of at least 1, one a "
                              "stage, as [2, 2, 2, 2].")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        checks.whole(self, "width", "groups")
        checks.one_of(self, "bias_init", BIASES)
        checks.share(self, "momentum", "smoothing")
        checks.one_of(self, "stem", ("large", "small"))
        checks.one_of(self, "norm", ("batch", "group"))
        checks.flag(self, "bottleneck")
        if self.norm == "group":
            checks.multiple(self, "width", "groups")


@dataclass(frozen=True)
class Conv:
    """One convolution and the norm behind it."""

    name: str
    kernel: int
    num_in: int
    num_out: int
    stride: int = 1

    @property
    def names(self) -> tuple[str, str, str]:
        """Its own weight, the norm's weight and the norm's bias."""
        return f"{self.name}.weight", f"{self.name}.norm.weight", f"{self.name}.norm.bias"


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> ResNet:
    """The model for a recipe's `[model]` keys and the data's facts ("shape", "num_classes"). RecipeError names a bad
    key."""
    return ResNet(checks.read("vision.resnet", Config, config), tuple(info["shape"]), int(info["num_classes"]),
                  info.get("class_counts", ()))


def blocks_of(config: Config) -> list[tuple[list[Conv], Conv | None]]:
    """Of each residual block its convolutions, and what its input passes through to be added to its output, where their
    shapes differ.

    A bottleneck shrinks the image in its 3 x 3 convolution (Goyal et al. 2017, section 5.1).
    """
    out, num_in = [], config.width
    for stage, count in enumerate(config.blocks):
        inner = config.width << stage
        num_out = inner * EXPANSION if config.bottleneck else inner
        for place in range(count):
            name, stride = f"s{stage}.b{place}", 2 if stage and not place else 1
            if config.bottleneck:
                main = [Conv(f"{name}.conv1", 1, num_in, inner), Conv(f"{name}.conv2", 3, inner, inner, stride),
                        Conv(f"{name}.conv3", 1, inner, num_out)]
            else:
                main = [Conv(f"{name}.conv1", 3, num_in, inner, stride), Conv(f"{name}.conv2", 3, inner, num_out)]
            is_same = stride == 1 and num_in == num_out
            out.append((main, None if is_same else Conv(f"{name}.shortcut", 1, num_in, num_out, stride)))
            num_in = num_out
    return out


def stem_of(config: Config, channels: int) -> Conv:
    return Conv("stem", 7, channels, config.width,
                2) if config.stem == "large" else Conv("stem", 3, channels, config.width)


def specs(config: Config, channels: int, num_classes: int,
          counts: Sequence[int] = ()) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """Parameters and buffers by name. A block starts as the identity: its last norm's weight is 0 (Goyal et al. 2017,
    section 5.1)."""
    params: dict[str, Spec] = {}
    buffers: dict[str, Spec] = {}

    def add(conv: Conv, gain: str = "ones") -> None:
        weight, scale, shift = conv.names
        params[weight] = Spec((conv.kernel, conv.kernel, conv.num_in, conv.num_out),
                              ("kernel_h", "kernel_w", "channels_in", "channels"),
                              "normal", math.sqrt(2.0 / (conv.kernel ** 2 * conv.num_out)))
        params[scale] = Spec((conv.num_out,), ("channels",), gain)
        params[shift] = Spec((conv.num_out,), ("channels",), "zeros")
        if config.norm == "batch":
            buffers[f"{conv.name}.norm.mean"] = Spec((conv.num_out,), ("channels",), "zeros")
            buffers[f"{conv.name}.norm.var"] = Spec((conv.num_out,), ("channels",), "ones")

    add(stem_of(config, channels))
    for (*first, last), shortcut in blocks_of(config):
        for conv in first:
            add(conv)
        add(last, "zeros")
        if shortcut:
            add(shortcut)
    wide = last.num_out
    params["head.weight"] = Spec((wide, num_classes), ("channels", "classes"), "uniform", 1.0 / math.sqrt(wide))
    params["head.bias"] = head_bias(config, num_classes, counts)
    return params, buffers


class ResNet:
    """The model behind `elastic.model.backend.Model`."""

    def __init__(self, config: Config, shape: tuple[int, ...], num_classes: int, counts: Sequence[int] = ()):
        self.config, self.shape, self.num_classes = config, shape, num_classes
        self.parameters, self.buffers = specs(config, shape[-1], num_classes, counts)

    def loss(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array], batch: Mapping[str, Array],
             seed: int) -> tuple[Array, Array, Mapping[str, Array]]:
        """The summed loss, the number of real rows, and the statistics after this batch."""
        logits, new = self.forward(ops, params, state, batch["image"], True)
        return *loss_of(ops, logits, batch, self.config.smoothing), new

    def metrics(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array],
                batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """loss, accuracy and top5 by the running statistics."""
        return scores_of(ops, self.forward(ops, params, state, batch["image"], False)[0], batch)

    def forward(self, ops: Any, params: Mapping[str, Array], state: Mapping[str, Array], x: Array,
                training: bool) -> tuple[Array, dict[str, Array]]:
        """(rows, height, width, channels) -> (rows, classes) logits, and the new statistics."""
        config, new = self.config, dict[str, Array]()

        def pass_through(conv: Conv, x: Array) -> Array:
            weight, scale, shift = conv.names
            x = ops.conv2d(x, params[weight], stride=conv.stride, padding=conv.kernel // 2)
            if config.norm == "group":
                return ops.group_norm(x, config.groups, params[scale], params[shift])
            # the variance of one value: NaN in some frameworks, an error in others
            if training and math.prod(x.shape[:-1]) == 1:
                raise UserError(f'model.norm = "batch" needs several values of each channel, and "{conv.name}" gets '
                                'one, of one row a logical shard with 1 x 1 pixels; write model.norm = "group", fewer '
                                'elastic.logical_shards or a larger data.batch_size.')
            mean, var = f"{conv.name}.norm.mean", f"{conv.name}.norm.var"
            y, new[mean], new[var] = ops.batch_norm(x, params[scale], params[shift], state[mean], state[var], training,
                                                    config.momentum)
            return y

        x = ops.relu(pass_through(stem_of(config, self.shape[-1]), x))
        if config.stem == "large":
            x = ops.max_pool(x, 3, 2, 1)
        for (*first, last), shortcut in blocks_of(config):
            y = x
            for conv in first:
                y = ops.relu(pass_through(conv, y))
            y = pass_through(last, y)
            x = ops.relu(ops.add(y, pass_through(shortcut, x) if shortcut else x))
        return ops.contract("bc,ck->bk", ops.mean(x, (1, 2)), params["head.weight"], params["head.bias"]), new
