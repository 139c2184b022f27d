"""Probes with several threads: TLB shootdowns, and asking for mmap_lock at once."""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kernels.spec import PMD_BYTES
from sweep.measure.figures import Quantity
from sweep.measure.loops import COUNT, PAGE, STOP, advise_each, advise_until_stopped, load_and_drop, run_until_stopped
from sweep.measure.machine import shootdowns
from sweep.measure.region import POPULATE_READ, Region, timed
from sweep.measure.sampling import DiscardedRunError, Probe, UnavailableError

FLUSHES, LOCKS = 50, 1000  # in a window, which is short
WINDOWS = 20  # of which the first in which no thread lost its CPU is taken
CONCURRENT = 0.5  # of what the measuring thread does, each other one must do in the same time
MAX_THREADS = 64
START_SECONDS, POLL_SECONDS = 5.0, 1e-4

Found = Mapping[Quantity, float]


@contextmanager
def running(cpu: int, loop: Callable[..., None], *arguments: int) -> Iterator[NDArray[np.int64]]:
    """`loop` in a thread on a CPU of its own, from its first round on; yields what it shares. Raises DiscardedRunError."""
    shared = np.zeros(2, np.int64)

    def work() -> None:
        with suppress(OSError):  # not allowed here: it runs where it can, and the run's check tells
            os.sched_setaffinity(0, {cpu})
        loop(shared, *arguments)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + START_SECONDS
        while shared[COUNT] == 0:
            if time.monotonic() > end:
                raise DiscardedRunError("a thread got no CPU")
            time.sleep(POLL_SECONDS)
        yield shared
    finally:
        shared[STOP] = 1
        thread.join()


def flush_ns(others: Sequence[int]) -> float:
    """Mapping and dropping a page while threads run on these CPUs: each is a target of the flush."""
    meant = FLUSHES * len(others)
    with ExitStack() as stack:
        region = stack.enter_context(Region(PMD_BYTES, mmap.MADV_NOHUGEPAGE))
        for cpu in others:
            stack.enter_context(running(cpu, run_until_stopped))
        for _ in range(WINDOWS):
            before = shootdowns()
            took = timed(load_and_drop, region.address, FLUSHES, mmap.MADV_DONTNEED)
            after = shootdowns()
            if before is None or after is None:
                raise UnavailableError("/proc/interrupts tells no TLB shootdowns")
            if took.faults == FLUSHES and after - before >= meant:  # other programs may send some too
                return took.ns / FLUSHES
    raise DiscardedRunError(f"never {meant} shootdown interrupts for {FLUSHES} flushes")


def targets(few: Sequence[int], many: Sequence[int], quantity: Quantity) -> Found:
    """What each further target adds to a flush."""
    return {quantity: (flush_ns(many) - flush_ns(few)) / (len(many) - len(few))}


def walk_ns(others: Sequence[int]) -> float:
    """A walk under mmap_lock while threads on these CPUs do the same, each to a page and a page table of its own."""
    with ExitStack() as stack:
        region = stack.enter_context(Region((len(others) + 1) * PMD_BYTES, mmap.MADV_NOHUGEPAGE))
        region.advise_each(POPULATE_READ, 0, PMD_BYTES)
        counts = [
            stack.enter_context(running(cpu, advise_until_stopped, region.address + i * PMD_BYTES, POPULATE_READ))
            for i, cpu in enumerate(others, 1)
        ]
        for _ in range(WINDOWS):
            before = [int(count[COUNT]) for count in counts]
            took = timed(advise_each, region.address, PAGE, 0, LOCKS, POPULATE_READ)
            done = [int(count[COUNT]) - old for count, old in zip(counts, before, strict=True)]
            if not took.faults and min(done, default=LOCKS) >= CONCURRENT * LOCKS:
                return took.ns / LOCKS
    raise DiscardedRunError("never did all threads run at once")


def line_ns(alone: float, together: float, threads: int) -> float:
    """How long the lock's cache line takes to move, as the model has it.

    A line that moves in L ns makes a round of A ns by itself last A + L, or N * L if N threads wait for it in turn.
    """
    return min(together - alone, together / threads)


def line_of_two(other: Sequence[int]) -> Found:
    """The time that a lock's cache line takes between two threads."""
    return {Quantity.LINE_OF_TWO: line_ns(walk_ns(()), walk_ns(other), 2)}


def line_growth(others: Sequence[int]) -> Found:
    """How much longer it takes for each further thread."""
    alone, two, all_of_them = walk_ns(()), walk_ns(others[:1]), walk_ns(others)
    threads = len(others) + 1
    return {Quantity.LINE_GROWTH: (line_ns(alone, all_of_them, threads) - line_ns(alone, two, 2)) / (threads - 2)}


def unavailable(reason: str) -> Found:
    raise UnavailableError(reason)


def thread_probes(cpus: Sequence[int]) -> list[Probe]:
    """All of them; the measuring thread has the first CPU."""
    others = cpus[1:MAX_THREADS]
    one = others[:1]
    probes: dict[Quantity, tuple[int, Callable[[], Found]]] = {
        Quantity.FIRST_TARGET: (2, partial(targets, (), one, Quantity.FIRST_TARGET)),
        Quantity.MORE_TARGETS: (3, partial(targets, one, others, Quantity.MORE_TARGETS)),
        Quantity.LINE_OF_TWO: (2, partial(line_of_two, one)),
        Quantity.LINE_GROWTH: (3, partial(line_growth, others)),
    }
    return [
        Probe((quantity,), run if len(cpus) >= needed else partial(unavailable, f"it takes {needed} CPUs, and there are {len(cpus)}"))
        for quantity, (needed, run) in probes.items()
    ]
