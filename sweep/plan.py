"""From a study to its points: counted without expanding, addressed by index, each with an id from its content.

The index runs through blocks, axes (the last moves fastest), replicates. What `where` leaves out, and what an earlier block
gives as well, has an index but is no point.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sweep.blocks import Block
from sweep.configs import digest_of
from sweep.errors import Fault, StudyError
from sweep.identity import Identities
from sweep.parameters import Point
from sweep.study import Study

MAX_POINTS = 1 << 32
BYTES_PER_POINT = 200  # on disk, sealed
SLAB = 1 << 16  # indices that are looked at together
FEW = 1 << 10
Bools = NDArray[np.bool_]
Int64s = NDArray[np.int64]


class PlannedPoint(NamedTuple):
    """One point: its identity and all that is needed to run it."""

    point_id: str  # 32 hex digits
    values: Mapping[str, Any]  # every parameter; `cores` is None where it is not given
    replicate: int
    seed: int

    @property
    def point(self) -> Point:
        return Point.model_construct(**self.values)


@dataclass(frozen=True)
class Points:
    """Some points of one block, in order."""

    block: Block
    identities: Identities
    seed: int
    indices: Int64s  # (points,)
    digits: Int64s  # (axes, points) which value of each axis
    replicates: Int64s  # (points,)

    def __len__(self) -> int:
        return len(self.indices)

    def chosen(self, which: Bools) -> "Points":
        return replace(self, indices=self.indices[which], digits=self.digits[:, which], replicates=self.replicates[which])

    def runs(self, apart: frozenset[str] = frozenset()) -> Iterator[tuple[int, int]]:
        """(first, end) of neighbours that differ in no parameter, but in these and in their replicate."""
        moved = [i for i, axis in enumerate(self.block.axes) if not apart.issuperset(axis.names)]
        changes = np.flatnonzero((self.digits[moved, 1:] != self.digits[moved, :-1]).any(axis=0)) + 1
        yield from pairwise([0, *changes.tolist(), len(self)]) if len(self) else ()

    @cached_property
    def ids(self) -> list[str]:
        return self.identities.of(self.digits, self.replicates)

    def values(self, number: int) -> dict[str, Any]:
        """Every parameter of one of them; `cores` is None where it is not given."""
        return self.block.every_value(self._rows[number])

    @cached_property
    def _rows(self) -> list[list[int]]:
        """Digits, point by point."""
        rows: list[list[int]] = self.digits.T.tolist()
        return rows

    def values_of(self, name: str) -> tuple[list[Any], Int64s]:
        """The values of a parameter that may occur, and which of them each point has."""
        source = self.block.source(name)
        if source.position is None:
            return [source.value(0)], np.zeros(len(self), np.int64)
        which, count = self.digits[source.position], len(source.rows)
        if count > len(self):
            present, which = np.unique(which, return_inverse=True)
            return [source.value(digit) for digit in present.tolist()], which
        return [source.value(digit) for digit in range(count)], which

    def __getitem__(self, number: int) -> PlannedPoint:
        return PlannedPoint(self.ids[number], self.values(number), int(self.replicates[number]), self.seed)

    def __iter__(self) -> Iterator[PlannedPoint]:
        return (self[number] for number in range(len(self)))


def _as_array(indices: Int64s | range) -> Int64s:
    return np.arange(indices.start, indices.stop, indices.step) if isinstance(indices, range) else indices


class Plan:
    """The points of a study. Raises StudyError for too many."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.upper = sum(block.size() for block in study.blocks) * study.replicates  # indices
        if self.upper > MAX_POINTS:
            raise StudyError(
                [Fault(study.where("block", 0), "block", f"{self.upper:,} points; at most {MAX_POINTS:,} are taken; split the study")]
            )
        self._ends = np.cumsum([block.size() * study.replicates for block in study.blocks])
        self.starts = [0, *self._ends[:-1].tolist()]
        self._known: dict[int, Identities] = {}

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
        for points in self.points_at(indices):
            yield from zip(points.indices.tolist(), points, strict=True)

    def points_at(self, indices: Int64s | range) -> Iterator[Points]:
        """The points of these indices, those of one block after the other together."""
        for at in range(0, len(indices), SLAB):
            slab = _as_array(indices[at : at + SLAB])
            numbers = np.searchsorted(self._ends, slab, side="right")
            cuts = np.flatnonzero(np.diff(numbers)) + 1
            for part, number in zip(np.split(slab, cuts), numbers[[0, *cuts]].tolist(), strict=True):
                points = self._points(number, part)
                if len(points):
                    yield points

    def _points(self, number: int, indices: Int64s) -> Points:
        block = self.study.blocks[number]
        inner, replicates = np.divmod(indices - self.starts[number], self.study.replicates)
        points = Points(block, self._identities(number), self.study.seed, indices, block.digits_at(inner), replicates)
        if block.where is None and not self.rivals[number]:
            return points
        rows, whose = np.unique(inner, return_inverse=True)
        kept = [self._is_kept(number, digits) for digits in block.digits_at(rows).T.tolist()]
        return points.chosen(np.array(kept, np.bool_)[whose])

    def _is_kept(self, number: int, digits: Sequence[int]) -> bool:
        block = self.study.blocks[number]
        if not block.keeps(digits):
            return False
        return not self.rivals[number] or not any(rival.find(block.canonical(digits)) for rival in self.rivals[number])

    def _identities(self, number: int) -> Identities:
        if number not in self._known:
            self._known[number] = Identities(self.study.blocks[number], self._digests, self.study.seed)
        return self._known[number]

    def __iter__(self) -> Iterator[PlannedPoint]:
        for start in range(0, self.upper, FEW):
            yield from (planned for _, planned in self.at(range(start, min(start + FEW, self.upper))))

    def backwards(self) -> Iterator[PlannedPoint]:
        """The last first, a few at a time."""
        for end in range(self.upper, 0, -FEW):
            yield from reversed([planned for _, planned in self.at(range(max(0, end - FEW), end))])

    def points(self) -> list[PlannedPoint]:
        """All of them at once: for small studies. Raises StudyError if there are none."""
        found = list(self)
        if not found:
            raise StudyError([Fault(self.study.where("block", 0, "where"), "where", "keeps no point; loosen it")])
        return found
