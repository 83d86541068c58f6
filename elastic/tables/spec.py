"""What a table is: plain values of the recipe, with what must hold of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from elastic.errors import RecipeError
from elastic.tables.starts import check_init

# floats of a row's optimizer state: by width, and beside
SLOTS = {"sgd": (0, 0), "adagrad": (1, 0), "rowwise_adagrad": (0, 1), "adam": (2, 0)}
# in ttl_steps; and a full bucket gives up this part of its rows at once, so that a commit seldom looks through one
SWEEPS = 16


@dataclass(frozen=True)
class TableSpec:
    """A map from 64-bit ids to rows of `width` float32 values.

    Its ids are 0 .. vocabulary - 1, or with vocabulary = 0 any int64, and it grows. An id is stored once it has
    appeared `admit` times, and trained from then on; it is evicted `ttl_steps` after its last appearance (0: never), or
    where there are more than `max_rows` (0: any number).
    """

    name: str
    width: int
    optimizer: str = "rowwise_adagrad"
    init: str = "normal:0.02"
    seed: int = 0
    num_buckets: int = 1024
    vocabulary: int = 0
    admit: int = 0
    ttl_steps: int = 0
    max_rows: int = 0

    def __post_init__(self) -> None:
        key = f"tables.{self.name}"
        for name, value in (("vocabulary", self.vocabulary), ("admit", self.admit), ("ttl_steps", self.ttl_steps),
                            ("max_rows", self.max_rows)):
            if value < 0:
                raise RecipeError(f"{key}.{name} = {value} must be a whole number of at least 0.")
        if self.width < 1:
            raise RecipeError(f"{key}.width = {self.width} must be a whole number of at least 1.")
        if self.optimizer not in SLOTS:
            raise RecipeError(f"{key}.optimizer = {self.optimizer!r} is not one of {', '.join(SLOTS)}.")
        if self.num_buckets < 1 or self.num_buckets & (self.num_buckets - 1):
            raise RecipeError(f"embedding.buckets = {self.num_buckets} must be a power of two, as 1024.")
        if 0 < self.max_rows < self.num_buckets:
            raise RecipeError(f"{key}.max_rows = {self.max_rows} must be at least embedding.buckets = "
                              f"{self.num_buckets}, each of which holds its share of the rows, or 0 for no limit.")
        check_init(f"{key}.init", self.init)

    @property
    def num_slots(self) -> int:
        """Floats of optimizer state a row."""
        wide, beside = SLOTS[self.optimizer]
        return wide * self.width + beside

    @property
    def bucket_rows(self) -> int:
        """Rows that a bucket may hold; 0 is any number."""
        return self.max_rows // self.num_buckets

    @property
    def vocabulary_rows(self) -> int:
        """Places for rows in a bucket of a static vocabulary."""
        return -(-self.vocabulary // self.num_buckets)


@dataclass(frozen=True)
class RowUpdate:
    """One commit's numbers, already scheduled. The sums of slopes are multiplied by `scale` first; decay is an L2 term,
    on the touched rows alone."""

    lr: float
    scale: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def numbers(self, step: int) -> np.ndarray:
        """float32: lr, scale, weight_decay, eps, beta1, 1 - beta1, beta2, 1 - beta2, and Adam's rate and root of its
        bias at this step (from 1)."""
        biases = 1 - self.beta1 ** step, 1 - self.beta2 ** step
        return np.array([self.lr, self.scale, self.weight_decay, self.eps, self.beta1, 1 - self.beta1, self.beta2,
                         1 - self.beta2,
                         self.lr / biases[0], math.sqrt(biases[1])], np.float32)
