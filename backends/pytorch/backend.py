"""The door of PyTorch: a backend for a model of named arrays or for a user's own module, and how a user's own things are made."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils.data

from backends.common import Door
from backends.pytorch import warn_if_late
from backends.pytorch.adapter import ModuleModel, seeded
from backends.pytorch.module_backend import ModuleBackend
from backends.pytorch.neutral_backend import TorchBackend
from elastic.errors import UserError
from elastic.model.backend import Model

_made: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class Torch(Door):
    name, trains = "torch", "torch module"
    seeded = staticmethod(seeded)

    def create(self, model: Model | torch.nn.Module, settings: Any) -> TorchBackend:
        """`settings` has device ("cpu", "cuda", "auto"), precision ("float32", "bfloat16", for tests "float64"),
        threads and compile. UserError."""
        warn_if_late()
        model = self.adapt(model)
        return ModuleBackend(model, settings) if isinstance(model, ModuleModel) else TorchBackend(model, settings)

    def own(self, model: Any) -> Any:
        return ModuleModel(model) if isinstance(model, torch.nn.Module) else super().own(model)

    def construct(self, factory: Callable[..., Any], config: Mapping[str, Any], seed: int) -> Any:
        """UserError for a module that was there before: what one worker trains must be its own, and begin as every
        other's."""
        # gc.get_objects() breaks other threads' tuples
        there = list(vars(sys.modules.get(getattr(factory, "__module__", ""), sys)).values())
        made = super().construct(factory, config, seed)
        if isinstance(made, torch.nn.Module):
            if made in _made or any(made is found for found in there):
                raise UserError(f"model.kind: the factory gives a {type(made).__name__} that was there before; let it "
                                "make a new one in each call.")
            _made.add(made)
        return made

    def collate(self, items: Sequence[Any]) -> Any:
        """As torch's own loader makes it."""
        return torch.utils.data.default_collate(list(items))


framework = Torch()
