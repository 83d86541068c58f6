"""Text data against plain Python slicing."""

from __future__ import annotations

import codecs
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from elastic.data import Sampler, eval_batches, load_batch
from elastic.errors import RecipeError, UserError
from nlp import data
from tests.support.tables import write

TEXT = "".join(f"Line {n}: the quick brown fox jumps over the lazy dog, {n * n} times.\n"
               for n in range(60)) + "ñandú → 😀 äöü\n" * 8


def section(path: Any, **keys: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"format": "text", "path": path, "tokens": "char", "eval_fraction": 0.1, "eval_path": (),
                              "vocab_size": 300} | keys)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return file


def test_characters_are_numbered_and_split_as_nanogpt_does(text_file: Path, tmp_path: Path) -> None:
    info = data.prepare(section([str(text_file)]), {"context": 16}, tmp_path / "cache")
    characters = sorted(set(TEXT))
    ids = {character: number for number, character in enumerate(characters)}
    cut = int(len(TEXT) * 0.9)
    assert info["vocab_size"] == len(characters)
    assert data.open_dataset(info, "train").tokens.tolist() == [ids[c] for c in TEXT[:cut]]
    assert data.open_dataset(info, "eval").tokens.tolist() == [ids[c] for c in TEXT[cut:]]
    assert (info["num_tokens"], info["num_eval_tokens"]) == (cut, len(TEXT) - cut)
    assert data.decode(info, data.encode(info, TEXT)) == TEXT
    assert json.loads(json.dumps(info)) == info


@pytest.mark.parametrize("tokens", ["char", "byte", "bpe"])
def test_windows_are_slices_and_their_epochs_shift(text_file: Path, tmp_path: Path, tokens: str) -> None:
    context = 16
    info = data.prepare(section([str(text_file)], tokens=tokens), {"context": context}, tmp_path)
    windows = data.open_dataset(info, "train", seed=5)
    everything = data.encode(info, TEXT[:int(len(TEXT) * 0.9)])
    assert windows.num_samples == (len(everything) - context) // context
    offsets = [windows.offset(epoch) for epoch in range(50)]
    assert 0 <= min(offsets) < max(offsets) < context
    for epoch in (0, 1, 49):
        indices = np.arange(windows.num_samples)
        rows = windows.batch(indices, np.full(len(indices), epoch))["tokens"]
        starts = [i * context + offsets[epoch] for i in range(windows.num_samples)]
        assert rows.dtype == np.int32
        assert rows.tolist() == [everything[start:start + context + 1] for start in starts]
    assert offsets == [data.open_dataset(info, "train", seed=5).offset(epoch) for epoch in range(50)]
    assert offsets != [data.open_dataset(info, "train", seed=6).offset(epoch) for epoch in range(50)]


def test_evaluation_covers_its_text_once(text_file: Path, tmp_path: Path) -> None:
    context = 16
    info = data.prepare(section([str(text_file)]), {"context": context}, tmp_path)
    windows = data.open_dataset(info, "eval", seed=5)
    batches = [load() for load in eval_batches(windows, 4)]
    targets = [token for b in batches for row, w in zip(b["tokens"], b["row_weight"], strict=True) if w
               for token in row[1:].tolist()]
    everything = data.encode(info, TEXT[int(len(TEXT) * 0.9):])
    assert targets == everything[1:1 + len(everything[1:]) // context * context]


def test_a_training_epoch_feeds_every_window_once(text_file: Path, tmp_path: Path) -> None:
    info = data.prepare(section([str(text_file)]), {"context": 16}, tmp_path)
    windows = data.open_dataset(info, "train", seed=1)
    sampler = Sampler(windows.num_samples, 8, 4, 1, True, epochs=1)
    rows = [tuple(row) for step in range(1, sampler.num_steps + 1) for shard in range(4)
            for batch in [load_batch(windows, sampler, step, shard)]
            for row, w in zip(batch["tokens"].tolist(), batch["row_weight"], strict=True) if w]
    expected = windows.batch(np.arange(windows.num_samples), np.zeros(windows.num_samples, np.int64))["tokens"].tolist()
    assert sorted(rows) == sorted(map(tuple, expected))
    assert rows != [tuple(row) for row in expected]


def test_byte_pairs_give_the_text_back_and_say_the_same_in_every_process(text_file: Path, tmp_path: Path) -> None:
    info = data.prepare(section([str(text_file)], tokens="bpe"), {"context": 16}, tmp_path / "one")
    assert info["vocab_size"] == 300
    assert len(data.encode(info, TEXT)) < len(TEXT.encode())
    assert data.decode(info, data.encode(info, TEXT)) == TEXT
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.apply(data.prepare, (section([str(text_file)], tokens="bpe"), {"context": 16}, tmp_path / "two"))
    assert other["tokenizer"] == info["tokenizer"]
    assert Path(other["train_file"]).read_bytes() == Path(info["train_file"]).read_bytes()


def test_byte_pairs_are_trained_on_the_training_text_alone(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abab" * 900 + "\n" + "xyxy" * 100)
    info = data.prepare(section([str(file)], tokens="bpe", vocab_size=262), {"context": 8}, tmp_path)
    assert len(data.encode(info, "xyxy")) == 4
    assert len(data.encode(info, "abab")) < 4


def test_files_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for name, text in (("b.txt", "second"), ("a.txt", "first\n"), ("more/c.txt", "third"), (".hidden", "never")):
        (folder / name).write_text(text)
    for path in ([str(folder)], [str(folder / "a.txt"), str(folder / "b.txt"), str(folder / "more")], str(folder)):
        info = data.prepare(section(path, eval_fraction=0.0, tokens="byte"), {"context": 2}, tmp_path / "cache")
        assert bytes(data.open_dataset(info, "train").tokens.tolist()) == b"first\nsecond\nthird"
        assert data.open_dataset(info, "eval").num_samples == 0
        assert eval_batches(data.open_dataset(info, "eval"), 4) == []
    info = data.prepare(section([str(folder / "*.txt")], eval_fraction=0.0), {"context": 2}, tmp_path / "cache")
    assert data.decode(info, data.open_dataset(info, "train").tokens) == "first\nsecond"


@pytest.mark.parametrize("marked", [(0, 1, 2), (1,), (2, 0)])
@pytest.mark.parametrize("tokens", ["char", "byte"])
def test_marks_of_the_encoding_at_files_beginnings_are_no_text(marked: tuple[int, ...], tokens: str,
                                                               tmp_path: Path) -> None:
    texts = ["to be or not ", "that is \ufeff the question ", "whether 'tis nobler"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes((codecs.BOM_UTF8 if number in marked else b"") + text.encode())
    info = data.prepare(section([str(tmp_path / "*.txt")], eval_fraction=0.0, tokens=tokens), {"context": 2},
                        tmp_path / "cache")
    assert data.decode(info, data.open_dataset(info, "train").tokens) == "\n".join(texts)
    assert tokens == "byte" or sorted(data.decode(info, range(info["vocab_size"]))) == sorted({*"".join(texts), "\n"})


def test_evaluation_text_of_its_own(text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("zebra! " * 20)
    info = data.prepare(section([str(text_file)], eval_path=[str(other)]), {"context": 16}, tmp_path)
    assert data.decode(info, data.open_dataset(info, "eval").tokens) == "zebra! " * 20
    assert data.decode(info, data.open_dataset(info, "train").tokens) == TEXT


def test_text_is_tokenised_once_and_again_when_it_changes(text_file: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = data.tokenise
    monkeypatch.setattr(data, "tokenise", lambda *arguments: calls.append(1) or real(*arguments))
    first = data.prepare(section([str(text_file)]), {"context": 16}, tmp_path)
    again = data.prepare(section([str(text_file)]), {"context": 32}, tmp_path)
    assert (len(calls), again["train_file"]) == (1, first["train_file"])
    data.prepare(section([str(text_file)], tokens="byte"), {"context": 16}, tmp_path)
    text_file.write_text(TEXT.replace("fox", "cat"))
    changed = data.prepare(section([str(text_file)]), {"context": 16}, tmp_path)
    assert len(calls) == 3
    assert changed["train_file"] != first["train_file"]


def test_writers_at_the_same_time_do_not_disturb_each_other(text_file: Path, tmp_path: Path) -> None:
    work = (section([str(text_file)]), {"context": 16}, tmp_path / "cache")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = [result.get(60) for result in [pool.apply_async(data.prepare, work) for _ in range(6)]]
    assert all(info == found[0] for info in found)
    assert sorted(os.listdir(Path(found[0]["train_file"]).parent)) == [".lock", "eval.arrow", "facts.json",
                                                                       "train.arrow"]


def assert_refused(paths: Any, words: str, cache: Path, context: Any = 16, **keys: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        data.prepare(section(paths, **keys), {"context": context}, cache)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.endswith((".", "?"))


def test_bad_text_is_refused_in_one_sentence_that_names_key_and_file(text_file: Path, tmp_path: Path) -> None:
    empty, broken, short, hollow = (tmp_path / name for name in ("empty.txt", "broken.txt", "short.txt", "hollow"))
    empty.write_bytes(b"")
    broken.write_bytes(b"good \xff bad")
    short.write_text("too short")
    hollow.mkdir()
    assert_refused([str(tmp_path / "none.txt")], "none.txt", tmp_path)
    assert_refused([str(empty)], f"data.path: the file {empty} is empty", tmp_path)
    assert_refused([str(text_file), str(broken)], f"data.path: the file {broken} is not UTF-8 at byte 5", tmp_path)
    assert_refused([str(short)], f"data.path: {short} gives 8 tokens to train on, fewer than the 32", tmp_path)
    assert_refused([str(hollow)], f"data.path: the folder {hollow} holds no file", tmp_path)
    assert_refused([], "data.path names no file", tmp_path)
    assert_refused([str(text_file)], "data.eval_fraction = 0.001", tmp_path, eval_fraction=0.001)
    assert_refused([str(text_file)], f"data.eval_path: the file {empty} is empty", tmp_path, eval_path=[str(empty)])
    assert_refused([str(text_file)], "data.tokens = 'word' must be one of char, byte, bpe", tmp_path, tokens="word")
    assert_refused([str(text_file)], "data.vocab_size = 100 must be at least 256", tmp_path, tokens="bpe",
                   vocab_size=100)
    assert_refused([str(text_file)], "model.context = 0", tmp_path, context=0)


def test_a_cache_that_cannot_be_written_or_read_is_one_sentence(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file where the cache should be")
    with pytest.raises(UserError, match="cache .* cannot be written"):
        data.prepare(section([str(text_file)]), {"context": 16}, tmp_path / "occupied")
    info = data.prepare(section([str(text_file)]), {"context": 16}, tmp_path / "cache")
    train = Path(info["train_file"])
    whole = train.read_bytes()
    for content in (whole[:100], b"", Path(info["eval_file"]).read_bytes()):
        train.unlink()
        train.write_bytes(content)
        with pytest.raises(UserError, match="delete its folder"):
            data.open_dataset(info, "train")


def test_an_unknown_character_in_a_prompt_is_named(text_file: Path, tmp_path: Path) -> None:
    info = data.prepare(section([str(text_file)]), {"context": 16}, tmp_path)
    with pytest.raises(UserError, match="'§'"):
        data.encode(info, "fox § dog")


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
def test_a_column_of_a_table_is_text(suffix: str, tmp_path: Path) -> None:
    """One text a row, a line break after each."""
    texts = [f"Row {n}, \"{n * n}\"\nand a second line" for n in range(40)] + ["the last"]
    files = [write(tmp_path / f"{n}.{suffix}", pa.table({"id": range(len(part)), "body": part}), 7)
             for n, part in enumerate((texts[:20], texts[20:]))]
    section_of = section([str(file) for file in files], format=suffix, text="body")
    info = data.prepare(section_of, {"context": 8}, tmp_path / "cache")
    (tmp_path / "plain.txt").write_text("\n".join(texts))
    plain = data.prepare(section([str(tmp_path / "plain.txt")]), {"context": 8}, tmp_path / "cache")
    assert info["key"] == plain["key"] and info["num_tokens"] == plain["num_tokens"]
    for column, says in (("boody", 'has no column "boody"; it has'), ("id", 'the column "id" of')):
        if (suffix, column) != ("csv", "id"):  # all that a CSV holds is text
            with pytest.raises(UserError, match=says):
                data.prepare(section([str(files[0])], format=suffix, text=column), {"context": 8}, tmp_path)


def test_a_missing_text_names_file_and_row(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", pa.table({"body": ["a", "b", None]}), 2)
    with pytest.raises(UserError, match=f'the column "body" of {file} has no value in row 2'):
        data.prepare(section([str(file)], format="parquet", text="body"), {"context": 1}, tmp_path)


def test_bytes_that_are_no_text_and_a_column_that_stands_twice(tmp_path: Path) -> None:
    table = pa.table({"body": pa.array([b"a", b"\xff"]).view(pa.string())})
    for broken, says in ((table, "t.arrow cannot be read .'utf-8' codec"),
                         (table.append_column("body", table["body"]), 'two columns named "body"')):
        file = write(tmp_path / "t.arrow", broken, 2)
        with pytest.raises(UserError, match=says):
            data.prepare(section([str(file)], format="arrow", text="body"), {"context": 1}, tmp_path)


def test_text_behind_a_uri(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    local, remote = (data.prepare(section([path]), {"context": 8}, tmp_path)
                     for path in (str(tmp_path / "a.txt"), (tmp_path / "a.txt").as_uri()))
    assert local["key"] == remote["key"]
    with pytest.raises(RecipeError, match="does not exist or holds no file"):
        data.prepare(section([(tmp_path / "b.txt").as_uri()]), {"context": 8}, tmp_path)
