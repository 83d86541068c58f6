"""Suites that are too long to run whole each time: a sample of them, by a seed that is told, and all of it where ELASTIC_TEST_SAMPLE=all."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")
SEED = int(os.environ.get("ELASTIC_TEST_SEED") or random.SystemRandom().randrange(1_000_000))
WHOLE = os.environ.get("ELASTIC_TEST_SAMPLE") == "all"


def sample(cases: Sequence[T], count: int, always: Sequence[T] = ()) -> list[T]:
    """`count` of the cases in their order, `always` among them."""
    if WHOLE or count >= len(cases):
        return list(cases)
    rest = [n for n, case in enumerate(cases) if case not in always]
    kept = sorted([n for n, case in enumerate(cases) if case in always]
                  + random.Random(SEED).sample(rest, count - len(always)))
    return [cases[n] for n in kept]


def sometimes(name: str, share: float) -> pytest.MarkDecorator:
    """For one test that is long by itself: chosen by the seed in that share of runs."""
    return pytest.mark.skipif(not WHOLE and random.Random(f"{SEED} {name}").random() >= share,
                              reason="the seed leaves it out; make chaos runs it")
