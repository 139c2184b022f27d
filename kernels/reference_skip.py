"""Repeated random touches of one vCPU without their hits (docs/model.md section 13), in plain Python.

Only the first read and the first write of a unit can change anything. skip_hits() says which comes next and after how
many hits; the arithmetic is spelled out since both implementations have to round the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt

from kernels.reference_workload import FOR_ACTOR, FOR_ORDER, FOR_READ_FIRST, FOR_WRITE, GOLDEN, MASK64, draw, permutation, zipf_bins
from kernels.spec import Access, Order
from kernels.steps import Touch

LN_2 = 0.6931471805599453
WHOLE = 2**62  # weights are parts of it


def fraction(key: int, purpose: int, i: int) -> float:
    """0 <= u < 1, of 53 bits."""
    return (draw(key, purpose, i) >> 11) / 2**53


def atanh_2(z: float) -> float:
    """ln((1 + z) / (1 - z)), six terms."""
    square, found = z * z, 2.0 / 11.0
    for odd in (9.0, 7.0, 5.0, 3.0):
        found = 2.0 / odd + square * found
    return z * (2.0 + square * found)


def minus_ln(x: float) -> float:
    """-ln(x): powers of two first, then the series."""
    found = 0.0
    for bits in (32, 16, 8, 4, 2, 1):
        if x < 0.5**bits:
            found += bits * LN_2
            x *= 2.0**bits
    if x < 0.703125:
        found += LN_2
        x *= 2.0
    return found - atanh_2((x - 1.0) / (x + 1.0))


def rate(p: float) -> float:
    """-ln(1 - p)."""
    if p < 0.25:
        return atanh_2(p / (2.0 - p))
    x, found = 1.0 - p, 0.0
    while x < 0.703125:
        x += x
        found += LN_2
    return found - atanh_2((x - 1.0) / (x + 1.0))


@dataclass
class Firsts:
    """The units that had no access of one kind yet: bins of equal weight, each with its own order."""

    key: int
    edges: list[int]
    weights: list[int]  # of one unit of each bin
    kind: int  # 0: reads, 1: writes
    taken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.taken = [0] * len(self.weights)

    @property
    def weight(self) -> int:
        sizes = [end - first for first, end in pairwise(self.edges)]
        return sum((size - taken) * weight for size, taken, weight in zip(sizes, self.taken, self.weights, strict=True))

    def take(self, bits: int) -> int:
        """The rank of one of them, drawn by weight."""
        target = bits * self.weight >> 64
        for b, weight in enumerate(self.weights):
            size = self.edges[b + 1] - self.edges[b]
            if target < (size - self.taken[b]) * weight:
                break
            target -= (size - self.taken[b]) * weight
        order = permutation(self.key ^ GOLDEN * 2 * (2 * b + self.kind + 1) & MASK64, size)
        self.taken[b] += 1
        return self.edges[b] + order(self.taken[b] - 1)


def bins(step: Touch, n: int) -> tuple[list[int], list[int]]:
    """Edges of the bins, weight of a unit of each."""
    if step.order == Order.RANDOM:
        return [0, n], [WHOLE // n]
    edges, shares = zipf_bins(n, step.theta)
    before = [0, *shares[:-1]]
    sizes = [end - first for first, end in pairwise(edges)]
    return edges, [(share - less) // size for share, less, size in zip(shares, before, sizes, strict=True)]


@dataclass
class SkippedHits:
    """How many hits there were, and of them writes: a sum of binomials, drawn from its normal at the end."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, hits: int, share: float) -> None:
        self.count += hits
        self.mean += hits * share
        self.variance += hits * share * (1.0 - share)

    def writes(self, key: int) -> int:
        z = -6.0
        for i in range(12):
            z += fraction(key, FOR_ACTOR, i)
        return min(max(int(self.mean + sqrt(max(0.0, self.variance)) * z + 0.5), 0), self.count)


def skip_hits(step: Touch, key: int, n: int, touches: int, hits: SkippedHits) -> Iterator[tuple[int, Access]]:
    """(unit, access) of each first read and first write of n units; the touches between them go into `hits`."""
    edges, weights = bins(step, n)
    reads, writes = (Firsts(key, edges, weights, kind) for kind in (0, 1))
    scatter = permutation(key, n) if step.order == Order.ZIPF else int
    w = {Access.WRITE: 1.0, Access.READ: 0.0, Access.MIXED: int(step.write_percent / 100.0 * 2**53) / 2**53}[step.access]
    left, event = touches, 0
    while left > 0:
        new_writes, new_reads = w * (writes.weight / WHOLE), (1.0 - w) * (reads.weight / WHOLE)
        new = new_writes + new_reads
        skipped = left
        if new > 0.0:
            wait = minus_ln(((draw(key, FOR_ORDER, event) >> 11) + 0.5) / 2**53)
            skipped = min(left, 0 if new >= 1.0 else int(wait / rate(new)))
        old = (w - new_writes) + ((1.0 - w) - new_reads)
        hits.add(skipped, (w - new_writes) / old if old > 0.0 else 0.0)
        left -= skipped
        if left == 0:
            return
        write = fraction(key, FOR_WRITE, event) * new < new_writes
        rank = (writes if write else reads).take(draw(key, FOR_READ_FIRST, event))
        yield scatter(rank), Access.WRITE if write else Access.READ
        left -= 1
        event += 1
