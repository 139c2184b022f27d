"""The contract of executors, and the loop that drives any of them: bounded window, retries, halving.

A chunk that fails as a whole (its worker was killed) is tried again, then halved until one point is left, which then
becomes a row of `errors`: the sweep goes on. A point that merely raises has become such a row inside the worker.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from sweep.dataset.store import chunk_key
from sweep.plan import PlannedPoint
from sweep.point import Context, PointRows, error_row, run_point
from sweep.schema import to_table

MAX_ATTEMPTS = 2
POLL_SECONDS = 0.5


@dataclass
class Chunk:
    """Points that run in one call and are committed together."""

    points: list[PlannedPoint]
    attempt: int = 1


@dataclass(frozen=True)
class ChunkResult:
    """What a worker gives back: tables ready to publish, and per point the wall time, which is no part of the data."""

    key: str
    tables: dict[str, pa.Table]
    wall_ns: list[tuple[str, int]] = field(default_factory=list)
    worker: str = ""

    @property
    def failed(self) -> int:
        return int(self.tables["errors"].num_rows)

    @property
    def done(self) -> int:
        return int(self.tables["points"].num_rows)


def tables_of(rows: list[PointRows]) -> dict[str, pa.Table]:
    return {
        "points": to_table("points", [r.point for r in rows if r.point is not None]),
        "steps": to_table("steps", [step for r in rows for step in r.steps]),
        "errors": to_table("errors", [r.error for r in rows if r.error is not None]),
    }


def run_chunk(points: list[PlannedPoint], context: Context, worker: str) -> ChunkResult:
    """Run the points of a chunk, one after the other: what every executor's workers do."""
    rows, wall = [], []
    for planned in points:
        start = time.perf_counter_ns()
        rows.append(run_point(planned, context))
        wall.append((planned.point_id, time.perf_counter_ns() - start))
    return ChunkResult(chunk_key(p.point_id for p in points), tables_of(rows), wall, worker)


class Pool(Protocol):
    """What an executor offers. `submit` never blocks; `wait` gives what is ready within the time, in any order."""

    slots: int

    def submit(self, chunk: Chunk) -> Any: ...

    def wait(self, handles: list[Any], seconds: float) -> list[tuple[Any, ChunkResult | Exception]]: ...

    def close(self, now: bool) -> None: ...


def drive(pool: Pool, chunks: Iterator[Chunk], stopping: Callable[[], bool]) -> Iterator[ChunkResult]:
    """Keep a window of chunks at work until all are done, or until `stopping()` says so (then what runs is finished)."""
    waiting: deque[Chunk] = deque()
    running: dict[Any, Chunk] = {}
    while True:
        while len(running) < 2 * pool.slots and not stopping():
            chunk = waiting.popleft() if waiting else next(chunks, None)
            if chunk is None:
                break
            running[pool.submit(chunk)] = chunk
        if not running:
            return
        for handle, outcome in pool.wait(list(running), POLL_SECONDS):
            chunk = running.pop(handle)
            if isinstance(outcome, ChunkResult):
                yield outcome
            elif chunk.attempt < MAX_ATTEMPTS:
                waiting.append(Chunk(chunk.points, chunk.attempt + 1))
            elif len(chunk.points) > 1:
                half = len(chunk.points) // 2
                waiting.extend((Chunk(chunk.points[:half]), Chunk(chunk.points[half:])))
            else:
                yield lost_point(chunk.points[0], outcome)


def lost_point(planned: PlannedPoint, error: Exception) -> ChunkResult:
    """A point whose worker died each time: a row of `errors`."""
    text = str(error).splitlines()[0] if str(error) else "the worker process ended"
    row = error_row(planned, "WorkerDiedError", f"{type(error).__name__}: {text}")
    return ChunkResult(chunk_key([planned.point_id]), tables_of([PointRows(None, [], row)]))
