"""Every key of a recipe, by section: its type, bounds and default. Its description says what would be right; error messages quote it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat, PlainValidator, field_validator

from elastic.recipe.embedding import Embedding, TableName, TableSection
from elastic.recipe.fields import NAMES, Section, Texts, at_least, share
from elastic.recipe.images import Pictured
from elastic.recipe.tables import TABLES

# modules, each with a `Config` and a `build`
KINDS = ("nlp.gpt", "nlp.bert", "vision.resnet", "vision.vit", "recommender.dlrm")
DEFAULT_FULL = 10  # checkpoint.full_every
WEIGHTS = "a list of numbers above 0, one for each entry of data.path"
PATTERNS = 'a list of name patterns, as ["*.bias", "ln_f.*"]'


def rising(values: tuple[int, ...]) -> tuple[int, ...]:
    if any(low >= high for low, high in zip(values, values[1:])):
        raise ValueError("a number is not above the one before")
    return values


Rising = Annotated[tuple[Annotated[int, Field(ge=1, strict=True)], ...], AfterValidator(rising)]


class Run(Section):
    name: str = Field("run", pattern=r"^[\w.-]{1,100}$",
                      description="a short name of letters, digits, '.', '_' and '-'")
    steps: int | None = at_least(1, None)
    epochs: int | None = at_least(1, None)
    seed: int = Field(0, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    eval_every: int = at_least(0, 200, " (steps; 0 is never)")


class ModelSection(Section):
    """Every other key belongs to the model itself: see `config`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    kind: str = Field(pattern=r"^[A-Za-z_][\w.]*(:[A-Za-z_][\w.]*)?$",
                      description=f'one of {", ".join(KINDS)}, or "package.module:attribute" for a model of your own')
    init: str = Field("", description="the path of a safetensors file or of a checkpoint")
    freeze: Texts = Field((), description=PATTERNS)
    thaw: Texts = Field((), description=PATTERNS)

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if ":" not in kind and kind not in KINDS:
            raise ValueError("an unknown model kind")
        return kind

    @property
    def config(self) -> dict[str, Any]:
        """The model's own keys."""
        return dict(self.model_extra or {})


class Backend(Section):
    name: Literal["torch", "reference", "tensorflow", "mxnet"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int = at_least(1, 1)
    compile: bool = Field(False, description="true or false")


class Data(Pictured):
    format: Literal["text", "csv", "parquet", "arrow", "idx", "imagefolder"] | None = None
    path: Texts = Field((), description="a path, a URI, a glob, \"package:NAME/GLOB\" or a list of them")
    kind: str = Field("", pattern=r"^$|^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
                      description='"package.module:attribute" of a map-style data set')
    options: dict[str, Any] = Field({}, description="a table of keyword arguments for data.kind")
    batch_size: int = at_least(1, 12, " (rows of the global batch)")
    eval_fraction: float = share(0.1)
    eval_path: Texts = Field((), description="a path, a URI, a glob, \"package:NAME/GLOB\" or a list of them")
    shuffle: bool = Field(True, description="true or false")
    shuffle_by: Literal["auto", "rows", "blocks"] = "auto"
    columns: Texts = Field((), description=f"{NAMES}: the columns of a table to use, none for all of numbers")
    weights: tuple[Annotated[FiniteFloat, Field(gt=0)], ...] = Field((), strict=False, description=WEIGHTS)
    tokens: Literal["char", "byte", "bpe"] = "char"
    vocab_size: int = at_least(2, 1024, " (for tokens = \"bpe\")")
    ledger: bool = Field(False, description="true or false")
    text: str = Field("", description="a column's name")

    @property
    def is_table(self) -> bool:
        """Whether it feeds columns of numbers as they are; where text, images or labels are named, a domain reads it.
        """
        return self.format in TABLES and not (self.text or self.image or self.label)


class MeshSection(Section):
    tensor: int = at_least(1, 1)
    pipeline: int = at_least(1, 1)
    expert: int = at_least(1, 1)
    schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1"] = "1f1b"
    micro_batches: int = at_least(1, 1)
    chunks: int = at_least(1, 2, " (of the model, that a stage holds under schedule = \"interleaved\")")
    layout: dict[str, Literal["tensor", "expert"]] = Field({},
                                                           description="written {DIM = AXIS, ...}, each axis "
                                                                       "\"tensor\" or \"expert\": those of "
                                                           "the model's splits that are to be made")
    auto: bool = Field(False, exclude=True, description='mesh = "auto" in place of the section: the planner finds the '
                                                        'numbers before workers start')

    @property
    def replica_size(self) -> int:
        """Workers that together hold one copy of the model."""
        return self.tensor * self.pipeline * self.expert


class Elastic(Section):
    min_workers: int = at_least(1, 1)
    max_workers: int = at_least(1, 2)
    logical_shards: int = Field(0, ge=1, description="a whole number of at least 1 that divides data.batch_size")
    reduction: Literal["exact", "fast"] = "exact"
    hang_timeout_s: FiniteFloat = Field(30.0, gt=0, description="a number of seconds above 0")
    start_timeout_s: FiniteFloat = Field(600.0, gt=0, description="a number of seconds above 0")
    orphan_timeout_s: FiniteFloat = Field(300.0, gt=0, description="a number of seconds above 0")
    spares: int = at_least(0, 0)


def decays(value: Any) -> float | dict[str, float]:
    """A number for all parameters, or one by pattern."""
    by = value if isinstance(value, dict) else {"*": value}
    numbers = {name: number for name, number in by.items() if type(number) in (int, float) and 0 <= number < math.inf}
    if not by or len(numbers) < len(by):
        raise ValueError("no number of at least 0")
    return {name: float(number) for name, number in numbers.items()} if by is value else float(value)


class Optimizer(Section):
    name: Literal["adamw", "adam", "sgd", "adagrad"] = "adamw"
    lr: FiniteFloat = Field(1e-3, ge=0, description="a number of at least 0")
    beta1: float = share(0.9)
    beta2: float = share(0.999)
    eps: FiniteFloat = Field(1e-8, gt=0, description="a number above 0")
    momentum: float = share(0.9)
    weight_decay: Annotated[float | dict[str, float], PlainValidator(decays)] = Field(0.0, description=(
        'a number of at least 0, or a table of them by name pattern, as {"embedding" = 1e-5, "*" = 0.01}, of which a '
        'parameter takes the first '
        "that matches it, and 0 where none does"))
    base_batch: int = at_least(0, 0, ": the batch size that lr and min_lr are meant for, to whose multiple they are "
                                     "scaled; 0 for no scaling")
    schedule: Literal["constant", "cosine", "linear", "step", "one-cycle"] = "constant"
    warmup_steps: int = at_least(0, 0)
    milestones: Rising = Field((), strict=False, description=(
        "a list of whole numbers of at least 1 that rise from each to the next: the steps after which the rate falls"))
    gamma: FiniteFloat = Field(0.1, gt=0, le=1,
                               description="a number above 0 and at most 1: what the rate is multiplied by at each "
                                           "milestone")
    pct_start: float = share(0.3, "a number of at least 0 and below 1: the share of the run over which the rate rises")
    div_factor: FiniteFloat = Field(25.0, ge=1, description="a number of at least 1: lr over the rate at the start")
    final_div_factor: FiniteFloat = Field(1e4, ge=1,
                                          description="a number of at least 1: the rate at the start over that at the end")
    min_lr: FiniteFloat = Field(0.0, ge=0, description="a number from 0 to optimizer.lr")
    clip_norm: FiniteFloat = Field(0.0, ge=0, description="a number above 0, or 0 for none")
    no_decay: Texts = Field((), description=PATTERNS)
    ema: float = share(0.0, "a number of at least 0 and below 1, as 0.999: the decay of moving averages of the "
                            "parameters, which evaluations, `elastic evaluate`, sample and export then use in their "
                            "place; 0 for none")
    sharded: bool = Field(False, description="true or false")
    twin: bool = Field(True, description="true or false")

    @property
    def decayed(self) -> tuple[str, ...]:
        """The patterns of weight_decay; a number is for all."""
        return tuple(self.weight_decay) if isinstance(self.weight_decay, dict) else ("*",)


class Checkpoint(Section):
    every_steps: int = at_least(0, 200, " (0: at the end only)")
    full_every: int = Field(DEFAULT_FULL, ge=1, exclude_if=lambda value: value == DEFAULT_FULL, description=(
        "a whole number of at least 1: each such checkpoint holds all rows of the tables, those between them what "
        "changed since the one before"))
    keep: int = at_least(1, 3)
    keep_every: int = at_least(0, 0, " (steps; the checkpoints of its multiples are kept for ever; 0 is none)")
    busy: Literal["wait", "skip"] = Field("wait",
                                          description='"wait" or "skip": what a checkpoint does that is due while one '
                                                      'is written')
    write_mb_s: FiniteFloat = Field(0.0, ge=0,
                                    description="a number above 0 (megabytes a second of each worker), or 0 for no "
                                                "limit")
    best: str = Field("eval.loss", pattern=r"^$|^eval\.\w+$",
                      description='"eval.loss", another "eval.NAME", or "" for none')
    best_mode: Literal["min", "max"] | None = Field(None,
                                                    description='"min" or "max": which value of checkpoint.best is the '
                                                                'best; known for the '
                                                                      "platform's own figures")
    path: str = Field("", description='"" for the run directory, a path, or a URI such as s3://BUCKET/PATH')


class Recipe(Section):
    """A whole recipe, resolved: defaults filled in, paths absolute, `elastic.logical_shards` chosen. What belongs to
    embedding tables is written down only where it says something."""

    run: Run = Run()
    model: ModelSection
    backend: Backend = Backend()
    data: Data
    mesh: MeshSection = MeshSection()
    elastic: Elastic = Elastic()
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    tables: dict[TableName, TableSection] = Field({}, exclude_if=lambda tables: not tables)
    embedding: Embedding = Field(Embedding(), exclude_if=lambda section: section == Embedding())
