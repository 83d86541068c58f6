"""The door of PyTorch: a backend for a model of named arrays or for a user's own module, and how a user's own things are made."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils.data

from backends.common import before_models as before_models
from backends.pytorch import adapter, warn_if_late
from backends.pytorch.adapter import seeded
from backends.pytorch.arrays import TorchBackend
from backends.pytorch.module import ModuleBackend
from elastic.errors import UserError
from elastic.model.backend import Model

_made: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def create(model: Model | torch.nn.Module, settings: Any) -> TorchBackend:
    """`settings` has device ("cpu", "cuda", "auto"), precision ("float32", "bfloat16", and for tests "float64"), threads and compile. UserError."""
    warn_if_late()
    model = adapt(model)
    return ModuleBackend(model, settings) if isinstance(model, adapter.ModuleModel) else TorchBackend(model, settings)


def adapt(model: Model | torch.nn.Module) -> Any:
    """A user's module as a model; others as they are. UserError where a module cannot serve."""
    return adapter.ModuleModel(model) if isinstance(model, torch.nn.Module) else model


def construct(factory: Callable[..., Any], config: Mapping[str, Any], seed: int) -> Any:
    """A user's module or data set; what it draws to begin with is a function of `seed`, so every worker builds the same.

    UserError for a module that was there before: what one worker trains must be its own, and begin as every other's.
    """
    there = list(vars(sys.modules.get(getattr(factory, "__module__", ""), sys)).values())  # gc.get_objects() breaks other threads' tuples
    with seeded(seed):
        made = factory(**config)
        if not isinstance(made, torch.nn.Module):
            return made
        if made in _made or any(made is found for found in there):
            raise UserError(f"model.kind: the factory gives a {type(made).__name__} that was there before; let it make a new one in each call.")
        _made.add(made)
    return made


def collate(items: Sequence[Any]) -> Any:
    """A user's items as a batch, as torch's own loader makes it."""
    return torch.utils.data.default_collate(list(items))
