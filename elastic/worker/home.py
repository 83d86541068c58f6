"""Where a worker process keeps what goes into the run's directory: in it, or, where its node does not see it, on the head node."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

from elastic.checkpoint.claim import read as claim_of
from elastic.messages import Job
from elastic.observe.run_files import is_seen
from elastic.storage.head import CHUNK, IN_FLIGHT, HeadFiles, HeadSink, at_head, head_files
from elastic.storage.store import Store

SEND_S = 0.5  # between two looks at what the log has got


def checkpoints_of(job: Job) -> str:
    """The place of checkpoints as this node reaches it. Its claim says whether what lies at that path here is the
    run's."""
    if "://" in job.checkpoints or job.is_local:
        return job.checkpoints
    with contextlib.suppress(OSError):
        claim = claim_of(Store.open(job.checkpoints))
        if claim is not None and claim.run == job.run_id:
            return job.checkpoints
    return at_head(job.run_id, job.checkpoints)


@dataclass
class Log:
    """A worker's output. What a node of its own file system writes is sent to the head node; the last half second of a
    process that is killed stays here."""

    path: Path  # on this node
    job: Job
    target: str = ""  # on the head node; "": it is the same
    sent: int = 0
    sink: HeadSink | None = None
    over: threading.Event = field(default_factory=threading.Event)
    sending: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, job: Job, name: str) -> Log:
        there = Path(job.run_dir) / "logs" / f"{name}.log"
        if job.is_local or is_seen(Path(job.run_dir), job.run_id):
            return cls(there, job)
        return cls(own_folder() / job.run_id / there.name, job, str(there))

    def note(self, node: str) -> str:
        """What the run is to know."""
        return (f"Node {node[:8]} does not see {self.job.run_dir}: what {self.path.stem} writes there goes through the head node.")

    def start(self) -> None:
        """Once the process writes there."""
        if self.target:
            threading.Thread(target=self._work, name="log", daemon=True).start()

    def _work(self) -> None:
        while not self.over.wait(SEND_S):
            self.send()

    def send(self) -> None:
        """What is new. A head that does not answer gets it the next time."""
        with self.sending, contextlib.suppress(OSError):
            self.sink = self.sink or opened(head_files(self.job.run_id), self.target)
            with open(self.path, "rb") as file:
                file.seek(self.sent)
                while new := file.read(IN_FLIGHT * CHUNK):
                    begin = self.sink.low
                    try:
                        self.sink.write(new)
                        self.sink.flush()
                    except OSError:
                        self.sink.abort()
                        self.sink.low = begin
                        raise
                    self.sent += len(new)

    def close(self) -> None:
        """The process is about to end."""
        self.over.set()
        if self.target:
            self.send()


def own_folder() -> Path:
    """On this node, nobody else's: what another user has put in its place is not written to."""
    folder = Path(tempfile.gettempdir()) / f"elastic-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    there = folder.lstat()
    return folder if stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix="elastic-"))


def opened(files: HeadFiles, path: str) -> HeadSink:
    """A file of the head node to append to."""
    found = files.info(path)
    if found is None:
        files.make_folder(path.rpartition("/")[0])
        return files.create(path)
    return HeadSink(files, path, found.bytes)
