"""A submission seen out, with a job server that says what a test wants; and what is said of one that is no match."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from elastic.cli import run
from elastic.driver import console, job_follow, submit
from elastic.driver.job_client import NoAnswer
from elastic.driver.job_follow import Follower, Tail
from elastic.driver.submit import Submission
from elastic.errors import UserError
from elastic.observe.progress import Progress

PACE = "step 5/9 · loss 2.0000 · 10 samples/s · 1 worker · generation 1"


class FakeJobs:
    """Each look takes the next of these: (status, exit code, log), or an error."""

    def __init__(self, *looks: Any):
        self.looks, self.stopped = list(looks), list[str]()

    def details(self, submission_id: str) -> Any:
        if isinstance(self.looks[0], BaseException):
            raise self.looks.pop(0)
        (status, code, self.log), *rest = self.looks
        self.looks = rest or self.looks
        return SimpleNamespace(status=status, driver_exit_code=code, message="")

    def log_of(self, submission_id: str) -> str:
        return self.log

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)

    def get_address(self) -> str:
        return "http://head:8265"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_follow, "POLL_S", 0.0)
    monkeypatch.setattr(job_follow, "SAVE_S", 0.0)


def seen(run_dir: Path, *looks: Any) -> tuple[int, str, list[str], Follower]:
    """Exit code, what was shown, and what was said beside it."""
    said = list[str]()
    follower = Follower(FakeJobs(*looks), Submission("run-1", str(run_dir)), said.append)  # type: ignore[arg-type]
    out = io.StringIO()
    with Progress(console=Console(file=out, width=200)) as progress:
        code = follower.see_out(progress)
    return code, out.getvalue(), said, follower


def test_a_log_is_shown_line_by_line_each_once_also_after_a_break(tmp_path: Path) -> None:
    away = NoAnswer("No job server answers.")
    code, shown, said, _ = seen(tmp_path, ("PENDING", None, ""), ("RUNNING", None, "step 0: run started\nste"), away, away,
                                ("RUNNING", None, f"step 0: run started\n{PACE}\n"),
                                ("FAILED", 3, f"step 0: run started\n{PACE}\nelastic: The loss is nan"))
    assert code == 3
    assert shown.splitlines() == ["step 0: run started", PACE, "elastic: The loss is nan"]
    assert len(said) == 1 and "tries again" in said[0], "a break is told once"


@pytest.mark.parametrize(("status", "exit_code", "code"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 130, 130),
                                                           ("FAILED", -9, 3), ("FAILED", None, 3), ("STOPPED", None, 130)])
def test_the_exit_code_is_the_runs(tmp_path: Path, status: str, exit_code: int | None, code: int) -> None:
    assert seen(tmp_path, (status, exit_code, ""))[0] == code


def test_files_that_are_the_runs_are_followed_instead_of_the_log(tmp_path: Path) -> None:
    """Only while live.json names it: a directory of that name may be another's."""
    events = [{"time": 1.0, "event": "run_started", "generation": 0, "step": 0, "run": "run-1", "num_steps": 2, "pid": 1}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    for run_id, shown_of in (("other-1", "log"), ("run-1", "files")):
        (tmp_path / "live.json").write_text(json.dumps({"run_id": run_id, "address": ""}))
        code, shown, _, follower = seen(tmp_path, ("RUNNING", None, "of the log\n"), ("SUCCEEDED", 0, "of the log\n"))
        assert (code, "of the log" in shown, "run started" in shown) == (0, shown_of == "log", shown_of == "files")
        assert follower.sees_files == (shown_of == "files")


def test_a_tail_gives_each_whole_line_once_and_all_again_where_it_was_cut(tmp_path: Path) -> None:
    file, tail = tmp_path / "lines", Tail(tmp_path / "lines")
    assert tail.new() == []
    file.write_text('{"a": 1}\n{"b"')
    assert tail.new() == [{"a": 1}] and tail.new() == []
    file.write_text('{"a": 1}\n{"b": 2}\n')
    assert tail.new() == [{"b": 2}] and tail.new() == []
    file.write_text('{"a": 1}\n')
    assert tail.new() == [{"a": 1}]


def test_ctrl_c_detaches_who_cannot_be_asked_and_stops_who_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    for answers, stopped in ((False, []), (True, ["run-1"])):
        jobs = FakeJobs(KeyboardInterrupt(), ("STOPPED", None, ""))
        monkeypatch.setattr(console, "wants_stop", lambda answers=answers: answers)
        code = console.see_out(Follower(jobs, Submission("run-1", str(tmp_path)), console.complain))  # type: ignore[arg-type]
        assert (code, jobs.stopped) == (130, stopped)
    assert "goes on; stop it with: ray job stop run-1 --address http://head:8265" in capsys.readouterr().out


def test_what_is_asked_of_a_submitted_run_is_answered_on_its_head_and_leaves_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    class Head(FakeJobs):
        sent, removed = list[Any](), list[str]()

        def details(self, submission_id: str) -> Any:
            found = super().details(submission_id)
            found.metadata = {"elastic_run_dir": "~/a b"} if submission_id == "run-1" else {}
            found.runtime_env = {"working_dir": "gcs://x.zip"}
            return found

        def submit(self, submission_id: str, *rest: Any) -> None:
            self.sent.append(rest)

        def remove(self, submission_id: str) -> None:
            self.removed.append(submission_id)

    monkeypatch.setattr(submit, "POLL_S", 0.0)
    looks = ("RUNNING", None, ""), ("PENDING", None, ""), ("FAILED", 2, "Running entrypoint for job a: b\nelastic: no.\n")
    jobs = Head(*looks)
    assert submit.ask_there(jobs, "run-1", "scale", ["--workers", "9"]) == (2, ["elastic: no."])  # type: ignore[arg-type]
    assert jobs.sent == [("python -m elastic.cli scale --workers 9 ~/'a b'", {"working_dir": "gcs://x.zip"}, {})]
    assert len(jobs.removed) == 1 and jobs.removed[0].startswith("run-1-scale-")
    with pytest.raises(UserError, match="other-1 is no run of `elastic submit`"):
        submit.ask_there(Head(*looks), "other-1", "status")  # type: ignore[arg-type]


@pytest.fixture
def stub() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers each path as it is told, and 404 else."""
    answers: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the library's name
            found = answers.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode() if not isinstance(found, bytes) else found)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("version", "metadata", "words"), [
    ({"ray_version": "2.41.0"}, {"data": {"pythonVersion": "3.11.9"}}, ("Ray 2.41.0", "pip install 'ray[default]==2.41.0'")),
    ({}, {"data": {"pythonVersion": "3.9.1"}}, ("Python 3.9", "install here, on Python 3.9")),
    (None, {}, ("is no job server of Ray", "http://HEAD:8265")),
    (b"<html>", {}, ("http://HEAD:8265",)),
])
def test_a_server_of_another_version_or_kind_is_one_sentence(
        stub: tuple[str, dict[str, Any]], version: Any, metadata: dict[str, Any], words: tuple[str, ...], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("aiohttp", reason="Ray's job client comes with the extra `submit`")
    import ray

    address, answers = stub
    answers["/api/version"] = {"version": "4", "ray_version": ray.__version__, **version} if isinstance(version, dict) else version
    answers["/api/v0/cluster_metadata"] = metadata
    assert run(["submit", "nlp/gpt_shakespeare", "--address", address]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and all(word in said for word in words), said


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("elastic.driver.job_client.find_spec", lambda name: None)
    assert run(["submit", "nlp/gpt_shakespeare", "--address", "http://127.0.0.1:1"]) == 2
    assert "pip install 'elastic-training[submit]'" in capsys.readouterr().err
