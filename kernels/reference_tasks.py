"""Actors as generators, and the locks they share, in virtual time: what reference.py runs on.

A path is a generator that yields what its actor waits for: time to pass in the kernel, the guest to run, a lock, or
another task's page lock. Between two yields nothing else happens in the machine. The next event is the one with the
smallest (time, in flight before in the guest, actor number). Daemons (khugepaged, KSM) live on from step to step.
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
class Rest:
    """A daemon is between two operations for so many ns: the step may end meanwhile."""

    ns: int


@dataclass(frozen=True)
class Take:
    lock: "RwLock"
    write: bool


@dataclass(frozen=True)
class SleepOnPage:
    """Another task works on that page: its folio lock (shmem) or hugetlb_fault_mutex."""

    page: int


T = TypeVar("T")
Wait: TypeAlias = Kernel | Guest | Rest | Take | SleepOnPage
Path: TypeAlias = Generator[Wait, None, T]  # a piece of the fault path that ends in a T


@dataclass
class Task:
    """One actor, and where it is."""

    number: int
    kind: Actor
    path: Iterator[Wait] = field(default_factory=lambda: iter(()))
    time: int = 0  # of its next event, or when it fell asleep
    in_guest: bool = False
    resting: bool = False
    asleep: bool = False
    done: bool = False
    sleeps_on: int | None = None
    pml: int = 0  # entries in the vCPU's page-modification log


@dataclass
class RwLock:
    """A fair rwlock, first come, first served: kvm->mmu_lock, and mmap_lock (whose only writer is khugepaged)."""

    wait_counter: str
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
    """The actors of the present step, the daemons beside them, the locks they share, and what they count."""

    def __init__(self) -> None:
        self.mmu_lock = RwLock("mmu_lock_wait_ns")
        self.mmap_lock = RwLock("mmap_lock_wait_ns")
        self.actors: list[Task] = []
        self.daemons: list[Task] = []
        self.who = Actor.GUEST
        self.count = {c.name.lower(): 0 for c in Counter}

    def start_daemon(self, kind: Actor, path: Callable[[Task], Iterator[Wait]], first_ns: int) -> None:
        """The daemon's first event comes so late in the run."""
        daemon = Task(0, kind, time=first_ns, resting=True)
        daemon.path = path(daemon)
        self.daemons.append(daemon)

    def run(self, paths: Sequence[Callable[[Task], Iterator[Wait]]], who: Actor, max_events: int) -> int:
        """One step: all actors start at time 0. Returns when the last one is done, in ns."""
        self.who = who
        self.actors = [Task(i, who, in_guest=True) for i in range(len(paths))]
        for task, path in zip(self.actors, paths, strict=True):
            task.path = path(task)
        for number, daemon in enumerate(self.daemons, len(paths)):
            daemon.number = number
            daemon.time = max(0, daemon.time)
        events = 0
        while ready := self.ready():
            events += 1
            if events > max_events:
                raise RuntimeError(f"no end after {max_events} events")
            self.advance(min(ready, key=lambda a: (a.time, a.in_guest, a.number)))
        if not all(a.done for a in self.actors) or not all(d.resting for d in self.daemons):
            raise RuntimeError("all actors sleep")
        return max(a.time for a in self.actors)

    def ready(self) -> list[Task]:
        """Who can go on: when the step's own actors are done, the daemons, as long as one is in the middle of an operation."""
        going = [a for a in self.actors + self.daemons if not (a.done or a.asleep)]
        over = all(d.resting for d in self.daemons) and all(a.done for a in self.actors)
        return [] if over else going

    def pass_time(self, ns: int) -> None:
        """A step is over: times of the daemons count from the next one's start."""
        for daemon in self.daemons:
            daemon.time -= ns

    def advance(self, task: Task) -> None:
        """One event of the actor: until it has to wait."""
        task.resting = False
        for wait in task.path:
            match wait:
                case Take(lock, write):
                    if not lock.queue and lock.admits(write):
                        lock.take(write)
                        continue
                    lock.queue.append((task, write))
                    task.asleep = True
                case SleepOnPage(page):
                    task.sleeps_on = page
                    task.asleep = True
                case Kernel(ns) | Guest(ns) | Rest(ns):
                    task.time += ns
                    task.in_guest = isinstance(wait, Guest)
                    task.resting = isinstance(wait, Rest)
            return
        task.done = True
        task.in_guest = False

    def take_mmu_lock(self, write: bool) -> Path[None]:
        self.count["mmu_lock_write" if write else "mmu_lock_read"] += 1
        yield Take(self.mmu_lock, write)

    def unlock(self, task: Task, lock: RwLock) -> None:
        for other in lock.release():
            self.count[lock.wait_counter] += task.time - other.time
            self.wake(other, task.time)

    def unlock_page(self, task: Task, page: int) -> None:
        for other in self.actors:
            if other.sleeps_on == page:
                self.wake(other, task.time)

    def wake(self, sleeper: Task, now: int) -> None:
        sleeper.time = now
        sleeper.asleep = False
        sleeper.sleeps_on = None
