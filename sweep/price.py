"""What a plan costs before it runs: seconds of one core and memory, of all of it and of each stretch of its indices.

A prediction depends on a few parameters only (PRICED); it is made once for each combination of them that occurs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sweep.blocks import Block
from sweep.plan import SLAB, Bools, Plan
from sweep.predict import predict_bytes, predict_seconds

PRICED = frozenset(
    {
        "workload",
        "memory",
        "vcpus",
        "backing",
        "kernel",
        "policy",
        "mmu",
        "thp_enabled",
        "use_zero_page",
        "prealloc",
        "prealloc_threads",
        "khugepaged",
        "ksm",
    }
)
EXACTLY = 1_000  # combinations that are priced one by one; of more, so many, evenly spread
LEAST_SECONDS, MOST_SECONDS = 1.0, 30.0  # of a stretch
SHARE = 64  # a stretch is at most this part of what is left behind it: they become smaller towards the end
FEWEST = 16  # stretches of a small study
MOST_POINTS = 1 << 14  # of a stretch


class Price(NamedTuple):
    """Of a point."""

    seconds: float
    nbytes: int


class Stretch(NamedTuple):
    """Indices from `start` to `end`, which run in one call and are committed together; seconds of all, memory of the largest."""

    start: int
    end: int
    seconds: float
    nbytes: int


class Estimate(NamedTuple):
    """Of a plan: points before duplicates of blocks are left out, seconds, memory of the largest point; `exact`: nothing was sampled."""

    points: int
    seconds: float
    nbytes: int
    exact: bool


@dataclass
class Prices:
    """Prices of a plan's points, remembered."""

    plan: Plan
    _known: dict[tuple[int, tuple[int, ...]], Price] = field(default_factory=dict)

    def of(self, number: int, digits: tuple[int, ...]) -> Price:
        """Of the point of block `number` with these digits."""
        block = self.plan.study.blocks[number]
        key = number, tuple(digits[i] for i in block.positions(PRICED))
        if key not in self._known:
            point = block.point(digits)
            workload = self.plan.study.workloads[point.workload]
            self._known[key] = Price(predict_seconds(point, workload), predict_bytes(point, workload))
        return self._known[key]

    def estimate(self) -> Estimate:
        """Of the whole plan, from at most EXACTLY combinations of each block."""
        found = [self._of_block(number, block) for number, block in enumerate(self.plan.study.blocks)]
        return Estimate(
            sum(e.points for e in found), sum(e.seconds for e in found), max(e.nbytes for e in found), all(e.exact for e in found)
        )

    def _of_block(self, number: int, block: Block) -> Estimate:
        positions = block.positions(PRICED | (block.where.used if block.where else frozenset()))
        looked_at = list(block.evenly(EXACTLY, positions))
        held = [self.of(number, digits) for digits in looked_at if block.holds(digits)]
        size = block.size() * self.plan.study.replicates
        points = size * len(held) // max(1, len(looked_at))
        mean = sum(price.seconds for price in held) / max(1, len(held))
        exact = len(looked_at) == (block.size() if block.sampled is not None else block.combinations(positions))
        return Estimate(points, points * mean, max((price.nbytes for price in held), default=0), exact)

    def slab(self, number: int, lo: int, hi: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(seconds, bytes) of each combination of block `number` from `lo` to `hi`; where there are too many, the block's mean and most."""
        block = self.plan.study.blocks[number]
        positions = block.positions(PRICED)
        if block.combinations(positions) > EXACTLY * 20:
            whole = self._of_block(number, block)
            return np.full(hi - lo, whole.seconds / max(1, whole.points)), np.full(hi - lo, whole.nbytes)
        rows = block.rows(lo, hi)
        _, first, which = np.unique(rows[list(positions)], axis=1, return_index=True, return_inverse=True)
        prices = [self.of(number, tuple(rows[:, i].tolist())) for i in first]
        return np.array([p.seconds for p in prices])[which], np.array([p.nbytes for p in prices])[which]

    def priced(self, kept: Bools) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.int64]]]:
        """(first index, seconds, bytes) of slab after slab of indices; nothing for those that are not kept."""
        replicates = self.plan.study.replicates
        for start in range(0, self.plan.upper, SLAB):
            for number, lo, hi in self.plan.parts(start, min(start + SLAB, self.plan.upper)):
                seconds, nbytes = self.slab(number, lo // replicates, -(-hi // replicates))
                inside = slice(lo % replicates, lo % replicates + hi - lo)
                first = self.plan.starts[number] + lo
                held = kept[first : first + hi - lo]
                yield first, np.repeat(seconds, replicates)[inside] * held, np.repeat(nbytes, replicates)[inside] * held


def stretches(prices: Prices, kept: Bools) -> list[Stretch]:
    """The plan cut into stretches of about equal time, 1 ... 30 s, smaller ones towards the end. The plan alone decides where."""
    left = prices.estimate().seconds
    least = min(LEAST_SECONDS, left / FEWEST)
    found: list[Stretch] = []
    start, seconds, nbytes = 0, 0.0, 0
    for first, costs, sizes in prices.priced(kept):
        sums, at = np.cumsum(costs), 0
        while at < len(costs):
            goal = min(max(left / SHARE, least), MOST_SECONDS) - seconds + (sums[at - 1] if at else 0.0)
            end = min(int(np.searchsorted(sums, goal)) + 1, at + MOST_POINTS - (first + at - start), len(costs))
            seconds += float(sums[end - 1] - (sums[at - 1] if at else 0.0))
            nbytes, at = max(nbytes, int(sizes[at:end].max())), end
            if at < len(costs) or first + at - start >= MOST_POINTS:
                found.append(Stretch(start, first + at, seconds, nbytes))
                left, start, seconds, nbytes = left - seconds, first + at, 0.0, 0
    if start < len(kept):
        found.append(Stretch(start, len(kept), seconds, nbytes))
    return found
