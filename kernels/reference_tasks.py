"""Actors as generators, and mmu_lock, in virtual time: what reference.py runs on.

A path is a generator that yields what its actor waits for: time to pass in the kernel, the guest to run, mmu_lock, or
another task's page lock. Between two yields nothing else happens in the machine. The next event is the one with the
smallest (time, in flight before in the guest, actor number).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from kernels.spec import Actor, Counter


@dataclass(frozen=True)
class Kernel:
    """Work in the kernel for so many ns."""

    ns: int


@dataclass(frozen=True)
class Guest:
    """In the guest (a VMM loop: between two pages) for so many ns; a flush can kick the vCPU meanwhile."""

    ns: int


@dataclass(frozen=True)
class TakeMmuLock:
    write: bool


@dataclass(frozen=True)
class SleepOnPage:
    """Another task clears that page: its folio lock (shmem) or hugetlb_fault_mutex."""

    page: int


T = TypeVar("T")
Wait: TypeAlias = Kernel | Guest | TakeMmuLock | SleepOnPage
Path: TypeAlias = Generator[Wait, None, T]  # a piece of the fault path that ends in a T


@dataclass
class Task:
    """One actor, and where it is."""

    number: int
    path: Iterator[Wait] = field(default_factory=lambda: iter(()))
    time: int = 0  # of its next event, or when it fell asleep
    in_guest: bool = True
    asleep: bool = False
    done: bool = False
    sleeps_on: int | None = None


@dataclass
class MmuLock:
    """kvm->mmu_lock: a queued rwlock, first come, first served."""

    readers: int = 0
    writer: bool = False
    queue: deque[tuple[Task, bool]] = field(default_factory=deque)

    def admits(self, write: bool) -> bool:
        return not self.writer and not (write and self.readers)

    def take(self, write: bool) -> None:
        self.writer = write
        self.readers += not write

    def release(self) -> list[Task]:
        """Give it back (by the writer if there is one); returns who has it from now on."""
        if self.writer:
            self.writer = False
        else:
            self.readers -= 1
        woken = []
        while self.queue and self.admits(self.queue[0][1]):
            task, write = self.queue.popleft()
            self.take(write)
            woken.append(task)
        return woken


class Scheduler:
    """The actors of the present step, the lock they share, and what they count."""

    def __init__(self) -> None:
        self.lock = MmuLock()
        self.tasks: list[Task] = []
        self.who = Actor.GUEST
        self.count = {c.name.lower(): 0 for c in Counter}

    def run(self, paths: Sequence[Callable[[Task], Iterator[Wait]]], who: Actor, max_events: int) -> int:
        """One step: all actors start at time 0. Returns when the last one is done, in ns."""
        self.who = who
        self.tasks = [Task(i) for i in range(len(paths))]
        for task, path in zip(self.tasks, paths, strict=True):
            task.path = path(task)
        events = 0
        while ready := [a for a in self.tasks if not a.done and not a.asleep]:
            events += 1
            if events > max_events:
                raise RuntimeError(f"no end after {max_events} events")
            self.advance(min(ready, key=lambda a: (a.time, a.in_guest, a.number)))
        if not all(a.done for a in self.tasks):
            raise RuntimeError("all actors sleep")
        return max(a.time for a in self.tasks)

    def advance(self, task: Task) -> None:
        """One event of the actor: until it has to wait."""
        for wait in task.path:
            match wait:
                case TakeMmuLock(write):
                    self.count["mmu_lock_write" if write else "mmu_lock_read"] += 1
                    if not self.lock.queue and self.lock.admits(write):
                        self.lock.take(write)
                        continue
                    self.lock.queue.append((task, write))
                    task.asleep = True
                case SleepOnPage(page):
                    task.sleeps_on = page
                    task.asleep = True
                case Kernel(ns) | Guest(ns):
                    task.time += ns
                    task.in_guest = isinstance(wait, Guest)
            return
        task.done = True
        task.in_guest = False

    def wake(self, sleeper: Task, now: int) -> None:
        sleeper.time = now
        sleeper.asleep = False
        sleeper.sleeps_on = None

    def unlock(self, task: Task) -> None:
        for other in self.lock.release():
            self.count["mmu_lock_wait_ns"] += task.time - other.time
            self.wake(other, task.time)

    def unlock_page(self, task: Task, page: int) -> None:
        for other in self.tasks:
            if other.sleeps_on == page:
                self.wake(other, task.time)
