"""A place for checkpoints belongs to one live run: a small file there says whose it is, and was renewed when.

On a disk the file is read and written under a lock, so of two only one gets it. On a storage without locks whoever
finds the place free writes, waits, and has it if it reads back its own text; a text that was on its way for longer than
the wait takes the place from who had just got it, which learns that before it commits anything. A claim runs out when
nobody renews it; machines' clocks may differ by less than that. A run directory is one run's already (`rundir.held`):
whoever goes on there takes over what the run before it had.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from elastic.errors import BadCheckpoint, UserError
from elastic.storage.atomic import locked
from elastic.storage.files import LocalFiles
from elastic.storage.remote import shown
from elastic.storage.store import Store

NAME = "claim.json"
RENEW_S, LAPSE_S = 10.0, 60.0
SETTLE_S = 2.0  # between writing and reading back
LOCK_S = 10.0  # for the lock of a file that is held for an instant
MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Word:
    """What a claim says. `owner` is the run's directory, `token` another one with every writing."""

    run: str
    owner: str
    time: float
    token: str

    def is_live(self) -> bool:
        return abs(time.time() - self.time) <= LAPSE_S

    def lapses_in(self) -> float:
        """Seconds, unless it is renewed."""
        return self.time + LAPSE_S - time.time()

    def others(self, run: str, owner: str) -> bool:
        """Whether it keeps this run away."""
        return self.is_live() and self.run != run and self.owner != owner

    def sentence(self, location: str) -> str:
        return (f'checkpoint.path = "{shown(location)}" is in use by the live run {self.run} of {self.owner} (last '
                'sign of life '
                f"{max(0.0, time.time() - self.time):.0f} s ago); name another path, or wait until it has ended, after "
                f"a crash {LAPSE_S:g} s more.")


def owner_of(run_dir: str | os.PathLike[str]) -> str:
    return f"{socket.gethostname()}:{os.path.abspath(run_dir)}"


def parse(text: bytes) -> Word | None:
    """None for what is no claim: half a text is nobody's."""
    try:
        found = json.loads(text)
        return Word(str(found["run"]), str(found["owner"]), float(found["time"]), str(found["token"]))
    except (ValueError, KeyError, TypeError):
        return None


def read(store: Store) -> Word | None:
    """The claim there is, whoever's."""
    size = store.size(NAME)
    return parse(store.read_range(NAME, 0, min(size, MAX_BYTES))) if size else None


class Claim:
    """One run's, from `take` to `release`. Errors of the storage are OSError."""

    def __init__(self, location: str, run: str, owner: str):
        self.location, self.run, self.owner = location, run, owner
        self.store = Store.open(location)
        self.renewed, self.lost = float("-inf"), ""
        self.over, self.lock = threading.Event(), threading.Lock()

    def take(self) -> None:
        """Takes or renews it. UserError where another live run has it."""
        with self.lock:
            if isinstance(self.store.files, LocalFiles):
                self._take_locked()
            else:
                self._take_settled()
            self.renewed = time.monotonic()

    def _word(self) -> Word:
        return Word(self.run, self.owner, time.time(), uuid.uuid4().hex)

    def _refuse(self, found: Word | None) -> None:
        if found is not None and found.others(self.run, self.owner):
            raise UserError(found.sentence(self.location))

    @contextmanager
    def _file(self) -> Iterator[Any]:
        os.makedirs(self.store.root, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(self.store.path(NAME), flags, 0o644), "r+b", buffering=0) as file:
            if not locked(file, LOCK_S):
                raise BlockingIOError(f"{NAME} is locked for more than {LOCK_S:g} s")
            yield file

    def _take_locked(self) -> None:
        with self._file() as file:
            self._refuse(parse(file.read(MAX_BYTES)))
            text = json.dumps(asdict(self._word())).encode()
            file.seek(0)
            file.write(text)  # over the old text: a full disk has room for that
            file.truncate(len(text))

    def _take_settled(self) -> None:
        found = read(self.store)
        self._refuse(found)
        while True:
            mine = self._word()
            self.store.write(NAME, [json.dumps(asdict(mine)).encode()])
            if found is not None and found.run == self.run and found.is_live():
                return  # it is this run's already
            time.sleep(SETTLE_S)
            back = read(self.store)
            if back == mine:
                return
            self._refuse(back)

    @contextmanager
    def kept(self, lost: Callable[[str], None]) -> Iterator[None]:
        """Takes it, and renews it while this lasts; `lost(sentence)` if another run has it after all. Given back where
        it ends well: who falls may have somebody who carries on.
        """

        def renew() -> bool:
            try:
                self.take()
            except UserError as error:
                self.lost = str(error)
                lost(self.lost)
            except OSError as error:  # the storage may answer again before the next checkpoint
                print(f"The claim on {shown(self.location)} could not be renewed: {' '.join(str(error).split())[:200]}",
                      flush=True)
            return not self.lost

        def work() -> None:
            while not self.over.wait(RENEW_S) and renew():
                continue

        if renew():
            threading.Thread(target=work, name="claim", daemon=True).start()
        try:
            yield
            self.release()
        finally:
            self.over.set()

    def check(self) -> None:
        """Before something is made to count there. BadCheckpoint where it is another's by now."""
        try:
            if self.lost:
                raise BadCheckpoint(self.lost)
            self._refuse(read(self.store))
            if time.monotonic() - self.renewed > LAPSE_S / 2:
                self.take()
        except UserError as error:
            raise BadCheckpoint(str(error)) from error

    def release(self) -> None:
        """The run is over; what another has taken meanwhile stays."""
        self.over.set()
        with self.lock, contextlib.suppress(OSError, UserError):
            found = read(self.store)
            if found is not None and found.run == self.run:
                self.store.remove(NAME)
