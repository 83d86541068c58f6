"""An S3 of this process's own, on loopback and a free port: moto's server."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

numbers = itertools.count()


class Server:
    """`bucket()` gives the URI of a new bucket, with all that is needed to reach it."""

    def __init__(self, host: str, port: int):
        self.endpoint = f"http://{host}:{port}"

    def uri(self, bucket: str, path: str = "", keys: str = "test:test@") -> str:
        return f"s3://{keys}{bucket}{path}?region=us-east-1&allow_bucket_creation=true&endpoint_override={self.endpoint}"

    def bucket(self, path: str = "/run/checkpoints") -> str:
        from elastic.storage.remote import open_files

        name = f"bucket-{next(numbers)}"
        files, _ = open_files(self.uri(name))
        files.filesystem.create_dir(name)  # type: ignore[attr-defined]
        return self.uri(name, path)


@contextmanager
def serving() -> Iterator[Server]:
    """Skips with a reason where moto is not installed."""
    server = pytest.importorskip("moto.server",
                                 reason="moto with its server is not installed: pip install -e '.[dev]'").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server.start()
    try:
        yield Server(*server.get_host_and_port())
    finally:
        server.stop()
