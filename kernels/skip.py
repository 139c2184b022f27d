"""Repeated random touches without their hits: which page is touched first when, drawn directly (docs/model.md section 13).

With one vCPU a touch can change something only if it is the first read of its unit or the first write. How many touches
lie between two such is geometric, which unit it is follows from the weights of those that are left: a tree of sums over
the bins of equal weight per unit, and inside a bin a permutation. All other touches are hits, counted together.
Doubles are only added, multiplied, divided and rooted, which IEEE 754 gives the same everywhere.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.blocks import permute_units
from kernels.draws import (
    GOLDEN,
    SALT_ACTOR,
    SALT_ORDER,
    SALT_READ_FIRST,
    SALT_WRITE,
    actor_key,
    draw,
    half_bits,
    permute_once,
    signed,
)
from kernels.jit import jit
from kernels.spec import PAGE_SHIFT, Access, Order, Stream
from kernels.state import Env, Int64s
from kernels.workload import ZIPF_BITS

MOST = 512  # first accesses made at a time
LN_2 = 0.6931471805599453
MAX_BINS = 1024  # zipf_bins() makes fewer: 64 ranks and 16 bins for each octave above
READ, WRITE = np.int64(0), np.int64(1)
BIN_KEY = np.int64(signed(GOLDEN * 2 & (1 << 64) - 1))  # keeps the permutations of bins apart
WEIGHTS = 1.0 / (1 << ZIPF_BITS)
UNIT = 1.0 / (1 << 53)
FAR = float(1 << 60)
NORMAL_DRAWS = 12


class Skip(NamedTuple):
    """Where the step stands; holds nothing from one step to the next."""

    tree: Int64s  # (2, 2 * MAX_BINS) for first reads, first writes: sums of the weights of the units that are left
    taken: Int64s  # (2, MAX_BINS) units of each bin that are not
    first: Int64s  # (MAX_BINS + 1,) first rank of each bin
    weight: Int64s  # (MAX_BINS,) of a unit, in 2**-ZIPF_BITS
    left: Int64s  # (3,) touches to come, events so far, hits
    writes: NDArray[np.float64]  # (2,) of the hits: expected writes, their variance
    waits: NDArray[np.float64]  # (MOST,) exponential, of the events of a block
    tosses: NDArray[np.float64]  # (MOST,) 0 ... 1
    kinds: Int64s  # (MOST,) READ or WRITE
    ranks: Int64s  # (MOST,) of the unit; before that, its place in the order of its kind
    bins: Int64s  # (MOST,) of the unit
    half: Int64s  # (MAX_BINS,) half the bits of a bin's permutation


def new_skip() -> Skip:
    return Skip(
        tree=np.zeros((2, 2 * MAX_BINS), np.int64),
        taken=np.zeros((2, MAX_BINS), np.int64),
        first=np.zeros(MAX_BINS + 1, np.int64),
        weight=np.zeros(MAX_BINS, np.int64),
        left=np.zeros(3, np.int64),
        writes=np.zeros(2, np.float64),
        waits=np.zeros(MOST, np.float64),
        tosses=np.zeros(MOST, np.float64),
        kinds=np.zeros(MOST, np.int64),
        ranks=np.zeros(MOST, np.int64),
        bins=np.zeros(MOST, np.int64),
        half=np.zeros(MAX_BINS, np.int64),
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
def leaves_of_bins(bins: int) -> int:
    leaves = 1
    while leaves < bins:
        leaves *= 2
    return leaves


@jit
def start_skipping(env: Env, skip: Skip, touches: int, n: int) -> None:
    """All n units are untouched."""
    if touches <= 0:
        skip.left[0], skip.left[2] = 0, 0
        return
    bins = bins_of(env)
    leaves = leaves_of_bins(bins)
    find_bins(env, skip, n)
    for b in range(bins):
        skip.half[b] = half_bits(skip.first[b + 1] - skip.first[b])
    skip.bins[:] = 0
    skip.taken[:] = 0
    skip.tree[:] = 0
    skip.left[0], skip.left[1], skip.left[2] = touches, 0, 0
    skip.writes[:] = 0.0
    for kind in range(2):
        for b in range(bins):
            skip.tree[kind, leaves + b] = (skip.first[b + 1] - skip.first[b]) * skip.weight[b]
        for node in range(leaves - 1, 0, -1):
            skip.tree[kind, node] = skip.tree[kind, 2 * node] + skip.tree[kind, 2 * node + 1]


@jit
def share_of_writes(env: Env) -> float:
    access = env.stream[Stream.ACCESS]
    if access == Access.MIXED:
        return env.stream[Stream.WRITE_CUT] * UNIT
    return 1.0 if access == Access.WRITE else 0.0


@jit
def odd_series(z: float) -> float:
    """ln((1 + z) / (1 - z)) for -0.18 < z < 0.18, to ten digits."""
    y = z * z
    return z * (2.0 + y * (2.0 / 3.0 + y * (2.0 / 5.0 + y * (2.0 / 7.0 + y * (2.0 / 9.0 + y * (2.0 / 11.0))))))


@jit
def scale_up(x: float, found: float, bits: float, power: float) -> tuple[float, float]:
    """x times 2**bits if that leaves it below 1, and what -ln(x) has more by that."""
    small = x < 1.0 / power
    return x * (power if small else 1.0), found + (bits * LN_2 if small else 0.0)


@jit
def minus_ln(x: float) -> float:
    """-ln(x) for 2**-63 <= x <= 1. No branch, so that a loop of it runs over vectors."""
    found = 0.0
    x, found = scale_up(x, found, 32.0, 2.0**32)
    x, found = scale_up(x, found, 16.0, 2.0**16)
    x, found = scale_up(x, found, 8.0, 2.0**8)
    x, found = scale_up(x, found, 4.0, 2.0**4)
    x, found = scale_up(x, found, 2.0, 2.0**2)
    x, found = scale_up(x, found, 1.0, 2.0**1)
    small = x < 0.703125
    found += LN_2 if small else 0.0
    x *= 2.0 if small else 1.0
    return found - odd_series((x - 1.0) / (x + 1.0))


@jit
def fraction(bits: np.uint64) -> float:
    """0 <= u < 1, of 53 bits."""
    return np.float64(np.int64(bits >> np.uint64(11))) * UNIT


@jit
def draw_waits(skip: Skip, key: int) -> None:
    """Of the next events: how long each is waited for, in units of its rate, and the toss for read or write."""
    event = skip.left[1]  # read once: else it might change below, and the loop would not run over vectors
    for i in range(MOST):
        skip.tosses[i] = fraction(draw(key, SALT_WRITE, event + i))
        skip.waits[i] = minus_ln(fraction(draw(key, SALT_ORDER, event + i)) + 0.5 * UNIT)


@jit
def rate_of(p: float) -> float:
    """-ln(1 - p) for 0 < p < 1, exact for small p too. Branches: p changes slowly."""
    if p < 0.25:
        return odd_series(p / (2.0 - p))
    x, found = 1.0 - p, 0.0
    while x < 0.703125:
        x += x
        found += LN_2
    return found - odd_series((x - 1.0) / (x + 1.0))


@jit
def gap(p: float, wait: float) -> int:
    """Touches before the next event, which each is with probability p (0 < p): geometric."""
    if p >= 1.0:
        return np.int64(0)
    touches = wait / rate_of(p)
    return np.int64(touches) if touches < FAR else np.int64(FAR)


@jit
def scaled(bits: np.uint64, total: int) -> int:
    """A number in 0 ... total - 1 (total < 2**62): the high half of a product of 64 bits."""
    low, high = np.uint64(total) & np.uint64(0xFFFFFFFF), np.uint64(total) >> np.uint64(32)
    a, b = bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)
    middle = b * low + ((a * low) >> np.uint64(32))
    upper = a * high + (middle & np.uint64(0xFFFFFFFF))
    return np.int64(b * high + (middle >> np.uint64(32)) + (upper >> np.uint64(32)))


@jit
def take_place(skip: Skip, kind: int, key: int, event: int, leaves: int) -> tuple[int, int]:
    """(bin, place in the order of its kind) of a unit that had no access of this kind yet, drawn by weight. The root of the
    tree stays as it is."""
    target = scaled(draw(key, SALT_READ_FIRST, event), skip.tree[kind, 1])
    node = np.int64(1)
    while node < leaves:
        node *= 2
        right = np.int64(target >= skip.tree[kind, node])
        target -= skip.tree[kind, node] * right
        node += right
    b = node - leaves
    weight = skip.weight[b]
    while node > 1:
        skip.tree[kind, node] -= weight
        node >>= 1
    skip.taken[kind, b] += 1
    return b, skip.taken[kind, b] - 1


@jit
def kind_key(key: int, number: int) -> int:
    """Key of the order in which the units of a bin have their first read or write."""
    return key ^ (BIN_KEY * (number + 1))


@jit
def find_ranks(skip: Skip, key: int, count: int) -> None:
    """From the places of a block's events in the order of their kind and bin to the ranks of their units."""
    for i in range(count):
        b = skip.bins[i]
        skip.ranks[i] = permute_once(kind_key(key, 2 * b + skip.kinds[i]), skip.ranks[i], skip.half[b])
    for i in range(count):
        b = skip.bins[i]
        while skip.ranks[i] >= skip.first[b + 1] - skip.first[b]:
            skip.ranks[i] = permute_once(kind_key(key, 2 * b + skip.kinds[i]), skip.ranks[i], skip.half[b])
        skip.ranks[i] += skip.first[b]


@jit
def next_firsts(env: Env, skip: Skip, key: int) -> int:
    """Which kinds of first accesses come next, after how many hits, and the rank of the unit of each (with one bin its place
    in the order of its kind); their number."""
    w = share_of_writes(env)
    leaves = leaves_of_bins(bins_of(env))
    left, event = skip.left[0], skip.left[1]
    reads_left, writes_left = skip.tree[READ, 1], skip.tree[WRITE, 1]
    weight = skip.weight[0]
    mean, variance = skip.writes[0], skip.writes[1]
    count, skipped, first_writes = np.int64(0), np.int64(0), skip.taken[WRITE, 0]
    while count < MOST and left > 0:
        writes, reads = w * (writes_left * WEIGHTS), (1.0 - w) * (reads_left * WEIGHTS)
        new = writes + reads
        hits = min(gap(new, skip.waits[count]) if new > 0.0 else left, left)
        old_writes, old = w - writes, (w - writes) + ((1.0 - w) - reads)
        share = old_writes / old if old > 0.0 else 0.0
        mean += hits * share
        variance += hits * share * (1.0 - share)
        skipped += hits
        left -= hits
        if left == 0:
            break
        kind = np.int64(skip.tosses[count] * new < writes)
        skip.kinds[count] = kind
        if leaves == 1:
            skip.ranks[count] = first_writes if kind else event - first_writes
        else:
            skip.tree[READ, 1], skip.tree[WRITE, 1] = reads_left, writes_left
            skip.bins[count], skip.ranks[count] = take_place(skip, kind, key, event, leaves)
            weight = skip.weight[skip.bins[count]]
        reads_left -= 0 if kind else weight
        writes_left -= weight if kind else 0
        first_writes += kind
        left -= 1
        event += 1
        count += 1
    skip.left[0], skip.left[1], skip.left[2] = left, event, skip.left[2] + skipped
    skip.tree[READ, 1], skip.tree[WRITE, 1] = reads_left, writes_left
    skip.writes[0], skip.writes[1] = mean, variance
    if leaves == 1:
        skip.taken[WRITE, 0] = first_writes
    return count


@jit
def fill_firsts(env: Env, skip: Skip, n: int, shift: int, block: Int64s) -> int:
    """The next first accesses, MOST at most, into the block (as blocks.fill_block() does); their number. 0: the step is over."""
    s = env.stream
    key = actor_key(s[Stream.KEY], np.int64(0))
    draw_waits(skip, key)
    count = next_firsts(env, skip, key)
    find_ranks(skip, key, count)
    if s[Stream.ORDER] == Order.ZIPF:
        permute_units(skip.ranks, count, key, n)  # where workload.unit_of() puts them
    for i in range(count):
        block[i] = ((shift + ((s[Stream.START_BYTES] + skip.ranks[i] * s[Stream.EVERY_BYTES]) >> PAGE_SHIFT)) << 1) | skip.kinds[i]
    return count


@jit
def writes_of_hits(env: Env, skip: Skip) -> int:
    """How many of the hits are writes: the sum of as many binomials, as its normal."""
    key = actor_key(env.stream[Stream.KEY], np.int64(0))
    z = -NORMAL_DRAWS / 2.0
    for i in range(NORMAL_DRAWS):
        z += fraction(draw(key, SALT_ACTOR, np.int64(i)))
    found = np.int64(skip.writes[0] + math.sqrt(max(0.0, skip.writes[1])) * z + 0.5)
    return min(max(found, 0), skip.left[2])
