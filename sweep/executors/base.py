"""The contract of executors, and the loop that drives any of them: bounded window, memory, deadlines, retries, halving.

A chunk that fails as a whole (its worker was killed, hangs, or ran out of memory) is tried again alone, then halved until one point
is left, which then becomes a row of `errors`: the sweep goes on. A point that merely raises has become such a row inside the worker.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sweep.errors import FaultsweepError
from sweep.plan import Int64s
from sweep.worker import Chunk, ChunkResult

MAX_ATTEMPTS = 2
POLL_SECONDS = 0.5
SLOWER = 20.0  # a chunk may take so many times what was predicted, at the pace of those that are done
PACES = 0.1, 10.0  # of a machine, as far as deadlines believe it
DEADLINE_SECONDS = 120.0  # and this on top


class ChunkHangsError(RuntimeError):
    """A chunk ran over its deadline."""


class WorkerDiedError(RuntimeError):
    """The process that ran a chunk is gone; the text says how."""


class Pool(Protocol):
    """What an executor offers. `submit` never blocks; `wait` gives what is ready within the time, in any order; `abandon` kills
    what runs a chunk (and perhaps others, which then fail)."""

    slots: int

    def submit(self, chunk: Chunk) -> Any: ...

    def wait(self, handles: list[Any], seconds: float) -> list[tuple[Any, ChunkResult | Exception]]: ...

    def abandon(self, handle: Any) -> None: ...

    def close(self, now: bool) -> None: ...


@dataclass
class Limits:
    """What the loop holds to: memory of all chunks in flight, and time."""

    memory: float = float("inf")  # bytes
    deadline: float = DEADLINE_SECONDS
    clock: Callable[[], float] = time.monotonic


@dataclass
class Forecast:
    """What predicted seconds are worth on this machine: calibrated on the chunks that are done, from the first one on."""

    predicted: float = 0.0  # seconds of one core for all chunks of the run
    done: float = 0.0  # of these, what is behind us
    measured: float = 0.0  # of these, what workers answered with their time
    taken: float = 0.0  # that time

    def learn(self, chunk: Chunk, result: ChunkResult) -> None:
        """From what workers took themselves: a chunk may have waited for its worker to start."""
        self.done += chunk.seconds
        if result.seconds > 0:
            self.measured += chunk.seconds
            self.taken += result.seconds

    @property
    def pace(self) -> float:
        """Seconds for each that was predicted; 1 until something is known."""
        return self.taken / self.measured if self.measured else 1.0

    def left(self, slots: int) -> float:
        """Seconds until so many workers are through with the rest."""
        return max(0.0, self.predicted - self.done) * self.pace / slots


@dataclass
class _Flight:
    chunk: Chunk
    since: float


@dataclass
class _Driver:
    """The loop's state: what waits, what runs, what is suspect."""

    pool: Pool
    chunks: Iterator[Chunk]
    limits: Limits
    forecast: Forecast
    suspects: deque[Chunk] = field(default_factory=deque)
    running: dict[Any, _Flight] = field(default_factory=dict)
    next_chunk: Chunk | None = None

    def window(self) -> int:
        """How many chunks may be in flight: one while there are suspects, and nothing new beside them."""
        if any(flight.chunk.suspect for flight in self.running.values()):
            return 1
        if self.suspects:
            return 1 if not self.running else 0
        return 2 * self.pool.slots

    def peek(self) -> Chunk | None:
        if self.suspects:
            return self.suspects[0]
        if self.next_chunk is None:
            self.next_chunk = next(self.chunks, None)
        return self.next_chunk

    def take(self) -> Chunk:
        if self.suspects:
            return self.suspects.popleft()
        chunk, self.next_chunk = self.next_chunk, None
        if chunk is None:
            raise RuntimeError("nothing to take")
        return chunk

    def fits(self, chunk: Chunk) -> bool:
        """One chunk may always run; others only where memory is left."""
        held = sum(flight.chunk.nbytes for flight in self.running.values())
        return not self.running or held + chunk.nbytes <= self.limits.memory

    def fill(self) -> None:
        while len(self.running) < self.window() and (chunk := self.peek()) is not None and self.fits(chunk):
            chunk = self.take()
            self.running[self.pool.submit(chunk)] = _Flight(chunk, self.limits.clock())

    def overdue(self) -> list[Any]:
        """Handles of chunks that ran over their deadline; each may have waited for one other on its worker."""
        longest = max((flight.chunk.seconds for flight in self.running.values()), default=0.0)
        now, found, pace = self.limits.clock(), [], min(max(self.forecast.pace, PACES[0]), PACES[1])
        for handle, flight in self.running.items():
            allowed = self.limits.deadline + SLOWER * pace * (flight.chunk.seconds + longest)
            if now - flight.since > allowed * flight.chunk.attempt:
                found.append(handle)
        return found

    def again(self, chunk: Chunk, alone: bool) -> bool:
        """Put a chunk that failed back, whole or in halves. False: it was one point, alone, for the last time."""
        if not alone:
            self.suspects.append(replace(chunk, suspect=True))
        elif chunk.attempt < MAX_ATTEMPTS:
            self.suspects.append(replace(chunk, attempt=chunk.attempt + 1, suspect=True))
        elif len(chunk.indices) > 1:
            self.suspects.extend(halves(chunk))
        else:
            return False
        return True


def halves(chunk: Chunk) -> tuple[Chunk, Chunk]:
    half = len(chunk.indices) // 2
    parts: tuple[range | Int64s, range | Int64s] = chunk.indices[:half], chunk.indices[half:]
    left, right = (replace(chunk, indices=part, seconds=chunk.seconds / 2, attempt=1, suspect=True) for part in parts)
    return left, right


def drive(
    pool: Pool,
    chunks: Iterator[Chunk],
    stopping: Callable[[], bool],
    lost: Callable[[Chunk, Exception], ChunkResult],
    limits: Limits | None = None,
    forecast: Forecast | None = None,
) -> Iterator[ChunkResult]:
    """Keep a window of chunks at work until all are done, or until `stopping()` says so (then what runs is finished).

    When a worker dies, all chunks in flight may fail with it: each is a suspect, and suspects run alone, so that only
    the guilty one is counted, halved, and in the end told apart: `lost` makes its row of `errors`. `forecast` learns on the way."""
    driver = _Driver(pool, chunks, limits or Limits(), forecast or Forecast())
    while True:
        if not stopping():
            driver.fill()
        if not driver.running:
            return
        alone = len(driver.running) == 1
        outcomes = pool.wait(list(driver.running), POLL_SECONDS)
        answered = {handle for handle, _ in outcomes}
        outcomes += [(handle, _hang(pool, handle)) for handle in driver.overdue() if handle not in answered]
        for handle, outcome in outcomes:
            flight = driver.running.pop(handle, None)
            if flight is None:
                continue
            if isinstance(outcome, FaultsweepError):  # disk full, rows that differ: nothing that another try mends
                raise outcome
            if isinstance(outcome, ChunkResult):
                result = outcome
            elif driver.again(flight.chunk, alone):
                continue
            else:
                result = lost(flight.chunk, outcome)
            driver.forecast.learn(flight.chunk, result)
            yield result


def _hang(pool: Pool, handle: Any) -> ChunkHangsError:
    pool.abandon(handle)
    return ChunkHangsError("no answer within the deadline; its worker was killed")
