"""A place for checkpoints is one live run's: on a disk, where locks decide, and on a storage that has none."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from elastic.checkpoint import claim as claims
from elastic.checkpoint.access import check_access, claimed
from elastic.checkpoint.claim import NAME, Claim, owner_of, read
from elastic.checkpoint.manager import committed
from elastic.errors import BadCheckpoint, UserError
from elastic.storage.store import Store
from tests.support.checkpoints import Arrays, saver, values

WAIT_S = 20.0


@pytest.fixture
def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SETTLE_S", 0.6)


@pytest.fixture(params=["disk", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path, settle: None) -> str:
    return str(tmp_path / "checkpoints") if request.param == "disk" else request.getfixturevalue("s3").bucket()


def claim(location: str, name: str) -> Claim:
    return Claim(location, f"{name}-1", f"host:/runs/{name}")


def race(takers: Iterable[Claim]) -> list[str]:
    """Who has it, of those that try at once."""
    takers, won = list(takers), list[str]()
    start = threading.Barrier(len(takers))

    def work(one: Claim) -> None:
        start.wait()
        try:
            one.take()
            won.append(one.run)
        except UserError:
            return

    threads = [threading.Thread(target=work, args=(one,)) for one in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return won


def test_one_has_it_and_the_other_is_told_whose_it_is(location: str) -> None:
    claim(location, "a").take()
    with pytest.raises(UserError) as refused:
        claim(location, "b").take()
    said = str(refused.value)
    assert said.startswith("checkpoint.path = ") and "is in use by the live run a-1 of host:/runs/a" in said and "\n" not in said
    assert "test@" not in said, "a URI's keys are secret"
    with pytest.raises(UserError, match="live run a-1"):
        check_access(location, True, "host:/runs/b")
    with pytest.raises(UserError, match="live run a-1"):
        claimed(location, "b-1", "host:/runs/b")
    check_access(location, True, "host:/runs/a")


def test_of_many_at_once_one_has_it(location: str) -> None:
    for round in range(3):
        takers = [claim(location, f"{round}{name}") for name in "abcdef"]
        (winner,) = race(takers)
        found = read(Store.open(location))
        assert found is not None and found.run == winner
        for one in takers:
            one.release()
        assert read(Store.open(location)) is None, "the winner's word went, and nobody else's was there"


def test_it_is_renewed_and_given_back_by_its_own_run_alone(location: str) -> None:
    one, other = claim(location, "a"), claim(location, "b")
    one.take()
    before = read(Store.open(location))
    one.take()
    after = read(Store.open(location))
    assert before and after and after.token != before.token and after.time > before.time
    other.release()
    assert read(Store.open(location)) == after
    one.release()
    other.take()
    assert read(Store.open(location)).run == "b-1"  # type: ignore[union-attr]


def test_who_goes_on_in_the_same_directory_has_it_at_once(location: str) -> None:
    claim(location, "a").take()
    Claim(location, "a-2", "host:/runs/a").take()
    assert read(Store.open(location)).run == "a-2"  # type: ignore[union-attr]
    assert owner_of("x/../runs/a") == owner_of(Path("runs/a").absolute()) != owner_of("runs/b")


def test_a_claim_that_nobody_renews_runs_out(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(location, "a").take()
    monkeypatch.setattr(claims, "LAPSE_S", 0.0)
    claim(location, "b").take()
    assert read(Store.open(location)).run == "b-1"  # type: ignore[union-attr]


@pytest.mark.parametrize("text", [b"", b"{", b'{"run": 1}', b"null", b"\xff",
                                  b'{"run": "a", "owner": "b", "time": "soon", "token": ""}'])
def test_half_a_claim_is_nobody_s(tmp_path: Path, text: bytes) -> None:
    (tmp_path / NAME).write_bytes(text + b" " * 500)
    claim(str(tmp_path), "a").take()
    assert read(Store.open(tmp_path)).run == "a-1"  # type: ignore[union-attr]


def test_a_claim_is_no_link_to_follow(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a diary")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot be used"):
        claimed(str(tmp_path / "checkpoints"), "a-1", "host:/runs/a")
    assert (tmp_path / "mine").read_text() == "a diary"


def test_a_word_that_was_long_on_its_way_leaves_one_of_two(s3: Any, settle: None,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives when another has read back and gone to work."""
    location = s3.bucket()
    slow, quick = claim(location, "slow"), claim(location, "quick")
    write = slow.store.write

    def late(name: str, pieces: Any) -> None:
        quick.take()
        quick.check()
        write(name, pieces)

    monkeypatch.setattr(slow.store, "write", late)
    slow.take()
    slow.check()
    with pytest.raises(BadCheckpoint, match="live run slow-1"):
        quick.check()


def test_a_run_that_was_away_for_too_long_learns_that_another_has_it(location: str,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEW_S", 0.05)
    lost, told = list[str](), threading.Event()
    one = claim(location, "a")
    one.take()
    with monkeypatch.context() as patch:
        patch.setattr(claims, "LAPSE_S", 0.0)
        claim(location, "b").take()
    with one.kept(lambda why: (lost.append(why), told.set())):
        assert told.wait(WAIT_S) and "live run b-1" in lost[0]
        with pytest.raises(BadCheckpoint, match="live run b-1"):
            one.check()
    assert read(Store.open(location)).run == "b-1"  # type: ignore[union-attr]


def test_a_long_silence_is_looked_into_before_a_commit(tmp_path: Path) -> None:
    one = claim(str(tmp_path), "a")
    one.take()
    before = read(one.store)
    one.check()
    assert read(one.store) == before
    one.renewed -= claims.LAPSE_S
    one.check()
    assert read(one.store) != before, "it is renewed first"
    (tmp_path / NAME).unlink()
    claim(str(tmp_path), "b").take()
    with pytest.raises(BadCheckpoint, match="live run b-1"):
        one.check()


def test_an_orphan_does_not_write_where_another_run_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = claim(str(tmp_path), "b")
    other.take()
    assert not saver(str(tmp_path)).leave(Arrays(values(5), 5), 1, {}, ())
    assert "live run b-1" in capsys.readouterr().out and committed(Store.open(tmp_path)) == []
    other.release()
    assert saver(str(tmp_path)).leave(Arrays(values(5), 5), 1, {}, ())
