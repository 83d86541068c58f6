"""Named arrays as a file that any torch program loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from backends.pytorch.adapter import as_torch


def save_state_dict(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """A plain dict of CPU tensors: `torch.load(path, weights_only=True)` gives it back, `load_state_dict` takes it."""
    with open(path, "xb") as file:
        torch.save({name: as_torch(np.array(array)) for name, array in arrays.items()}, file)
