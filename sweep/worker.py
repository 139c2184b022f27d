"""What a worker does with a chunk: run its points, publish their rows, and answer with what is to be committed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from sweep.dataset.records import Commit, runs_of
from sweep.dataset.store import Store, chunk_key
from sweep.plan import Int64s, Plan
from sweep.point import Context, PointRows, context_of, error_row, run_point
from sweep.schema import to_table
from sweep.study import Study


@dataclass(frozen=True)
class Chunk:
    """Indices of a plan that run in one call and are committed together."""

    indices: range | Int64s
    seconds: float = 0.0  # predicted, of one core
    nbytes: int = 0  # memory, predicted
    attempt: int = 1
    suspect: bool = False


@dataclass(frozen=True)
class ChunkResult:
    """A chunk whose parts are published; and, which is no part of the data, how long its points took."""

    commit: Commit
    done: int
    failed: int
    point_ids: tuple[str, ...] = ()
    wall_ns: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    worker: str = ""
    attempt: int = 1
    seconds: float = 0.0  # from the first point to the last published part; 0: not known


@dataclass(frozen=True)
class Job:
    """What all chunks of a run share: small, and sent once to each worker."""

    study: Study
    place: str  # of the dataset

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.study)

    @cached_property
    def context(self) -> Context:
        return context_of(self.study)

    @cached_property
    def store(self) -> Store:
        return Store(self.place)


def tables_of(rows: list[PointRows]) -> dict[str, pa.Table]:
    return {
        "points": to_table("points", [r.point for r in rows if r.point is not None]),
        "steps": to_table("steps", [step for r in rows for step in r.steps]),
        "errors": to_table("errors", [r.error for r in rows if r.error is not None]),
    }


def run_chunk(chunk: Chunk, job: Job, worker: str) -> ChunkResult:
    """Run the points of a chunk, one after the other, and publish their rows. Raises MemoryError and what the storage raises."""
    begin = time.perf_counter()
    rows, wall, ids, failed = [], [], [], []
    for index, planned in job.plan.at(chunk.indices):
        start = time.perf_counter_ns()
        rows.append(run_point(planned, job.context))
        wall.append(time.perf_counter_ns() - start)
        ids.append(planned.point_id)
        if rows[-1].error is not None:
            failed.append(index)
    commit = published(job.store, job.plan, chunk, rows, ids, failed)
    times, seconds = np.array(wall, np.int64), time.perf_counter() - begin
    return ChunkResult(commit, len(ids) - len(failed), len(failed), tuple(ids), times, worker, chunk.attempt, seconds)


def published(store: Store, plan: Plan, chunk: Chunk, rows: list[PointRows], ids: list[str], failed: list[int]) -> Commit:
    key = chunk_key(ids)
    return Commit(key, store.publish(key, tables_of(rows)), plan.digest, runs_of(chunk.indices), tuple(failed))


def lost_points(job: Job, store: Store) -> Callable[[Chunk, Exception], ChunkResult]:
    """Makes rows of `errors` for points whose worker died, hung or ran out of memory each time."""

    def lost(chunk: Chunk, error: Exception) -> ChunkResult:
        found = list(job.plan.at(chunk.indices))
        kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__  # numpy has a MemoryError of its own
        rows = [PointRows(None, [], error_row(planned, kind, str(error) or kind)) for _, planned in found]
        ids = [planned.point_id for _, planned in found]
        commit = published(store, job.plan, chunk, rows, ids, [index for index, _ in found])
        return ChunkResult(commit, 0, len(found), tuple(ids), np.zeros(len(found), np.int64), "", chunk.attempt)

    return lost
