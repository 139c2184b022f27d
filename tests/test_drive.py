"""The driver's loop against a fake executor in virtual time: what is late, lost, done twice or hangs; every index once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from sweep.dataset.records import Commit
from sweep.executors.base import Limits, drive
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
