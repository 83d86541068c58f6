"""Labelled images as a data set: read and decoded once into a mapped file, normalised and varied as they are fed.

The data door of an image model: `prepare` turns the recipe's `[data]` into plain facts (`info`), `open_dataset` turns
the facts into a data set. Both give the same on every machine that sees the same images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elastic.data.cache import facts_once
from elastic.data.dataset import Dataset
from elastic.data.permutation import permute_by_epoch
from elastic.errors import RecipeError, UserError
from vision import augment
from vision.images import sources
from vision.store import Classes, Store, path_of, sized, write

UNIT = ""  # weights count rows
VERSION = 4
SPLITS = {"train": "path", "eval": "eval_path"}


def prepare(data: Any, model_config: Mapping[str, Any], cache_dir: str | Path) -> dict[str, Any]:
    """Facts that a model and `open_dataset` need, as plain values; reads the images where `cache_dir` does not hold
    them yet.

    `data` has format ("idx", "imagefolder", or a table's), path and eval_path (the latter may be empty), eval_fraction,
    image and label (columns, of tables), skip_bad, image_size, channels, crop, flip and mixup. Keys of the result:
    shape (height, width, channels), num_classes, classes (their names, if they have any), class_counts (of training
    images), num_samples, num_eval_samples, num_skipped, mean and std (of each channel's training pixels, 0 to 1),
    train_file, eval_file, crop, flip, mixup, spread, eval_fraction, notes (lines on what is left out), key (the same
    for the same images). RecipeError or UserError names file and row of what cannot serve.
    """
    paths = {split: getattr(data, name) for split, name in SPLITS.items() if getattr(data, name)}
    found = {split: sources(f"data.{SPLITS[split]}", data, path) for split, path in paths.items()}
    asked = [VERSION, data.format, data.image, data.label, data.skip_bad, data.image_size, data.channels,
             data.eval_fraction, {
        split: [[f.where, f.size, f.mtime_ns, f.below] for f in files] for split, (files, _) in found.items()}]
    folder = Path(cache_dir) / f"images-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}"
    known = facts_once(folder, lambda: look(data, paths, folder))
    if data.crop >= min(known["shape"][:2]):
        raise RecipeError(f"data.crop = {data.crop} moves images of {sized(known['shape'])} out of sight; write less "
                          f"than {min(known['shape'][:2])}.")
    files = {f"{split}_file": str(path_of(folder / (split if split in paths else "train"), "labels"))
             for split in SPLITS}
    notes = [line for _, lines in found.values() for line in lines]
    return {**known, **files, "notes": notes, "crop": data.crop, "flip": data.flip, "mixup": data.mixup,
            "own_eval": "eval" in paths,
            "spread": data.format == "imagefolder", "eval_fraction": data.eval_fraction}


def look(data: Any, paths: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes every split and says what is in it."""
    classes, digest, skipped = Classes(), hashlib.sha256(), 0
    shape, rows = tuple[int, ...](), dict[str, int]()
    for split, path in paths.items():
        key = f"data.{SPLITS[split]}"
        written = write(key, data, path, folder / split, classes, shape or None)
        shape, rows[split], skipped = written.shape, written.rows, skipped + written.skipped
        digest.update(f"{split}/{written.shape}/{written.digest}/".encode())
    chosen, held_out = cut(rows["train"], 0.0 if "eval" in paths else data.eval_fraction, data.format == "imagefolder")
    if classes.count < 2:
        raise RecipeError(f"data.path holds images of {classes.count} class; give two classes at least.")
    store = Store(folder / "train", shape)
    mean, std = store.moments(chosen)
    return {"shape": list(shape), "num_classes": classes.count, "classes": classes.names,
            "class_counts": np.bincount(store.labels[chosen], minlength=classes.count).tolist(),
            "num_samples": len(chosen),
            "num_eval_samples": rows.get("eval", len(held_out)), "num_skipped": skipped, "mean": mean, "std": std,
            "key": digest.hexdigest()[:32]}


def cut(rows: int, eval_fraction: float, spread: bool) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those to evaluate on: the last ones, or, where classes lie one after the other, some all
    over."""
    held = int(rows * eval_fraction)
    out = np.zeros(rows, bool)
    out[(np.arange(held) * rows + rows // 2) // max(held, 1) if spread else slice(rows - held, rows)] = True
    return np.flatnonzero(~out), np.flatnonzero(out)


def open_dataset(info: Mapping[str, Any], split: str, seed: int = 0) -> Images:
    """The "train" split, varied as the recipe says, or the "eval" split, as it is."""
    store = Store(Path(info[f"{split}_file"]).with_suffix(""), info["shape"])
    if info["own_eval"]:
        rows = np.arange(len(store.labels))
    else:
        rows = cut(len(store.labels), info["eval_fraction"], info["spread"])[0 if split == "train" else 1]
    expected = info["num_samples" if split == "train" else "num_eval_samples"]
    if len(rows) != expected:
        raise UserError(f"The image file {info[f'{split}_file']} gives {len(rows)} images instead of {expected}; "
                        "delete its folder, it is made again.")
    return Images(store, rows, info, seed if split == "train" else None)


class Images(Dataset):
    """Rows of a store, normalised to mean 0 and standard deviation 1 by channel. Without a seed each sample is as it
    is."""

    def __init__(self, store: Store, rows: np.ndarray, info: Mapping[str, Any], seed: int | None):
        self.store, self.rows, self.seed = store, rows, seed
        varied = seed is not None
        self.crop, self.flip, self.mixup = int(info["crop"]) * varied, bool(info["flip"]) and varied, float(info["mixup"]) * varied
        self.num_samples = len(rows)
        std = np.maximum(np.array(info["std"]), 1e-6)
        self.scale = (1.0 / (255.0 * std)).astype(np.float32)
        self.shift = (np.array(info["mean"]) / std).astype(np.float32)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """{"image": float32 (rows, height, width, channels), "label": int64 (rows,)}; mixed up, "label2" and "mix" too.
        """
        images, labels, words = self.look(indices, epochs)
        if not self.mixup:
            return {"image": images, "label": labels}
        others, labels2, _ = self.look(permute_by_epoch(indices, epochs, self.num_samples, augment.PARTNER, self.seed
                                                        or 0), epochs)
        part = augment.proportions(words, self.mixup)
        wide = part[:, None, None, None]
        return {"image": wide * images + (1 - wide) * others, "label": labels, "label2": labels2, "mix": part}

    def look(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = self.rows[indices]
        images, labels = self.store.pixels[rows], self.store.labels[rows]
        words = np.zeros((len(indices), augment.WORDS), np.uint64)
        if self.seed is not None and (self.crop or self.flip or self.mixup):
            words = augment.draws(self.seed, epochs, indices)
            images = augment.crop_and_flip(images, words, self.crop, self.flip)
        return images * self.scale - self.shift, labels, words
