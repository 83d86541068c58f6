"""An immutable mapping of which the next version costs little: a state machine that is fed thousands of events keeps its maps in these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self, TypeVar

V = TypeVar("V")
FEW = 16  # changes that are worth no merging
GONE: Any = object()


class PersistentMap(Mapping[str, V]):
    """Versions share a base, and each has its own few changes to it: at most the square root of the base's size, then they
    are merged into another. So a change copies that many entries, and n changes of an empty map n * sqrt(n)."""

    __slots__ = ("_base", "_changes", "_size")

    def __init__(self, base: Mapping[str, V] | None = None, changes: Mapping[str, V] | None = None, size: int = -1):
        self._base, self._changes = base or {}, changes or {}
        self._size = len(self._base) if size < 0 else size

    def having(self, key: str, value: V) -> Self:
        return self._changed(key, value, self._size + (key not in self))

    def without(self, key: str) -> Self:
        return self._changed(key, GONE, self._size - 1) if key in self else self

    def _changed(self, key: str, value: V, size: int) -> Self:
        found = type(self)(self._base, {**self._changes, key: value}, size)
        return type(self)(dict(found)) if len(found._changes) ** 2 > max(FEW ** 2, len(self._base)) else found

    def __getitem__(self, key: str) -> V:
        value = self._changes.get(key, self)
        if value is self:
            return self._base[key]
        if value is GONE:
            raise KeyError(key)
        return value  # type: ignore[return-value]

    def __contains__(self, key: object) -> bool:
        return self._changes[key] is not GONE if key in self._changes else key in self._base  # type: ignore[index]

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in self._base if self._changes.get(key) is not GONE)
        yield from (key for key, value in self._changes.items() if value is not GONE and key not in self._base)

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"PersistentMap({dict(self)})"
