"""The accesses of a lone actor, a block at a time, in loops that vectorise: the same as fetch_access() makes one by one.

An access in a block is `page << 1 | write`, the page of the VMA.
"""

import numpy as np

from kernels.draws import (
    NEXT_DRAW,
    SALT_ORDER,
    SALT_READ_FIRST,
    SALT_WRITE,
    actor_key,
    below,
    draw_state,
    drawn_below,
    half_bits,
    permute_once,
    scramble,
)
from kernels.jit import jit
from kernels.spec import PAGE_BYTES, PAGE_SHIFT, Access, Order, Stream
from kernels.state import Env, Int64s
from kernels.workload import fetch_pair, strided, unit_of

BLOCK = 1024  # accesses
VISITS = BLOCK // 2  # of a block whose visits may be a read and a write
READS, WRITES, DRAWN, READ_FIRST, PAIRED = np.int64(0), np.int64(1), np.int64(2), np.int64(3), np.int64(4)  # kinds of a run
Run = tuple[int, int, int]  # kind, first visit, length: see next_run()
LONE = np.int64(0)  # the only actor; typed, so that callees are not compiled again for a literal


@jit
def next_run(env: Env, index: int, limit: int) -> Run:
    """(kind, first visit, length in accesses) of the accesses from `index` on that are made in the same way.

    READ_FIRST: the length is in visits, as the index is. PAIRED: windows that fit a block, from the start of one."""
    s = env.stream
    access = s[Stream.ACCESS]
    if s[Stream.ORDER] == Order.LIST:
        return DRAWN, index, limit - index
    if access == Access.PAIRS:
        if s[Stream.WINDOW] <= VISITS:
            return PAIRED, index >> 1, limit - index
        visit, write = fetch_pair(env, index, limit)
        first = index // (2 * s[Stream.WINDOW]) * s[Stream.WINDOW]
        return write, visit, first + min(s[Stream.WINDOW], limit // 2 - first) - visit
    if s[Stream.READ_FIRST_CUT] > 0 and (access == Access.MIXED or access == Access.WRITE):
        return READ_FIRST, index, limit - index
    if access == Access.MIXED:
        return DRAWN, index, limit - index
    return (WRITES if access == Access.WRITE else READS), index, limit - index


@jit
def is_run_of_pages(env: Env, kind: int) -> bool:
    """Page after page, each once, all reads or all writes."""
    s = env.stream
    return kind <= WRITES and s[Stream.ORDER] == Order.SEQUENTIAL and s[Stream.EVERY_BYTES] == PAGE_BYTES


@jit
def fill_uniform(units: Int64s, count: int, key: int, visit: int, n: int) -> None:
    z = draw_state(key, SALT_ORDER, visit)
    for i in range(count):
        units[i] = below(scramble(z), n)
        z += NEXT_DRAW


@jit
def fill_permuted(units: Int64s, count: int, key: int, visit: int, n: int) -> None:
    for i in range(count):
        units[i] = visit + i
    permute_units(units, count, key, n)


@jit
def permute_units(units: Int64s, count: int, key: int, n: int) -> None:
    """Each number below n goes to its place in a permutation: draws.permute() of a whole block."""
    half = half_bits(n)
    for i in range(count):
        units[i] = permute_once(key, units[i], half)
    if n == np.int64(1) << (2 * half):
        return
    for i in range(count):
        while units[i] >= n:
            units[i] = permute_once(key, units[i], half)


@jit
def fill_in_order(units: Int64s, count: int, first: int, n: int, stride: int) -> None:
    """Visits one after the other, or in strides, round and round."""
    unit = strided(first, n, stride)
    column = unit % stride
    for i in range(count):
        units[i] = unit
        unit += stride
        if unit >= n:
            column = column + 1 if column + 1 < min(stride, n) else 0
            unit = column


@jit
def fill_units(env: Env, units: Int64s, count: int, visit: int, n: int) -> None:
    """unit_of() of so many visits."""
    s = env.stream
    key = actor_key(s[Stream.KEY], LONE)
    order = s[Stream.ORDER]
    if order == Order.RANDOM and s[Stream.REPEAT]:
        fill_uniform(units, count, key, visit, n)
    elif order == Order.RANDOM:
        fill_permuted(units, count, key, visit, n)
    elif order == Order.ZIPF:
        for i in range(count):
            units[i] = unit_of(env, key, visit + i, n)
    else:
        first = visit % n if s[Stream.REPEAT] else visit
        fill_in_order(units, count, first, n, s[Stream.STRIDE] if order == Order.STRIDED else np.int64(1))


@jit
def fill_pages(env: Env, units: Int64s, count: int, lo: int) -> int:
    """Turn the units of a part that begins at `lo` into pages, less what is returned."""
    every = env.stream[Stream.EVERY_BYTES]
    start = env.stream[Stream.START_BYTES] + lo * every
    if every == PAGE_BYTES:
        return start >> PAGE_SHIFT
    for i in range(count):
        units[i] = (start + units[i] * every) >> PAGE_SHIFT
    return np.int64(0)


@jit
def fill_writes(env: Env, units: Int64s, count: int, visit: int, base: int, block: Int64s) -> None:
    """Accesses of those pages, each drawn to be a read or a write."""
    limit = env.stream[Stream.WRITE_CUT]
    z = draw_state(actor_key(env.stream[Stream.KEY], LONE), SALT_WRITE, visit)
    for i in range(count):
        block[i] = (units[i] + base) << 1 | np.int64(drawn_below(scramble(z), limit))
        z += NEXT_DRAW


@jit
def fill_same(units: Int64s, count: int, base: int, write: int, block: Int64s) -> None:
    """Accesses of those pages, all reads or all writes."""
    for i in range(count):
        block[i] = (units[i] + base) << 1 | write


@jit
def fill_list(env: Env, index: int, count: int, shift: int, block: Int64s) -> None:
    for i in range(count):
        block[i] = (shift + env.list_gfn[index + i]) << 1 | np.int64(env.list_write[index + i])


@jit
def add_reads(env: Env, drawn: Int64s, count: int, visit: int, block: Int64s) -> int:
    """Put a read before the writes that are drawn to have one; returns how many accesses there are."""
    limit = env.stream[Stream.READ_FIRST_CUT]
    z = draw_state(actor_key(env.stream[Stream.KEY], LONE), SALT_READ_FIRST, visit)
    made = 0
    for i in range(count):
        access = drawn[i]
        block[made] = access & ~1
        made += (access & 1) & np.int64(drawn_below(scramble(z), limit))
        block[made] = access
        made += 1
        z += NEXT_DRAW
    return made


@jit
def add_writes(reads: Int64s, count: int, window: int, block: Int64s) -> None:
    """Put the writes of each window behind its reads."""
    first = 0
    while first < count:
        size = min(window, count - first)
        for i in range(size):
            block[2 * first + i] = reads[first + i]
            block[2 * first + size + i] = reads[first + i] | 1
        first += size


@jit
def fill_block(env: Env, run: Run, index: int, lo: int, n: int, shift: int, units: Int64s, block: Int64s) -> tuple[int, int]:
    """The accesses from `index` on, in a part of n units that begins at `lo`: (how many, how far the index goes)."""
    kind, visit, length = run
    if env.stream[Stream.ORDER] == Order.LIST:
        count = min(BLOCK, length)
        fill_list(env, index, count, shift, block)
        return count, count
    window = env.stream[Stream.WINDOW]
    visits = min(BLOCK if kind <= DRAWN else VISITS, length)
    if kind == PAIRED:
        visits = min(VISITS // window * window, length >> 1)
    fill_units(env, units, visits, visit, n)
    base = shift + fill_pages(env, units, visits, lo)
    if kind == DRAWN:
        fill_writes(env, units, visits, visit, base, block)
        return visits, visits
    if kind <= WRITES:
        fill_same(units, visits, base, kind, block)
        return visits, visits
    if kind == PAIRED:
        fill_same(units, visits, base, READS, units)
        add_writes(units, visits, window, block)
        return 2 * visits, 2 * visits
    if env.stream[Stream.ACCESS] == Access.MIXED:
        fill_writes(env, units, visits, visit, base, units)
    else:
        fill_same(units, visits, base, WRITES, units)
    return add_reads(env, units, visits, visit, block), visits


@jit
def count_writes(env: Env, run: Run) -> tuple[int, int]:
    """(reads, writes) of a whole run, whatever it touches."""
    kind, visit, length = run
    key = actor_key(env.stream[Stream.KEY], LONE)
    if kind <= WRITES:
        return (0, length) if kind == WRITES else (length, 0)
    if kind == PAIRED:
        return length >> 1, length >> 1
    writes, before = 0, 0
    limit = env.stream[Stream.WRITE_CUT] if env.stream[Stream.ACCESS] == Access.MIXED else np.int64(1) << 62
    first_limit = env.stream[Stream.READ_FIRST_CUT] if kind == READ_FIRST else np.int64(0)
    z = draw_state(key, SALT_WRITE, visit)
    for _ in range(length):
        writes += np.int64(drawn_below(scramble(z), limit))
        z += NEXT_DRAW
    if kind == READ_FIRST:
        z, y = draw_state(key, SALT_WRITE, visit), draw_state(key, SALT_READ_FIRST, visit)
        for _ in range(length):
            before += np.int64(drawn_below(scramble(z), limit)) & np.int64(drawn_below(scramble(y), first_limit))
            z += NEXT_DRAW
            y += NEXT_DRAW
    return length - writes + before, writes
