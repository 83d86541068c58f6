"""CSV as people write it: cells of any length, marks of an encoding, packed files. Oracle: what Python's csv module wrote."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.data import formats
from elastic.data.files import find
from elastic.data.formats import batches, schema_of
from elastic.data.text import read_column, read_text
from elastic.errors import UserError

LONG = "lorem, \"ipsum\"\ndolor "
TABLES: dict[str, Callable[[], list[list[str]]]] = {  # the rows below id,s; blocks are of 1000 bytes
    "first": lambda: [["0", LONG * 100], ["1", "plain"]],
    "second": lambda: [["0", "plain"], ["1", LONG * 100], ["2", "plain"]],
    "last": lambda: [*([str(n), "plain"] for n in range(500)), ["500", LONG * 100]],
    "one in many": lambda: [[str(n), LONG * (2000 if n == 300 else 1)] for n in range(600)],
    "ever longer": lambda: [[str(n), LONG * 3 ** (n % 10)] for n in range(20)]}


def put(folder: Path, content: bytes, name: str = "t.csv") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def as_csv(rows: list[list[str]], header: tuple[str, str] = ("id", "s")) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue().encode()


def texts(path: str, column: str = "s") -> list[str]:
    return list(read_column("csv", find("data.path", path)[0], column))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", TABLES)
def test_cells_may_be_longer_than_a_block(rows: str, packed: bool, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1000)
    written = TABLES[rows]()
    content = as_csv(written)
    assert texts(put(tmp_path, gzip.compress(content) if packed else content)) == [text for _, text in written]


def test_a_cell_of_megabytes_and_a_long_line_of_names(tmp_path: Path) -> None:
    assert texts(put(tmp_path, as_csv([["0", LONG * 200_000], ["1", "plain"]]))) == [LONG * 200_000, "plain"]
    names = [f"{'x' * 1000}{n}" for n in range(2000)]
    path = put(tmp_path, (",".join(names) + "\n" + ",".join(["7"] * 2000) + "\n").encode())
    assert schema_of("csv", find("data.path", path)[0]).names == names


def test_numbers_beside_long_cells_keep_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1000)
    path = put(tmp_path, as_csv([[str(n), "x" * (5000 if n % 97 == 0 else 3)] for n in range(700)]))
    found = [batch.column("id").to_pylist() for batch in batches("csv", find("data.path", path)[0], {"id": pa.int64()})]
    assert sum(found, []) == list(range(700))


def test_a_row_larger_than_any_block_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 100)
    monkeypatch.setattr(formats, "MOST_BLOCK", 2000)
    path = put(tmp_path, b'id,s\n1,"p\n' + b"3,q\n" * 1000)
    with pytest.raises(UserError, match="t.csv.*quotation mark that is not closed") as caught:
        texts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mark_of_the_encoding_is_no_character(packed: bool, tmp_path: Path) -> None:
    def put_marked(content: bytes) -> str:
        content = codecs.BOM_UTF8 + content
        return put(tmp_path, gzip.compress(content) if packed else content)

    path = put_marked("s,id\nä,1\n\ufeffz,2\n".encode())
    assert texts(path) == ["ä", "\ufeffz"]  # within the file it is one
    path = put_marked("to be\n\ufeffor not".encode())
    assert read_text("data.path", find("data.path", path)[0]) == "to be\n\ufeffor not"
    path = put_marked(b"to be \xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 9"):
        read_text("data.path", find("data.path", path)[0])
    with pytest.raises(UserError, match="empty"):
        read_text("data.path", find("data.path", put_marked(b""))[0])


def test_several_streams_of_gzip_in_one_file_are_all_read(tmp_path: Path) -> None:
    whole = as_csv([[str(n), f"text {n}"] for n in range(5000)])
    path = put(tmp_path, b"".join(gzip.compress(whole[low:low + 7777]) for low in range(0, len(whole), 7777)),
               "t.csv.gz")
    assert texts(path) == [f"text {n}" for n in range(5000)]
    for harm in (lambda c: c[:-9], lambda c: c[:200] + bytes([c[200] ^ 255]) + c[201:]):
        with pytest.raises(UserError, match="t.csv cannot be read|t.csv, after row"):
            texts(put(tmp_path, harm(gzip.compress(np.random.default_rng(0).bytes(3).hex().encode() + b",s\n"
                                                   + b"1,2\n" * 9999 + whole))))


def test_what_others_packed_is_named(tmp_path: Path) -> None:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("t.csv", as_csv([["1", "a"]]))
    for content, name in ((zipped.getvalue(), "zip"), (lzma.compress(as_csv([["1", "a"]])), "xz")):
        path = put(tmp_path, content)
        for read in (lambda: texts(path), lambda: read_text("data.path", find("data.path", path)[0])):
            with pytest.raises(UserError, match=f"t.csv is packed by {name}; unpack it"):
                read()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "t.parquet")
    path = put(tmp_path, gzip.compress((tmp_path / "t.parquet").read_bytes()), "t.parquet")
    with pytest.raises(UserError, match="t.parquet is packed by gzip; unpack it"):
        schema_of("parquet", find("data.path", path)[0])
