"""Pages in RocksDB, in a folder of this process's own. The log of writes is off: nothing outlives the process."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, WriteBatch, WriteOptions

from elastic.errors import UserError
from elastic.humanize import size

FOLDER = "elastic-rows-"  # how the folders begin of which each is one process's, for one table
OWNER = "owner"  # a file in it that its process keeps locked: whoever can lock it may take the folder away
BUFFER_BYTES = 16 << 20  # a table's rows on their way to disk, twice
CACHE_BYTES = 64 << 20  # of a process: pages that were read, and where pages lie
OPEN_FILES = 256
BLOOM_BITS = 10  # a page


class RocksPages:
    """`recommender.cold_rows.Pages`."""

    def __init__(self, path: str, table: str):
        self.path, self.table = path, table
        self.folder, lock = own_folder(path, table)
        try:
            self._db = opened(self.folder / "rows")
        except Exception as error:
            take_away(self.folder, lock)
            raise self._failed(f"cannot keep rows ({error})") from error
        self._finalizer = weakref.finalize(self, give_back, self._db, self.folder, lock)

    def put(self, numbers: np.ndarray, pages: Sequence[bytes]) -> None:
        batch = WriteBatch(raw_mode=True)
        for key, page in zip(keys(numbers), pages):
            batch.put(key, page)
        try:
            self._db.write(batch)
        except Exception as error:
            raise self._failed(f"has no room for {size(sum(map(len, pages)))} more ({error})") from error

    def get(self, numbers: np.ndarray) -> Sequence[bytes]:
        try:
            return self._db[keys(numbers)]  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(f"cannot be read ({error})") from error

    def close(self) -> None:
        self._finalizer()

    def _failed(self, what: str) -> UserError:
        return UserError(f'table {self.table}: embedding.disk_path = "{self.path}" {what}; free some space there, name '
                         "another folder, or raise embedding.memory_gb.")


def keys(numbers: np.ndarray) -> list[bytes]:
    content = numbers.astype(">u4").tobytes()
    return [content[at:at + 4] for at in range(0, len(content), 4)]


@cache
def page_cache() -> Any:
    """All tables' of this process."""
    return Cache(CACHE_BYTES)


def opened(folder: Path) -> Any:
    options, blocks, writes = Options(raw_mode=True), BlockBasedOptions(), WriteOptions()
    options.create_if_missing(True)
    options.set_write_buffer_size(BUFFER_BYTES)
    options.set_max_write_buffer_number(2)
    options.set_compression_type(DBCompressionType.none())  # numbers of 32 bits do not shrink
    options.set_max_open_files(OPEN_FILES)
    blocks.set_block_cache(page_cache())
    blocks.set_cache_index_and_filter_blocks(True)
    blocks.set_bloom_filter(BLOOM_BITS, False)
    options.set_block_based_table_factory(blocks)
    writes.disable_wal = True
    db = Rdict(str(folder), options=options)
    db.set_write_options(writes)
    return db


# folders


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Nobody else makes or takes away folders there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def own_folder(path: str, table: str) -> tuple[Path, int]:
    """A new folder, and the lock that says whose it is; takes away those of processes that are gone. UserError where
    nothing can be written."""
    try:
        os.makedirs(path, exist_ok=True)
        with alone_in(Path(path)):
            for other in Path(path).glob(f"{FOLDER}*"):
                if (lock := locked(other / OWNER)) is not None:
                    take_away(other, lock)
            name = re.sub(r"[^A-Za-z0-9_-]", "", table)[:40]
            folder = Path(mkdtemp("", f"{FOLDER}{os.getpid()}-{name}-", path))
            lock = locked(folder / OWNER)
        if lock is None:
            raise OSError(0, "no file can be locked")
        return folder, lock
    except OSError as error:
        raise UserError(f'embedding.disk_path = "{path}" cannot be written on this node ({error.strerror}); name a '
                        "folder of a local disk with room for the rows.") from error


def locked(file: Path) -> int | None:
    """A descriptor that holds the file's lock for as long as the process lives; None where another holds it, or the
    file is another's or gone."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def take_away(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def give_back(db: Any, folder: Path, lock: int) -> None:
    db.cancel_all_background(True)  # not closed, which would write what is in memory
    take_away(folder, lock)
