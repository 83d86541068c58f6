"""Items of users' own data sets: what becomes of any nesting, and one sentence for what cannot be. Oracles: torch's own collate; np.stack."""

from __future__ import annotations

import itertools
import random
import threading
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from elastic.data import MapStyle, Sampler, load_batch
from elastic.data.collate import num_rows, sliced, stacked
from elastic.errors import RecipeError
from elastic.planning.memory import num_bytes

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from backends.pytorch.arrays import columns  # noqa: E402
from backends.pytorch.backend import framework  # noqa: E402

Pair = namedtuple("Pair", "left right")
COUNT = itertools.count()
DTYPES = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
          torch.int64, torch.float16,
          torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
          torch.float8_e5m2]


class Made:
    """A data set of `size` items, each `make(index)`."""

    def __init__(self, make: Callable[[int], Any], size: int = 6):
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


NESTINGS: dict[str, Callable[[int], Any]] = {
    "a dict in a dict": lambda i: {"inputs": {"x": np.full(3, i, np.float32), "deep": {"er": i}}, "y": float(i)},
    "lists and tuples": lambda i: ([np.full(2, i), (i, float(i))], {"a": [i, [True, i]]}),
    "named tuples": lambda i: Pair({"p": Pair(i, 2.0 * i)}, [np.ones((2, 2)) * i, i]),
    "tensors": lambda i: {"t": torch.full((2, 1), i), "n": np.float64(i), "s": np.array(i, np.int16)},
    "texts": lambda i: {"name": f"item {i}", "both": ("a", i), "raw": b"x"},
    "an ordered dict": lambda i: OrderedDict(b=i, a=(torch.ones(1) * i,)),
    "complex numbers": lambda i: {"z": np.array([i + 1j, 2 - 1j * i], np.complex64), "w": torch.tensor(1j * i)},
    "nothing within": lambda i: {"empty": {}, "also": [], "x": torch.ones(2) * i}}


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif hasattr(wanted, "dtype"):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        if hasattr(wanted, "numpy"):
            found, wanted = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (found, wanted))
        assert found.tolist() == wanted.tolist()
    else:
        assert found == wanted


@pytest.mark.parametrize("name", NESTINGS)
def test_torch_gets_what_its_own_loader_would_give(name: str) -> None:
    source = Made(NESTINGS[name])
    found = MapStyle(source, collate=framework.collate).batch(np.array([4, 1, 2]), np.zeros(3, np.int64))
    wanted = next(iter(torch.utils.data.DataLoader(torch.utils.data.Subset(source, [4, 1, 2]), batch_size=3)))
    assert_same(found, wanted)
    assert_same(columns(found, torch.device("cpu")), wanted)
    assert num_rows(found) == 3
    none = MapStyle(source, collate=framework.collate).batch(np.array([], np.int64), np.array([], np.int64))
    assert num_rows(none) == 0 and num_rows(sliced(found, 1, 3)) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_torch_is_stacked(dtype: Any) -> None:
    tensors = [torch.tensor([[1, 0], [0, number]]).to(dtype) for number in range(2)]
    wanted = torch.utils.data.default_collate([{"a": [0, tensor]} for tensor in tensors])
    assert_same(MapStyle(Made(lambda i: {"a": [0, tensors[i]]}, 2),
                         collate=framework.collate).batch(np.arange(2), np.zeros(2)), wanted)


@pytest.mark.parametrize("dtype", ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
                                   "float16", "float32", "float64",
                                   "complex64", "complex128", "<U3", "bfloat16"])
def test_others_get_what_numpy_stacks(dtype: str) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    values = np.arange(12).reshape(6, 2).astype(dtype)
    found = MapStyle(Made(lambda i: ({"a": [values[i], {"b": values[i, 0]}]},
                                     Pair(values[i], 1)))).batch(np.array([5, 0]), np.zeros(2))
    x, pair = found
    assert isinstance(found, tuple) and type(pair) is Pair and pair.right.tolist() == [1, 1]
    for column, wanted in ((x["a"][0], values[[5, 0]]), (x["a"][1]["b"], values[[5, 0], 0]),
                           (pair.left, values[[5, 0]])):
        assert (column.dtype == wanted.dtype or dtype == "<U3") and column.tolist() == wanted.tolist()


class Strange:
    pass


REFUSED: dict[str, tuple[Callable[[int], Any], str]] = {
    "another shape": (lambda i: {"a": [0, np.zeros(2 + i // 3)]},
                      r"item\['a'\]\[1\] is a ndarray of shape \(3,\) in item 3 and .*\(2,\) in item 0"),
    "another length": (lambda i: {"a": {"b": [1.0] * (1 + i // 2)}},
                       r"item\['a'\]\['b'\] is a list of 2 in item 2 and a list of 1 in item 0"),
    "another key": (lambda i: ({"a": 1, **({"b": 2} if i == 5 else {})}, 1),
                    r"item\[0\] is a dict with 'a', 'b' in item 5"),
    "another kind": (lambda i: Pair(1, {"c": 1} if i else [1]),
                     r"item\.right is a dict with 'c' in item 1 and a list of 1 in item 0"),
    "none": (lambda i: {"a": [0, None], "x": 1}, r"item\['a'\]\[1\] cannot be put into a batch: it is a NoneType"),
    "an object": (lambda i: (0, {"deep": [Strange()]}),
                  r"item\[1\]\['deep'\]\[0\] cannot be put into a batch: it is a Strange"),
    "an array of objects": (lambda i: {"o": np.array([None, 1])},
                            r"item\['o'\] cannot be put into a batch: it is a ndarray of shape \(2,\)"),
    "a set": (lambda i: {"s": {1, 2}}, r"item\['s'\] cannot be put into a batch: it is a set")}


@pytest.mark.parametrize("put", [framework.collate, stacked])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_in_a_batch_is_refused_by_its_path(name: str, put: Callable[..., Any]) -> None:
    make, words = REFUSED[name]
    with pytest.raises(RecipeError, match=f"^data.kind: {words}") as caught:
        MapStyle(Made(make), collate=put).batch(np.arange(6), np.zeros(6))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("value", "name"),
                         [(np.zeros(2, np.int16), "int16"), (np.complex64(1j), "complex64"),
                          (np.zeros((), np.uint32), "uint32")])
def test_a_type_that_the_framework_lacks_is_refused_by_its_path(value: Any, name: str) -> None:
    few = ("float32", "int64")
    fits = MapStyle(Made(lambda i: {"a": [np.float32(i), i]}), collate=lambda items: stacked(items, few))
    assert fits.batch(np.arange(2), np.zeros(2))["a"][1].tolist() == [0, 1]
    data = MapStyle(Made(lambda i: {"a": [i, {"b": value}]}), collate=lambda items: stacked(items, few))
    with pytest.raises(RecipeError, match=rf"item\['a'\]\[1\]\['b'\] cannot be put into a batch: .*there is no {name} in the framework, only"):
        data.batch(np.arange(2), np.zeros(2))


def test_an_error_in_an_item_names_file_line_and_item() -> None:
    def fails(index: int) -> Any:
        return {"x": 1 / (index - 4)}

    sampler = Sampler(6, 2, 1, 0, False, epochs=1)
    data = MapStyle(Made(fails))
    assert load_batch(data, sampler, 1, 0)["x"].tolist() == [-1 / 4, -1 / 3]
    line = fails.__code__.co_firstlineno + 1
    with pytest.raises(RecipeError, match=rf"data.kind: item 4 of Made cannot be had: ZeroDivisionError: .*\(test_items.py, line {line}, in fails\)"):
        load_batch(data, sampler, 3, 0)
    training, evaluation = MapStyle(Made(fails)).split(0.34)
    assert training.num_samples == 4 and evaluation is not None
    with pytest.raises(RecipeError, match="item 4 of Made"):  # as the user counts them
        evaluation.batch(np.array([0]), np.array([0]))


class Own(Made):
    """Puts its own batches together, and not by rows."""

    def collate_fn(self, items: list[Any]) -> Any:
        return {"flat": np.concatenate(items), "told": str(len(items))}


def test_a_collate_fn_of_its_own_makes_the_batch_and_rows_are_items() -> None:
    data = MapStyle(Own(lambda i: np.full(i, i)), collate=framework.collate)
    found = data.batch(np.array([3, 1]), np.zeros(2, np.int64))
    assert num_rows(found) == 2 and columns(found, torch.device("cpu"))["flat"].tolist() == [3, 3, 3, 1]
    assert num_rows(data.batch(np.array([], np.int64), np.array([], np.int64))) == 0
    assert num_rows(sliced(found, 0, 2)) == 2 and num_rows(sliced(found, 0, 0)) == 0
    with pytest.raises(RecipeError, match="cannot be cut by rows into micro-batches; set mesh.micro_batches = 1"):
        sliced(found, 0, 1)


def test_a_collate_fn_that_forgets_to_return_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "collate_fn", lambda self, items: None)
    with pytest.raises(RecipeError, match=r"collate_fn of Own gives None for items 0, 1, 2, \.\.\.; let it return the batch"):
        MapStyle(Own(lambda i: np.full(i, i))).batch(np.arange(4), np.zeros(4, int))


def test_a_collate_fn_that_fails_is_told_with_its_items_and_line() -> None:
    data = MapStyle(Own(lambda i: "text"), collate=framework.collate)
    with pytest.raises(RecipeError, match=r"collate_fn for items 2, 3 of Own cannot be had: Value.*\(test_items.py, line \d+, in collate_fn"):
        data.batch(np.array([2, 3]), np.zeros(2, np.int64))


@pytest.mark.parametrize(("make", "words"), [
    (lambda: {"a": [1, {"b": np.random.default_rng().random(2)}]}, r"\(batch\['a'\]\[1\]\['b'\]\)"),
    (lambda: {"a": torch.empty(2).fill_(float(next(COUNT)))}, r"\['a'\]"),
    (lambda: (f"{next(COUNT)}",), r"\(batch\[0\]"), (lambda: {f"{next(COUNT)}": 1}, r"\(batch\)")])
def test_items_that_are_not_the_same_again_are_told(make: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        MapStyle(Made(lambda i: make(), 1), collate=framework.collate).check_repeats(np.array([0]), np.zeros(1, np.int64))


@pytest.mark.parametrize("make", [lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3).to_sparse_csr(),
                                  lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
                                  lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)],
                                                                     layout=torch.jagged)])
def test_tensors_that_lie_otherwise_are_the_same_again(make: Any) -> None:
    data = MapStyle(Made(lambda i: 0, 1))
    data.own = lambda items: {"a": make()}
    data.check_repeats(np.array([0]), np.zeros(1, np.int64))
    assert num_bytes(data.batch(np.array([0]), np.zeros(1, np.int64))) >= 0


def test_nested_tensors_are_looked_into() -> None:
    data = MapStyle(Made(lambda i: 0, 1))
    data.own = lambda items: torch.nested.nested_tensor([torch.ones(2), torch.full((3,), float(next(COUNT)))],
                                                        layout=torch.jagged)
    with pytest.raises(RecipeError, match=r"\(batch\[1\]\)"):
        data.check_repeats(np.array([0]), np.zeros(1, np.int64))


def test_packed_sequences_keep_their_lengths_on_the_cpu() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    for device in ("cpu", "meta"):
        found = columns(packed, torch.device(device))
        assert type(found) is type(packed) and found.data.device.type == device and found.batch_sizes.tolist() == [2, 2, 1]
        assert found.data is not packed.data


def test_a_dict_of_a_user_s_own_kind_stays_of_it_as_in_torch() -> None:
    class Named(dict[str, Any]):
        __getattr__ = dict.__getitem__

    class Encoding(UserDict[str, Any]):
        """As tokenizers give."""

    for kind in (Named, Encoding, OrderedDict, lambda entries: defaultdict(list, entries)):
        batch = framework.collate([kind({"x": torch.ones(2) * i, "y": {"z": i}}) for i in range(4)])
        for found in (columns(batch, torch.device("cpu")), sliced(batch, 1, 3)):
            assert type(found) is type(batch) is type(kind({})) and type(found["y"]) is dict
        assert found["x"].tolist() == [[1, 1], [2, 2]] and batch["x"].shape == (4, 2), "the whole stays"
    assert columns(Named(x=torch.ones(2)), torch.device("cpu")).x.tolist() == [1, 1]


def test_what_a_collate_fn_makes_stays_what_it_is_though_it_is_a_sequence() -> None:
    class Images:
        def __init__(self, tensor: Any):
            self.tensor = tensor

        def __len__(self) -> int:
            return len(self.tensor)

        def __getitem__(self, row: int) -> Any:
            return self.tensor[row]

        def to(self, device: Any) -> Any:
            return Images(self.tensor.to(device))

    found = columns({"images": Images(torch.ones(2, 3)), "sizes": np.ones(2)}, torch.device("meta"))
    assert isinstance(found["images"], Images) and found["images"].tensor.device.type == "meta" and found["sizes"].dtype == torch.float32


def test_a_collate_fn_that_fills_one_buffer_again_and_again_is_told_and_one_that_gives_what_is_fixed_passes() -> None:
    rows, buffer, fixed = np.arange(2), torch.empty(2), torch.ones(3)

    def filling(items: list[int]) -> Any:
        return {"fixed": fixed, "x": buffer.copy_(torch.tensor(items))}

    data = MapStyle(Made(lambda i: i))
    data.own = filling
    with pytest.raises(RecipeError, match=r"writes into a batch that it gave before \(batch\['x'\]\)"):
        data.check_repeats(rows, np.zeros(2, np.int64))
    data.own = lambda items: {"fixed": fixed, "x": filling(items)["x"].clone(), "lock": threading.Lock()}
    data.check_repeats(rows, np.zeros(2, np.int64))
    data.own = lambda items: {"fixed": fixed, "x": filling(items)["x"].clone()}
    data.check_repeats(rows, np.zeros(2, np.int64))


def test_items_that_draw_from_seeded_generators_are_the_same_again() -> None:
    made = Made(lambda i: {"a": torch.rand(2), "b": np.random.rand(), "c": random.random(), "d": float("nan"),
                           "e": np.array([np.nan]), "f": "x"})
    data = MapStyle(made, seeded=framework.seeded, collate=framework.collate)
    data.check_repeats(np.arange(3), np.zeros(3, np.int64))
    with pytest.raises(RecipeError, match=r"\(batch\['a'\]\)"):
        MapStyle(made, collate=framework.collate).check_repeats(np.arange(3), np.zeros(3, np.int64))
