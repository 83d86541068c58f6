"""The manifest is believed only if every word of it can be true."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from elastic.checkpoint.manifest import FileEntry, Manifest, Piece, body_sha256, parse, render
from elastic.errors import BadCheckpoint, UserError


def piece(name: str = "parameter/w", shape: Any = (4, 3), start: Any = (0, 0), count: Any = (4, 3),
          dtype: str = "float32",
          offset: int = 112) -> Piece:
    return Piece(name, dtype, shape, start, count, offset)


GOOD = Manifest(step=50, generation=3, cursor=600, seed=7, recipe="[run]\nname = 'ä'\n",
                files=(FileEntry("part-0-g000003.safetensors", 400, "ab" * 16, ("01" * 16,) * 7,
                                 (piece("buffer/n", (), (), (), "int64", 104), piece(count=(2, 3)))),
                       FileEntry("part-1-g000003.safetensors", 300, "cd" * 16, ("02" * 16,) * 5,
                                 (piece(start=(2, 0), count=(2, 3)),))),
                chunk_bytes=64,
                eval={"loss": 1.25}, extra={"info": {"vocab_size": 65, "sources": ["a"]}, "none": None})


def signed(body: dict[str, Any]) -> str:
    """With the right hash, as somebody would write it who means harm or has another version."""
    return render(body | {"sha256": body_sha256(body)})


def test_it_reads_back_as_it_was() -> None:
    assert parse(GOOD.dumps()) == GOOD
    assert parse(GOOD.dumps().encode()) == GOOD
    assert GOOD.bytes == 700


def test_values_that_json_has_not_are_left_out_of_the_evaluation() -> None:
    odd = Manifest(1, 1, 0, 0, "", eval={"loss": float("nan"), "bound": float("inf"), "accuracy": 0.5})
    assert parse(odd.dumps()).eval == {"accuracy": 0.5}


def test_any_flipped_bit_is_found() -> None:
    text = GOOD.dumps().encode()
    for place in range(len(text)):
        for bit in (0, 3, 5, 7):
            broken = bytearray(text)
            broken[place] ^= 1 << bit
            with pytest.raises(BadCheckpoint):
                parse(bytes(broken))


def test_any_truncation_is_found() -> None:
    text = GOOD.dumps()
    for size in range(len(text)):
        with pytest.raises(BadCheckpoint):
            parse(text[:size])


ATTACKS = [
    (lambda b: b.update(format=1), "does not know"),
    (lambda b: b.update(format="1"), "not a number"),
    (lambda b: b.update(format=0), "does not know"),
    (lambda b: b.pop("format"), "not a number"),
    (lambda b: b.pop("cursor"), "keys"),
    (lambda b: b.update(run="echo"), "keys"),
    (lambda b: b.update(step=-1), "step is -1"),
    (lambda b: b.update(step=True), "step is True"),
    (lambda b: b.update(cursor=1 << 63), "cursor"),
    (lambda b: b.update(recipe=["x"]), "not a text"),
    (lambda b: b.update(eval={"loss": "low"}), "no number"),
    (lambda b: b.update(extra=[1]), "extra"),
    (lambda b: b.update(files={}), "not a list"),
    (lambda b: b["files"][0].update(name="../../etc/passwd"), "not a plain name"),
    (lambda b: b["files"][0].update(name="/etc/passwd"), "not a plain name"),
    (lambda b: b["files"][0].update(name=".."), "not a plain name"),
    (lambda b: b["files"][0].update(name="a\\b"), "not a plain name"),
    (lambda b: b["files"][0].update(name="C:b"), "not a plain name"),
    (lambda b: b["files"][0].update(name="a\x00b"), "not a plain name"),
    (lambda b: b["files"][0].update(name=""), "not a plain name"),
    (lambda b: b["files"][0].update(name=b["files"][1]["name"]), "a file twice"),
    (lambda b: b["files"][0].update(hash="AB" * 16), "not an xxh3-128"),
    (lambda b: b["files"][0]["chunks"].__setitem__(3, "ab"), "not an xxh3-128"),
    (lambda b: b["files"][0]["chunks"].pop(), "another number of chunk hashes"),
    (lambda b: b["files"][0].update(bytes=1 << 62), "another number of chunk hashes"),
    (lambda b: b.update(chunk_bytes=0), "chunk_bytes"),
    (lambda b: b.update(chunk_bytes=12), "chunk_bytes"),
    (lambda b: b.update(chunk_bytes=1 << 40), "chunk_bytes"),
    (lambda b: b["files"][0].update(bytes=10, chunks=["01" * 16]), "larger than its 10 bytes"),
    (lambda b: b["files"][0]["pieces"][1].update(offset=392), "lies outside"),
    (lambda b: b["files"][0]["pieces"][1].update(offset=108), "on another array"),
    (lambda b: b["files"][0]["pieces"][1].update(offset=-112), "offset of"),
    (lambda b: b["files"][0]["pieces"][0].update(offset=100), "not a multiple"),
    (lambda b: b["files"][0].update(bytes=1.5), "size of"),
    (lambda b: b["files"][0]["pieces"][1].update(count=[1 << 40, 1 << 40]), "reaches out"),
    (lambda b: b["files"][1]["pieces"][0].update(shape=[1 << 60, 3]), "two dtypes or shapes"),
    (lambda b: b["files"][0]["pieces"][1].update(shape=[0, 1 << 62], start=[0, 0], count=[0, 1 << 62]),
     "larger than any memory"),
    (lambda b: b["files"][0]["pieces"][1].update(count=[2]), "another number of dims"),
    (lambda b: b["files"][0]["pieces"][1].update(count=[2, -3]), "shape of parameter/w"),
    (lambda b: b["files"][0]["pieces"][0].update(shape=[1] * 99), "at most 32"),
    (lambda b: b["files"][0]["pieces"][0].update(dtype="object"), "unknown dtype"),
    (lambda b: b["files"][0]["pieces"][0].update(dtype=[]), "unknown dtype"),
    (lambda b: b["files"][0]["pieces"][1].update(start=[1, 0]), "overlap"),
    (lambda b: b["files"][0]["pieces"][1].update(count=[1, 3]), "do not make up"),
    (lambda b: b["files"][0]["pieces"].append(b["files"][0]["pieces"][0] | {"offset": 200}),
     "do not make up the whole array"),
    (lambda b: b["files"][0]["pieces"].append("w"), "keys"),
]


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_a_manifest_that_cannot_be_true_is_refused_in_one_sentence(number: int) -> None:
    change, words = ATTACKS[number]
    body = copy.deepcopy(json.loads(GOOD.dumps()))
    change(body)
    with pytest.raises(BadCheckpoint) as caught:
        parse(signed(body))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_no_damage_but_a_flip_that_looks_like_one_is() -> None:
    """To fall back from a checkpoint that another version can read would throw its steps away."""
    body = json.loads(GOOD.dumps()) | {"format": 4, "colour": "red"}
    with pytest.raises(UserError, match=r"format 4, newer than 3, .*; install"):
        parse(signed(body))
    with pytest.raises(BadCheckpoint, match="hash"):
        parse(GOOD.dumps().replace('"format": 2', '"format": 4'))


def test_absurd_sizes_are_refused_although_they_fit_together() -> None:
    """An array of 2^61 bytes: its file would have to state as many."""
    huge = Manifest(1, 1, 0, 0, "", (FileEntry("a", 100, "ab" * 16, ("ab" * 16,),
                                               (piece(shape=(1 << 59,), start=(0,), count=(1 << 59,)),)),))
    with pytest.raises(BadCheckpoint, match="larger than its 100 bytes"):
        parse(huge.dumps())


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, '{"format": NaN}', '{"format": ' + "9" * 5000
                                  + "}", "\ufeff{}"])
def test_what_is_no_manifest_at_all(text: str) -> None:
    with pytest.raises(BadCheckpoint):
        parse(text)
    with pytest.raises(BadCheckpoint):
        parse(b"\xff\xfe" + text.encode())


def test_the_same_values_in_another_form_are_refused() -> None:
    with pytest.raises(BadCheckpoint, match="hash"):
        parse(json.dumps(json.loads(GOOD.dumps())))
