"""Looks into a user's module for what would train wrong without a word: hooks, views of parameters, attributes that remember."""

from __future__ import annotations

import hashlib
import random
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from elastic.errors import UserError

INTERNAL = frozenset(vars(torch.nn.Module()))
MOST = 20_000  # values that are looked at
DEPTH = 6  # containers within containers
PLAIN = (bool, int, float, complex, str, bytes, type(None))
OPAQUE = (torch.nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


@dataclass(frozen=True)
class Leaf:
    """A value that an attribute leads to. `place`: what it can be replaced in, by which key; None where it cannot."""

    value: Any
    place: tuple[Any, Any] | None

    @property
    def described(self) -> Any:
        """Equal where the value is."""
        value = self.value
        if isinstance(value, torch.Tensor):
            return ("tensor", value.dtype, tuple(value.shape), checksum(value))
        if isinstance(value, np.ndarray):
            content = np.ascontiguousarray(value).reshape(-1)
            return ("array", value.dtype.str, value.shape, 0 if value.dtype.hasobject
                    else digest(content.view(np.uint8)))
        if isinstance(value, torch.Generator):
            return ("generator", checksum(value.get_state()))
        if isinstance(value, np.random.Generator):
            return ("generator", repr(value.bit_generator.state))
        if isinstance(value, np.random.RandomState):
            return ("generator", repr(value.get_state()))
        if isinstance(value, random.Random):
            return ("generator", value.getstate())
        return (type(value).__name__, repr(value)) if isinstance(value,
                                                                 PLAIN) or type(value).__module__ == "itertools" else ("object",)


def digest(content: np.ndarray) -> str:
    return hashlib.blake2b(content.data, digest_size=16).hexdigest()


def checksum(tensor: torch.Tensor) -> str:
    """Of its bytes."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return str(id(tensor))
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return digest(flat.view(torch.uint8).numpy())


def leaves(module: torch.nn.Module) -> dict[str, Leaf]:
    """What the plain attributes of the module's parts lead to, by path. Parameters and buffers are not among it."""
    own = {id(t) for t in [*module.parameters(), *module.buffers()]}
    found: dict[str, Leaf] = {}
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        for key, value in list(vars(part).items()):
            if key not in INTERNAL:
                walk(f"{prefix}.{key}" if prefix else key, value, (vars(part), key), 0, own, seen, found)
    return found


def walk(path: str, value: Any, place: tuple[Any, Any] | None, depth: int, own: set[int], seen: set[int],
         found: dict[str, Leaf]) -> None:
    if len(found) >= MOST or id(value) in own or isinstance(value, OPAQUE):
        return
    inner = list(inside(value))
    is_deep = bool(inner) or isinstance(value, (Mapping, list, tuple, set, frozenset, deque))
    if not is_deep:
        found[path] = Leaf(value, place)
    elif depth < DEPTH and id(value) not in seen:
        seen.add(id(value))
        for suffix, item, where in inner:
            walk(path + suffix, item, where, depth + 1, own, seen, found)


def inside(value: Any) -> Iterator[tuple[str, Any, tuple[Any, Any] | None]]:
    """The entries of a container or an object: how to write them, what they are, where they can be replaced."""
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield f"[{key!r}]", item, (value, key) if isinstance(value, MutableMapping) else None
    elif isinstance(value, (list, tuple, deque)):
        for index, item in enumerate(value):
            yield f"[{index}]", item, (value, index) if isinstance(value, MutableSequence) else None
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{item!r}}}", item, None) for item in sorted(value, key=repr))
    elif not isinstance(value, (*PLAIN, torch.Tensor, np.ndarray, np.generic, torch.Generator, np.random.Generator,
                                random.Random)):
        for key, item in list(getattr(value, "__dict__", {}).items()):
            yield f".{key}", item, (vars(value), key)


def described(found: Mapping[str, Leaf]) -> dict[str, Any]:
    return {path: leaf.described for path, leaf in found.items()}


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Paths whose values are not what they were."""
    return [path for path in {**before, **after} if before.get(path) != after.get(path)]


def spoil(leaf: Leaf) -> None:
    """Another value in its place, by which a reader would give itself away."""
    value: Any = leaf.value
    if leaf.place is None:
        return
    holder, key = leaf.place
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        other = value.detach().clone()
        holder[key] = other.fill_(float("nan")) if other.is_floating_point() or other.is_complex() else other.bitwise_not_()
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fc":
        holder[key] = np.full_like(value, np.nan)
    elif isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, (int, float)):
        holder[key] = value + type(value)(12345)
    elif isinstance(value, str):
        holder[key] = value + "?"


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses that it covers."""
    length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size()


def refuse_views(kind: str, module: torch.nn.Module, named: Mapping[str, torch.Tensor]) -> None:
    """UserError where something beside a parameter's own object uses its memory: it would go on with what the parameter
    was built with."""
    owned = sorted((*extent(p), name) for name, p in named.items() if p.numel())
    for (_, end, one), (begin, _, two) in zip(owned, owned[1:]):
        if begin < end:
            raise UserError(f"model.kind: {kind} has two parameters, {one} and {two}, that share their memory; tie "
                            "them by using one Parameter in both places.")
    attributes = [(path, leaf.value) for path, leaf in leaves(module).items() if isinstance(leaf.value, torch.Tensor)]
    for path, tensor in [*attributes, *module.named_buffers()]:
        owner, _, key = path.rpartition(".")
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel() or f"{owner}.{key}_orig".lstrip(".") in named:
            continue  # the last: what torch's old spectral_norm and pruning make anew before each call
        low, high = extent(tensor)
        shared = next((name for begin, end, name in owned if low < end and begin < high), None)
        if shared:
            raise UserError(f"model.kind: {kind} keeps in {path} a view of the parameter {shared}, taken where it was "
                            "made; take it from the parameter where it is used, or keep the Parameter itself.")


def refuse_hooks(kind: str, named: Mapping[str, torch.Tensor],
                 seeded: Callable[[int], AbstractContextManager[None]]) -> None:
    """UserError for hooks that are not linear in the gradient: here it is a shard's sum, and shards are added up. What
    they draw is seeded."""
    generator = torch.Generator().manual_seed(0)
    for name, p in named.items():
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise UserError(f"model.kind: parameter {name} of {kind} has a hook that runs once its gradient is added "
                            "(register_post_accumulate_grad_hook), and here gradients are added shard by shard; take "
                            "it out, or use register_hook.")
        for hook in list((p._backward_hooks or {}).values()):
            probe = torch.randn(p.shape, generator=generator).to(p)
            one, many = (called(hook, probe * scale, seeded) for scale in (1.0, 4096.0))
            if not torch.equal(one * 4096.0, many):
                raise UserError(f"model.kind: parameter {name} of {kind} has a hook on its gradient that is not linear "
                                "in it, as a clipping is, and here it would see single shards; take it out "
                                "(optimizer.clip_norm clips the whole gradient).")


def called(hook: Any, gradient: torch.Tensor, seeded: Callable[[int], AbstractContextManager[None]]) -> torch.Tensor:
    with seeded(0), torch.no_grad():
        found = hook(gradient.clone())
    return gradient if found is None else found
