"""One contract, every row store. The oracles are torch's own modules and optimizers, ledgers in Python, and for bits the NumPy store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from elastic.collective.reduction import fold
from elastic.errors import NonFiniteLoss, UserError
from elastic.tables.bags import Bags, Summed
from elastic.tables.row_store import MOST, RowKernels, RowStore, kernels
from elastic.tables.rows import Rows
from elastic.tables.spec import SLOTS, RowUpdate, TableSpec
from elastic.tables.starts import key_of, starting_rows
from tests.support.rows import assert_same, ids, listed, random_bags, random_sums, spec, summed, whole
from tests.support.tight_rows import STORES, kernels_of

UPDATE = RowUpdate(lr=0.1)
KINDS = {"growing": {}, "static": {"vocabulary": 40}}
FAR = ids(-(1 << 63), -7, 0, 3, (1 << 63) - 1)


@pytest.fixture(params=["reference", *STORES])
def rows(request: pytest.FixtureRequest) -> RowKernels:
    return kernels_of(request.param)


def opened(rows: RowKernels, of: TableSpec, memory_bytes: int = 0) -> RowStore:
    store = rows.create(of, memory_bytes)
    store.hold(range(of.num_buckets))
    return store


def commit(store: RowStore, step: int, sums: Summed, update: RowUpdate = UPDATE) -> list[int]:
    """Returns what it evicts."""
    prepared = store.prepare(step, sums)
    store.commit(update)
    return prepared.evicted.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_was_never_updated_is_drawn_and_not_stored(rows: RowKernels, kind: str) -> None:
    store = opened(rows, spec(**KINDS[kind]))
    asked = ids(3, 39, 0, 3) if kind == "static" else FAR
    wanted = starting_rows(key_of(3, "ads"), "normal:0.1", asked, 5)
    assert_same(store.read(asked), wanted)
    assert_same(store.lookup(Bags(asked, np.arange(asked.size + 1))), wanted)
    assert not store.slots(asked).any() and not listed(store)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_pooling_is_that_of_an_embedding_bag(rows: RowKernels, pooling: str, is_weighted: bool) -> None:
    luck = np.random.default_rng(0)
    store, bags = opened(rows, spec(vocabulary=40, width=70)), random_bags(luck, np.arange(40), pooling, is_weighted, 9)
    table = torch.from_numpy(store.read(np.arange(40))).requires_grad_()
    weights = None if bags.weights is None else torch.from_numpy(bags.weights)
    wanted = torch.nn.functional.embedding_bag(torch.from_numpy(bags.ids), table, torch.from_numpy(bags.offsets[:-1]),
                                               mode="sum",
                                               per_sample_weights=weights)
    lengths = np.diff(bags.offsets)
    if pooling == "mean":  # which torch has no weights for
        totals = lengths if bags.weights is None else [bags.weights[a:b].sum()
                                                       for a, b in zip(bags.offsets, bags.offsets[1:])]
        wanted = wanted / torch.tensor(np.where(lengths, totals, 1), dtype=torch.float32)[:, None]
    assert np.allclose(store.lookup(bags), wanted.detach(), rtol=1e-5, atol=1e-6)
    slopes = luck.standard_normal((9, 70)).astype(np.float32)
    (wanted * torch.from_numpy(np.where(bags.is_filler[:, None], 0, slopes))).sum().backward()
    found = rows.deduplicate(store.spec, bags, slopes)
    assert np.allclose(found.sums, table.grad[found.ids], rtol=1e-4, atol=1e-5)
    real = np.repeat(~bags.is_filler, lengths)
    assert dict(zip(found.ids, found.counts)) == {id: (bags.ids[real] == id).sum() for id in bags.ids[real]}


def test_lists_that_are_not_pooled_are_filled_up_with_zeros(rows: RowKernels) -> None:
    store = opened(rows, spec())
    bags = Bags(ids(7, 9, 7), ids(0, 2, 2, 3), np.array([1, 2, 3], np.float32), "none", 2)
    one, other = store.read(ids(7, 9))
    zero = np.zeros(5, np.float32)
    assert_same(store.lookup(bags), np.array([[one, 2 * other], [zero, zero], [3 * one, zero]]))
    slopes = np.arange(30, dtype=np.float32).reshape(3, 2, 5)
    assert_same(rows.deduplicate(store.spec, bags, slopes),
                Summed(ids(7, 9), np.array([slopes[0, 0] + 3 * slopes[2, 0], 2 * slopes[0, 1]]),
                                                                   np.array([2, 1], np.int32)))


@pytest.mark.parametrize("pooling", ["sum", "mean", "none"])
def test_rows_that_were_read_before_pool_to_the_same_bits(rows: RowKernels, pooling: str) -> None:
    luck = np.random.default_rng(1)
    store = opened(rows, spec(width=33))
    commit(store, 1, random_sums(luck, np.arange(30), 33))
    bags = random_bags(luck, np.arange(-5, 40), pooling, True)
    distinct, index = rows.distinct(bags.ids)
    assert_same(distinct, np.unique(bags.ids))
    assert_same(distinct[index], bags.ids)
    assert_same(rows.pool(store.read(distinct), index, bags), store.lookup(bags))


def test_arrays_of_any_kind_of_memory_give_the_same_bits(rows: RowKernels) -> None:
    """As they come from Arrow, or as parts of larger ones."""
    luck = np.random.default_rng(9)
    store, bags, slopes = opened(rows, spec()), random_bags(luck, np.arange(9), "sum",
                                                            True), luck.standard_normal((6, 5)).astype(np.float32)
    wide = np.repeat(slopes, 2, axis=1)
    for array in (bags.ids, bags.offsets, bags.weights):
        array.flags.writeable = False
    whole_sums, part = rows.deduplicate(store.spec, bags, slopes), rows.deduplicate(store.spec, bags, wide[:, ::2])
    assert_same(part, whole_sums)
    fortran = replace(part, sums=np.asfortranarray(part.sums), counts=np.repeat(part.counts, 2)[::2])
    assert_same(rows.merge(fortran, whole_sums), rows.merge(whole_sums, whole_sums))
    commit(store, 1, fortran)
    other = opened(rows, spec())
    commit(other, 1, whole_sums)
    assert whole(store) == whole(other)
    assert_same(store.lookup(bags), other.lookup(replace(bags, ids=bags.ids.copy())))


def test_slopes_add_up_from_zero_in_the_order_of_positions(rows: RowKernels) -> None:
    slopes = np.array([[1e8], [1], [-1e8], [-0.0]], np.float32)
    found = rows.deduplicate(spec(width=1), Bags(ids(4, 4, 4, -2), np.arange(5)), slopes)
    assert_same(found, Summed(ids(-2, 4), np.array([[0], [0]], np.float32), np.array([1, 3], np.int32)))
    turned = rows.deduplicate(spec(width=1), Bags(ids(4, 4, 4, -2), np.arange(5)), slopes[[0, 2, 1, 3]])
    assert_same(turned.sums, np.array([[0], [1]], np.float32))


def test_the_tree_has_the_same_bits_however_leaves_are_shared_out(rows: RowKernels) -> None:
    luck = np.random.default_rng(2)
    leaves = [((i, i + 1), random_sums(luck, np.arange(20), 6)) for i in range(7)]
    leaves[3] = (leaves[3][0], Summed.none(6))
    whole_tree = fold(leaves, 7, rows.merge)[0][1]
    for cut in range(1, 7):
        nodes = [*fold(leaves[:cut], 7, rows.merge), *fold(leaves[cut:], 7, rows.merge)]
        assert_same(fold(nodes, 7, rows.merge)[0][1], whole_tree)
    wanted = np.zeros((20, 6))
    for _, leaf in leaves:
        wanted[leaf.ids] += leaf.sums
    assert np.allclose(whole_tree.sums, wanted[whole_tree.ids], atol=1e-5)
    assert whole_tree.counts.sum() == sum(leaf.counts.sum() for _, leaf in leaves)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", SLOTS)
def test_an_update_is_that_of_torch_on_the_touched_rows(rows: RowKernels, optimizer: str, decay: float) -> None:
    luck = np.random.default_rng(4)
    store = opened(rows, spec(width=19, optimizer=optimizer))
    params = [torch.from_numpy(store.read(ids(id))).requires_grad_() for id in range(6)]
    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam,
            "rowwise_adagrad": torch.optim.SGD}[optimizer]
    own = [kind([param], lr=0.1, weight_decay=decay, **({} if kind is torch.optim.SGD else {"eps": 1e-3}))
           for param in params]
    squares = np.zeros(6)
    for step in range(1, 4):
        sums = random_sums(luck, np.arange(6), 19)
        values, slots = store.read(sums.ids), store.slots(sums.ids)
        for id, sum in zip(sums.ids.tolist(), sums.sums):
            gradient = torch.from_numpy(0.5 * sum[None])
            if optimizer == "rowwise_adagrad":
                squares[id] += float(((gradient + decay * params[id].detach()) ** 2).mean())
                own[id].param_groups[0]["lr"] = 0.1 / (np.sqrt(squares[id]) + 1e-3)
            if optimizer == "adam":  # its bias is that of the run's step, whatever a row has missed
                own[id].state[params[id]]["step"] = torch.tensor(float(step - 1))
                for name in ("exp_avg", "exp_avg_sq"):
                    own[id].state[params[id]].setdefault(name, torch.zeros_like(params[id]))
            params[id].grad = gradient
            own[id].step()
        update = RowUpdate(0.1, 0.5, decay, eps=1e-3)
        commit(store, step, sums, update)
        assert np.allclose(store.read(np.arange(6)), torch.cat(params).detach(), rtol=1e-5, atol=1e-6)
        rows.update(store.spec, update, step, values, slots, sums.sums)
        assert_same(values, store.read(sums.ids))
        assert_same(slots, store.slots(sums.ids))


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_is_stored_once_it_has_appeared_often_enough_and_trained_from_then_on(rows: RowKernels, kind: str) -> None:
    store = opened(rows, spec(admit=3, optimizer="sgd", init="zeros", **KINDS[kind]))
    for step, (count, is_trained, stored, value) in enumerate([(2, False, 0, 0), (1, False, 1, 0), (1, True, 1, -1),
                                                               (5, True, 1, -2)], 1):
        prepared = store.prepare(step, summed({8: 1.0}, count=count))
        assert prepared.is_trained.tolist() == [is_trained]
        store.commit(RowUpdate(1.0))
        exported = [store.export(bucket) for bucket in store.held]
        assert sum(part.ids.size for part in exported) == stored and sum(part.waiting_ids.size for part in exported) == 1 - stored
        assert store.read(ids(8)).tolist() == [[value] * 5]
    assert [(part.counts.tolist(), part.lasts.tolist()) for part in exported if part.ids.size] == [([9], [4])]


def test_a_count_stays_at_the_most_that_it_can_say(rows: RowKernels) -> None:
    store = opened(rows, spec(num_buckets=1))
    for step in (1, 2):
        commit(store, step, summed({8: 1.0}, count=MOST - 1))
    assert store.export(0).counts.tolist() == [MOST]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_seen_for_long_goes_and_starts_anew(rows: RowKernels, kind: str) -> None:
    store = opened(rows, spec(ttl_steps=3, **KINDS[kind]))
    start = store.read(ids(1, 2))
    assert commit(store, 1, summed({1: 1.0, 2: 1.0})) == []
    assert commit(store, 4, summed({2: 1.0})) == []
    assert commit(store, 5, summed({})) == [1]
    assert list(listed(store)) == [2]
    assert_same(store.read(ids(1)), start[:1])
    assert not store.slots(ids(1)).any() and store.slots(ids(2)).any()


def test_a_long_wait_is_looked_for_a_bucket_at_a_time(rows: RowKernels) -> None:
    store = opened(rows, spec(ttl_steps=64, vocabulary=8))
    commit(store, 1, summed(dict.fromkeys(range(8), 1.0)))
    gone = {step: commit(store, step, summed({})) for step in range(60, 75)}
    assert {step: found for step, found in gone.items() if found} == {66: [2, 6], 67: [1, 5], 68: [0, 4], 69: [3, 7]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_bucket_gives_up_what_it_has_seen_least(rows: RowKernels, kind: str) -> None:
    store = opened(rows, spec(max_rows=3, num_buckets=1, **KINDS[kind]))
    assert commit(store, 1, summed({5: 1.0, 6: 1.0}, count=2)) == []
    assert commit(store, 2, summed({7: 1.0}, count=2)) == []
    assert commit(store, 3, summed({8: 1.0, 9: 1.0}, count=1)) == [8, 9]
    assert commit(store, 4, summed({9: 1.0}, count=2)) == [5]
    assert sorted(listed(store)) == [6, 7, 9]


def test_waiting_ids_have_room_of_their_own(rows: RowKernels) -> None:
    store = opened(rows, spec(max_rows=2, num_buckets=1, admit=2))
    commit(store, 1, summed({5: 1.0, 6: 1.0}, count=2))
    assert commit(store, 2, summed({7: 1.0, 8: 1.0})) == []
    assert commit(store, 3, summed({9: 1.0})) == [7]
    assert commit(store, 4, summed({8: 1.0})) == [5]
    assert sorted(listed(store)) == [6, 8, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_prepared_shows_nowhere_and_may_be_dropped(rows: RowKernels, kind: str) -> None:
    luck = np.random.default_rng(5)
    store, other = (opened(rows, spec(ttl_steps=1, admit=1, **KINDS[kind])) for _ in range(2))
    first, second = (random_sums(luck, np.arange(40), 5) for _ in range(2))
    commit(store, 1, first), commit(other, 1, first)
    before = whole(store)
    store.prepare(2, random_sums(luck, np.arange(40), 5))
    assert whole(store) == before
    store.forget()
    store.prepare(2, random_sums(luck, np.arange(40), 5))
    room = store.nbytes
    prepared = store.prepare(3, second)
    assert whole(store) == before and (store.nbytes >= room or rows is kernels_of("disk"))
    assert_same(prepared, other.prepare(3, second))
    assert store.squared_norms().sum() == pytest.approx((second.sums[prepared.is_trained] ** 2).sum())
    assert_same(store.squared_norms(), other.squared_norms())
    store.commit(UPDATE), other.commit(UPDATE)
    assert whole(store) == whole(other) != before


def test_a_commit_takes_no_memory(rows: RowKernels) -> None:
    store = opened(rows, spec(num_buckets=2))
    for step in range(1, 6):
        store.prepare(step, summed(dict.fromkeys(range(400 * step), 1.0)))
        before = store.nbytes
        store.commit(UPDATE)
        if rows is not kernels("reference"):  # what that takes is Python's
            assert store.nbytes == before
    assert len(listed(store)) == 2000


def test_a_sum_that_is_not_finite_is_named_and_changes_nothing(rows: RowKernels) -> None:
    store = opened(rows, spec())
    commit(store, 1, summed({1: 1.0}))
    before = whole(store)
    assert store.prepare(2, summed({1: 1.0, 6: np.nan, 7: np.inf})).bad == 6
    with pytest.raises(NonFiniteLoss, match="table ads: the gradient of id 6 is not finite at step 2"):
        store.commit(UPDATE)
    assert whole(store) == before
    assert store.prepare(2, summed({1: 1.0})).bad is None


@pytest.mark.parametrize("kind", KINDS)
def test_rows_move_to_another_split_of_buckets(rows: RowKernels, kind: str) -> None:
    luck = np.random.default_rng(6)
    store = opened(rows, spec(optimizer="adam", admit=2, **KINDS[kind]))
    for step in range(1, 5):
        commit(store, step, random_sums(luck, np.arange(40), 5))
    other = opened(rows, spec(optimizer="adam", admit=2, num_buckets=16, **KINDS[kind]))
    for bucket in store.held:
        other.load(store.export(bucket))
    assert listed(other) == listed(store)
    last = random_sums(luck, np.arange(40), 5)
    assert commit(store, 5, last) == commit(other, 5, last) and listed(other) == listed(store)


def test_increments_and_what_was_evicted_make_up_the_rest(rows: RowKernels) -> None:
    luck = np.random.default_rng(7)
    of = spec(ttl_steps=2, admit=2, num_buckets=2)
    store, copy = opened(rows, of), opened(rows, of)
    for step in range(1, 4):
        commit(store, step, random_sums(luck, np.arange(40), 5))
    for bucket in store.held:
        copy.load(store.export(bucket))
    gone = [id for step in range(4, 8) for id in commit(store, step, random_sums(luck, np.arange(40), 5))]
    assert gone
    copy.remove(np.array(gone, np.int64))
    for bucket in store.held:
        copy.load(store.export(bucket, after=3))
    assert whole(copy) == whole(store)


def test_where_a_row_lies_and_what_else_is_held_show_nowhere(rows: RowKernels) -> None:
    luck = np.random.default_rng(8)
    choices = luck.integers(-(1 << 62), 1 << 62, 60)
    steps = [random_sums(luck, choices, 5) for _ in range(6)]
    store = opened(rows, spec(num_buckets=8))
    for step, sums in enumerate(steps, 1):
        commit(store, step, sums)
    other = opened(rows, spec(num_buckets=8))
    commit(other, 1, random_sums(luck, luck.integers(-(1 << 62), 1 << 62, 200), 5))
    room = other.nbytes
    other.drop(range(8))
    assert not other.held
    other.hold([5, 1, 0, 7, 2, 3, 6, 4])
    assert other.nbytes <= room and not listed(other)
    for step, sums in enumerate(steps, 1):
        commit(other, step, sums)
    assert whole(other) == whole(store) and len(listed(store)) > 40
    other.drop([2])
    with pytest.raises(ValueError, match="bucket 2 of table ads is not held here"):
        other.read(choices)
    assert {**whole(other), 2: whole(store)[2]} == whole(store)


BAD_BAGS: dict[str, tuple[dict[str, Any], Any]] = {
    "id -1 is not in its vocabulary, 0 to 39": ({"ids": ids(3, -1, 4)}, KINDS["static"]),
    "id 40 is not in its vocabulary": ({"ids": ids(3, 40, 4)}, KINDS["static"]),
    "offsets must rise from 0 to the 3 ids .* decrease behind list 1": ({"offsets": ids(0, 2, 1, 3)}, {}),
    "these run from 0 to 4": ({"offsets": ids(0, 4)}, {}),
    "these run from 1 to 3": ({"offsets": ids(1, 3)}, {}),
    "ids are int32": ({"ids": np.zeros(3, np.int32)}, {}),
    "weights are float64 of shape .3,.; they must be float32": ({"weights": np.ones(3)}, {}),
    "list 1 has 2 ids, and lists that are not pooled are 1 long": ({"pooling": "none"}, {}),
    "pooling = 'max' is not one of sum, mean, none": ({"pooling": "max"}, {})}


@pytest.mark.parametrize("sentence", BAD_BAGS)
def test_bags_that_cannot_be_looked_up_get_a_sentence(rows: RowKernels, sentence: str) -> None:
    changes, table = BAD_BAGS[sentence]
    store = opened(rows, spec(**table))
    bags = Bags(**{"ids": ids(3, 4, 5), "offsets": ids(0, 1, 3), **changes})
    for call in (store.lookup, lambda bags: rows.deduplicate(store.spec, bags, np.zeros((bags.size, 5), np.float32))):
        with pytest.raises(UserError, match=sentence):
            call(bags)


def test_sums_and_slopes_of_another_table_get_a_sentence(rows: RowKernels) -> None:
    store, good = opened(rows, spec(**KINDS["static"])), summed({3: 1.0, 4: 1.0})
    for sentence, sums in {"must be int64 ids, float32 rows of width 5": summed({3: 1.0}, width=6),
                           "ids of its sums must rise, each once": replace(good, ids=ids(4, 3)),
                           "id 40 is not in its vocabulary": summed({40: 1.0})}.items():
        with pytest.raises(UserError, match=sentence):
            store.prepare(1, sums)
    with pytest.raises(UserError, match="its slopes are float32 of shape .1, 6.; .* shape .1, 5."):
        rows.deduplicate(store.spec, Bags(ids(3), ids(0, 1)), np.zeros((1, 6), np.float32))


def test_rows_of_another_table_get_a_sentence_and_nothing_is_lost(rows: RowKernels) -> None:
    store, good = opened(rows, spec(num_buckets=1, **KINDS["static"])), summed({3: 1.0, 4: 1.0})
    commit(store, 1, good)
    saved, before = store.export(0), whole(store)
    cases: dict[str, Rows] = {
        "values of the rows to load are float32 of shape .2, 4., and with width = 5": replace(saved, values=saved.values[:, :4]),
        "values of the rows to load are float64": replace(saved, values=saved.values.astype(np.float64)),
        "slots of the rows to load .* optimizer = 'rowwise_adagrad'": replace(saved, slots=saved.values),
        "must rise": replace(saved, ids=ids(4, 3)), "id 41 is not in its vocabulary": replace(saved, ids=ids(3, 41)),
        "is stored, and waiting": replace(saved, waiting_ids=saved.ids, waiting_counts=saved.counts,
                                          waiting_lasts=saved.lasts)}
    for sentence, bad in cases.items():
        with pytest.raises(UserError, match=sentence):
            store.load(bad)
        assert whole(store) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_is_full_says_so_before_the_vote(rows: RowKernels, kind: str) -> None:
    if kind == "static" and rows is kernels("reference"):
        pytest.skip("it stores no row of a vocabulary before it is updated")
    of = spec(width=1000, vocabulary=1_000_000 if kind == "static" else 0)
    store = rows.create(of, 40_000_000)
    with pytest.raises(UserError, match="embedding.memory_gb leaves it"):
        store.hold(range(4))
        commit(store, 1, summed({3: 1.0}, 1000))
        before = whole(store)
        store.prepare(2, summed(dict.fromkeys(range(30000), 1.0), 1000))
    if kind == "growing":
        assert whole(store) == before
        commit(store, 2, summed({3: 1.0}, 1000))
    assert store.nbytes <= 40_000_000
