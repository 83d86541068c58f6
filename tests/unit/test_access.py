"""Is the place for checkpoints usable? Told in one sentence, before the run and within seconds."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.checkpoint import access
from elastic.checkpoint.access import AWS_KEYS, check_access
from elastic.errors import UserError
from elastic.storage.store import Store
from tests.support.checkpoints import save

QUICK_S = 20.0  # Amazon's own defaults take minutes; a loaded machine some seconds


class Denied(http.server.BaseHTTPRequestHandler):
    """An S3 that lets nobody in."""

    def answer(self) -> None:
        body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def log_message(self, *arguments: Any) -> None:
        return


@pytest.fixture
def denying() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Denied)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def refusal(location: str, is_new: bool = True) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        check_access(location, is_new)
    assert time.monotonic() - started < QUICK_S
    assert "\n" not in str(error.value) and str(error.value).startswith("checkpoint.path = ")
    return str(error.value)


def test_a_place_that_can_be_written_to_is_left_as_it_was(tmp_path: Path, s3: Any) -> None:
    for location in (str(tmp_path / "new" / "folder"), s3.bucket()):
        check_access(location, True)
        assert Store.open(location).names() == []


def test_missing_credentials_are_told_at_once(denying: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in (*AWS_KEYS, "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    said = refusal(f"s3://bucket/run?region=us-east-1&endpoint_override={denying}")
    assert "ACCESS_DENIED" in said and "no credentials were found in the environment, so set AWS_ACCESS_KEY_ID" in said
    said = refusal(f"s3://KEY:SECRET@bucket/run?region=us-east-1&endpoint_override={denying}")
    assert "ACCESS_DENIED" in said and "no credentials" not in said and "SECRET@" not in said


def test_nobody_at_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NETWORK_CONNECTION" in refusal("s3://K:S@bucket/run?region=us-east-1&endpoint_override=http://127.0.0.1:9")


def test_a_bucket_that_is_not_there(s3: Any) -> None:
    location = s3.uri("no-such-bucket", "/run").replace("allow_bucket_creation=true", "allow_bucket_creation=false")
    assert "no-such-bucket" in refusal(location)


def test_a_storage_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(access, "ACCESS_S", 0.05)
    monkeypatch.setattr(access, "look", lambda store, is_new: release.wait(10))
    assert "does not answer within 0.05 s" in refusal("/anywhere")
    release.set()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "write a path or URI that may be written to" in refusal(str(tmp_path / "file" / "checkpoints"))


def test_another_run_s_checkpoints_are_not_taken_for_one_s_own(tmp_path: Path) -> None:
    save(str(tmp_path), 50, 2)
    assert "holds the checkpoints of another run already (step-00000050 of the run a-run); name another path" in refusal(str(tmp_path))
    check_access(str(tmp_path), is_new=False)
