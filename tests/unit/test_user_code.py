"""What a user's model gives back or raises is one sentence, with the user's own line."""

from __future__ import annotations

import collections
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.common import telling
from elastic.errors import GroupBroken, UserError
from elastic.model.user_code import describe, is_of_machine, pair, pairs, place_of, rebuilt, users


class AcceleratorError(RuntimeError):
    """As torch names what a device says."""


@pytest.mark.parametrize(("found", "says"), [
    ((1.0, 2.0, 3.0), "not (float, float, float)"),
    ((np.ones(3), 2.0), "not (an array of shape (3,), float)"),
    ((1.0, None), "not (float, NoneType)"),
    ([1.0, 2.0], "not list"),
])
def test_what_is_no_pair_is_named(found: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        pair(found, "loss(batch)")
    assert str(caught.value) == f"model.kind: loss(batch) must give (sum, weight), one number each, {says}."


def test_pairs_by_name() -> None:
    assert pairs({"a": (np.float32(1), np.ones((1, 1)))}, "metrics(batch)")["a"][0] == 1
    for found, says in ((3.0, "a dict of (sum, weight) by name, not float"),
                        ({"a": 1.0}, "metrics(batch)['a'] must give (sum, weight)")):
        with pytest.raises(UserError, match="metrics") as caught:
            pairs(found, "metrics(batch)")
        assert says in str(caught.value)


def test_batches_keep_their_kind() -> None:
    Rows = collections.namedtuple("Rows", "x y")
    assert rebuilt(Rows(1, 2), str) == Rows("1", "2") and rebuilt([1], str) == ["1"] and rebuilt((1,), str) == ("1",)


def test_the_user_s_line_stands_behind_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import json\ndef loss():\n    json.loads('no')\n")
    with pytest.raises(ValueError, match="Expecting") as caught:
        runpy.run_path(str(tmp_path / "mine.py"))["loss"]()
    assert describe(caught.value).endswith("(mine.py, line 3, in loss)"), "not json's own"
    assert describe(UserError("as it is")) == "as it is" and place_of(KeyError("never raised")) == ""


@pytest.mark.parametrize("error", [GroupBroken("a peer is gone"), OSError("no space"), MemoryError(),
                                   ConnectionResetError(), UserError("mend it"),
                                   AcceleratorError("CUDA error: unspecified launch failure"),
                                   type("Closer", (AcceleratorError,), {})()])
def test_what_the_group_or_the_machine_lacks_is_not_the_user_s_fault(error: Exception) -> None:
    for around in (users(True), users(False), telling("Net", str)):
        with pytest.raises(type(error)) as caught, around:
            raise error
        assert caught.value is error


def test_what_frameworks_lack_is_known_by_their_own_names() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    assert all(is_of_machine(error("lost")) for error in (torch.OutOfMemoryError, torch.AcceleratorError))
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    assert is_of_machine(tf.errors.ResourceExhaustedError(None, None,
                                                          "OOM")) and not is_of_machine(tf.errors.InvalidArgumentError(None, None, ""))


def test_what_the_user_s_code_raises_is_theirs_where_it_is_their_code() -> None:
    with pytest.raises(UserError, match=r"^ValueError: row 7 \(test_user_code.py, line \d+, in test_what"), users(True):
        raise ValueError("row 7")
    with pytest.raises(ValueError, match="row 7"), users(False):
        raise ValueError("row 7")
