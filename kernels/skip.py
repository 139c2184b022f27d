"""Repeated random touches without their hits: which page is touched first when, drawn directly (docs/model.md section 13).

With one vCPU a touch can change something only if it is the first read of its unit or the first write. How many touches
lie between two such is geometric. The units have their first reads, and their first writes, in an order of its own each: by
weight, drawn by rejection from the weights at some earlier time. So each kind's is made well ahead, and which kind comes next is
all that waits for the event before. All other touches are hits, counted together.
Doubles are only added, multiplied, divided and rooted, which IEEE 754 gives the same everywhere.
"""

import math
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.blocks import BLOCK
from kernels.draws import (
    GOLDEN,
    PERMUTE_KEY,
    SALT_ACTOR,
    SALT_ORDER,
    SALT_READ_FIRST,
    SALT_WRITE,
    actor_key,
    draw,
    draw_state,
    half_bits,
    signed,
)
from kernels.jit import jit, shared
from kernels.spec import PAGE_SHIFT, Access, Order, Stream
from kernels.state import Env, Int64s
from kernels.workload import ZIPF_BITS

MOST = BLOCK  # first accesses made at a time
LN_2 = 0.6931471805599453
MAX_BINS = 1024  # zipf_bins() makes fewer: 64 ranks and 16 bins for each octave above
GUIDE = 1024
READ, WRITE = np.int64(0), np.int64(1)
BIN_KEY = np.int64(signed(GOLDEN * 2 & (1 << 64) - 1))  # keeps the permutations of bins apart
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's
HALF_BITS = 6  # of a shape: what half_bits() returns
WEIGHTS = 1.0 / (1 << ZIPF_BITS)
UNIT = 1.0 / (1 << 53)
FAR = float(1 << 60)
NORMAL_DRAWS = 12


class Queue(IntEnum):
    """First reads, or first writes, that are made but did not happen yet."""

    LEFT = 0  # weight of the units that are in no queue and had none
    SNAPSHOT = 1  # the same when targets were last laid out
    SHIFT = 2  # from a target to its entry in the guide
    TRIED = 3  # attempts so far
    AT = 4  # the next in the queue
    END = 5  # of the queue


class Skip(NamedTuple):
    """Where the step stands; holds nothing from one step to the next. Two rows: of reads, of writes."""

    first: Int64s  # (MAX_BINS + 1,) first rank of each bin
    weight: Int64s  # (MAX_BINS,) of a unit, in 2**-ZIPF_BITS
    shape: Int64s  # (MAX_BINS,) shape_of() a bin
    taken: Int64s  # (2, MAX_BINS) units of each bin that are in a queue or were
    low: Int64s  # (2, MAX_BINS) targets below it, down to the end of the bin before, are units that are taken
    end: Int64s  # (2, MAX_BINS) of a bin's targets
    guide: Int64s  # (2, GUIDE) bin of the first of the targets that have their upper bits in common
    queue: Int64s  # (2, len(Queue))
    access: Int64s  # (2, MOST + 2) page << 1 | write
    chance: Int64s  # (2, MOST + 2) that a touch is the next of its kind, in 2**-ZIPF_BITS, before each of the queue and behind the last
    targets: Int64s  # (MOST,) of attempts
    lefts: Int64s  # (MOST,) Queue.LEFT before each of a queue
    bins: Int64s  # (MOST,) of the units of a queue
    shapes: Int64s  # (MOST,) of their bins
    ranks: Int64s  # (MOST,) of the units; before that, their places in the order of their bin
    left: Int64s  # (3,) touches to come, events so far, hits
    moments: NDArray[np.float64]  # (2,) of the hits: expected writes, their variance
    waits: NDArray[np.float64]  # (MOST,) exponential, of the events of a block
    tosses: NDArray[np.uint64]  # (MOST,) draws for read or write
    reads: Int64s  # (MOST,) chance of a first read at each event
    writes: Int64s  # (MOST,) and of a first write
    gaps: Int64s  # (MOST,) hits before each
    shares: NDArray[np.float64]  # (MOST,) how many of them are writes


def new_skip() -> Skip:
    return Skip(
        first=np.zeros(MAX_BINS + 1, np.int64),
        weight=np.zeros(MAX_BINS, np.int64),
        shape=np.zeros(MAX_BINS, np.int64),
        taken=np.zeros((2, MAX_BINS), np.int64),
        low=np.zeros((2, MAX_BINS), np.int64),
        end=np.zeros((2, MAX_BINS), np.int64),
        guide=np.zeros((2, GUIDE), np.int64),
        queue=np.zeros((2, len(Queue)), np.int64),
        access=np.zeros((2, MOST + 2), np.int64),
        chance=np.zeros((2, MOST + 2), np.int64),
        targets=np.zeros(MOST, np.int64),
        lefts=np.zeros(MOST, np.int64),
        bins=np.zeros(MOST, np.int64),
        shapes=np.zeros(MOST, np.int64),
        ranks=np.zeros(MOST, np.int64),
        left=np.zeros(3, np.int64),
        moments=np.zeros(2, np.float64),
        waits=np.zeros(MOST, np.float64),
        tosses=np.zeros(MOST, np.uint64),
        reads=np.zeros(MOST, np.int64),
        writes=np.zeros(MOST, np.int64),
        gaps=np.zeros(MOST, np.int64),
        shares=np.zeros(MOST, np.float64),
    )


@jit
def bins_of(env: Env) -> int:
    return len(env.zipf_cut) if env.stream[Stream.ORDER] == Order.ZIPF else np.int64(1)


@jit
def find_bins(env: Env, skip: Skip, n: int) -> None:
    """Units of one weight lie in one bin; uniform touches have one bin."""
    skip.first[0], skip.first[1] = 0, n
    skip.weight[0] = (np.int64(1) << ZIPF_BITS) // n
    if env.stream[Stream.ORDER] != Order.ZIPF:
        return
    for b in range(len(env.zipf_cut)):
        share = env.zipf_cut[b] - (env.zipf_cut[b - 1] if b else 0)
        skip.first[b], skip.first[b + 1] = env.zipf_lo[b], env.zipf_lo[b + 1]
        skip.weight[b] = share // (env.zipf_lo[b + 1] - env.zipf_lo[b])


@jit
def shape_of(units: int) -> int:
    """What move_once() needs to know of a permutation of so many."""
    return (units << HALF_BITS) | half_bits(units)


@jit
def least_left(snapshot: int) -> int:
    """A snapshot of that weight serves until less is left: seven attempts of eight, at least, find a unit that is left."""
    return snapshot - (snapshot >> 3)


@shared
def take_snapshot(skip: Skip, kind: int, bins: int) -> None:
    """Lay out targets for the units that are left now."""
    total = np.int64(0)
    for b in range(bins):
        rest = skip.end[kind, b] - skip.low[kind, b]
        skip.low[kind, b] = total
        total += rest
        skip.end[kind, b] = total
    shift = np.int64(0)
    while total >> shift >= GUIDE:
        shift += 1
    skip.queue[kind, Queue.LEFT], skip.queue[kind, Queue.SNAPSHOT], skip.queue[kind, Queue.SHIFT] = total, total, shift
    b = np.int64(0)
    for entry in range((total + (np.int64(1) << shift) - 1) >> shift):
        while skip.end[kind, b] <= entry << shift:
            b += 1
        skip.guide[kind, entry] = b


@jit
def start_skipping(env: Env, skip: Skip, touches: int, n: int) -> None:
    """All n units are untouched."""
    skip.left[0], skip.left[1], skip.left[2] = max(touches, 0), 0, 0
    if touches <= 0:
        return
    bins = bins_of(env)
    find_bins(env, skip, n)
    for b in range(bins):
        size = skip.first[b + 1] - skip.first[b]
        skip.shape[b] = shape_of(size)
        skip.end[READ, b] = skip.end[WRITE, b] = size * skip.weight[b]
    skip.low[:] = 0
    skip.taken[:] = 0
    skip.bins[:] = 0
    skip.queue[:] = 0
    skip.moments[:] = 0.0
    for kind in range(2):
        take_snapshot(skip, kind, bins)


@jit
def share_of_writes(env: Env) -> float:
    access = env.stream[Stream.ACCESS]
    if access == Access.MIXED:
        return env.stream[Stream.WRITE_CUT] * UNIT
    return 1.0 if access == Access.WRITE else 0.0


@jit
def odd_series(z: float) -> float:
    """ln((1 + z) / (1 - z)) for -0.18 < z < 0.18, to ten digits; in parts that do not wait for one another."""
    y = z * z
    yy = y * y
    return z * ((2.0 + y * (2.0 / 3.0)) + yy * ((2.0 / 5.0 + y * (2.0 / 7.0)) + yy * (2.0 / 9.0 + y * (2.0 / 11.0))))


@jit
def scale_up(x: float, found: float, bits: float, power: float) -> tuple[float, float]:
    """x times 2**bits if that leaves it below 1, and what -ln(x) has more by that."""
    small = x < 1.0 / power
    return x * (power if small else 1.0), found + (bits * LN_2 if small else 0.0)


@jit
def doubled(x: float) -> tuple[float, float]:
    """x (0, or 2**-63 ... 1) as often doubled as it takes to reach 0.703125, and what -ln(x) has more by that. No branch, so that a
    loop of it runs over vectors."""
    found = 0.0
    x, found = scale_up(x, found, 32.0, 2.0**32)
    x, found = scale_up(x, found, 16.0, 2.0**16)
    x, found = scale_up(x, found, 8.0, 2.0**8)
    x, found = scale_up(x, found, 4.0, 2.0**4)
    x, found = scale_up(x, found, 2.0, 2.0**2)
    x, found = scale_up(x, found, 1.0, 2.0**1)
    small = x < 0.703125
    return x * (2.0 if small else 1.0), found + (LN_2 if small else 0.0)


@jit
def minus_ln(x: float) -> float:
    """-ln(x) for 2**-63 <= x <= 1."""
    x, found = doubled(x)
    return found - odd_series((x - 1.0) / (x + 1.0))


@jit
def rate_of(p: float) -> float:
    """-ln(1 - p) for 0 < p <= 1, exact for small p too. For 1 it is finite, but more than any wait."""
    x, found = doubled(1.0 - p)
    less = p if found == 0.0 else 1.0 - x
    return found + odd_series(less / (1.0 + x))


@jit
def gap(p: float, wait: float) -> int:
    """Touches before the next event, which each is with probability p (0 < p): geometric."""
    touches = wait / rate_of(p)
    return np.int64(touches if touches < FAR else FAR)


@jit
def fraction(bits: np.uint64) -> float:
    """0 <= u < 1, of 53 bits."""
    return np.float64(np.int64(bits >> np.uint64(11))) * UNIT


@jit
def draw_waits(skip: Skip, key: int, count: int) -> None:
    """Of the next events: how long each is waited for, in units of its rate, and the draw for read or write."""
    event = skip.left[1]  # read once: else it might change below, and the loop would not run over vectors
    for i in range(count):
        skip.tosses[i] = draw(key, SALT_WRITE, event + i)
        skip.waits[i] = minus_ln(fraction(draw(key, SALT_ORDER, event + i)) + 0.5 * UNIT)


@jit
def scaled(bits: np.uint64, total: int) -> int:
    """A number in 0 ... total - 1 (total < 2**62): the high half of a product of 64 bits."""
    low, high = np.uint64(total) & np.uint64(0xFFFFFFFF), np.uint64(total) >> np.uint64(32)
    a, b = bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)
    middle = b * low + ((a * low) >> np.uint64(32))
    upper = a * high + (middle & np.uint64(0xFFFFFFFF))
    return np.int64(b * high + (middle >> np.uint64(32)) + (upper >> np.uint64(32)))


@jit
def draw_targets(skip: Skip, kind: int, key: int, count: int) -> None:
    """Of the next attempts to find a unit that had no access of this kind yet."""
    total, tried = skip.queue[kind, Queue.SNAPSHOT], skip.queue[kind, Queue.TRIED]
    for i in range(count):
        skip.targets[i] = scaled(draw(key, SALT_READ_FIRST, 2 * (tried + i) + kind), total)


@jit
def take_places(skip: Skip, kind: int, count: int) -> int:
    """Bins of the units that so many attempts find, and their places in the order of their bin; how many they are. Ends when too
    little is left for the snapshot."""
    end, low, taken, guide = skip.end[kind], skip.low[kind], skip.taken[kind], skip.guide[kind]
    left, shift = skip.queue[kind, Queue.LEFT], skip.queue[kind, Queue.SHIFT]
    least = least_left(skip.queue[kind, Queue.SNAPSHOT])
    made, tried = np.int64(0), np.int64(0)
    while tried < count and left >= least:
        target = skip.targets[tried]
        tried += 1
        b = guide[target >> shift]
        while target >= end[b]:
            b += 1
        if target >= low[b]:
            weight = skip.weight[b]
            skip.bins[made], skip.ranks[made], skip.lefts[made] = b, taken[b], left
            low[b] += weight
            taken[b] += 1
            left -= weight
            made += 1
    skip.queue[kind, Queue.TRIED] += tried
    skip.queue[kind, Queue.LEFT] = left
    return made


@jit
def take_all_alike(skip: Skip, kind: int, count: int) -> int:
    """take_places() with one bin: it does not matter which targets are drawn."""
    left, weight, taken = skip.queue[kind, Queue.LEFT], skip.weight[0], skip.taken[kind, 0]
    made = min(count, skip.first[1] - taken)
    for i in range(made):
        skip.ranks[i] = taken + i
        skip.lefts[i] = left - i * weight
    skip.taken[kind, 0] = taken + made
    skip.queue[kind, Queue.LEFT] = left - made * weight
    return made


@jit
def bin_key(key: int, b: int) -> int:
    """Key of the order in which the units of a bin have their first writes."""
    return key ^ (BIN_KEY * (b + 1))


@jit
def mixed(key: int, turn: int, x: int) -> int:
    """32 bits."""
    z = (draw_state(key ^ PERMUTE_KEY, turn, np.int64(0)) + np.uint64(x)) * MIX_1
    return np.int64(((z ^ (z >> np.uint64(32))) * MIX_2) >> np.uint64(32))


@jit
def move_row(key: int, turn: int, row: int, column: int, rows: int) -> int:
    row += (mixed(key, turn, column) * rows) >> 32
    return row - (rows if row >= rows else 0)


@jit
def move_once(key: int, x: int, shape: int) -> int:
    """Place of x in a permutation of as few whole rows as hold all units, a row being a power of two: five Feistel rounds.

    With fewer than three moves of rows the number of units of one half that come to one half would vary too much."""
    half = shape & ((1 << HALF_BITS) - 1)
    mask = (np.int64(1) << half) - 1
    rows = (((shape >> HALF_BITS) + mask) >> half) & 0xFFFFFFFF  # a product of 32 bits each is cheaper
    row, column = x >> half, x & mask
    row = move_row(key, 0, row, column, rows)
    column ^= mixed(key, 1, row) & mask
    row = move_row(key, 2, row, column, rows)
    column ^= mixed(key, 3, row) & mask
    row = move_row(key, 4, row, column, rows)
    return (row << half) | column


@jit
def move_all(skip: Skip, key: int, shape: int, count: int) -> None:
    """Each rank goes to its place in one permutation."""
    for i in range(count):
        skip.ranks[i] = move_once(key, skip.ranks[i], shape)
    for i in range(count):
        while skip.ranks[i] >= shape >> HALF_BITS:  # ends: a permutation leads back
            skip.ranks[i] = move_once(key, skip.ranks[i], shape)


@jit
def move_in_bins(skip: Skip, key: int, count: int) -> None:
    """The same of places in the order of a bin, each in the bin's own permutation."""
    for i in range(count):
        skip.shapes[i] = skip.shape[skip.bins[i]]
    for i in range(count):
        skip.ranks[i] = move_once(bin_key(key, skip.bins[i]), skip.ranks[i], skip.shapes[i])
    for i in range(count):
        while skip.ranks[i] >= skip.shapes[i] >> HALF_BITS:
            skip.ranks[i] = move_once(bin_key(key, skip.bins[i]), skip.ranks[i], skip.shapes[i])


@jit
def find_chances(env: Env, skip: Skip, kind: int, count: int) -> None:
    """Of a queue of so many."""
    w = share_of_writes(env)
    share = w if kind == WRITE else 1.0 - w
    for i in range(count):
        skip.chance[kind, i] = np.int64(share * np.float64(skip.lefts[i]))
    skip.chance[kind, count] = np.int64(share * np.float64(skip.queue[kind, Queue.LEFT]))


@shared
def fill_queue(env: Env, skip: Skip, kind: int, key: int, n: int, shift: int) -> None:
    """The next first accesses of a kind, MOST at most; there may be none, seldom."""
    s = env.stream
    zipf = s[Stream.ORDER] == Order.ZIPF
    count = min(MOST, skip.left[0], n // 8 + 8)  # few units: a snapshot does not serve for long
    if zipf:
        if skip.queue[kind, Queue.LEFT] < least_left(skip.queue[kind, Queue.SNAPSHOT]):
            take_snapshot(skip, kind, bins_of(env))
        draw_targets(skip, kind, key, count)
        count = take_places(skip, kind, count)
    else:
        count = take_all_alike(skip, kind, count)
    find_chances(env, skip, kind, count)
    if kind == WRITE:
        move_in_bins(skip, key, count)
    if zipf:
        for i in range(count):
            skip.ranks[i] += skip.first[skip.bins[i]]
    if kind == READ or zipf:
        move_all(skip, key, shape_of(n), count)
    for i in range(count):
        skip.access[kind, i] = ((shift + ((s[Stream.START_BYTES] + skip.ranks[i] * s[Stream.EVERY_BYTES]) >> PAGE_SHIFT)) << 1) | kind
    skip.queue[kind, Queue.AT], skip.queue[kind, Queue.END] = 0, count


@jit
def fill_queues(env: Env, skip: Skip, key: int, n: int, shift: int) -> bool:
    """Those that are empty. False: no touch is new any more."""
    for kind in range(2):
        if skip.queue[kind, Queue.AT] == skip.queue[kind, Queue.END] and skip.queue[kind, Queue.LEFT] > 0:
            fill_queue(env, skip, kind, key, n, shift)
    return skip.chance[READ, skip.queue[READ, Queue.AT]] + skip.chance[WRITE, skip.queue[WRITE, Queue.AT]] > 0


@jit
def merge_queues(skip: Skip, block: Int64s, made: int, most: int) -> int:
    """Into the block, until it has so many or a queue is over: which kind comes next. How many there are then."""
    read, write = skip.queue[READ, Queue.AT], skip.queue[WRITE, Queue.AT]
    # One more of a kind that is over: with a chance of 0 it never comes, and the other kind can go on.
    end_read = skip.queue[READ, Queue.END] + (skip.queue[READ, Queue.LEFT] == 0)
    end_write = skip.queue[WRITE, Queue.END] + (skip.queue[WRITE, Queue.LEFT] == 0)
    reads, writes = skip.chance[READ, read], skip.chance[WRITE, write]
    next_reads, next_writes = skip.chance[READ, read + 1], skip.chance[WRITE, write + 1]  # ahead: so no turn waits for memory
    while made < most and read < end_read and write < end_write and reads + writes > 0:
        skip.reads[made], skip.writes[made] = reads, writes
        kind = np.int64(scaled(skip.tosses[made], reads + writes) < writes)
        block[made] = skip.access[kind, write if kind else read]
        reads = reads if kind else next_reads
        writes = next_writes if kind else writes
        read += 1 - kind
        write += kind
        next_reads, next_writes = skip.chance[READ, read + 1], skip.chance[WRITE, write + 1]
        made += 1
    skip.queue[READ, Queue.AT], skip.queue[WRITE, Queue.AT] = read, write
    return made


@jit
def measure_gaps(skip: Skip, w: float, count: int) -> None:
    """How many hits come before each event, and the share of writes among them."""
    for i in range(count):
        reads, writes = skip.reads[i] * WEIGHTS, skip.writes[i] * WEIGHTS
        skip.gaps[i] = gap(reads + writes, skip.waits[i])
        old_writes, old = w - writes, (w - writes) + ((1.0 - w) - reads)
        skip.shares[i] = old_writes / old if old > 0.0 else 0.0


@jit
def count_hits(skip: Skip, count: int) -> int:
    """Let so many events and the hits before them happen, as far as touches are left; how many events did."""
    left, mean, variance = skip.left[0], skip.moments[0], skip.moments[1]
    made = np.int64(0)
    while made < count:
        hits, share = min(skip.gaps[made], left), skip.shares[made]
        mean += hits * share
        variance += hits * share * (1.0 - share)
        left -= hits
        if left == 0:
            break
        left -= 1
        made += 1
    skip.left[2] += skip.left[0] - left - made
    skip.left[0] = left
    skip.left[1] += made
    skip.moments[0], skip.moments[1] = mean, variance
    return made


@jit
def hit_only(skip: Skip, w: float) -> None:
    """All touches that are left are hits."""
    hits = skip.left[0]
    skip.left[0] = 0
    skip.left[2] += hits
    skip.moments[0] += hits * w
    skip.moments[1] += hits * w * (1.0 - w)


@jit
def fill_firsts(env: Env, skip: Skip, n: int, shift: int, block: Int64s) -> int:
    """The next first accesses, MOST at most, into the block (as blocks.fill_block() does); their number. 0: the step is over."""
    key, w = actor_key(env.stream[Stream.KEY], np.int64(0)), share_of_writes(env)
    made, most = np.int64(0), min(MOST, skip.left[0])
    draw_waits(skip, key, most)
    while made < most and fill_queues(env, skip, key, n, shift):
        made = merge_queues(skip, block, made, most)
    measure_gaps(skip, w, made)
    count = count_hits(skip, made)
    if made < most:
        hit_only(skip, w)
    return count


@jit
def writes_of_hits(env: Env, skip: Skip) -> int:
    """How many of the hits are writes: the sum of as many binomials, as its normal."""
    key = actor_key(env.stream[Stream.KEY], np.int64(0))
    z = -NORMAL_DRAWS / 2.0
    for i in range(NORMAL_DRAWS):
        z += fraction(draw(key, SALT_ACTOR, np.int64(i)))
    found = np.int64(skip.moments[0] + math.sqrt(max(0.0, skip.moments[1])) * z + 0.5)
    return min(max(found, 0), skip.left[2])
