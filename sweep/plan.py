"""From a study to its points: counted without expanding, addressed by index, each with an id from its content.

The index runs through blocks, axes (the last moves fastest), replicates. What `where` leaves out, and what an earlier block
gives as well, has an index but is no point.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sweep.blocks import Block
from sweep.configs import digest_of
from sweep.errors import Fault, StudyError
from sweep.identity import Identity
from sweep.parameters import Point
from sweep.study import Study

MAX_POINTS = 1 << 32
BYTES_PER_POINT = 200  # on disk, sealed
SLAB = 1 << 16  # indices that are looked at together
Bools = NDArray[np.bool_]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class PlannedPoint:
    """One point: its identity and all that is needed to run it."""

    point_id: str  # 32 hex digits
    point: Point
    replicate: int
    seed: int


class Plan:
    """The points of a study. Raises StudyError for too many."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.upper = sum(block.size() for block in study.blocks) * study.replicates  # indices
        if self.upper > MAX_POINTS:
            raise StudyError(
                [Fault(study.where("block", 0), "block", f"{self.upper:,} points; at most {MAX_POINTS:,} are taken; split the study")]
            )
        ends = np.cumsum([block.size() * study.replicates for block in study.blocks]).tolist()
        self.starts = [0, *ends[:-1]]

    @cached_property
    def digest(self) -> str:
        """Plans of one digest have the same point at each index."""
        blocks = [[[axis.names, axis.values] for axis in block.axes] for block in self.study.blocks]
        rest = [[dict(block.fixed), block.where and block.where.text, block.sample and vars(block.sample)] for block in self.study.blocks]
        return digest_of([blocks, rest, self.study.replicates, self.study.identity()])

    @cached_property
    def _digests(self) -> Mapping[str, str]:
        return {name: workload.digest() for name, workload in self.study.workloads.items()}

    @cached_property
    def rivals(self) -> tuple[tuple[Block, ...], ...]:
        """Of each block, the earlier ones that may give the same points."""
        blocks = self.study.blocks
        return tuple(tuple(other for other in blocks[:i] if not block.apart(other)) for i, block in enumerate(blocks))

    def kept(self, start: int, end: int) -> Bools:
        """Which of the indices from `start` to `end` are points."""
        found = [self._kept_of(number, lo, hi) for number, lo, hi in self.parts(start, end)]
        return np.concatenate(found) if found else np.zeros(0, np.bool_)

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(block's number, first and last index + 1 inside the block)."""
        for number, first in enumerate(self.starts):
            last = first + self.study.blocks[number].size() * self.study.replicates
            lo, hi = max(start, first), min(end, last)
            if lo < hi:
                yield number, lo - first, hi - first

    def _kept_of(self, number: int, lo: int, hi: int) -> Bools:
        block, replicates = self.study.blocks[number], self.study.replicates
        first, last = lo // replicates, -(-hi // replicates)
        kept = block.kept_of(first, last)
        if self.rivals[number]:
            for i in np.flatnonzero(kept).tolist():
                values = block.canonical(block.digits(first + i))
                kept[i] = not any(rival.find(values) for rival in self.rivals[number])
        return np.repeat(kept, replicates)[lo - first * replicates : hi - first * replicates]

    def __len__(self) -> int:
        """Points, counted exactly. Raises WhereError."""
        return self._length

    @cached_property
    def _length(self) -> int:
        counts = [
            self._counted(number) if self.rivals[number] else block.kept * self.study.replicates
            for number, block in enumerate(self.study.blocks)
        ]
        return sum(counts)

    def _counted(self, number: int) -> int:
        size = self.study.blocks[number].size() * self.study.replicates
        return sum(int(self._kept_of(number, lo, min(lo + SLAB, size)).sum()) for lo in range(0, size, SLAB))

    def at(self, indices: Int64s | range) -> Iterator[tuple[int, PlannedPoint]]:
        """(index, point) of these indices; those that are no points are left out."""
        last: tuple[int, int] | None = None
        for index in indices if isinstance(indices, range) else indices.tolist():
            number = self._block_at(index)
            inner, replicate = divmod(index - self.starts[number], self.study.replicates)
            if (number, inner) != last:
                last, made = (number, inner), self._configuration(number, inner)
            if made:
                yield index, PlannedPoint(made[1].of(replicate), made[0], replicate, self.study.seed)

    def _block_at(self, index: int) -> int:
        return max(number for number, first in enumerate(self.starts) if first <= index and self.study.blocks[number].size())

    def _configuration(self, number: int, inner: int) -> tuple[Point, Identity] | None:
        """The point without its replicate, if it is one."""
        block = self.study.blocks[number]
        digits = block.digits(inner)
        if not block.keeps(digits):
            return None
        values = block.canonical(digits)
        if any(rival.find(values) for rival in self.rivals[number]):
            return None
        return block.point(digits), Identity(values, self._digests[values["workload"]], self.study.seed)

    def __iter__(self) -> Iterator[PlannedPoint]:
        return (planned for _, planned in self.at(range(self.upper)))

    def backwards(self) -> Iterator[PlannedPoint]:
        return (planned for _, planned in self.at(range(self.upper - 1, -1, -1)))

    def points(self) -> list[PlannedPoint]:
        """All of them at once: for small studies. Raises StudyError if there are none."""
        found = list(self)
        if not found:
            raise StudyError([Fault(self.study.where("block", 0, "where"), "where", "keeps no point; loosen it")])
        return found
