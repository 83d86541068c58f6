"""Models for tables of categories and numbers. By `arch`:

    dlrm   numbers through an MLP, embeddings of categories, dot products of every pair, an MLP on top (Naumov et al.
    2019)
    dcn    cross layers over numbers and embeddings, an MLP on top (Wang et al. 2021, DCN-V2, stacked)
    mf     factorisation machine (Rendle 2010); with two categories and no numbers, matrix factorisation with biases
    lr     logistic regression

The model is a neutral function of named arrays; a framework enters through `ops`. A batch has "label" (rows,),
"numeric" (rows, columns) and "categorical" (rows, columns), rows of one table of all columns; and "row_weight" (rows,),
0 for filler rows. What lies in embedding tables on workers has been looked up: "rows/COLUMN" (rows, width) among the
parameters is the vector of a column's value, or the pooled one of its list, and counts as one more column. mf reads
single weights beside it, "rows/COLUMN.linear" (rows, 1), which start from zeros as the dense ones do; for lr
"rows/COLUMN" is (rows, 1) itself. So its linear part has a table of its own: one row of both would start it from noise,
and weigh a weight and a vector alike in a row-wise optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from elastic.errors import RecipeError
from elastic.model import config as checks
from elastic.model.backend import Spec
from elastic.model.layers import Chained, dense_from, dense_into, part_tag
from elastic.model.tally import Tally
from elastic.tables.placing import LINEAR, placed
from recommender.metrics import Curve, Errors, Lists

Array = Any
ARCHS = ("dlrm", "dcn", "mf", "lr")
LOSSES = ("binary", "squared")
BIASES = ("zeros", "mean")
LEAST_SHARE = 1e-6  # of positives, that log-odds stand for


@dataclass(frozen=True)
class Config:
    """The keys of `[model]`. `bottom` and `top` are widths of hidden layers; `layers` counts dcn's cross layers.
    `embedding_init` is how the rows of embeddings start, "normal:DEVIATION" or "uniform:LIMIT", "" for
    normal:1/sqrt(width); `bias_init` how the last bias does, "zeros" or "mean", the labels' mean in the training rows
    (their log-odds under the binary loss).
    """

    arch: str = "dlrm"
    bottom: Sequence[int] = (64,)
    top: Sequence[int] = (64, 32)
    layers: int = 2
    dropout: float = 0.0
    loss: str = "binary"
    embedding_init: str = ""
    bias_init: str = "zeros"

    def __post_init__(self) -> None:
        for key, choices in (("arch", ARCHS), ("loss", LOSSES), ("bias_init", BIASES)):
            checks.one_of(self, key, choices)
        for key in ("bottom", "top"):
            widths = getattr(self, key)
            if not isinstance(widths, (list, tuple)) or not all(map(checks.is_whole, widths)):
                raise RecipeError(f"model.{key} = {widths!r} must be a list of whole numbers of at least 1.")
        checks.whole(self, "layers")
        checks.share(self, "dropout")
        self.embedding_start(1)

    def embedding_start(self, width: int) -> tuple[str, float]:
        """`init` and `scale` of a `Spec`."""
        text = self.embedding_init if self.embedding_init != "" else f"normal:{1 / math.sqrt(width)}"
        kind, _, number = text.partition(":") if isinstance(text, str) else ("", "", "")
        try:
            scale = float(number)
        except ValueError:
            scale = -1.0
        if kind not in ("normal", "uniform") or not 0.0 <= scale < math.inf:
            raise RecipeError(f'model.embedding_init = {self.embedding_init!r} must be "normal:DEVIATION" or '
                              '"uniform:LIMIT", as "uniform:0.05".')
        return kind, scale


@dataclass(frozen=True)
class Columns:
    """What the data says: rows of each dense categorical column's embedding, the number of numeric columns, the
    embedding's width, and where the labels lie: their mean in the training rows. Of features that lie in embedding
    tables, `vectors` have the widths by name, and `weights` are the names of the single weights."""

    sizes: tuple[int, ...]
    num_numeric: int
    width: int
    label_mean: float = 0.0
    vectors: Mapping[str, int] = field(default_factory=dict)
    weights: tuple[str, ...] = ()

    @property
    def num_vectors(self) -> int:
        return len(self.sizes) + len(self.vectors)


def columns_of(info: Mapping[str, Any], arch: str) -> Columns:
    """From the data's facts; features in the order of their names."""
    places, sizes = placed(info), tuple(info["sizes"])
    facts = int(info["num_numeric"]), int(info["embedding_dim"]), float(info.get("label_mean", 0.0))
    if places is None:
        return Columns(sizes, *facts)
    looks = sorted(places.looks, key=lambda look: look.name)
    weights = tuple(look.name for look in looks if arch == "lr" or look.table.endswith(LINEAR))
    return Columns(tuple(sizes[number] for number in places.dense), *facts,
                   {look.name: places.width(look) for look in looks if look.name not in weights}, weights)


def build(config: Mapping[str, Any], info: Mapping[str, Any]) -> Recommender:
    """The model for a recipe's `[model]` keys and the data's facts. RecipeError names a bad key."""
    read = checks.read("recommender.dlrm", Config, config)
    columns = columns_of(info, read.arch)
    if read.arch == "dlrm" and not columns.num_vectors:
        raise RecipeError('data.categorical is missing; model.arch = "dlrm" needs at least one: add it, or write '
                          'model.arch = "dcn" or "lr".')
    return Recommender(read, columns, (int(info["num_eval_rows"]), int(info["top"])) if info.get("top") else None)


def specs(config: Config, columns: Columns) -> dict[str, Spec]:
    """Every parameter by name. Dense layers start as He et al. 2015, embeddings at 1/sqrt(width)."""
    out: dict[str, Spec] = {}
    rows, numbers, width = sum(columns.sizes), columns.num_numeric, columns.width

    def dense(name: str, num_in: int, num_out: int, gain: float = 2.0,
              dims: tuple[str, str] = ("d_in", "d_out")) -> int:
        out[f"{name}.weight"] = Spec((num_in, num_out), dims, "normal", math.sqrt(gain / num_in))
        out[f"{name}.bias"] = Spec((num_out,), dims[1:], "zeros")
        return num_out

    def mlp(num_in: int, names: Sequence[str], widths: Sequence[int]) -> int:
        for (name, (reads, makes)), num_out in zip(paired(names).items(), widths, strict=True):
            num_in = dense(name, num_in, num_out, 1.0 if name == "out" else 2.0, (reads or "d_in", makes or "d_out"))
        return num_in

    if config.arch in ("mf", "lr"):
        if rows:
            out["linear.categorical"] = Spec((rows, 1), ("table_row", "one"), "zeros")
        if numbers:
            out["linear.numeric"] = Spec((numbers, 1), ("numeric", "one"), "zeros")
        out["bias"] = Spec((1,), ("one",), "zeros")
    if config.arch != "lr" and rows:
        out["embedding"] = Spec((rows, width), ("table_row", "d_embedding"), *config.embedding_start(width))
    if config.arch == "mf" and numbers:
        out["factors"] = Spec((numbers, width), ("numeric", "d_embedding"), "normal", 1 / math.sqrt(width))
    if config.arch == "dlrm":
        if numbers:
            mlp(numbers, bottom_layers(config), (*config.bottom, width))
        count = columns.num_vectors + bool(numbers)
        mlp((width if numbers else 0) + count * (count - 1) // 2 + (0 if count > 1 else width), top_layers(config),
            (*config.top, 1))
    if config.arch == "dcn":
        total = numbers + len(columns.sizes) * width + sum(columns.vectors.values())
        for i in range(config.layers):
            dense(f"cross{i}", total, total, 1.0)
        mlp(total, top_layers(config), (*config.top, 1))
    if config.bias_init == "mean":
        name = "bias" if "bias" in out else "out.bias"
        out[name] = replace(out[name], init="values", values=(start_of(config, columns.label_mean),))
    return out


def start_of(config: Config, mean: float) -> float:
    """The score that stands for labels of this mean."""
    if config.loss == "squared":
        return mean
    share = min(max(mean, LEAST_SHARE), 1 - LEAST_SHARE)
    return math.log(share / (1 - share))


def bottom_layers(config: Config) -> list[str]:
    return [f"bottom{i}" for i in range(len(config.bottom) + 1)]


def top_layers(config: Config) -> list[str]:
    return [*(f"top{i}" for i in range(len(config.top))), "out"]


def paired(layers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Of dense layers one after the other, the dim by which each one's input may be split and that of its result, ""
    where it is whole.

    Two and two split what lies between them, a dim called as the first (Shoeybi et al. 2019, section 3); an odd last
    one stays whole.
    """
    out = dict.fromkeys(layers, ("", ""))
    for first, second in zip(layers[::2], layers[1::2], strict=False):
        out[first], out[second] = ("", first), (first, "")
    return out


class Recommender(Chained):
    """The model behind `elastic.model.backend.Chain`. `lists`: rows to evaluate on in lists, and how many of each
    count.

    What travels between its pieces is (rows, width): of the layer before, or all that the layers on top read; at the
    end scores (rows,), log-odds, or under the squared loss the value itself.
    """

    reads = {"interact": ("linear.", "bias", "embedding", "factors", "bottom", "cross")}

    def __init__(self, config: Config, columns: Columns, lists: tuple[int, int] | None = None):
        self.config, self.columns, self.lists = config, columns, lists
        self.parameters = specs(config, columns)
        self.pieces = ("interact", *(top_layers(config) if config.arch in ("dlrm", "dcn") else ()))
        splits = ("table_row", *paired(bottom_layers(config)), *paired(top_layers(config)))
        self.layout = {dim: "tensor" for spec in self.parameters.values() for dim in spec.dims if dim in splits}

    def run(self, ops: Any, params: Mapping[str, Array], piece: str, x: Array | None, batch: Mapping[str, Array],
            seed: int | None) -> Array:
        rows = batch["label"].shape[0]
        p = Pass(ops, params, batch, self.config, self.columns, rows, seed)
        if piece == "interact":
            x = {"dlrm": dlrm, "dcn": dcn, "mf": factorised, "lr": linear}[self.config.arch](p)
        else:
            x = p.dense(piece, x) if piece == "out" else p.layer(piece, x)
        return ops.reshape(x, (rows,)) if piece == self.pieces[-1] else x

    def score(self, ops: Any, x: Array, batch: Mapping[str, Array], seed: int) -> tuple[Array, Array]:
        """The summed loss and the number of real rows."""
        measure = ops.binary_cross_entropy if self.config.loss == "binary" else ops.squared_error
        return measure(x, batch["label"], batch["row_weight"]), ops.sum(batch["row_weight"])

    def measure(self, ops: Any, x: Array, batch: Mapping[str, Array]) -> Mapping[str, tuple[Array, Array]]:
        """"loss" is the log-loss or the mean square error; with it the share of positives, or the mean absolute error.
        """
        total, weight = self.score(ops, x, batch, 0)
        if self.config.loss == "binary":
            return {"loss": (total, weight), "score": (x, weight),
                    "base_rate": (ops.sum(ops.multiply(batch["label"], batch["row_weight"])), weight)}
        off = ops.subtract(x, batch["label"])
        size = ops.add(ops.relu(off), ops.relu(ops.multiply(off, -1.0)))
        return {"loss": (total, weight), "score": (x, weight),
                "mae": (ops.sum(ops.multiply(size, batch["row_weight"])), weight)}

    def tally(self) -> Tally:
        is_binary = self.config.loss == "binary"
        tally = Curve() if is_binary else Errors()
        return Lists(tally, *self.lists, is_binary) if self.lists else tally


@dataclass(frozen=True)
class Pass:
    """What the parts of one forward pass share."""

    ops: Any
    params: Mapping[str, Array]
    batch: Mapping[str, Array]
    config: Config
    columns: Columns
    rows: int
    seed: int | None

    @property
    def splits(self) -> dict[str, tuple[str, str]]:
        return paired(bottom_layers(self.config)) | paired(top_layers(self.config))

    def dense(self, name: str, x: Array) -> Array:
        reads, makes = self.splits.get(name, ("", ""))
        if reads:
            return dense_from(self.ops, self.params, "ni,io->no", name, x, reads)
        return dense_into(self.ops, self.params, "ni,io->no", name, x, makes)

    def layer(self, name: str, x: Array) -> Array:
        x = self.ops.relu(self.dense(name, x))
        if self.config.dropout and self.seed is not None:
            x = self.ops.dropout(x, self.config.dropout, self.seed, part_tag(self.ops, name, self.splits[name][1]))
        return x

    def rows_of(self, table: str) -> Array:
        """(rows, columns, width) of the batch's categories."""
        return self.ops.gather(self.params[table], self.batch["categorical"], "table_row", sum(self.columns.sizes))

    def looked_up(self) -> list[Array]:
        """(rows, width) of each feature in embedding tables."""
        return [self.params[f"rows/{name}"] for name in self.columns.vectors]

    def vectors(self) -> list[Array]:
        """(rows, columns, width) of the dense categories, if there are any, and of each feature in embedding tables."""
        dense = [self.rows_of("embedding")] if self.columns.sizes else []
        return dense + [self.ops.reshape(found, (self.rows, 1, self.columns.width)) for found in self.looked_up()]

    def together(self, parts: Sequence[Array], axis: int) -> Array:
        return parts[0] if len(parts) == 1 else self.ops.concatenate(parts, axis)


def dlrm(p: Pass) -> Array:
    ops, width = p.ops, p.columns.width
    vectors, parts = p.vectors(), []
    if p.columns.num_numeric:
        numbers = p.batch["numeric"]
        for name in bottom_layers(p.config):
            numbers = p.layer(name, numbers)
        vectors.insert(0, ops.reshape(numbers, (p.rows, 1, width)))
        parts.append(numbers)
    together = p.together(vectors, 1)
    count = together.shape[1]
    if count > 1:
        parts.append(pairs(ops, together, p.rows, count))
    elif not parts:
        parts.append(ops.reshape(together, (p.rows, width)))
    return p.together(parts, 1)


def pairs(ops: Any, vectors: Array, rows: int, count: int) -> Array:
    """(rows, count, width) -> (rows, count (count - 1) / 2): the dot product of every pair."""
    dots = ops.reshape(ops.contract("nid,njd->nij", vectors, vectors), (rows, count * count))
    first, second = np.tril_indices(count, -1)
    places = ops.constant((first * count + second).astype(np.int64))
    return ops.transpose(ops.gather(ops.transpose(dots, (1, 0)), places), (1, 0))


def dcn(p: Pass) -> Array:
    ops = p.ops
    parts = [p.batch["numeric"]] if p.columns.num_numeric else []
    if p.columns.sizes:
        parts.append(ops.reshape(p.rows_of("embedding"), (p.rows, len(p.columns.sizes) * p.columns.width)))
    parts += p.looked_up()
    first = x = p.together(parts, 1)
    for i in range(p.config.layers):
        x = ops.add(ops.multiply(first, p.dense(f"cross{i}", x)), x)
    return x


def linear(p: Pass) -> Array:
    ops, out = p.ops, []
    if p.columns.sizes:
        out.append(ops.sum(p.rows_of("linear.categorical"), (1,)))
    out += [p.params[f"rows/{name}"] for name in p.columns.weights]
    if p.columns.num_numeric:
        out.append(ops.contract("ni,io->no", p.batch["numeric"], p.params["linear.numeric"]))
    return ops.add(reduce(ops.add, out), p.params["bias"])


def factorised(p: Pass) -> Array:
    """The sum over pairs is half of (sum of all)^2 - sum of squares."""
    ops, vectors = p.ops, p.vectors()
    if p.columns.num_numeric:
        numbers = ops.reshape(p.batch["numeric"], (p.rows, p.columns.num_numeric, 1))
        vectors.append(ops.multiply(numbers, p.params["factors"]))
    x = p.together(vectors, 1)
    total = ops.sum(x, (1,))
    both = ops.subtract(ops.multiply(total, total), ops.sum(ops.multiply(x, x), (1,)))
    return ops.add(linear(p), ops.multiply(ops.sum(both, (1,), keep=True), 0.5))
