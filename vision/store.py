"""Decoded images and their labels in two mapped files of plain values: PREFIX.pixels and PREFIX.labels. Labels are numbers of classes: whole numbers
as they are, names in the order of the alphabet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic.errors import UserError
from elastic.storage.atomic import appearing, write_atomically
from vision.images import BadImage, samples

Label = int | str
CHUNK = 1024  # images looked at together
MOST_CLASSES = 1 << 20


class Classes:
    """Numbers labels. While the training set is read, by first appearance; once it is `close`d, for good, and no class
    is added."""

    def __init__(self) -> None:
        self.numbers: dict[Label, int] = {}
        self.names: list[str] = []  # empty where labels are numbers
        self.count = 0

    def number(self, label: Label, where: str) -> int:
        """UserError for a label outside the classes, or of another kind than those before."""
        if isinstance(label, int) and label < 0:
            raise UserError(f"{where} is of class {label}; the classes are counted from 0.")
        first = next(iter(self.numbers), label)
        if isinstance(label, str) != isinstance(first, str):
            raise UserError(f"{where} is of class {label!r} and others are of class {first!r}; write all labels as "
                            "whole numbers or all as texts.")
        if not self.count:
            return self.numbers.setdefault(label, len(self.numbers))
        if isinstance(label, int) and label < self.count:
            return label
        if label not in self.numbers:
            known = ", ".join(self.names[:12]) if self.names else f"0 to {self.count - 1}"
            raise UserError(f"{where} is of class {label!r}, which is none of those to train on ({known}); mend the "
                            "label or leave it out.")
        return self.numbers[label]

    def close(self) -> np.ndarray:
        """The final number of each one given so far."""
        found = list(self.numbers)
        self.names = sorted(label for label in found if isinstance(label, str))
        final = [label if isinstance(label, int) else self.names.index(label) for label in found]
        self.count = max(final, default=-1) + 1
        if self.count > MOST_CLASSES:
            raise UserError(f"The largest class is {self.count - 1}, of {len(found)} different ones, and classes are "
                            f"counted from 0, at most {MOST_CLASSES} of them; number them anew, or write them as "
                            "texts.")
        self.numbers = dict(zip(found, final))
        return np.array(final, np.int64)


@dataclass(frozen=True)
class Written:
    """What a split holds. `digest` is of all pixels and labels."""

    shape: tuple[int, ...]
    rows: int
    skipped: int
    digest: str


def write(key: str, data: Any, paths: Sequence[str], prefix: Path, classes: Classes, shape: tuple[int, ...]
          | None) -> Written:
    """Reads and decodes all images at `paths`; they have `shape`, or the first one's. Ends the training set of
    `classes`.

    UserError names the file and row of an image that is damaged or of another size, unless the recipe says that such
    are skipped.
    """
    target, labels, skipped, digest = path_of(prefix, "pixels"), list[int](), 0, hashlib.sha256()
    try:
        with appearing(target) as file:
            for sample in samples(key, data, paths):
                try:
                    pixels = sample.pixels(data.image_size, data.channels)
                    shape = shape or pixels.shape
                    if pixels.shape != shape:
                        raise BadImage(f"{sample.where} is {sized(pixels.shape)} and the first image {sized(shape)}")
                except BadImage as error:
                    if not data.skip_bad:
                        raise UserError(f"{key}: {error}; mend it, leave it out, or skip all such images by "
                                        "data.skip_bad = true (data.image_size brings all to one size, data.channels "
                                        "all to grey or to colour).") from error
                    skipped += 1
                    continue
                labels.append(classes.number(sample.label, sample.where))
                content = pixels.tobytes()
                file.write(content)
                digest.update(content)
            if not labels or not shape:
                raise UserError(f"{key} gives no image ({skipped} skipped); give a path with some.")
            numbers = np.array(labels, np.int64) if classes.count else classes.close()[labels]
        write_atomically(path_of(prefix, "labels"), numbers.tobytes())
    except OSError as error:
        raise UserError(f"The image cache {target.parent} cannot be written ({error.strerror or error}); "
                        "make it writable or free some space.") from error
    digest.update(numbers.tobytes())
    return Written(shape, len(labels), skipped, digest.hexdigest())


def sized(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]} with {shape[2]} channel{'s' * (shape[2] > 1)}"


def path_of(prefix: Path, part: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{part}")


class Store:
    """Rows by number. UserError where the files are gone or have another length."""

    def __init__(self, prefix: Path, shape: Sequence[int]):
        try:
            self.labels = np.memmap(path_of(prefix, "labels"), np.int64, "r")
            self.pixels = np.memmap(path_of(prefix, "pixels"), np.uint8, "r", shape=(len(self.labels), *shape))
            whole = path_of(prefix, "pixels").stat().st_size == self.pixels.nbytes
        except (OSError, ValueError) as error:
            raise UserError(f"The image files {prefix}.* cannot be read ({error}); delete their folder, it is made "
                            "again.") from error
        if not whole:
            raise UserError(f"The image files {prefix}.* do not fit together; delete their folder, it is made again.")

    def moments(self, rows: np.ndarray) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel's pixels, 0 to 1; from sums of whole numbers, so that no order
        shows."""
        channels = self.pixels.shape[-1]
        total, square, count = np.zeros(channels, np.int64), np.zeros(channels, np.int64), 0
        for low in range(0, len(rows), CHUNK):
            pixels = self.pixels[rows[low:low + CHUNK]].reshape(-1, channels).astype(np.int64)
            total, square, count = total + pixels.sum(0), square + (pixels * pixels).sum(0), count + len(pixels)
        mean = total / count
        return (mean / 255).tolist(), (np.sqrt(np.maximum(square / count - mean * mean, 0)) / 255).tolist()
