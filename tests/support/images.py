"""Small labelled images that a model can learn, and the files that hold them."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from elastic.recipe import Recipe, parse
from tests.support.inprocess import merged

CLASSES = 3


def draw(count: int, side: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, side, side) and labels: noise with a bright stripe whose place is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.uint8)
    images = rng.integers(0, 120, (count, side, side)).astype(np.uint8)
    for image, label in zip(images, labels):
        image[2 * label:2 * label + 2] += 120
    return images, labels


def write_idx(path: Path, values: np.ndarray) -> None:
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim,
                          *values.shape) + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def idx_files(folder: Path, train: int = 90, test: int = 30) -> dict[str, str]:
    """`path` and `eval_path` of two sets."""
    for prefix, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = draw(count, seed=seed)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return {"path": str(folder / "train-images-idx3-ubyte.gz"), "eval_path": str(folder / "t10k-images-idx3-ubyte.gz")}


def vision_recipe(kind: str, files: Mapping[str, str], steps: int = 12, **changes: Mapping[str, Any]) -> Recipe:
    """A model of images that a thread trains in milliseconds a step; L = 8."""
    model = {"vision.resnet": {"blocks": [1, 1], "width": 4, "stem": "small"},
             "vision.vit": {"layers": 1, "heads": 2, "width": 8, "patch": 4, "mlp": 2}}[kind]
    base = {"run": {"steps": steps, "eval_every": 5}, "model": {"kind": kind, **model},
            "data": {"format": "idx", "batch_size": 32, "crop": 1, "flip": True, **files},
            "elastic": {"max_workers": 3, "logical_shards": 8, "hang_timeout_s": 5.0}, "checkpoint": {"every_steps": 6},
            "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "no_decay": ["*bias"]}}
    return parse(merged(base, changes))


def section(**changes: Any) -> Any:
    """A recipe's `[data]` as the door sees it."""
    base = {"format": "idx", "path": (), "eval_path": (), "eval_fraction": 0.0, "image": "", "label": "",
            "skip_bad": False, "image_size": 0,
            "channels": 0, "crop": 0, "flip": False, "mixup": 0.0}
    given = {key: (value,) if key.endswith("path") and isinstance(value, str) else value
             for key, value in changes.items()}
    return SimpleNamespace(**{**base, **given})


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    from PIL import Image

    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def everything(info: dict[str, Any], split: str = "train", epoch: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    from vision.data import open_dataset

    dataset = open_dataset(info, split, seed)
    rows = np.arange(dataset.num_samples)
    return dataset.batch(rows, np.full(len(rows), epoch))
