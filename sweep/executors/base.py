"""The contract of executors, and the loop that drives any of them: bounded window, retries, halving.

A chunk that fails as a whole (its worker was killed) is tried again alone, then halved until one point is left, which
then becomes a row of `errors`: the sweep goes on. A point that merely raises has become such a row inside the worker.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from sweep.dataset.store import chunk_key
from sweep.plan import PlannedPoint
from sweep.point import Context, PointRows, error_row, run_point
from sweep.schema import to_table

MAX_ATTEMPTS = 2
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Chunk:
    """Points that run in one call and are committed together."""

    points: list[PlannedPoint]
    attempt: int = 1
    suspect: bool = False


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
    """Keep a window of chunks at work until all are done, or until `stopping()` says so (then what runs is finished).

    When a worker dies, all chunks in flight may fail with it: each is a suspect, and suspects run alone, so that only
    the guilty one is counted, halved, and in the end told apart."""
    suspects: deque[Chunk] = deque()
    running: dict[Any, Chunk] = {}
    while True:
        while len(running) < _window(pool, running, suspects) and not stopping():
            chunk = suspects.popleft() if suspects else next(chunks, None)
            if chunk is None:
                break
            running[pool.submit(chunk)] = chunk
        if not running:
            return
        alone = len(running) == 1
        for handle, outcome in pool.wait(list(running), POLL_SECONDS):
            chunk = running.pop(handle)
            if isinstance(outcome, ChunkResult):
                yield outcome
            elif not alone:
                suspects.append(replace(chunk, suspect=True))
            elif chunk.attempt < MAX_ATTEMPTS:
                suspects.append(replace(chunk, attempt=chunk.attempt + 1, suspect=True))
            elif len(chunk.points) > 1:
                half = len(chunk.points) // 2
                suspects.extend((Chunk(chunk.points[:half], suspect=True), Chunk(chunk.points[half:], suspect=True)))
            else:
                yield lost_point(chunk.points[0], outcome)


def _window(pool: Pool, running: dict[Any, Chunk], suspects: deque[Chunk]) -> int:
    """How many chunks may be in flight: one while there are suspects, and nothing new beside them."""
    if any(chunk.suspect for chunk in running.values()):
        return 1
    if suspects:
        return 1 if not running else 0
    return 2 * pool.slots


def lost_point(planned: PlannedPoint, error: Exception) -> ChunkResult:
    """A point whose worker died each time: a row of `errors`."""
    text = str(error).splitlines()[0] if str(error) else "the worker process ended"
    row = error_row(planned, "WorkerDiedError", f"{type(error).__name__}: {text}")
    return ChunkResult(chunk_key([planned.point_id]), tables_of([PointRows(None, [], row)]))
