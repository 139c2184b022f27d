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
from sweep.point import context_of
from sweep.rows import Recorder
from sweep.schema import texts
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
    point_ids: pa.Array | None = None
    wall_ns: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))  # of each of them
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
    def recorder(self) -> Recorder:
        return Recorder(context_of(self.study))

    @cached_property
    def store(self) -> Store:
        return Store(self.place)


def run_chunk(chunk: Chunk, job: Job, worker: str) -> ChunkResult:
    """Run the points of a chunk, one after the other, and publish their rows. Raises MemoryError and what the storage raises."""
    begin = time.perf_counter()
    recorder = job.recorder
    recorder.begin()
    ids: list[str] = []
    failed: list[int] = []
    wall = [np.zeros(0, np.int64)]
    for points in job.plan.points_at(chunk.indices):
        done, wall_ns = recorder.run(points)
        wall.append(wall_ns)
        ids += points.ids
        failed += points.indices[~done].tolist()
    commit = published(job, chunk, ids, failed)
    times, seconds = np.concatenate(wall), time.perf_counter() - begin
    return ChunkResult(commit, len(ids) - len(failed), len(failed), texts(ids), times, worker, chunk.attempt, seconds)


def published(job: Job, chunk: Chunk, ids: list[str], failed: list[int]) -> Commit:
    """Publish the recorder's rows; what is to be committed."""
    key = chunk_key(ids)
    return Commit(key, job.store.publish(key, job.recorder.tables()), job.plan.digest, runs_of(chunk.indices), tuple(failed))


def lost_points(job: Job) -> Callable[[Chunk, Exception], ChunkResult]:
    """Makes rows of `errors` for points whose worker died, hung or ran out of memory each time."""

    def lost(chunk: Chunk, error: Exception) -> ChunkResult:
        found = list(job.plan.at(chunk.indices))
        kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__  # numpy has a MemoryError of its own
        job.recorder.begin()
        for _, planned in found:
            job.recorder.fail(planned, kind, str(error) or kind)
        ids = [planned.point_id for _, planned in found]
        commit = published(job, chunk, ids, [index for index, _ in found])
        return ChunkResult(commit, 0, len(found), texts(ids), np.zeros(len(found), np.int64), "", chunk.attempt)

    return lost
