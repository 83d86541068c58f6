"""The ledger on disk: which sample fed which logical shard at which step (`data/ledger.py` notes it), and what that proves.

One Arrow IPC stream per generation, one record batch per step, one row per sample. Each batch goes to the operating
system in one piece before the step's own line does, so every step in metrics.jsonl is in the ledger; a torn tail is
cut. What a full disk does not take is held until it does.
"""

from __future__ import annotations

import base64
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from elastic.errors import UserError
from elastic.storage.atomic import write_whole

FOLDER = "ledger"
COLUMNS = ("step", "logical_shard", "position", "epoch", "sample")
TYPES = (pa.int64(), pa.int32(), pa.int64(), pa.int32(), pa.int64())


class LedgerFiles:
    """Appends steps; made where a run stands at `written`, it first drops what comes after."""

    def __init__(self, run_dir: str | Path, written: int):
        self.folder = Path(run_dir) / FOLDER
        self.generation, self._file = -1, cast("FileIO | None", None)
        self._path = self.folder  # of the newest step's file
        self._held: deque[tuple[int, Path, bytes]] = deque()  # (step, file, rows)
        self.error: OSError | None = None  # why rows are held
        self.cut_back(written)

    def append(self, generation: int, step: int, packed: Mapping[str, Any]) -> None:
        """`packed`: sizes of the sources, and rows: base64 of int64 (n, 4), shard, position, epoch, sample."""
        rows = np.frombuffer(base64.b64decode(packed["rows"]), "<i8").reshape(-1, 4)
        about = {"sizes": json.dumps(packed["sizes"])}
        schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in zip(COLUMNS, TYPES)], metadata=about)
        columns = [np.full(len(rows), step), *rows.T]
        batch = pa.record_batch([pa.array(column).cast(kind) for column, kind in zip(columns, TYPES)], schema=schema)
        piece = batch.serialize().to_pybytes()
        if generation != self.generation:  # a file is never gone on with: the controller that does so has its own
            self.generation, self._path = generation, self.folder / f"g{generation:06d}-step-{step:08d}.arrow"
            piece = schema.serialize().to_pybytes() + piece
        self._held.append((step, self._path, piece))
        self.retry()

    def retry(self) -> bool:
        """Writes what is held; whether that is everything."""
        try:
            while self._held:
                _, path, piece = self._held[0]
                if self._file is None or self._file.name != str(path):
                    self.close()
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
                write_whole(self._file, piece)
                self._held.popleft()
        except OSError as error:
            self.error = error
            return False
        self.error = None
        return True

    def cut_back(self, step: int) -> None:
        """Drops later steps and what is torn."""
        self.generation = -1
        self._held = deque(one for one in self._held if one[0] <= step)
        self.close()
        for file in files(self.folder):
            end = 0
            for batch, after in pieces(file):
                if batch["step"][0] > step:
                    break
                end = after
            if not end:
                file.unlink()
            elif end < file.stat().st_size:
                os.truncate(file, end)

    def sync(self) -> None:
        """Returns when all of it is on the disk itself; OSError where some is held."""
        if not self.retry() and self.error:
            raise self.error
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None


def files(folder: Path) -> list[Path]:
    """In the order of their generations."""
    return sorted(folder.glob("g*.arrow"))


def pieces(file: Path) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Every whole step of a file, and where it ends in bytes."""
    with pa.OSFile(str(file)) as raw:
        try:
            reader = pa.ipc.open_stream(raw)
        except (pa.ArrowInvalid, OSError):
            return
        while True:
            try:
                batch = reader.read_next_batch()
            except (StopIteration, pa.ArrowInvalid, OSError):
                return
            if not batch.num_rows:
                continue
            yield {name: batch.column(name).to_numpy() for name in COLUMNS}, raw.tell()


def sources_of(file: Path) -> list[int]:
    """The samples of each source; UserError if the file was altered."""
    try:
        with pa.OSFile(str(file)) as raw:
            about = pa.ipc.open_stream(raw).schema.metadata or {}
        return json.loads(about[b"sizes"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no ledger: the file was altered.") from error


@dataclass
class Proof:
    """Follows a ledger from its first row to its last. Memory: one byte a sample of each epoch that is not whole yet.
    """

    sizes: list[int]
    problems: list[str] = field(default_factory=list)
    position: int = 0  # the next one
    step: int = 0
    fed: dict[int, int] = field(default_factory=dict)  # source -> rows
    open: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # (source, epoch) -> which samples came by
    whole: set[tuple[int, int]] = field(default_factory=set)

    def take(self, rows: Mapping[str, np.ndarray], samples: Mapping[int, int]) -> None:
        """One step; `samples`: how many its line says."""
        step, num = int(rows["step"][0]), len(rows["step"])
        if step != self.step + 1:
            self.problems.append(f"ledger: step {step} where step {self.step + 1} should be")
        if samples.get(step) != num:
            self.problems.append(f"ledger: step {step} has {num} samples, metrics.jsonl says "
                                 f"{samples.get(step, 'nothing')}")
        if not np.array_equal(rows["position"], np.arange(self.position, self.position + num)):
            self.problems.append(f"ledger: step {step} does not feed the positions {self.position} to "
                                 f"{self.position + num - 1}, each once")
        if (np.diff(rows["logical_shard"]) < 0).any():
            self.problems.append(f"ledger: step {step} has its logical shards out of order")
        self.step, self.position = step, self.position + num
        first = np.concatenate([[0], np.cumsum(self.sizes)])
        sources = np.searchsorted(first, rows["sample"], side="right") - 1
        if (sources < 0).any() or (sources >= len(self.sizes)).any():
            self.problems.append(f"ledger: step {step} feeds a sample that the data does not have")
            return
        for source in np.unique(sources).tolist():
            mine = sources == source
            self.fed[source] = self.fed.get(source, 0) + int(mine.sum())
            for epoch in np.unique(rows["epoch"][mine]).tolist():
                self.mark(source, epoch, rows["sample"][mine & (rows["epoch"] == epoch)] - first[source], step)

    def mark(self, source: int, epoch: int, samples: np.ndarray, step: int) -> None:
        key = (source, epoch)
        seen = self.open.setdefault(key, np.zeros(self.sizes[source], bool))
        twice = samples[seen[samples]].tolist() or samples[np.bincount(samples)[samples] > 1].tolist() if key not in self.whole else samples.tolist()
        if twice:
            self.problems.append(f"ledger: sample {twice[0]}{self.named(source)} is fed a second time in epoch "
                                 f"{epoch}, at step {step}")
        seen[samples] = True
        if seen.all():
            self.whole.add(key)
            del self.open[key]

    def named(self, source: int) -> str:
        return f" of source {source}" if len(self.sizes) > 1 else ""

    def end(self) -> None:
        """Every epoch that the run went through is whole."""
        for source, size in enumerate(self.sizes):
            for epoch in range(self.fed.get(source, 0) // size):
                if (source, epoch) not in self.whole:
                    seen = self.open.get((source, epoch), np.zeros(size, bool))
                    self.problems.append(f"ledger: epoch {epoch}{self.named(source)} lacks {int((~seen).sum())} of "
                                         f"{size} samples, the first of them {int(np.argmin(seen))}")


def prove(run_dir: Path, steps: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """(problems, facts) of a run's ledger against its committed steps: every position once, every sample of a whole
    epoch once."""
    found = files(run_dir / FOLDER)
    if not found:
        return (["ledger: there is none, but the recipe asks for one"] if steps else []), []
    samples = {line["step"]: line["samples"] for line in steps}
    proof = Proof(sources_of(found[0]))
    for file in found:
        if sources_of(file) != proof.sizes:
            proof.problems.append(f"{file.name}: its data set is another one than that of {found[0].name}")
        end = 0
        for rows, after in pieces(file):
            proof.take(rows, samples)
            end = after
        if end < file.stat().st_size:
            proof.problems.append(f"{file.name}: cannot be read after byte {end}")
    if samples and proof.step != max(samples):
        proof.problems.append(f"ledger: it ends at step {proof.step}, metrics.jsonl at step {max(samples)}")
    proof.end()
    facts = f"ledger: {proof.position} positions, each fed once; {len(proof.whole)} whole epochs, every sample of each exactly once"
    return proof.problems, [facts]
