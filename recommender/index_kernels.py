"""The store's compiled kernels on ids: where an id's row lies, entering and removing ids, sorting them. None of them touches a row.

A bucket's index is open addressing over an array of its own, with linear probing that begins at one of its lines: a
line of 64 bytes is four entries, of key (int64), place and count (int32); the last steps (int32) lie beside them. A
static vocabulary needs no key: entry id // B is the id's. `heads` (buckets, 4) int64 says of each bucket where its
entries and last steps lie in memory, how many there are (0: it is not held), and the place of a static bucket's first
row.

Numba keeps what it compiled by the date of the file that a kernel stands in, so a kernel calls nothing that stands
elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from elastic.model.ops import MIX1, MIX2

EMPTY, WAITING = -2, -1  # in place of a place
COLD = -3  # and down from it: the row is on disk, under the number COLD - place
ENTRIES, LASTS, CAPACITY, FIRST = range(4)  # of a head
PLACE, COUNT, FIELDS = 2, 3, 4  # of an entry, as int32
ENTRY_BYTES = 4 * FIELDS
GROUP = 4  # entries of a line
# of a pool of places: the first of the free ones, how many are free, the first that was never taken
HEAD, FREE, FRESH = range(3)
MOST = (1 << 31) - 1
CHUNK = 64  # ids whose entries are asked of memory together
AHEAD = 16  # entries that are asked of memory before they are needed
DIGIT = 11  # bits of a radix sort's digit
SIGN = np.uint64(1 << 63)

kernel = njit(nogil=True, cache=True, error_model="numpy")


def pointer_to(kind: types.Type) -> Any:
    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), build

    return pointer


int64s, int32s = pointer_to(types.int64), pointer_to(types.int32)


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = builder.inttoptr(arguments[0], ir.PointerType()), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        builder.call(builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind),
                     [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def match(context: Any, address: Any, id: Any) -> Any:
    """Which entry of a line has this key, 0 to 3, all compared at once; 4 where none has."""
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line, word = ir.VectorType(arguments[1].type, 2 * GROUP), ir.IntType(2 * GROUP)
        undefined, first = ir.Constant(line, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        keys = builder.shuffle_vector(builder.insert_element(undefined, arguments[1], first), undefined,
                                      ir.Constant(ir.VectorType(ir.IntType(32), 2 * GROUP), [0] * 2 * GROUP))
        there = builder.load(builder.inttoptr(arguments[0], ir.PointerType()), typ=line, align=8)
        # every second word is no key
        bits = builder.and_(builder.bitcast(builder.icmp_signed("==", there, keys), word), word(0b01010101))
        return builder.zext(builder.lshr(builder.cttz(bits, ir.IntType(1)(0)), word(1)), arguments[1].type)

    return types.int64(types.int64, types.int64), build


@kernel
def mixed(id: int) -> Any:
    """SplitMix64's finaliser."""
    value = np.uint64(id)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(MIX1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(MIX2)
    return value ^ (value >> np.uint64(31))


@kernel
def home(word: Any, capacity: int) -> Any:
    """The line at which a key's probing begins: by the upper half of its word, for the lower one chose the bucket."""
    return np.int64(((word >> np.uint64(32)) * np.uint64(capacity // GROUP)) >> np.uint64(32)) * GROUP


@kernel
def find(heads: Any, shift: int, is_static: bool, id: int) -> Any:
    """(bucket, entry); the entry is -1 where there is none."""
    if is_static:
        return id & ((1 << shift) - 1), id >> shift
    word = mixed(id)
    bucket = np.int64(word & np.uint64((1 << shift) - 1))
    return bucket, probe(heads, bucket, home(word, heads[bucket, CAPACITY]), id)


@kernel
def probe(heads: Any, bucket: int, entry: int, id: int) -> int:
    """An id's entry, from its home on; -1 where there is none. Most are in their first line, of which an empty entry's
    key means nothing."""
    keys, entries = int64s(heads[bucket, ENTRIES]), int32s(heads[bucket, ENTRIES])
    found = entry + match(heads[bucket, ENTRIES] + ENTRY_BYTES * entry, id)
    if found < entry + GROUP and entries[found * FIELDS + PLACE] != EMPTY:
        return found
    while entries[entry * FIELDS + PLACE] != EMPTY:
        if keys[2 * entry] == id:
            return entry
        entry += 1
        if entry == heads[bucket, CAPACITY]:
            entry = 0
    return -1


@kernel
def locate(heads: Any, shift: int, is_static: bool, ids: Any, places: Any, numbers: Any) -> Any:
    """Fills in the place of each id's row, and -1, -2 and so on where none is in memory, which are as many as it says;
    for each of these, in `numbers` unless that is empty, its number on disk, or -1.

    A static vocabulary has all its rows. -1 - bucket where a bucket is not held.
    """
    missing = 0
    buckets, homes = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    for begin in range(0, ids.size, CHUNK):
        end = min(begin + CHUNK, ids.size)
        for i in range(begin, end):
            if is_static:
                bucket = ids[i] & ((1 << shift) - 1)
                places[i] = heads[bucket, FIRST] + (ids[i] >> shift)
            else:
                word = mixed(ids[i])
                bucket = np.int64(word & np.uint64((1 << shift) - 1))
                buckets[i - begin], homes[i - begin] = bucket, home(word, heads[bucket, CAPACITY])
                prefetch(heads[bucket, ENTRIES] + ENTRY_BYTES * homes[i - begin])
            if heads[bucket, CAPACITY] == 0:
                return -1 - bucket
        if is_static:
            continue
        for i in range(begin, end):
            bucket = buckets[i - begin]
            entry = probe(heads, bucket, homes[i - begin], ids[i])
            place = int32s(heads[bucket, ENTRIES])[entry * FIELDS + PLACE] if entry >= 0 else WAITING
            if place < 0:
                if numbers.size:
                    numbers[missing] = COLD - place if place <= COLD else -1
                missing += 1
                place = -missing
            places[i] = place
    return missing


@kernel
def weigh(heads: Any, shift: int, is_static: bool, admit: int, ids: Any, counts: Any, buckets: Any, entries: Any,
          is_trained: Any, new: Any,
          admitted: Any) -> Any:
    """Of each id: its bucket, its entry (-1: none yet) and whether it is updated. By bucket, how many entries are new,
    and how many are admitted.

    0, or -1 - bucket where one is not held.
    """
    for i in range(ids.size):
        if i + AHEAD < ids.size:
            word = mixed(ids[i + AHEAD])
            bucket = (ids[i + AHEAD] if is_static else np.int64(word)) & ((1 << shift) - 1)
            entry = ids[i + AHEAD] >> shift if is_static else home(word, heads[bucket, CAPACITY])
            prefetch(heads[bucket, ENTRIES] + ENTRY_BYTES * entry)
            prefetch(heads[bucket, LASTS] + 4 * entry)
        bucket = (ids[i] if is_static else np.int64(mixed(ids[i]))) & ((1 << shift) - 1)
        if heads[bucket, CAPACITY] == 0:
            return -1 - bucket
        bucket, entry = find(heads, shift, is_static, ids[i])
        count, place = 0, EMPTY
        if entry >= 0:
            held = int32s(heads[bucket, ENTRIES])
            place = held[entry * FIELDS + PLACE]
            count = held[entry * FIELDS + COUNT] if place != EMPTY else 0
        new[bucket] += place == EMPTY
        is_stored = place >= 0 or place <= COLD
        admitted[bucket] += not is_stored and count + counts[i] >= admit
        buckets[i], entries[i] = bucket, entry
        is_trained[i] = is_stored or count >= admit
    return 0


@kernel
def enter(heads: Any, bucket: int, id: int) -> int:
    """The entry of an id that is not there, waiting and without appearances. There is room."""
    capacity = heads[bucket, CAPACITY]
    entries = int32s(heads[bucket, ENTRIES])
    entry = home(mixed(id), capacity)
    while entries[entry * FIELDS + PLACE] != EMPTY:
        entry += 1
        if entry == capacity:
            entry = 0
    int64s(heads[bucket, ENTRIES])[2 * entry] = id
    entries[entry * FIELDS + PLACE] = WAITING
    entries[entry * FIELDS + COUNT] = 0
    return entry


@kernel
def take(pool: Any, slabs: Any, slab_shift: int, stride: int) -> int:
    """A free place. Those that were given back hold the next one in their first four bytes."""
    if pool[FREE] == 0:
        pool[FRESH] += 1
        return pool[FRESH] - 1
    place = pool[HEAD]
    pool[HEAD] = int32s(slabs[place >> slab_shift] + (place & ((1 << slab_shift) - 1)) * stride)[0]
    pool[FREE] -= 1
    return place


@kernel
def give(pool: Any, slabs: Any, slab_shift: int, stride: int, place: int) -> None:
    int32s(slabs[place >> slab_shift] + (place & ((1 << slab_shift) - 1)) * stride)[0] = pool[HEAD]
    pool[HEAD] = place
    pool[FREE] += 1


@kernel
def take_all(pool: Any, slabs: Any, slab_shift: int, stride: int, places: Any) -> None:
    for i in range(places.size):
        places[i] = take(pool, slabs, slab_shift, stride)


@kernel
def give_all(places: Any, pool: Any, slabs: Any, slab_shift: int, stride: int, pages: Any, page_shift: int) -> None:
    """Of rows that go: in memory, on disk, or of none."""
    for i in range(places.size):
        if places[i] >= 0:
            give(pool, slabs, slab_shift, stride, places[i])
        elif places[i] <= COLD:
            pages[(COLD - places[i]) >> page_shift] -= 1


@kernel
def keep_below(bound: int, pool: Any, slabs: Any, slab_shift: int, stride: int) -> None:
    """Of the free places only those below."""
    place, num = pool[HEAD], pool[FREE]
    pool[HEAD], pool[FREE], pool[FRESH] = -1, 0, min(pool[FRESH], bound)
    for _ in range(num):
        following = int32s(slabs[place >> slab_shift] + (place & ((1 << slab_shift) - 1)) * stride)[0]
        if place < bound:
            give(pool, slabs, slab_shift, stride, place)
        place = following


@kernel
def places_of(heads: Any, buckets: Any, entries: Any, places: Any) -> None:
    for i in range(entries.size):
        places[i] = int32s(heads[buckets[i], ENTRIES])[entries[i] * FIELDS + PLACE] if entries[i] >= 0 else EMPTY


@kernel
def move(heads: Any, buckets: Any, entries: Any, places: Any) -> None:
    """The rows of these entries lie elsewhere."""
    for i in range(entries.size):
        int32s(heads[buckets[i], ENTRIES])[entries[i] * FIELDS + PLACE] = places[i]


@kernel
def settle(heads: Any, shift: int, is_static: bool, admit: int, ids: Any, counts: Any, lasts: Any, buckets: Any,
           entries: Any, used: Any,
           stored: Any, pool: Any, slabs: Any, slab_shift: int, stride: int, places: Any, new_places: Any) -> None:
    """Counts appearances and notes the last step; whoever is admitted gets a place. Fills in each id's place (-1: it
    waits), and it again if new. No id's row is on disk."""
    for i in range(ids.size):
        bucket, entry = buckets[i], entries[i]
        if entry < 0:
            entry = enter(heads, bucket, ids[i])
            used[bucket] += 1
        held = int32s(heads[bucket, ENTRIES])
        at = entry * FIELDS
        if held[at + PLACE] == EMPTY:  # of a static vocabulary
            held[at + PLACE] = WAITING
            held[at + COUNT] = 0
            used[bucket] += 1
        count = min(np.int64(held[at + COUNT]) + counts[i], MOST)
        new_places[i] = WAITING
        if held[at + PLACE] == WAITING and count >= admit:
            held[at + PLACE] = heads[bucket, FIRST] + entry if is_static else take(pool, slabs, slab_shift, stride)
            new_places[i] = held[at + PLACE]
            stored[bucket] += 1
        held[at + COUNT] = count
        int32s(heads[bucket, LASTS])[entry] = lasts[i]
        places[i] = held[at + PLACE]


@kernel
def remove(heads: Any, shift: int, is_static: bool, ids: Any, used: Any, stored: Any, pool: Any, slabs: Any,
           slab_shift: int, stride: int, pages: Any, page_shift: int, places: Any) -> None:
    """Forgets ids; one that is not there is passed over. Fills in the place that each had in memory, or -1."""
    for i in range(ids.size):
        bucket, entry = find(heads, shift, is_static, ids[i])
        places[i] = WAITING
        if entry < 0:
            continue
        held = int32s(heads[bucket, ENTRIES])
        place = held[entry * FIELDS + PLACE]
        if place == EMPTY:
            continue
        used[bucket] -= 1
        if place <= COLD:
            stored[bucket] -= 1
            pages[(COLD - place) >> page_shift] -= 1
        if place >= 0:
            stored[bucket] -= 1
            places[i] = place
            if not is_static:
                give(pool, slabs, slab_shift, stride, place)
        if is_static:
            held[entry * FIELDS + PLACE] = EMPTY
        else:
            close(heads, bucket, entry)


@kernel
def close(heads: Any, bucket: int, hole: int) -> None:
    """Takes an entry out: those behind it whose probing passed over it move up (Knuth, volume 3, 6.4, algorithm R)."""
    capacity = heads[bucket, CAPACITY]
    keys, entries, lasts = int64s(heads[bucket, ENTRIES]), int32s(heads[bucket, ENTRIES]), int32s(heads[bucket, LASTS])
    here = hole
    while True:
        here += 1
        if here == capacity:
            here = 0
        if entries[here * FIELDS + PLACE] == EMPTY:
            break
        if (here - home(mixed(keys[2 * here]), capacity)) % capacity >= (here - hole) % capacity:
            for field in range(FIELDS):
                entries[hole * FIELDS + field] = entries[here * FIELDS + field]
            lasts[hole] = lasts[here]
            hole = here
    entries[hole * FIELDS + PLACE] = EMPTY


@kernel
def rehash(heads: Any, bucket: int, keys: Any, entries: Any, lasts: Any) -> None:
    """Enters all of a bucket's old entries into its new, empty index."""
    for old in range(keys.size):
        if entries[old, PLACE] != EMPTY:
            entry = enter(heads, bucket, keys[old])
            held = int32s(heads[bucket, ENTRIES])
            held[entry * FIELDS + PLACE], held[entry * FIELDS + COUNT] = entries[old, PLACE], entries[old, COUNT]
            int32s(heads[bucket, LASTS])[entry] = lasts[old]


@kernel
def ascending(ids: Any) -> Any:
    """(sorted ids, where each stood): a stable radix sort that passes over digits in which all ids agree."""
    keys, order = np.empty(ids.size, np.uint64), np.arange(ids.size)
    other_keys, other_order = np.empty_like(keys), np.empty_like(order)
    varying = np.uint64(0)
    for i in range(ids.size):
        keys[i] = np.uint64(ids[i]) ^ SIGN
        varying |= keys[i] ^ keys[0]
    ends = np.empty(1 << DIGIT, np.int64)
    mask = np.uint64((1 << DIGIT) - 1)
    for low in range(0, 64, DIGIT):
        shift = np.uint64(low)
        if (varying >> shift) & mask == 0:
            continue
        ends[:] = 0
        for i in range(keys.size):
            ends[(keys[i] >> shift) & mask] += 1
        total = 0
        for digit in range(ends.size):
            total, ends[digit] = total + ends[digit], total
        for i in range(keys.size):
            digit = (keys[i] >> shift) & mask
            other_keys[ends[digit]], other_order[ends[digit]] = keys[i], order[i]
            ends[digit] += 1
        keys, other_keys, order, other_order = other_keys, keys, other_order, order
    return (keys ^ SIGN).view(np.int64), order


@kernel
def groups(ids: Any) -> Any:
    """(distinct ids, where each one's run begins, and at last where all ends) of sorted ids."""
    distinct, starts = np.empty_like(ids), np.empty(ids.size + 1, np.int64)
    num = 0
    for i in range(ids.size):
        if i == 0 or ids[i] != ids[i - 1]:
            distinct[num], starts[num] = ids[i], i
            num += 1
    starts[num] = ids.size
    return distinct[:num], starts[:num + 1]
