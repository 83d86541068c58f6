"""Who writes what: all of it, nothing twice, and as evenly as rows allow. The oracle is a count of every element by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.boxes import Box
from elastic.checkpoint.manifest import ITEM_BYTES, Piece
from elastic.checkpoint.plan import shares
from elastic.checkpoint.safetensors import lay_out

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
specs = st.dictionaries(st.text("abc/", min_size=1, max_size=4), st.tuples(st.sampled_from(sorted(ITEM_BYTES)), shapes),
                        max_size=8)


def where(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(s, s + c) for s, c in zip(piece.start, piece.count))


@given(specs, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_element_is_in_exactly_one_share(arrays: dict, world_size: int) -> None:
    found = shares(arrays, world_size)
    assert len(found) == world_size
    counts = {name: np.zeros(shape, int) for name, (_, shape) in arrays.items()}
    for pieces in found:
        assert len({piece.name for piece in pieces}) == len(pieces)
        for piece in pieces:
            assert (piece.dtype, piece.shape) == arrays[piece.name]
            counts[piece.name][where(piece)] += 1
    assert all((count == 1).all() for count in counts.values())
    assert {piece.name for pieces in found for piece in pieces} == set(arrays), "an array without elements still has to be named"


@given(specs, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_box_is_one_run_of_its_array(arrays: dict, world_size: int) -> None:
    for pieces in shares(arrays, world_size):
        for piece in pieces:
            numbers = np.arange(math.prod(piece.shape)).reshape(piece.shape)[where(piece)].reshape(-1)
            assert piece.box.run is not None
            assert numbers.tolist() == list(range(*piece.box.run))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_shares_are_equal_to_a_row(world_size: int) -> None:
    """A model's arrays: no rank has more than an equal share and one row of the array that is cut."""
    arrays = {"wte": ("float32", (5000, 64)), "h0.w": ("float32", (64, 256)), "h0.b": ("float32", (256,)),
              "n": ("int64", ())}
    arrays |= {f"optimizer/{name}": spec for name, spec in arrays.items()}
    total = sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in arrays.values())
    sizes = [sum(piece.bytes for piece in pieces) for pieces in shares(arrays, world_size)]
    assert sum(sizes) == total
    assert max(sizes) - total / world_size <= 64 * 4 * 4 and total / world_size - min(sizes) <= 64 * 4 * 4


@given(specs, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_a_file_lies_as_safetensors_reads_it(arrays: dict, world_size: int) -> None:
    """The oracle is the library's own reader, for the kinds of numbers that it and NumPy know."""
    from safetensors.numpy import load

    arrays = {name: (dtype, shape) for name, (dtype, shape) in arrays.items() if dtype != "bfloat16"}
    draw = np.random.default_rng(0)
    for pieces in shares(arrays, world_size):
        header, placed = lay_out(pieces)
        content = bytearray(header) + draw.bytes(sum(piece.bytes for piece in pieces))
        found = load(bytes(content))
        assert set(found) == {piece.name for piece in placed}
        for piece in placed:
            halves = (2,) if piece.dtype == "complex128" else ()
            assert found[piece.name].shape == (*piece.count, *halves) and piece.offset % ITEM_BYTES[piece.dtype] == 0
            assert found[piece.name].tobytes() == content[piece.offset:piece.offset + piece.bytes]


boxes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4)), min_size=1,
                 max_size=3)


@given(boxes)
@settings(max_examples=200, deadline=None)
def test_where_two_boxes_meet(sides: list) -> None:
    """Element by element: what lies in both is what the slices name."""
    shape = (7,) * len(sides)
    one = Piece("a", "float32", shape, tuple(s[0] for s in sides), tuple(s[1] for s in sides), 40)
    other = Piece("a", "float32", shape, tuple(s[2] for s in sides), tuple(s[3] for s in sides))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    both = sorted(set(numbers[where(one)].reshape(-1)) & set(numbers[where(other)].reshape(-1)))
    meeting = one.box.meet(other.box)
    if meeting is None:
        assert not both
        return
    inside, there = meeting.relative(one.box), meeting.relative(other.box)
    assert sorted(numbers[where(one)][inside.slices].reshape(-1)) == sorted(numbers[where(other)][there.slices].reshape(-1)) == both
    assert inside.inside(one.box) == there.inside(other.box) == meeting and meeting.elements.tolist() == both


@given(shapes, st.integers(0, 1300), st.integers(0, 1300))
@settings(max_examples=400, deadline=None)
def test_a_range_of_elements_is_a_few_boxes(shape: tuple[int, ...], low: int, high: int) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    low, high = min(low, numbers.size), min(high, numbers.size)
    boxes = Box.all(shape).runs(low, high)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    found = []
    for box in boxes:
        assert box.run is not None and all(box.count)
        found += numbers[box.slices].reshape(-1).tolist()
        assert found[-1] - found[-box.size] == box.size - 1 and box.elements.tolist() == found[-box.size:]
    assert found == list(range(low, high))
