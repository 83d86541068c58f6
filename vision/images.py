"""Labelled images as files hold them, one after the other: IDX (MNIST and its family), folders by class, Parquet with encoded bytes.

Whatever an image has against being used is a `BadImage`, which names its file and row; what a file has, a `UserError`.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as t

from elastic.data.columns import field_of
from elastic.data.files import HIDDEN, File, describe, find, look, told
from elastic.data.formats import batches, schema_of
from elastic.errors import RecipeError, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
UNSIGNED_BYTES = 8  # the third byte of an IDX file
# EXIF of any bytes
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, SyntaxError,
              struct.error)
MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels


class BadImage(Exception):
    """An image that cannot be used; its text says where it is and what is wrong."""


@dataclass(frozen=True)
class Sample:
    """`image` is uint8 (height, width, channels), or encoded bytes. `label` is a class's number or name."""

    where: str
    image: Any
    label: int | str

    def pixels(self, size: int = 0, channels: int = 0) -> np.ndarray:
        """uint8 (height, width, channels). BadImage."""
        return self.image if isinstance(self.image, np.ndarray) else decode(self.image, self.where, size, channels)


def sources(key: str, data: Any, paths: Sequence[str]) -> tuple[list[File], list[str]]:
    """Every file that is read for the recipe's `[data]` at `paths`, those of labels too; and a line for each kind of
    file that is not."""
    files, left = look(key, paths)
    notes = told(key, left, HIDDEN)
    if data.format == "imagefolder":
        _, others, astray = by_class(files)
        notes += [*told(key, others, "as no image by its name"),
                  *told(key, astray, "as an image outside the classes' folders")]
    return files + [labels_of(key, file) for file in image_files(key, files)] if data.format == "idx" else files, notes


def samples(key: str, data: Any, paths: Sequence[str]) -> Iterator[Sample]:
    """All samples of the recipe's `[data]` at `paths`, in the order of the files and of the rows in them."""
    files = find(key, paths)
    if data.format == "idx":
        yield from idx_samples(key, files)
    elif data.format == "imagefolder":
        yield from folder_samples(key, files)
    else:
        for file in files:
            yield from table_samples(data, file)


def decode(content: bytes, where: str, size: int = 0, channels: int = 0) -> np.ndarray:
    """uint8 (height, width, 1) of a grey image, else (height, width, 3), or what `channels` says; transparency is left
    out. With `size`, the middle square scaled to that many pixels a side. Of 16 bits the upper 8 are kept. It is turned
    as its EXIF orientation says."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise UserError(f"{where} is an encoded image, and Pillow, which decodes them, is not installed; "
                        "install it with pip install pillow.") from error
    try:
        with Image.open(io.BytesIO(content)) as stored:
            opened: Any = stored
            with suppress(*UNREADABLE):  # an orientation that cannot be read is none
                opened = ImageOps.exif_transpose(stored)
            wide = opened.mode.startswith("I;16")  # whose conversion makes white of all above 255
            if opened.mode in ("I", "F"):
                raise BadImage(f"{where} holds numbers of 32 bits, which tell of no white; convert it to 8 or 16 bits")
            eight = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if wide else opened
            plain = eight.convert(MODES[channels or (1 if eight.mode in ("L", "LA", "1") else 3)])
            found = np.asarray(ImageOps.fit(plain, (size, size), Image.Resampling.BILINEAR) if size else plain)
    except UnidentifiedImageError as error:  # its own words name an object in memory
        raise BadImage(f"{where} is no image of a known format" if content else f"{where} has no bytes") from error
    except BadImage:
        raise
    except Exception as error:  # a decoder that stumbles over damaged bytes may raise anything
        raise BadImage(f"{where} is no image that can be decoded ({describe(error)})") from error
    return found.reshape(*found.shape[:2], -1)


def content_of(key: str, file: File) -> bytes:
    try:
        with file.stream() as stream:
            return stream.read()  # type: ignore[no-any-return]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{key}: the file {file.name} cannot be read ({describe(error)}); restore it or leave it out.") from error


# IDX: two zero bytes, the type, the number of dims, each dim as a big-endian uint32, the values (LeCun's MNIST page).


def image_files(key: str, files: Sequence[File]) -> list[File]:
    chosen = [file for file in files if "images" in PurePosixPath(file.where).name]
    if not chosen:
        raise RecipeError(f'{key}: {files[0].name} is not named as a file of images is; give one as '
                          '"train-images-idx3-ubyte.gz", with its labels beside it.')
    return chosen


def idx_samples(key: str, files: Sequence[File]) -> Iterator[Sample]:
    for file in image_files(key, files):
        images, labels = read_idx(file, (3, 4)), read_idx(labels_of(key, file), (1,))
        if len(images) != len(labels):
            raise UserError(f"{key}: {file.name} holds {len(images)} images and its labels {len(labels)}; restore both "
                            "files.")
        images = images.reshape(*images.shape[:3], math.prod(images.shape[3:]))
        for row, label in enumerate(labels.tolist()):
            yield Sample(f"row {row} of {file.name}", images[row], label)


def labels_of(key: str, file: File) -> File:
    folder, slash, name = file.where.rpartition("/")
    own = name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    try:
        return find(key, [folder + slash + own])[0]
    except RecipeError as error:
        raise RecipeError(f"{key}: the labels of {file.name} are missing; put {own} beside it.") from error


def read_idx(file: File, ranks: tuple[int, ...]) -> np.ndarray:
    content = content_of("data.path", file)
    head = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != bytes([0, 0, UNSIGNED_BYTES]) or content[3] not in ranks or len(content) < head:
        dims = " or ".join(map(str, ranks))
        raise UserError(f"data.path: {file.name} is no IDX file of unsigned bytes with {dims} dims (it begins with "
                        f"{content[:4].hex(' ')}); give one of the MNIST family.")
    shape = np.frombuffer(content, ">u4", content[3], 4).astype(np.int64)
    if len(content) - head != shape.prod():
        raise UserError(f"data.path: {file.name} holds {len(content) - head} bytes of values where its header tells of "
                        f"{shape.prod()}; restore it.")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


# Folders, one for each class.


def by_class(files: Sequence[File]) -> tuple[list[tuple[File, str]], list[str], list[str]]:
    """Every image with its class, the folder directly below data.path (or, where the recipe names class folders or
    files, that in which it lies); the files left out that are no images by their names; and those left out as images
    outside the classes' folders."""
    chosen = [file for file in files if file.path.suffix.lower() in SUFFIXES]
    roots = {root_of(file) for file in chosen if "/" in file.below}
    fits = [not file.below or "/" in file.below or root_of(file) not in roots for file in chosen]
    images = [(file, file.below.partition("/")[0] if "/" in file.below else file.path.parent.name)
              for file in compress(chosen, fits)]
    others = [file.name for file in files if file.path.suffix.lower() not in SUFFIXES]
    return images, others, [file.name for file, fit in zip(chosen, fits) if not fit]


def root_of(file: File) -> str:
    return str(file.path).removesuffix(file.below)


def folder_samples(key: str, files: Sequence[File]) -> Iterator[Sample]:
    images, _, _ = by_class(files)
    if not images:
        raise RecipeError(f"{key} holds no image ({', '.join(SUFFIXES)}); give a folder with one folder for each "
                          "class.")
    for file, label in images:
        yield Sample(file.name, content_of(key, file), label)


# Tables with a column of encoded images, or of structs with "bytes", as Hugging Face's data sets have it.


def table_samples(data: Any, file: File) -> Iterator[Sample]:
    schema = schema_of(data.format, file)
    for name, value in (("image", data.image), ("label", data.label)):
        field_of(f"data.{name}", file.name, schema, value)
    kind = schema.field(data.image).type
    inner = kind.field("bytes").type if t.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (t.is_binary(inner) or t.is_large_binary(inner)):
        raise UserError(f'data.image: the column "{data.image}" of {file.name} is {kind}, which holds no bytes; name '
                        'one with encoded images.')
    row = 0
    for batch in batches(data.format, file, {name: schema.field(name).type for name in (data.image, data.label)}):
        for image, label in zip(batch.column(data.image), batch.column(data.label).to_pylist()):
            where = f"row {row} of {file.name}"
            content = image.as_py()
            content = content["bytes"] if isinstance(content, dict) else content
            if not isinstance(label, (int, str)):
                raise UserError(f'data.label: the column "{data.label}" has {label!r} in {where}; it must hold whole '
                                'numbers or texts.')
            yield Sample(where, content or b"", label)
            row += 1
