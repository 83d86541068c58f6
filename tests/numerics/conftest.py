"""What several suites of runs train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A text to train on, tokenised into a folder of its own."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    file = folder / "text.txt"
    file.write_text(" ".join(random.choice(["to", "be", "or", "not", "that", "is", "the", "question"], 1500)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield file
