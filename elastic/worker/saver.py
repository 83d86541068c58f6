"""A worker's side of checkpoints: copy its share at the step boundary, write it beside the training, report to the controller."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from elastic.checkpoint.claim import read as claim_of
from elastic.checkpoint.manager import MANIFEST, commit, committed, folder_of, read_sound, split
from elastic.checkpoint.manifest import Manifest
from elastic.checkpoint.part import Image, part_name
from elastic.checkpoint.reader import Reader, read_together
from elastic.checkpoint.state_hash import PARAMETER
from elastic.checkpoint.table_reader import check_tables
from elastic.collective.group import CollectiveGroup
from elastic.errors import BadCheckpoint, NonFiniteLoss, RecipeError, RunFailed
from elastic.messages import Part, Save
from elastic.state.state import State, check_same
from elastic.storage.faulty import FaultyFiles
from elastic.storage.remote import shown
from elastic.storage.store import Store, patiently
from elastic.tables.held import HeldTables
from elastic.worker.table_saver import Copied, TableSaver, write_tables

JOIN_S = 0.1  # between two reports of how far a write is that everybody waits for


class Saver:
    """Writes at most one part at a time; a second save waits for the first. `post` takes the `Part` of each that is
    durable, or failed.

    `head`: what all manifests of the run have in common. `mb_s`: megabytes a second at most, while nobody waits for the
    write; 0: as fast as the storage takes them. `tables`: what this worker holds of embedding tables; each
    `full_every`-th checkpoint has all rows of a bucket, the others what has changed since.
    """

    def __init__(self, worker: str, location: str, head: Manifest, batch_size: int, post: Callable[[Any], None],
                 crash: Callable[[], None] = lambda: os._exit(1), mb_s: float = 0.0, tables: HeldTables | None = None,
                 full_every: int = 10):
        self.worker, self.location, self.head, self.batch_size, self.post = worker, location, head, batch_size, post
        self.crash, self.mb_s = crash, mb_s
        self.tables = TableSaver(tables, full_every) if tables else None
        self.hurry = threading.Event()  # somebody waits for the write
        self.thread: threading.Thread | None = None
        self.image: Image | None = None
        self.error: Exception | None = None
        self.writing, self.done = False, 0  # a part is still being written, and bytes of it that are
        self.saved: tuple[int, int, int, int] | None = None
        self.newest = 0  # step of the last save that turned out to be committed

    def prepare(self, state: State, rank: int, world_size: int) -> None:
        """Gets the memory for the next saves ready, beside the training."""
        before = self.thread

        def work() -> None:
            if before is not None:
                before.join()
            self.image = self._image(state, rank, world_size)

        self.thread = threading.Thread(target=work, name="staging", daemon=True)
        self.thread.start()

    def _image(self, state: State, rank: int, world_size: int) -> Image:
        boxes = state.shares(rank // state.replica_size, world_size // state.replica_size)
        places = tuple(state.in_whole(box) for box in boxes)
        # another coordinate's boxes may be just as large
        if self.image is not None and (self.image.sources, self.image.boxes) == (boxes, places):
            return self.image
        return Image(places, self.image.memory if self.image else None, boxes)

    def save(self, state: State, order: Save, evaluation: Mapping[str, float],
             progress: Callable[[int], None] = lambda done: None, is_alone: bool = False) -> None:
        """Returns once this rank's share is copied, or with `order.wait` once it is durable.

        A write that fails is reported to the controller, and raised only where it is waited for (RunFailed).
        `NonFiniteLoss` as soon as it is known that an earlier state was not finite. `is_alone`: too few are left to go
        on; of embedding tables all goes that this worker holds, and RunFailed where nobody holds the rest.
        """
        started = time.perf_counter()
        self.join(progress)
        self._raise_lost()
        this = (order.generation, order.step, order.rank, order.world_size)
        if self.saved == this and self.error is None:
            return
        copied = self.tables.copy(order, self.tables.base(order.step, self._is_there), is_alone) if self.tables else None
        before, self.saved = self.saved, this
        self.image = self._image(state, order.rank, order.world_size)
        self.image.fill(state.take)
        stall_s = time.perf_counter() - started
        head = self._head(order.generation, order.step, evaluation) if order.rank == 0 else None
        self.writing, self.error, self.done = True, None, 0
        self.hurry.clear()
        kind = f"rows-{self.worker}" if is_alone else "rows"  # a rank may be another's whose file of this step counts already
        self.thread = threading.Thread(target=self._write, args=(self.image, copied, order, head, stall_s, started,
                                                                 before[1] if before else 0, kind),
                                       name="saver", daemon=True)
        self.thread.start()
        if order.wait:
            self.join(progress)
            self._raise_lost()
            if self.error is not None:
                raise RunFailed(self._sentence(order.step, self.error)) from self.error

    def _head(self, generation: int, step: int, evaluation: Mapping[str, float], **extra: Any) -> Manifest:
        return replace(self.head, step=step, generation=generation, cursor=step * self.batch_size, eval=evaluation,
                       extra={**self.head.extra, **extra})

    def _is_there(self, step: int) -> bool:
        """Whether a checkpoint is committed, as far as the storage answers."""
        with contextlib.suppress(OSError):
            return Store.open(self.location).size(f"{folder_of(step)}/{MANIFEST}") is not None
        return False

    def _write(self, image: Image, copied: Copied | None, order: Save, head: Manifest | None, stall_s: float,
               started: float, before: int, kind: str) -> None:
        begun = time.monotonic()
        if before > self.newest and self._is_there(before):
            self.newest = before
        # then it is not known whose checkpoint comes to lie there
        is_new = copied is not None and not self._is_there(order.step)
        names, size = list[str](), len(image.bytes)

        def note(done: int) -> None:
            self.done = done
            if self.mb_s:
                self.hurry.wait(max(0.0, begun + done / (self.mb_s * 1e6) - time.monotonic()))

        def part(file: str, error: str = "", tables: str = "[]") -> Part:
            return Part(self.worker, order.generation, order.step, file, stall_s, time.perf_counter() - started,
                        order.rank,
                        order.world_size, head.dumps() if head else "", error, tables)

        try:
            store = self._store(order)
            names.append(part_name(order.rank, order.world_size, order.generation))
            entry = image.write(store, folder_of(order.step), names[0], self.head.chunk_bytes, note,
                                lambda: check_finite(image, order.step))
            tables = write_tables(store, order, copied, lambda done: note(size + done), kind, names.append) if copied else []
            if self.tables and copied and is_new:
                self.tables.written(order.step, copied)
            self.post(part(json.dumps(asdict(entry)), tables=json.dumps([asdict(table) for table in tables])))
        except Exception as error:
            self.error = error
            self._clear(order.step, names)
            if self.tables:
                self.tables.failed(error)
            self.post(part("", self._sentence(order.step, error)))
        finally:
            self.writing = False

    def _clear(self, step: int, names: Iterable[str]) -> None:
        """What was written of a part that will not be: on a full disk it would be in the way of the next."""
        for name in names:
            with contextlib.suppress(OSError):
                Store.open(self.location).remove(f"{folder_of(step)}/{name}")

    def _store(self, order: Save) -> Store:
        store = Store.open(self.location)
        if order.fault == "crash":
            return Store(FaultyFiles(store.files, "crash", 1 + order.step % 4, crash=self.crash), store.root)
        return Store(FaultyFiles(store.files, order.fault, 1, "write"), store.root) if order.fault else store

    def _sentence(self, step: int, error: Exception) -> str:
        if isinstance(error, NonFiniteLoss):
            return str(error)
        return (f"The checkpoint of step {step} could not be written to {shown(self.location)} ({reason(error)}); "
                "make room or mend the storage, then resume the run.")

    def join(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Waits for the write in flight; `progress(done)` is called now and then with the bytes that are written."""
        self.hurry.set()
        while self.thread is not None and self.thread.is_alive():
            self.thread.join(JOIN_S)
            progress(self.done)
        self.thread = None

    def _raise_lost(self) -> None:
        if isinstance(self.error, NonFiniteLoss):
            raise self.error

    def leave(self, state: State, generation: int, evaluation: Mapping[str, float],
              lines: Iterable[Mapping[str, Any]]) -> bool:
        """The final checkpoint of a worker without a controller: all of its state, committed by itself where nothing as
        new is.

        `lines`: those of metrics.jsonl that may be lost; with it go all since the newest checkpoint. Returns whether it
        was needed.
        """
        self.join()
        store, step = Store.open(self.location), state.committed
        newest = max((s for s, _ in committed(store)), default=0)
        if step <= 0 or newest >= step or not state.is_all:  # of no use without the other parts of the model
            return False
        claim = claim_of(store)
        if claim is not None and claim.others(self.head.extra.get("run", ""), ""):
            print(claim.sentence(self.location), flush=True)
            return False
        copied = None
        order = Save(generation, step, wait=True)
        if self.tables:
            try:
                copied = self.tables.copy(order, -1, is_alone=True)
            except RunFailed as lacking:
                print(str(lacking), flush=True)
                return False
        image = Image(state.shares(0, 1), self.image.memory if self.image else None)
        self.image = None  # its memory is another's now
        image.fill(state.take)
        name = part_name(0, 1, generation, f"state-{self.worker}")
        entry = image.write(store, folder_of(step), name, self.head.chunk_bytes,
                            check=lambda: check_finite(image, step))
        tables = write_tables(store, order, copied, lambda done: None, f"rows-{self.worker}") if copied else []
        if max((s for s, _ in committed(store)), default=0) >= step:
            return False
        head = self._head(generation, step, evaluation, lines=[fields for fields in lines if fields["step"] > newest])
        commit(store, replace(head, files=(entry,), tables=tuple(tables)))
        return True

    def restore(self, path: str, state: State, group: CollectiveGroup,
                at: Callable[[int], AbstractContextManager[Any]]) -> tuple[Manifest, int]:
        """Loads a checkpoint into the states of all members together; its manifest and the bytes that this one has
        read.

        `BadCheckpoint` if it is not whole; RecipeError, before anything is read, where it is of another model. The
        state counts as torn until all of it is in place.
        """
        self.join()  # what is still being written is of another past
        try:
            store, name = split(path)
            manifest = patiently(lambda: read_sound(store, name))
        except OSError as error:
            raise BadCheckpoint(f"{shown(path)} cannot be read ({' '.join(str(error).split())[:200]}).") from error
        pieces = [piece for entry in manifest.files for piece in entry.pieces]
        specs = state.whole_specs()
        check_same({name: shape for name, (_, shape) in specs.items()}, {piece.name: piece.shape for piece in pieces})
        for piece in pieces:
            if piece.dtype != (dtype := specs[piece.name][0]):
                raise RecipeError(f"{piece.name}: the checkpoint has dtype {piece.dtype}, the recipe's model has "
                                  f"{dtype}; it is of another model: put [model] back, or start a new run with "
                                  "model.init.")
        check_tables(manifest, self.tables.specs if self.tables else {})
        reader, read = Reader(store, name, manifest), 0
        state.committed = -1
        if self.tables:
            self.tables.held.committed = -1
        read_together(reader, group, lambda piece, low, values: state.put(piece.name, piece.box, low, values), at)
        if self.tables:
            read = self.tables.restore(store, name, manifest, store.root == Store.open(self.location).root, at)
            with at(0):  # nobody goes on before all have their rows
                group.barrier()
            self.tables.held.committed = manifest.step
        state.committed = manifest.step
        return manifest, reader.bytes + read


def check_finite(image: Image, step: int) -> None:
    """Nobody could go on from parameters that are no numbers."""
    if not image.are_finite(PARAMETER):
        raise NonFiniteLoss(f"The parameters are not finite after step {step}; lower optimizer.lr, set "
                            "optimizer.clip_norm or mend the data.")


def reason(error: BaseException) -> str:
    """Without the storage's own sentence, which names a temporary file: the same fault is the same sentence."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    return os.strerror(error.errno) if error.errno else type(error).__name__
