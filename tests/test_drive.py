"""The driver's loop against a fake executor in virtual time: what is late, lost, done twice or hangs; every index once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from random import Random
from typing import Any

import pytest

from sweep.dataset.records import Commit
from sweep.executors.base import DEADLINE_SECONDS, SLOWER, Forecast, Limits, drive
from sweep.worker import Chunk, ChunkResult

SCHEDULES = int(os.environ.get("FAULTSWEEP_SCHEDULES", "10000"))


@dataclass
class FakePool:
    """Workers that finish in any order; `guilty` points kill or hang whoever runs them, and some workers are killed by chance."""

    random: Random
    guilty: frozenset[int]
    hanging: frozenset[int]
    kills: int
    slots: int
    now: float = 0.0
    flying: dict[int, Chunk] = field(default_factory=dict)
    count: int = 0
    ran: list[int] = field(default_factory=list)
    most_bytes: int = 0

    def submit(self, chunk: Chunk) -> int:
        self.count += 1
        self.flying[self.count] = chunk
        self.most_bytes = max(self.most_bytes, sum(c.nbytes for c in self.flying.values()) if len(self.flying) > 1 else 0)
        return self.count

    def wait(self, handles: Sequence[int], seconds: float) -> list[tuple[int, ChunkResult | Exception]]:
        assert set(handles) == set(self.flying)
        self.now += 4 * seconds
        ready = [h for h in handles if not self.hanging & set(self.flying[h].indices)]
        if any(self.guilty & set(self.flying[h].indices) for h in ready) or (self.kills and self.random.random() < 0.1):
            self.kills = max(0, self.kills - 1)
            return [(h, RuntimeError("killed")) for h in handles if self.flying.pop(h)]
        chosen = self.random.sample(ready, self.random.randint(0, len(ready)))
        return [(h, self.result(self.flying.pop(h))) for h in chosen]

    def result(self, chunk: Chunk) -> ChunkResult:
        self.ran += list(chunk.indices)
        return ChunkResult(Commit("k", (), "", ((chunk.indices[0], chunk.indices[-1] + 1, 1),)), len(chunk.indices), 0)

    def abandon(self, handle: int) -> None:
        self.flying.pop(handle)

    def close(self, now: bool) -> None:
        pass


def schedule(seed: int) -> None:
    random = Random(seed)
    n = random.choice((1, 5, 12, 40))
    some = [i for i in range(n) if random.random() < random.choice((0.0, 0.02, 0.2))]
    guilty = frozenset(some[::2])
    hanging = frozenset(some[1::2])
    kills = random.choice((0, 0, 2))
    pool = FakePool(random, guilty, hanging, kills, random.choice((1, 2, 5)))
    cuts = sorted({0, n, *(random.randint(0, n) for _ in range(random.choice((0, 3, 12))))})
    chunks = [Chunk(range(a, b), (b - a) * 0.1, random.choice((1, 60))) for a, b in pairwise(cuts)]
    lost: list[int] = []

    def blame(chunk: Chunk, error: Exception) -> ChunkResult:
        lost.extend(chunk.indices)
        return ChunkResult(Commit("l", ()), 0, 1)

    done = 0
    limits = Limits(memory=100, deadline=5.0, clock=lambda: pool.now)
    for steps, result in enumerate(drive(pool, iter(chunks), lambda: False, blame, limits)):
        done += result.done
        assert steps < 100 * n, "the loop does not end"
    assert not pool.flying
    assert pool.most_bytes <= 100
    innocent = set(range(n)) - guilty - hanging
    assert set(pool.ran) >= innocent - set(lost)
    assert len(pool.ran) == len(set(pool.ran)) == done, "an index was given twice"
    assert guilty | hanging <= set(lost)
    assert len(set(lost) & innocent) <= (1 if kills else 0), "blamed without being guilty"


@pytest.mark.parametrize("shard", range(4))
def test_every_schedule_ends_with_every_index_once(shard: int, record_property: Any) -> None:
    """A seed that fails replays: schedule(seed)."""
    seeds = range(shard, SCHEDULES, 4)
    for seed in seeds:
        try:
            schedule(seed)
        except AssertionError as error:
            raise AssertionError(f"schedule({seed}): {error}") from error
    record_property("schedules of the driver's loop", len(seeds))


@dataclass
class SlowPool:
    """Workers in virtual time that take `pace` seconds for each that was predicted; with the point `hanging` they hang."""

    pace: float
    slots: int = 2
    hanging: int = -1
    now: float = 0.0
    free: list[float] = field(default_factory=lambda: [0.0, 0.0])
    ends: dict[int, tuple[float, Chunk]] = field(default_factory=dict)
    numbers: Any = field(default_factory=count)
    began: float = 0.0  # with the point that hangs
    waited: list[float] = field(default_factory=list)  # for it, each time

    def submit(self, chunk: Chunk) -> int:
        worker, number = self.free.index(min(self.free)), next(self.numbers)
        if self.hanging in chunk.indices:
            self.began, self.ends[number] = self.now, (float("inf"), chunk)
        else:
            self.free[worker] = max(self.now, self.free[worker]) + self.pace * chunk.seconds
            self.ends[number] = (self.free[worker], chunk)
        return number

    def wait(self, handles: Sequence[int], seconds: float) -> list[tuple[int, ChunkResult | Exception]]:
        self.now = max(self.now, min(self.now + seconds, *(self.ends[handle][0] for handle in handles), float("inf")))
        ready = [handle for handle in handles if self.ends[handle][0] <= self.now]
        return [(handle, self.result(self.ends.pop(handle)[1])) for handle in ready]

    def result(self, chunk: Chunk) -> ChunkResult:
        return ChunkResult(Commit("k", ()), len(chunk.indices), 0, seconds=self.pace * chunk.seconds)

    def abandon(self, handle: int) -> None:
        self.ends.pop(handle)
        self.waited.append(self.now - self.began)

    def close(self, now: bool) -> None:
        pass


@pytest.mark.parametrize("pace", [0.02, 1.0, 20.0])
def test_the_time_left_follows_from_the_first_chunks_of_this_machine(pace: float) -> None:
    """Chunks of very different length, longest first: what is left is known from the first one on, whatever the machine."""
    chunks = [Chunk(range(i, i + 1), seconds) for i, seconds in enumerate([30.0] * 4 + [5.0] * 20 + [1.0] * 80)]
    pool, forecast, told = SlowPool(pace), Forecast(sum(chunk.seconds for chunk in chunks)), []
    for _ in drive(pool, iter(chunks), lambda: False, fail, Limits(clock=lambda: pool.now), forecast):
        told.append((pool.now, forecast.left(pool.slots)))
    assert len(told) == len(chunks)
    for now, left in told:
        assert left == pytest.approx(pool.now - now, abs=31 * pace)  # what runs counts as not begun
    assert (forecast.pace, forecast.left(2)) == (pytest.approx(pace), 0)


@pytest.mark.parametrize("pace", [0.2, 1.0, 5.0])
def test_a_deadline_is_as_long_as_the_machine_is_slow(pace: float) -> None:
    """A chunk that hangs is given up after what was predicted, at the pace of those before it: alone, and alone once more."""
    chunks = [Chunk(range(i, i + 1), 10.0) for i in range(9)]
    pool, forecast, lost = SlowPool(pace, hanging=8), Forecast(90.0), list[str]()
    results = drive(pool, iter(chunks), lambda: False, lambda *error: lost_as(lost, *error), Limits(clock=lambda: pool.now), forecast)
    assert sum(result.done for result in results) == 8
    assert lost == ["ChunkHangsError"]
    allowed = DEADLINE_SECONDS + SLOWER * pace * (10.0 + 10.0)  # it may have waited for another one
    assert pool.waited == pytest.approx([allowed, 2 * allowed], abs=1.0)


def fail(chunk: Chunk, error: Exception) -> ChunkResult:
    raise AssertionError(f"{chunk} failed: {error}")


def lost_as(kinds: list[str], chunk: Chunk, error: Exception) -> ChunkResult:
    kinds.append(type(error).__name__)
    return ChunkResult(Commit("l", ()), 0, 1)
