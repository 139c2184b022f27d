"""The accesses of a step, in plain integers modulo 2**64: the part of the executable specification before any fault.

Every vCPU's accesses come from a counter-based generator (splitmix64), so that they depend on seed, replicate, step and
vCPU alone. See reference.py for the machine that they run on.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from itertools import pairwise

from kernels.spec import PAGE_BYTES, Access, Order, Spread
from kernels.steps import HostTouch, Touch, TouchList, WorkloadError, check_touch

MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
FOR_ACTOR, FOR_ORDER, FOR_WRITE, FOR_READ_FIRST = range(4)  # what a draw decides
FOR_THP = 3  # of a key of its own
THP_FAILURE = 0x7468705F6661696C  # makes it of the step's key
PERMUTATION = 0x5851F42D4C957F2D  # keeps the draws of a permutation apart

Accesses = Iterator[tuple[int, Access]]  # (gfn, READ or WRITE or EXEC)


def splitmix(z: int) -> int:
    """The finaliser of splitmix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
    return z ^ (z >> 31)


def step_key(seed: int, replicate: int, number: int) -> int:
    key = splitmix(seed + GOLDEN & MASK64)
    key = splitmix(key + (replicate + 1) * GOLDEN & MASK64)
    return splitmix(key + (number + 1) * GOLDEN & MASK64)


def draw(key: int, purpose: int, i: int) -> int:
    """64 random bits: number i for that purpose."""
    return splitmix(key + GOLDEN * (4 * i + purpose + 1) & MASK64)


def happens(key: int, purpose: int, i: int, probability: float) -> bool:
    """True with that probability, to 53 bits."""
    return draw(key, purpose, i) >> 11 < int(probability * 2**53)


def pick(bits: int, n: int) -> int:
    """One of 0 ... n - 1 by the upper half of 64 random bits."""
    return (bits >> 32) * n >> 32


def feistel(key: int, x: int, half: int) -> int:
    """A permutation of 0 ... 4**half - 1: four Feistel rounds over two halves of `half` bits."""
    left, right = x >> half, x & (1 << half) - 1
    for turn in range(4):
        left, right = right, left ^ (draw(key ^ PERMUTATION, turn, right) >> 32) & (1 << half) - 1
    return (left << half) + right


def permutation(key: int, n: int) -> Callable[[int], int]:
    """A permutation of 0 ... n - 1: Feistel over the next power of four, walking each cycle until it is back below n."""
    half = 1
    while 1 << 2 * half < n:
        half += 1

    def place(i: int) -> int:
        x = feistel(key, i, half)
        while x >= n:
            x = feistel(key, x, half)
        return x

    return place


def zipf_bins(ranks: int, theta: float) -> tuple[list[int], list[int]]:
    """First ranks of the bins (and `ranks` at the end), and the share of all draws, of 2**62, up to each bin's end.

    64 single ranks, then 16 bins per octave; a bin's weight is the integral of x**-theta between the half ranks."""
    edges = list(range(min(ranks, 64) + 1))
    while edges[-1] < ranks:
        edges.append(min(ranks, edges[-1] + edges[-1] // 16))
    with localcontext() as context:
        context.prec = 30
        power, weights = Decimal(repr(theta)), []
        for first, end in pairwise(edges):
            lo, hi = first + Decimal("0.5"), end + Decimal("0.5")
            if end - first == 1:
                weights.append(Decimal(end) ** -power)
            elif power == 1:
                weights.append(hi.ln() - lo.ln())
            else:
                weights.append((hi ** (1 - power) - lo ** (1 - power)) / (1 - power))
        total = sum(weights)
        shares, running = [], Decimal(0)
        for weight in weights:
            running += weight
            shares.append(int(running / total * 2**62))
    shares[-1] = 2**62
    return edges, shares


def unit_order(step: Touch, key: int, n: int, longest: int) -> Callable[[int], int]:
    """Which of an actor's n units its visit goes to; `longest` is the largest part of any actor."""
    shuffled = permutation(key, n)
    if step.order == Order.ZIPF:
        edges, shares = zipf_bins(longest, step.theta)

        def by_rank(visit: int) -> int:
            found = bisect_right(shares, draw(key, FOR_ORDER, 2 * visit) >> 2)
            rank = edges[found] + pick(draw(key, FOR_ORDER, 2 * visit + 1), edges[found + 1] - edges[found])
            return shuffled(min(rank, n - 1))

        return by_rank
    if step.order == Order.RANDOM:
        if step.repeat:
            return lambda visit: pick(draw(key, FOR_ORDER, visit), n)
        return shuffled
    if step.order == Order.STRIDED:  # 0, s, 2 s, ... then 1, s + 1, ...
        strided = [unit for first in range(min(step.stride, n)) for unit in range(first, n, step.stride)]
        return lambda visit: strided[visit % n]
    return lambda visit: visit % n


def visits_of(step: Touch, key: int, visits: int) -> Iterator[tuple[int, Access]]:
    """(visit, access) in the order in which an actor makes them."""
    if step.access == Access.PAIRS:  # a window of pages is read, then the same pages are written
        for first in range(0, visits, step.window):
            window = range(first, min(first + step.window, visits))
            yield from ((visit, Access.READ) for visit in window)
            yield from ((visit, Access.WRITE) for visit in window)
        return
    for visit in range(visits):
        access = step.access
        if access == Access.MIXED:
            access = Access.WRITE if happens(key, FOR_WRITE, visit, step.write_percent / 100.0) else Access.READ
        if access == Access.WRITE and happens(key, FOR_READ_FIRST, visit, step.read_first):
            yield visit, Access.READ
        yield visit, access


def vcpu_accesses(step: Touch, key: int, start_bytes: int, part: range, visits: int, longest: int) -> Accesses:
    """What one vCPU does in its part of the step's units."""
    order = unit_order(step, key, len(part), longest) if part else None
    for visit, access in visits_of(step, key, visits if order else 0):
        unit = part[order(visit)] if order else 0
        yield (start_bytes + unit * step.every) // PAGE_BYTES, access


def touch_accesses(step: Touch, pages: int, vcpus: int, key: int) -> list[Accesses]:
    """One iterator per vCPU that takes part. Raises WorkloadError."""
    if faults := check_touch(step):
        raise WorkloadError("; ".join(faults))
    actors = min(vcpus, step.vcpus or vcpus)
    first, end = int(step.start * pages), int(step.end * pages)
    units = len(range(step.at, (end - first) * PAGE_BYTES, step.every))
    repeat = step.repeat or step.order == Order.ZIPF
    if step.spread == Spread.ALL:
        parts = [range(units)] * actors
    else:
        parts = [range(units * v // actors, units * (v + 1) // actors) for v in range(actors)]
    longest = max(1, *map(len, parts))
    if not repeat and step.touches is not None and step.touches > sum(map(len, parts)):
        raise WorkloadError(f"touches = {step.touches} is more than the pages of the range")
    made = []
    for v, part in enumerate(parts):
        visits = len(part)
        if step.touches is not None:
            share = step.touches * (v + 1) // actors - step.touches * v // actors
            visits = share if repeat else min(share, visits)
        own = vcpu_key(key, v)
        made.append(vcpu_accesses(step, own, first * PAGE_BYTES + step.at, part, visits, longest))
    return made


def vcpu_key(key: int, vcpu: int) -> int:
    """Of a step's key, the vCPU's own."""
    return draw(key, FOR_ACTOR, vcpu)


def skipped_part(step: Touch, pages: int, vcpus: int) -> tuple[int, int, int]:
    """(first byte, units, touches) of a step with skip_hits, which one vCPU makes. Raises WorkloadError."""
    if faults := check_touch(step):
        raise WorkloadError("; ".join(faults))
    if min(vcpus, step.vcpus or vcpus) > 1:
        raise WorkloadError("skip_hits needs a step of one vCPU")
    first, end = int(step.start * pages), int(step.end * pages)
    units = len(range(step.at, (end - first) * PAGE_BYTES, step.every))
    return first * PAGE_BYTES + step.at, units, units if step.touches is None else step.touches


def list_accesses(step: TouchList, vcpus: int) -> list[Accesses]:
    """One iterator per vCPU: its rows, in their order."""
    rows: list[tuple[int, int, bool]] = list(zip(step.vcpu.tolist(), step.gfn.tolist(), step.write.tolist(), strict=True))
    kind = (Access.READ, Access.WRITE)
    return [iter([(gfn, kind[write]) for v, gfn, write in rows if v == vcpu]) for vcpu in range(vcpus)]


def host_pages(step: HostTouch, pages: int) -> Iterator[int]:
    """Pages of the slot that the VMM itself goes to, one after the other."""
    first, end = int(step.start * pages), int(step.end * pages)
    return (first + at // PAGE_BYTES for at in range(0, (end - first) * PAGE_BYTES, step.every))
