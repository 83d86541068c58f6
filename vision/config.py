"""Checks that the configurations of all image models share. RecipeError names the key, the value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from elastic.errors import RecipeError
from elastic.model.backend import Spec


def whole(config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"model.{key} = {value!r} must be a whole number of at least 1.")


def share(config: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise RecipeError(f"model.{key} = {value!r} must be a number of at least 0 and below 1.")


def flag(config: Any, *keys: str) -> None:
    for key in keys:
        if not isinstance(getattr(config, key), bool):
            raise RecipeError(f"model.{key} = {getattr(config, key)!r} must be true or false.")


def one_of(config: Any, key: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, key)
    if value not in choices:
        raise RecipeError(f"model.{key} = {value!r} must be one of {', '.join(choices)}.")


def read(kind: str, factory: type[Any], config: Mapping[str, Any]) -> Any:
    """`factory(**config)`, its keys known."""
    known = [field.name for field in fields(factory)]
    for key in config:
        if key not in known:
            raise RecipeError(f"model.{key} = {config[key]!r} is not a key of {kind}; its keys are {', '.join(known)}.")
    return factory(**config)


BIASES = ("zeros", "mean")
LEAST_COUNT = 0.5  # of images of a class, that a logarithm stands for


def head_bias(config: Any, num_classes: int, counts: Sequence[int]) -> Spec:
    """Of the logits: zeros, or with `bias_init` "mean" the logarithms of the classes' shares of the training images."""
    if config.bias_init == "zeros" or not counts:
        return Spec((num_classes,), ("classes",), "zeros")
    return Spec((num_classes,), ("classes",), "values", values=tuple(math.log(max(count, LEAST_COUNT) / sum(counts)) for count in counts))
