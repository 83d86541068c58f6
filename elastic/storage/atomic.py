"""Files of a local disk that appear whole or not at all, lines that are appended whole or not at all, and locks of files.

Checkpoints, which may lie on any storage, go through `store`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from elastic.errors import UserError
from elastic.storage.store import TEMPORARY

LOOK_S = 0.05  # between two tries for a lock


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path in the same folder for a file, or a folder, that takes `target`'s place once the block has ended well, and
    is gone if it fails."""
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    except BaseException:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which is `path` once the block has ended well, and on the disk itself. Of several writers the
    last wins."""
    with beside(path) as unfinished, open(unfinished, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: Any) -> None:
    """A text, or any bytes. The folder must exist."""
    with appearing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_whole(file: Any, piece: bytes) -> None:
    """All of it at the end of an unbuffered file that is appended to, or nothing: OSError."""
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(piece) < len(piece):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise


def locked(file: Any, wait_s: float = 0.0) -> bool:
    """Takes the operating system's lock of an open file, which ends with the file or the process; False if another
    still has it after `wait_s`.

    The file must be open for writing: NFS locks no other. UserError where the file system keeps no locks.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(LOOK_S)
        except OSError as error:
            raise UserError(f"{file.name} cannot be locked ({error.strerror}); put its folder on a file system that "
                            "keeps locks.") from error
