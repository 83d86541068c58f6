"""Named arrays as a file that any torch program loads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends.pytorch.arrays import as_torch


def names(module: Any) -> dict[str, str]:
    """What `load_state_dict` asks for, each with the name that a checkpoint has for it: the first of a tied array;
    buffers that are not persistent are left out. Of anything but a module: nothing.
    """
    if not isinstance(module, torch.nn.Module):
        return {}
    first: dict[int, str] = {}
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        first.setdefault(id(value), name)
    return {key: first[id(value)] for key, value in module.state_dict(keep_vars=True).items() if id(value) in first}


def save_state_dict(arrays: Mapping[str, np.ndarray], names: Mapping[str, str], facts: Mapping[str, Any],
                    path: Path) -> None:
    """An OrderedDict of CPU tensors: `torch.load(path, weights_only=True)` gives it back, `load_state_dict` takes it.
    `names`: as above.

    Its attribute `facts` says what the data are to the model.
    """
    tensors = {name: as_torch(np.array(array)) for name, array in arrays.items()}
    found = OrderedDict((key, tensors[name]) for key, name in names.items())
    vars(found)["facts"] = dict(facts)
    with open(path, "xb") as file:
        torch.save(found, file)
