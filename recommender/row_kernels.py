"""The store's compiled kernels on rows: pooling (of rows, and of slopes), updates, starting rows. None of them knows ids' places.

A row is worked on 16 floats at a time, as one vector; the last one is masked. There is no fast math, so every sum has
one order: by position, and within a row (`total`) by 16 lanes and then by halves. Row `place` lies at slabs[place >>
shift] + (place & mask) * stride bytes.

Numba keeps what it compiled by the date of the file that a kernel stands in, so a kernel calls nothing that stands
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from elastic.model.ops import GOLDEN, MIX1, MIX2

LANES = 16
BYTES = 4
LINE = 64  # bytes of memory that come at once
WHOLE = 62  # the shift under which an array is one slab
AHEAD = 160  # lines that are asked of memory before they are needed
NUMBER, VECTOR = ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM = range(4)

kernel = njit(nogil=True, cache=True, error_model="numpy")


class Lanes(types.Type):
    """16 floats."""

    def __init__(self) -> None:
        super().__init__("Lanes")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VECTOR)


lanes = Lanes()


def instruction(signature: Any, emit: Callable[..., Any]) -> Any:
    """A function for kernels that is these instructions."""
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, *arguments)

    if len(signature.args) == 1:
        @intrinsic
        def one(context: Any, a: Any) -> Any:
            return signature, build

        return one
    if len(signature.args) == 2:
        @intrinsic
        def two(context: Any, a: Any, b: Any) -> Any:
            return signature, build

        return two

    @intrinsic
    def three(context: Any, a: Any, b: Any, c: Any) -> Any:
        return signature, build

    return three


def spread(builder: Any, value: Any) -> Any:
    """One number in all lanes."""
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, NUMBER(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined),
                                  ir.Constant(ir.VectorType(NUMBER, LANES), [0] * LANES))


def mask(builder: Any, num: Any) -> Any:
    """The first `num` lanes, all of them, or none."""
    numbers = ir.Constant(ir.VectorType(num.type, LANES), list(range(LANES)))
    return builder.icmp_signed("<", numbers, spread(builder, num))


def called(builder: Any, name: str, result: Any, arguments: Any) -> Any:
    """One of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


def emit_load(builder: Any, address: Any, num: Any) -> Any:
    arguments = [builder.inttoptr(address, ir.PointerType()), NUMBER(BYTES), mask(builder, num),
                 ir.Constant(VECTOR, [0.0] * LANES)]
    return called(builder, "llvm.masked.load.v16f32.p0", VECTOR, arguments)


def emit_store(builder: Any, address: Any, num: Any, value: Any) -> Any:
    arguments = [value, builder.inttoptr(address, ir.PointerType()), NUMBER(BYTES), mask(builder, num)]
    called(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), arguments)
    return num


def emit_sqrt(builder: Any, value: Any) -> Any:
    return called(builder, "llvm.sqrt.v16f32", VECTOR, [value])


def emit_total(builder: Any, value: Any) -> Any:
    width = LANES // 2
    while width:
        order = ir.Constant(ir.VectorType(NUMBER, LANES), [(lane + width) % LANES for lane in range(LANES)])
        value = builder.fadd(value, builder.shuffle_vector(value, value, order))
        width //= 2
    return builder.extract_element(value, NUMBER(0))


def emit_prefetch(builder: Any, address: Any) -> Any:
    called(builder, "llvm.prefetch.p0", ir.VoidType(),
           [builder.inttoptr(address, ir.PointerType()), NUMBER(0), NUMBER(3), NUMBER(1)])
    return address


load = instruction(lanes(types.int64, types.int64), emit_load)  # address, how many floats at most
store = instruction(types.int64(types.int64, types.int64, lanes), emit_store)
same = instruction(lanes(types.float32), spread)
add = instruction(lanes(lanes, lanes), ir.IRBuilder.fadd)
sub = instruction(lanes(lanes, lanes), ir.IRBuilder.fsub)
mul = instruction(lanes(lanes, lanes), ir.IRBuilder.fmul)
div = instruction(lanes(lanes, lanes), ir.IRBuilder.fdiv)
sqrt = instruction(lanes(lanes), emit_sqrt)
total = instruction(types.float32(lanes), emit_total)
prefetch = instruction(types.int64(types.int64), emit_prefetch)
floats = instruction(types.CPointer(types.float32)(types.int64), lambda builder,
                     address: builder.inttoptr(address, ir.PointerType()))


@kernel
def address(slabs: Any, shift: int, stride: int, place: int) -> int:
    return slabs[place >> shift] + (place & ((1 << shift) - 1)) * stride


@kernel
def addresses(slabs: Any, shift: int, stride: int, spare: int, places: Any) -> Any:
    """Of rows by place; a place of -1, -2 and so on is the first, second ... row at `spare`."""
    found = np.empty_like(places)
    for i in range(places.size):
        found[i] = address(slabs, shift, stride, places[i]) if places[i] >= 0 else spare + (-1 - places[i]) * stride
    return found


@kernel
def pool(rows: Any, width: int, offsets: Any, targets: Any, weights: Any, divisors: Any, out: int) -> None:
    """Row targets[r] of `out` becomes the sum of what lies at the addresses rows[offsets[r]:offsets[r + 1]], weighted
    where there are weights, and divided by divisors[r] where there are divisors."""
    stride = BYTES * width
    ahead = 1 + AHEAD * LINE // (stride + LINE)
    for run in range(targets.size):
        for first in range(0, width, 4 * LANES):
            a = b = c = d = same(np.float32(0))
            left = width - first
            for i in range(offsets[run], offsets[run + 1]):
                if first == 0 and i + ahead < rows.size:
                    for line in range(0, stride, LINE):
                        prefetch(rows[i + ahead] + line)
                at = rows[i] + BYTES * first
                e, f = load(at, left), load(at + LINE, left - LANES)
                g, h = load(at + 2 * LINE, left - 2 * LANES), load(at + 3 * LINE, left - 3 * LANES)
                if weights.size:
                    weight = same(weights[i])
                    e, f, g, h = mul(weight, e), mul(weight, f), mul(weight, g), mul(weight, h)
                a, b, c, d = add(a, e), add(b, f), add(c, g), add(d, h)
            if divisors.size:
                divisor = same(divisors[run])
                a, b, c, d = div(a, divisor), div(b, divisor), div(c, divisor), div(d, divisor)
            at = out + stride * targets[run] + BYTES * first
            store(at, left, a)
            store(at + LINE, left - LANES, b)
            store(at + 2 * LINE, left - 2 * LANES, c)
            store(at + 3 * LINE, left - 3 * LANES, d)


@kernel
def copy(slabs: Any, shift: int, width: int, spare: int, places: Any, out: int) -> None:
    """Row i of `out` becomes the row at places[i]; without a place it is that of `spare`, or zeros where there is no
    spare."""
    stride = BYTES * width
    for i in range(places.size):
        at = address(slabs, shift, stride, places[i]) if places[i] >= 0 else spare + (-1 - places[i]) * stride
        for first in range(0, width, LANES):
            value = load(at + BYTES * first, width - first) if places[i] >= 0 or spare else same(np.float32(0))
            store(out + stride * i + BYTES * first, width - first, value)


@kernel
def put(slabs: Any, shift: int, width: int, places: Any, rows: int) -> None:
    """The row at places[i] becomes row i of `rows`, or zeros where rows is 0; without a place it goes nowhere."""
    stride = BYTES * width
    for i in range(places.size):
        if places[i] >= 0:
            at = address(slabs, shift, stride, places[i])
            for first in range(0, width, LANES):
                value = load(rows + stride * i + BYTES * first, width - first) if rows else same(np.float32(0))
                store(at + BYTES * first, width - first, value)


@kernel
def start(slabs: Any, shift: int, width: int, key: Any, levels: Any, ids: Any, places: Any) -> None:
    """Writes the starting row of each id to its place, if it has one: see `elastic.tables.starts`."""
    for i in range(ids.size):
        if places[i] < 0:
            continue
        row = floats(address(slabs, shift, BYTES * width, places[i]))
        word = mixed(key + np.uint64(ids[i]) * np.uint64(GOLDEN))
        for number in range(0, width, 4):
            parts = mixed(word + np.uint64(number // 4 + 1) * np.uint64(GOLDEN))
            for part in range(min(4, width - number)):
                row[number + part] = levels[(parts >> np.uint64(16 * part)) & np.uint64(0xFFFF)]


@kernel
def mixed(value: Any) -> Any:
    """SplitMix64's finaliser."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(MIX1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(MIX2)
    return value ^ (value >> np.uint64(31))


@kernel
def merge(left_ids: Any, right_ids: Any, left: int, right: int, width: int, left_counts: Any, right_counts: Any,
          ids: Any, sums: int,
          counts: Any) -> int:
    """left + right by ascending ids; how many there are."""
    stride = BYTES * width
    i = j = num = 0
    while i < left_ids.size or j < right_ids.size:
        is_left = j == right_ids.size or (i < left_ids.size and left_ids[i] <= right_ids[j])
        is_right = i == left_ids.size or (j < right_ids.size and right_ids[j] <= left_ids[i])
        ids[num] = left_ids[i] if is_left else right_ids[j]
        counts[num] = (left_counts[i] if is_left else 0) + (right_counts[j] if is_right else 0)
        for first in range(0, width, LANES):
            at, some = BYTES * first, width - first
            value = load((left + stride * i if is_left else right + stride * j) + at, some)
            if is_left and is_right:
                value = add(value, load(right + stride * j + at, some))
            store(sums + stride * num + at, some, value)
        i, j, num = i + is_left, j + is_right, num + 1
    return num


@kernel
def first_bad(sums: int, num: int, width: int) -> int:
    """The first row that has a number that is not finite; -1 where all are. Zero times such a number is none."""
    for i in range(num):
        found = same(np.float32(0))
        for first in range(0, width, LANES):
            found = add(found, mul(same(np.float32(0)), load(sums + BYTES * (width * i + first), width - first)))
        if total(found) != 0:
            return i
    return -1


@kernel
def squared_norms(buckets: Any, is_trained: Any, sums: Any, out: Any) -> None:
    for i in range(buckets.size):
        if is_trained[i]:
            for j in range(sums.shape[1]):
                out[buckets[i]] += np.float64(sums[i, j]) * np.float64(sums[i, j])


@kernel
def gradient(sums: int, value: Any, some: int, scale: Any, decay: Any) -> Any:
    found = mul(load(sums, some), same(scale))
    return add(found, mul(same(decay), value)) if decay != 0 else found


@kernel
def update(optimizer: int, values: Any, slots: Any, shift: int, width: int, num_slots: int, places: Any,
           is_trained: Any, sums: int,
           numbers: Any) -> None:
    """One optimizer step on each row that is trained; `numbers` as `RowUpdate.numbers` lists them."""
    lr, scale, decay, eps, beta1, rest1, beta2, rest2, bare_rate, root = numbers
    stride, slot_stride = BYTES * width, BYTES * num_slots
    ahead = 1 + AHEAD * LINE // (stride + slot_stride + LINE)
    for i in range(places.size):
        if i + ahead < places.size and places[i + ahead] >= 0:
            for line in range(0, stride, LINE):
                prefetch(address(values, shift, stride, places[i + ahead]) + line)
            for line in range(0, slot_stride, LINE):
                prefetch(address(slots, shift, slot_stride, places[i + ahead]) + line)
        if not is_trained[i]:
            continue
        row, slot, sum = address(values, shift, stride,
                                 places[i]), address(slots, shift, slot_stride, places[i]), sums + stride * i
        rate = lr
        if optimizer == ROWWISE_ADAGRAD:
            squares = same(np.float32(0))
            for first in range(0, stride, LINE):
                some = width - first // BYTES
                found = gradient(sum + first, load(row + first, some), some, scale, decay)
                squares = add(squares, mul(found, found))
            mean = total(load(slot, 1)) + total(squares) / np.float32(width)
            store(slot, 1, same(mean))
            rate = lr / (np.sqrt(mean) + eps)
        for first in range(0, stride, LINE):
            some = width - first // BYTES
            value = load(row + first, some)
            found = gradient(sum + first, value, some, scale, decay)
            if optimizer == ADAGRAD:
                state = add(load(slot + first, some), mul(found, found))
                store(slot + first, some, state)
                change = div(mul(same(rate), found), add(sqrt(state), same(eps)))
            elif optimizer == ADAM:
                moment = add(mul(same(beta1), load(slot + first, some)), mul(same(rest1), found))
                square = add(mul(same(beta2), load(slot + stride + first, some)), mul(mul(same(rest2), found), found))
                store(slot + first, some, moment)
                store(slot + stride + first, some, square)
                change = div(mul(same(bare_rate), moment), add(div(sqrt(square), same(root)), same(eps)))
            else:
                change = mul(same(rate), found)
            store(row + first, some, sub(value, change))
