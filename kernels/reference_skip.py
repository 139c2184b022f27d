"""Repeated random touches of one vCPU without their hits (docs/model.md section 13), in plain Python.

Only the first read and the first write of a unit can change anything. skip_hits() says which comes next and after how
many hits; the arithmetic is spelled out since both implementations have to round the same.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import sqrt

from kernels.reference_workload import FOR_ACTOR, FOR_ORDER, FOR_READ_FIRST, FOR_WRITE, GOLDEN, MASK64, draw, zipf_bins
from kernels.spec import Access, Order
from kernels.steps import Touch

LN_2 = 0.6931471805599453
WHOLE = 2**62  # weights are parts of it
FOR_ORDERS = 0x5851F42D4C957F2D  # keeps orders apart from draws


def fraction(key: int, purpose: int, i: int) -> float:
    """0 <= u < 1, of 53 bits."""
    return (draw(key, purpose, i) >> 11) / 2**53


def atanh_2(z: float) -> float:
    """ln((1 + z) / (1 - z)), six terms, two by two."""
    square = z * z
    first, middle, last = (2.0 / odd + square * (2.0 / (odd + 2.0)) for odd in (1.0, 5.0, 9.0))
    return z * (first + square * square * (middle + square * square * last))


def stretched(x: float) -> tuple[float, float]:
    """x times a power of two, which brings it to 0.7 ... 1.4; and ln() of that power."""
    found = 0.0
    for bits in (32, 16, 8, 4, 2, 1):
        if x < 0.5**bits:
            found += bits * LN_2
            x *= 2.0**bits
    return (x * 2.0, found + LN_2) if x < 0.703125 else (x, found)


def minus_ln(x: float) -> float:
    """-ln(x)."""
    x, found = stretched(x)
    return found - atanh_2((x - 1.0) / (x + 1.0))


def rate(p: float) -> float:
    """-ln(1 - p); finite for p = 1."""
    x, found = stretched(1.0 - p)
    return found + atanh_2((1.0 - x if found else p) / (1.0 + x))


def order(key: int, n: int) -> Callable[[int], int]:
    """A permutation of 0 ... n - 1 that lie in rows: five times either the columns move, all within their row, or the rows within their
    column, as the other coordinate says. Who comes to where the last row is not full goes on."""
    columns = 2
    while columns * columns < n:
        columns *= 2
    rows = -(-n // columns)

    def mixed(turn: int, x: int) -> int:
        z = ((key ^ FOR_ORDERS) + GOLDEN * (turn + 1) + x) * 0xBF58476D1CE4E5B9 & MASK64
        return ((z ^ z >> 32) * 0x94D049BB133111EB & MASK64) >> 32

    def place(i: int) -> int:
        row, column = divmod(i, columns)
        for turn in (0, 2, 4):
            if turn:
                column ^= mixed(turn - 1, row) % columns
            row = (row + (mixed(turn, column) * rows >> 32)) % rows
        found = row * columns + column
        return found if found < n else place(found)

    return place


@dataclass
class Firsts:
    """The order in which the units have their first accesses of one kind: bins of equal weight per unit.

    Attempts aim at the weights that were left when stock was last taken; what was taken since lies in front in its bin, and who
    aims there misses."""

    key: int
    edges: list[int]
    weights: list[int]  # of one unit of each bin
    kind: int  # 0: reads, 1: writes
    taken: list[int] = field(default_factory=list)
    attempts: int = 0
    stock: int = 0  # weight when it was taken
    ends: list[int] = field(default_factory=list)  # of the bins in it
    since: list[int] = field(default_factory=list)  # units of each bin taken since

    def __post_init__(self) -> None:
        self.taken = [0] * len(self.weights)
        self.left = sum(self.in_bins())
        self.take_stock()

    def in_bins(self) -> list[int]:
        """Weight left in each."""
        sizes = [end - first for first, end in pairwise(self.edges)]
        return [(size - taken) * weight for size, taken, weight in zip(sizes, self.taken, self.weights, strict=True)]

    def take_stock(self) -> None:
        self.ends = list(accumulate(self.in_bins()))
        self.stock = self.ends[-1]
        self.since = [0] * len(self.weights)

    def take(self) -> tuple[int, int]:
        """(bin, which of its units by order) of the next."""
        if self.left < self.stock - self.stock // 8:
            self.take_stock()
        while True:  # ends: seven of eight hit
            target = draw(self.key, FOR_READ_FIRST, 2 * self.attempts + self.kind) * self.stock >> 64
            self.attempts += 1
            b = bisect_right(self.ends, target)
            start = self.ends[b - 1] if b else 0
            if target >= start + self.since[b] * self.weights[b]:
                break
        self.left -= self.weights[b]
        self.since[b] += 1
        self.taken[b] += 1
        return b, self.taken[b] - 1

    def unit(self) -> int:
        """The next. Ranks are in the order of their first reads, bin by bin; writes have an order of their own in each bin."""
        b, place = self.take()
        rank = place
        if self.kind == 1:
            rank = order(self.key ^ GOLDEN * 2 * (b + 1) & MASK64, self.edges[b + 1] - self.edges[b])(place)
        if self.kind == 1 and len(self.weights) == 1:
            return rank
        return order(self.key, self.edges[-1])(self.edges[b] + rank)


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
    w = {Access.WRITE: 1.0, Access.READ: 0.0, Access.MIXED: int(step.write_percent / 100.0 * 2**53) / 2**53}[step.access]
    left, event = touches, 0
    while left > 0:
        new_writes, new_reads = int(w * writes.left), int((1.0 - w) * reads.left)
        new = new_writes + new_reads
        old_writes, old_reads = w - new_writes / WHOLE, (1.0 - w) - new_reads / WHOLE
        skipped = left
        if new > 0:
            wait = minus_ln(((draw(key, FOR_ORDER, event) >> 11) + 0.5) / 2**53)
            skipped = min(left, int(wait / rate(new_writes / WHOLE + new_reads / WHOLE)))
        hits.add(skipped, old_writes / (old_writes + old_reads) if old_writes + old_reads > 0.0 else 0.0)
        left -= skipped
        if left == 0:
            return
        write = draw(key, FOR_WRITE, event) * new >> 64 < new_writes
        yield (writes if write else reads).unit(), Access.WRITE if write else Access.READ
        left -= 1
        event += 1
