"""What is pure about tables: buckets and who holds them, starting rows, evictions, specs. The oracles are plain Python."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import RecipeError, UserError
from elastic.model.ops import GOLDEN, mix
from elastic.tables import row_store
from elastic.tables.buckets import Holders, Move, buckets_of, holders, moves
from elastic.tables.eviction import evicted, lowest, sweeps
from elastic.tables.rows import Rows, digests
from elastic.tables.starts import key_of, levels, starting_rows
from tests.support.rows import ids, spec

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"w{number}" for number in range(6)]
FAR = ids(-(1 << 63), -1, 0, 1, 12345, (1 << 63) - 1)


def test_buckets_are_the_ids_mixed_or_of_a_vocabulary_as_they_are() -> None:
    assert buckets_of(spec(num_buckets=1024), FAR).tolist() == [mix(id) % 1024 for id in FAR.tolist()]
    assert buckets_of(spec(num_buckets=8, vocabulary=100), np.arange(100)).tolist() == [id % 8 for id in range(100)]
    counts = np.bincount(buckets_of(spec(num_buckets=64), np.arange(64_000)), minlength=64)
    assert counts.min() > 850 and counts.max() < 1150


@pytest.mark.parametrize("width", [1, 4, 7])
def test_a_starting_row_is_splitmix64_of_seed_table_and_id(width: int) -> None:
    key, found = key_of(3, "ads"), starting_rows(key_of(3, "ads"), "normal:0.5", FAR, width)
    for id, row in zip(FAR.tolist(), found):
        word = mix(key + GOLDEN * id)
        for column in range(width):
            level = mix(word + GOLDEN * (column // 4 + 1)) >> 16 * (column % 4) & 0xFFFF
            assert row[column] == np.float32(0.5 * NormalDist().inv_cdf((level + 0.5) / 65536))
    assert len({key, key_of(4, "ads"), key_of(3, "ad")}) == 3


def test_starting_values_are_distributed_as_they_are_called() -> None:
    normal, uniform = (starting_rows(1, init, np.arange(4000), 64) for init in ("normal:0.5", "uniform:0.5"))
    assert abs(normal.mean()) < 0.005 and abs(normal.std() - 0.5) < 0.005 and abs((normal ** 4).mean() / normal.var() ** 2 - 3) < 0.1
    assert abs(uniform.mean()) < 0.005 and abs(uniform.std() - 1 / 12 ** 0.5) < 0.005 and np.abs(uniform).max() < 0.5
    assert abs(np.corrcoef(normal[:, :8].T) - np.eye(8)).max() < 0.06
    assert not starting_rows(1, "zeros", np.arange(3), 5).any()
    assert (levels("normal:2") == -levels("normal:2")[::-1]).all()


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"admit": -1}, "tables.ads.admit = -1 must be a whole number of at least 0"),
    ({"ttl_steps": -3}, "tables.ads.ttl_steps = -3"),
    ({"max_rows": -3}, "tables.ads.max_rows = -3"),
    ({"max_rows": 3}, "max_rows = 3 must be at least embedding.buckets = 4"),
    ({"vocabulary": -1}, "vocabulary = -1"), ({"width": 0}, "width = 0 must be a whole number of at least 1"),
    ({"num_buckets": 12}, "embedding.buckets = 12 must be a power of two"),
    ({"optimizer": "lamb"}, "'lamb' is not one of sgd, adagrad, "),
    ({"init": "normal"}, "tables.ads.init = 'normal' must be"), ({"init": "normal:nan"}, "'normal:nan'"),
    ({"init": "cauchy:1"}, "'cauchy:1'")])
def test_a_wrong_key_gets_a_sentence(changes: dict, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        spec(**changes)


def test_a_store_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(row_store.KINDS, "numba", "recommender.nowhere")
    with pytest.raises(UserError, match="row store 'numba' cannot be imported .* install the extra `tables`"):
        row_store.kernels("numba")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(-9, 9), st.booleans()), max_size=40,
                unique_by=lambda e: e[2]),
       st.integers(0, 40), st.sampled_from([0, 1, 5, 40]), st.sampled_from([0, 4, 8, 80]))
@settings(max_examples=200, deadline=None)
def test_what_is_evicted_is_the_oldest_and_the_least_counted(entries: list, step: int, ttl_steps: int,
                                                             max_rows: int) -> None:
    of = spec(ttl_steps=ttl_steps, max_rows=max_rows)
    counts, lasts, names, stored = (np.array([entry[column] for entry in entries], kind)
                                    for column, kind in enumerate((int, int, np.int64, bool)))
    left = [e for e in entries if not (ttl_steps and (step + 2) % max(1, ttl_steps // 16) == 0
                                       and step - e[1] > ttl_steps)]
    for kind in (True, False):
        mine, most = sorted(e for e in left if e[3] is kind), max_rows // 4
        if max_rows and len(mine) > most:
            left = [e for e in left if e not in mine[:len(mine) - most + most // 16]]
    found = evicted(of, step, 2, names, counts, lasts, stored)
    assert sorted(found.tolist()) == sorted(e[2] for e in entries if e not in left)


def test_every_bucket_is_swept_once_in_a_sixteenth_of_the_time_and_no_choice_needs_a_sort() -> None:
    swept = np.array([sweeps(spec(ttl_steps=320), step, np.arange(64)) for step in range(1, 41)])
    assert (swept.sum(0) == 2).all() and swept.sum(1).max() <= 4
    luck = np.random.default_rng(0)
    counts, lasts, names = luck.integers(0, 5, 500), luck.integers(0, 4, 500), luck.permutation(500)
    wanted = sorted(zip(counts, lasts, names))[:123]
    assert sorted(names[lowest(counts, lasts, names, 123)]) == sorted(id for *_, id in wanted)


def test_a_digest_is_of_the_bytes_and_their_lengths() -> None:
    rows = Rows(ids(1, 2), np.ones((2, 3), np.float32), np.ones((2, 1), np.float32), *(np.ones(2, np.int32),) * 2,
                ids(7),
                *(np.ones(1, np.int32),) * 2)
    text = b"".join(len(array).to_bytes(8, "little") + array.tobytes() for array in rows.arrays)
    head = b"".join(len(array).to_bytes(8, "little") + array.tobytes() for array in (rows.ids, rows.values))
    assert digests(rows) == (hashlib.sha256(head).hexdigest(), hashlib.sha256(text).hexdigest())
    found = {digests(replace(rows, **{name: array + 1})) for name, array in vars(rows).items()}
    assert len(found) == 8 and len({parameters for parameters, _ in found}) == 3


def copies(before: Holders, after: Holders) -> int:
    return sum(len({a, b} - {c, d, ""}) for a, b, c, d in zip(after.owners, after.twins, before.owners, before.twins))


def assert_even(found: Holders, members: list[str], twin: bool) -> None:
    second = twin and len(members) > 1
    owned, held = [len(found.owned(m)) for m in members], [len(found.held(m)) for m in members]
    assert sum(owned) == len(found.owners) and sum(held) == len(found.owners) * (1 + second)
    assert max(owned) - min(owned) <= 1 and max(held) - min(held) <= 1
    assert all((twin != "") == second and owner != twin for owner, twin in zip(found.owners, found.twins))


@given(st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=2, max_size=6), st.sampled_from([1, 2, 16, 64]),
       st.booleans())
@settings(max_examples=60, deadline=None)
def test_buckets_are_shared_out_evenly_and_what_can_stay_stays(history: list, num_buckets: int, twin: bool) -> None:
    before = holders(sorted(history[0]), num_buckets, twin)
    assert_even(before, sorted(history[0]), twin)
    for members in map(sorted, history[1:]):
        after = holders(members, num_buckets, twin, before)
        assert_even(after, members, twin)
        num = {m: len(before.held(m)) for m in members}
        each, more = divmod(len(after.owners) * (1 + (twin and len(members) > 1)), len(members))
        quotas = sorted(num.values(), reverse=True)
        fewest = sum(max(0, each + (place < more) - held) for place, held in enumerate(quotas))
        found = moves(before, after)
        assert len(found) == copies(before, after)
        assert len(found) == fewest or (twin and len(found) <= fewest + len(NAMES)), (fewest, before, after)
        assert all(move.source in (before.owners[move.bucket], before.twins[move.bucket]) for move in found)
        before = after


def test_with_a_twin_a_loss_takes_no_bucket_and_owners_change_without_a_move() -> None:
    before = holders(NAMES[:4], 1024, True)
    left = NAMES[1:4]
    assert before.lacking(left) == [] and len(before.lacking(NAMES[2:4])) > 0
    gone = Holders(tuple(o if o in left else "" for o in before.owners),
                   tuple(t if t in left else "" for t in before.twins))
    after = holders(left, 1024, True, gone)
    assert len(moves(gone, after)) == len(before.held(NAMES[0])) == 512
    assert all(before.twins[bucket] in (after.owners[bucket], after.twins[bucket]) for bucket in before.owned(NAMES[0]))
    sent = [sum(move.source == m for move in moves(gone, after)) for m in left]
    assert max(sent) - min(sent) <= 1


def test_what_nobody_has_cannot_be_moved() -> None:
    with pytest.raises(ValueError, match="nobody has bucket 1, which b wants"):
        moves(Holders(("a", ""), ("", "")), Holders(("b", "b"), ("", "")))
    assert moves(Holders(("a", "b"), ("", "")), Holders(("b", "b"), ("", ""))) == [Move(0, "a", "b")]


def test_a_cached_kernel_calls_nothing_that_stands_in_another_file() -> None:
    """Numba keeps compiled code by the date of a kernel's own file: what it takes from elsewhere in the project must be
    constants."""
    cached = [file for file in sorted((ROOT / "recommender").glob("*.py"))
              if "cache=True" in file.read_text(encoding="utf-8")]
    taken = [(file.name, alias.name) for file in cached
             for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
             if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("elastic", "recommender")
             for alias in node.names]
    assert len(cached) == 2 and all(name.isupper() for _, name in taken), taken
