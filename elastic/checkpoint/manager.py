"""Checkpoints in a store: committed, the newest good one found, old ones pruned; `controller/checkpoints.py` decides when.

Each is a folder, step-00000050, of part files and manifest.json. The manifest, written last, is the commit.

A checkpoint without a manifest does not exist. One with a manifest is used only after every file has the size and the
hash that the manifest states. Part files carry the generation that wrote them, so an older generation overwrites
nothing of a younger.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elastic.checkpoint import safetensors
from elastic.checkpoint.manifest import MAX_BYTES, FileEntry, Manifest, folder_of, parse
from elastic.checkpoint.part import hash_of
from elastic.checkpoint.reader import Reader, read_arrays
from elastic.checkpoint.state_hash import AVERAGE, OPTIMIZER, PARAMETER
from elastic.checkpoint.table_reader import TableReader
from elastic.errors import BadCheckpoint, RecipeError, UserError
from elastic.storage.remote import parted
from elastic.storage.store import TEMPORARY, Store

MANIFEST = "manifest.json"
FOLDER = re.compile(r"step-(\d{8,})")
GENERATION = re.compile(r"-g(\d{6,})\.")
Read = Callable[[Store, str], Manifest]  # as `read_manifest`


def commit(store: Store, manifest: Manifest) -> str:
    """Makes a checkpoint exist whose parts are written, and returns its name. ValueError where the manifest cannot be
    read back."""
    text = manifest.dumps()
    try:
        parse(text)
    except BadCheckpoint as error:
        raise ValueError(f"the manifest of step {manifest.step} is not sound: {error}") from error
    name = folder_of(manifest.step)
    store.write(f"{name}/{MANIFEST}", [text.encode()])
    return name


def committed(store: Store) -> list[tuple[int, str]]:
    """(step, name) of every folder with a manifest, whatever that says; oldest first."""
    folders = [(int(match[1]), name) for name in store.names() if (match := FOLDER.fullmatch(name))]
    return sorted((step, name) for step, name in folders if MANIFEST in store.names(name))


def read_manifest(store: Store, name: str) -> Manifest:
    """The checked manifest of a checkpoint. Its files are not looked at."""
    file = f"{name}/{MANIFEST}"
    size = store.size(file)
    if size is None:
        raise BadCheckpoint(f"{name} has no manifest.")
    if size > MAX_BYTES:
        raise BadCheckpoint(f"The manifest of {name} has {size} bytes, more than {MAX_BYTES}.")
    manifest = parse(store.read_range(file, 0, size))
    if (match := FOLDER.fullmatch(name)) and int(match[1]) != manifest.step:
        raise BadCheckpoint(f"{name} holds the manifest of step {manifest.step}.")
    return manifest


def read_file(store: Store, name: str, entry: FileEntry, manifest: Manifest) -> dict[str, np.ndarray]:
    """A part's boxes by the name they have in it, after the hash of all its bytes was found right."""
    content = Reader(store, name, manifest).chunks(entry, 0, len(entry.chunks))
    if hash_of(content) != entry.hash:
        raise BadCheckpoint(f"{name}/{entry.name} does not have the hash that the manifest states.")
    stated = {key: (piece.dtype, piece.count, piece.offset) for key, piece in safetensors.keyed(entry.pieces).items()}
    if safetensors.index(content, entry.name) != stated:
        raise BadCheckpoint(f"{entry.name} holds other arrays than the manifest states.")
    return safetensors.decode(content, entry.name)


def check_sizes(store: Store, name: str, manifest: Manifest) -> None:
    """All files are there and as long as they should be, before the first is read."""
    for file, size in manifest.sizes.items():
        found = store.size(f"{name}/{file}")
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise BadCheckpoint(f"{name}/{file} {state}.")


def read_bases(store: Store, name: str, manifest: Manifest, read: Read = read_manifest) -> dict[int, Manifest]:
    """The checkpoints, by step, that this one builds on, and those that they build on; its own is among them.

    BadCheckpoint where one is not there in full length.
    """
    found, wanted = {manifest.step: manifest}, sorted(manifest.bases)
    while wanted:
        step = wanted.pop()
        if step in found:
            continue
        base = folder_of(step)
        try:
            found[step] = read(store, base)
            check_sizes(store, base, found[step])
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{name} builds on {base}, which is not whole: {error}") from error
        wanted += found[step].bases
    return found


def verify(store: Store, name: str) -> Manifest:
    """Reads all of a checkpoint, one file of arrays in memory at a time, and of those that its tables build on what they
    need."""
    manifest = read_sound(store, name)
    for entry in manifest.files:
        read_file(store, name, entry, manifest)
    reader = open_tables(store, name, manifest)
    for table in reader.specs():
        for _ in reader.rows(table):
            continue
    for rows in manifest.tables:
        reader.check_file(rows)
    return manifest


def open_tables(store: Store, name: str, manifest: Manifest) -> TableReader:
    """BadCheckpoint where something that they build on is not there in full length."""
    return TableReader(store, name, manifest, read_bases(store, name, manifest))


def read_sound(store: Store, name: str) -> Manifest:
    """The manifest of a checkpoint whose files, and those of the checkpoints that it builds on, are all there in full
    length. Their bytes are not read."""
    manifest = read_manifest(store, name)
    check_sizes(store, name, manifest)
    read_bases(store, name, manifest)
    return manifest


def newest_good(store: Store, refused: Container[str] = (), look: Callable[[Store, str], Any] = read_sound
                ) -> tuple[str | None, list[tuple[str, str]]]:
    """The newest checkpoint that is whole by its manifest and its files' sizes, and (name, reason) of the newer ones
    that are not.

    Those stay where they are. Names in `refused` are passed over. `look=verify` reads every byte. OSError where none is
    whole and one could not be read: a storage that does not answer must not look like a run without checkpoints.
    """
    rejected: list[tuple[str, str]] = []
    unread: OSError | None = None
    for _, name in reversed(committed(store)):
        if name in refused:
            continue
        try:
            look(store, name)
            return name, rejected
        except BadCheckpoint as error:
            rejected.append((name, str(error)))
        except OSError as error:
            rejected.append((name, f"It cannot be read ({error})."))
            unread = error
    if unread is not None:
        raise OSError(f"No checkpoint can be read ({rejected[0][0]}: {unread}); resume the run when the storage "
                      "answers.") from unread
    return None, rejected


def read_weights(store: Store, name: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """Parameters and buffers by name, or the averages of those of which a checkpoint keeps some: only the bytes that
    hold them are read."""
    names = dict.fromkeys(piece.name for entry in manifest.files for piece in entry.pieces)
    average = {name: AVERAGE + name.partition("/")[2] for name in names if not name.startswith(OPTIMIZER)}
    chosen = {name: mean if mean in names else name for name, mean in average.items()}
    found = read_arrays(Reader(store, name, manifest), chosen.values())
    return {name: found[source] for name, source in chosen.items()}


def split(path: str | os.PathLike[str]) -> tuple[Store, str]:
    """The store and the name of a checkpoint given by the path or URI of its folder or manifest."""
    parent, name = parted(os.fspath(path))
    if name == MANIFEST:
        parent, name = parted(parent)
    return Store.open(parent), name


def prune(store: Store, keep: int, best: str | None = None, keep_every: int = 0, refused: Container[str] = (),
          read: Read = read_manifest, best_mode: str = "min") -> list[str]:
    """Removes all but the newest `keep` checkpoints, the one with the best `best` ("eval.loss"; the `best_mode` of
    all), and those whose step is a multiple of `keep_every` (0: none); returns what is gone. Of a checkpoint that is a
    link only the link goes.

    Unreadable ones, ones with missing or truncated files and those in `refused` count for nothing and stay. What those
    that are kept build on is kept too; and of tables the newest but one, on which one that is being written may build.
    """
    good: list[tuple[str, Manifest]] = []
    for _, name in reversed(committed(store)):
        if name in refused:
            continue
        try:
            manifest = read(store, name)
            check_sizes(store, name, manifest)
            good.append((name, manifest))
        except (BadCheckpoint, UserError):
            continue
    good = with_bases(good)
    kept = {name for name, _ in good[:keep]} | best_of(good, best, best_mode)
    kept |= {name for name, manifest in good if keep_every and manifest.step % keep_every == 0}
    kept |= bases_of(kept | {name for name, manifest in good[:2] if manifest.tables}, dict(good))
    gone = [name for name, _ in good if name not in kept]
    for name in gone:
        if not store.is_link(name):
            # first: a removal that is cut off must leave no manifest without its files
            store.remove(f"{name}/{MANIFEST}")
        store.remove(name)
    return gone


def with_bases(checkpoints: list[tuple[str, Manifest]]) -> list[tuple[str, Manifest]]:
    """Those, given newest first, that build on nothing that is not among them."""
    found: dict[str, Manifest] = {}
    for name, manifest in reversed(checkpoints):
        if all(folder_of(base) in found for base in manifest.bases):
            found[name] = manifest
    return [(name, manifest) for name, manifest in checkpoints if name in found]


def bases_of(names: Container[str], checkpoints: Mapping[str, Manifest]) -> set[str]:
    """The names, and all that those build on, of checkpoints by name, newest first."""
    found: set[str] = set()
    for name, manifest in checkpoints.items():
        if name in names or name in found:
            found |= {name, *map(folder_of, manifest.bases)}
    return found


def best_of(checkpoints: list[tuple[str, Manifest]], best: str | None, mode: str) -> set[str]:
    """The name of the best one, given newest first; of equals the oldest, because later ones repeat its evaluation
    until the next."""
    metric = (best or "").removeprefix("eval.")
    rated = [(manifest.eval[metric], name) for name, manifest in reversed(checkpoints) if metric in manifest.eval]
    if not rated:
        return set()
    return {(min if mode == "min" else max)(rated, key=lambda pair: pair[0])[1]}


def clean(store: Store, live_generation: int, read: Read = read_manifest) -> list[str]:
    """Removes what crashes left behind and returns it: files that no manifest names, in checkpoints at or below the
    newest committed one, written by generations before the live one. Called by the one who commits, and not during a
    commit."""
    newest = max((step for step, _ in committed(store)), default=-1)
    gone = []
    for folder in store.names():
        match = FOLDER.fullmatch(folder)
        if not match or int(match[1]) > newest or store.is_link(folder):
            continue
        files = store.names(folder)
        try:
            named = {MANIFEST, *read(store, folder).sizes} if MANIFEST in files else set()
        except (BadCheckpoint, UserError):  # kept for inspection as it is
            continue
        left = [file for file in files if file not in named and is_older(file, live_generation)]
        for file in left:
            store.remove(f"{folder}/{file}")
            gone.append(f"{folder}/{file}")
        if len(left) == len(files):
            store.remove(folder)
    return gone


def is_older(file: str, live_generation: int) -> bool:
    """Half a manifest is always left over: whoever cleans is the one who commits."""
    if file.startswith(f"{MANIFEST}.") and file.endswith(TEMPORARY):
        return True
    match = GENERATION.search(file)
    return match is not None and int(match[1]) < live_generation


def read_start(path: str, places: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of [model] init by parameter name; every one must be a parameter of the model, of its shape. None for
    ""."""
    values = read_init(path) if path else {}
    for name, value in values.items():
        place = places.get(name)
        if place is None or place.shape != value.shape:
            has = f"shape {place.shape}" if place else f"no such parameter, but {', '.join(list(places)[:3])} and so on"
            raise RecipeError(f"model.init = {path!r} holds {name} of shape {value.shape}, the model has {has}; give "
                              "weights of this model.")
    return values


def read_init(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Starting weights by parameter name, from a safetensors file or a checkpoint. RecipeError names `model.init`."""
    path = Path(path)
    try:
        if path.is_dir() or path.name == MANIFEST:
            store, name = split(path)
            found = read_weights(store, name, read_sound(store, name))
            return {name.removeprefix(PARAMETER): array for name, array in found.items() if name.startswith(PARAMETER)}
        found = safetensors.decode(path.read_bytes(), str(path))
        return {name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array
                for name, array in found.items()}
    except OSError as error:
        raise RecipeError(f"model.init = {str(path)!r} cannot be read ({error.strerror}); give a safetensors file or a "
                          "checkpoint.") from error
    except BadCheckpoint as error:
        raise RecipeError(f"model.init = {str(path)!r}: {error} Give a safetensors file or a whole checkpoint.") from error
