"""An immutable mapping against dict: any changes, every version afterwards."""

from __future__ import annotations

import random
import sys

from elastic.controller.persistent_map import PersistentMap


def test_every_version_is_what_a_dict_was_by_then() -> None:
    for seed in range(30):
        draw, found, wanted = random.Random(seed), PersistentMap[int](), dict[str, int]()
        versions = []
        for number in range(400):
            key = f"worker-{number if draw.random() < 0.5 else draw.randrange(number + 1)}"
            if draw.random() < 0.7:
                found, wanted = found.having(key, number), {**wanted, key: number}
            else:
                found, wanted = found.without(key), {name: value for name, value in wanted.items() if name != key}
            versions.append((found, wanted))
        for one, other in versions:
            assert one == other and len(one) == len(other) and set(one) == set(other)
            assert all(name in one and one[name] == value for name, value in other.items())
            assert one.get("nobody") is None and all((f"worker-{n}" in one) == (f"worker-{n}" in other) for n in range(400))


def test_entries_come_in_the_order_in_which_they_were_added() -> None:
    found = PersistentMap[int]()
    for number in range(500):
        found = found.having(str(number), number)
        found = found.without(str(number - 3)) if number % 7 == 0 else found
    kept = [number for number in range(500) if (number + 3) % 7 or number + 3 >= 500]
    assert list(found.items()) == [(str(number), number) for number in kept]


def test_a_change_copies_little() -> None:
    """Of a map of ten thousand, less than a tenth; of it all only once in a hundred times."""
    found, copied = PersistentMap({str(number): number for number in range(10_000)}), 0
    for number in range(1_000):
        after = found.having(str(number), -1)
        copied += sys.getsizeof(after._changes) + (sys.getsizeof(after._base) if after._base is not found._base else 0)
        found = after
    assert copied < 0.05 * 1_000 * sys.getsizeof(found._base)
