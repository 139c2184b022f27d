"""Actors as generators, and the locks they share, in virtual time: what reference.py runs on.

A path is a generator that yields what its actor waits for: time to pass in the kernel, the guest to run, a lock, or
another task's page lock. Between two yields nothing else happens in the machine. The next event is the one with the
smallest (time, in flight before in the guest, actor number). Daemons (khugepaged, KSM) live on from step to step.
What an actor waits for on top of its own work is kept in reference_time.py.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from kernels.cost import Cost
from kernels.reference_config import Config
from kernels.reference_time import REFILL, CacheLine, Cores, ShortHold, Thread
from kernels.spec import PAGE_BYTES, PMD_PAGES, PUD_ORDER, Actor, Counter


@dataclass(frozen=True)
class Kernel:
    """Work in the kernel for so many ns, and a wait after it."""

    ns: int
    delay: int = 0


@dataclass(frozen=True)
class Guest:
    """In the guest (a VMM loop: between two pages) for so many ns; a flush can kick the vCPU meanwhile."""

    ns: int


@dataclass(frozen=True)
class Entry:
    """On the way back into the guest for so many ns; no flush needs to interrupt that."""

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
Wait: TypeAlias = Kernel | Guest | Entry | Rest | Take | SleepOnPage
Path: TypeAlias = Generator[Wait, None, T]  # a piece of the fault path that ends in a T


@dataclass
class Task(Thread):
    """One actor, and where it is."""

    path: Iterator[Wait] = field(default_factory=lambda: iter(()))
    in_guest: bool = False
    resting: bool = False
    asleep: bool = False
    done: bool = False
    sleeps_on: int | None = None
    pml: int = 0  # entries in the vCPU's page-modification log

    @property
    def works(self) -> bool:
        """It is on a CPU, if only to spin."""
        return self.on_cpu and not self.done and (self.spins or not self.asleep)

    def in_guest_at(self, now: int) -> bool:
        """It runs guest code then; a flush has to interrupt it."""
        return self.in_guest and self.entered <= now


@dataclass
class RwLock:
    """A fair rwlock, first come, first served: kvm->mmu_lock, and mmap_lock (whose only writer is khugepaged)."""

    wait_counter: str
    hold_counter: str | None  # of its writers
    spins: bool  # who waits for it keeps the CPU
    line: CacheLine = field(default_factory=CacheLine)
    readers: int = 0
    writer: bool = False
    since: int = 0  # when its writer got it
    queue: deque[tuple[Task, bool]] = field(default_factory=deque)

    def admits(self, write: bool) -> bool:
        return not self.writer and not (write and self.readers)

    def take(self, write: bool, now: int) -> None:
        self.writer = write
        self.readers += not write
        self.since = now

    def release(self, now: int) -> list[Task]:
        """Give it back (by the writer if there is one); returns who has it from now on."""
        if self.writer:
            self.writer = False
        else:
            self.readers -= 1
        woken = []
        while self.queue and self.admits(self.queue[0][1]):
            task, write = self.queue.popleft()
            self.take(write, now)
            woken.append(task)
        return woken


class Scheduler:
    """The actors of the present step, the daemons beside them, the locks they share, and what they count."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.costs = config.costs
        self.mmu_lock = RwLock("mmu_lock_wait_ns", "mmu_lock_write_hold_ns", spins=True)
        self.mmap_lock = RwLock("mmap_lock_wait_ns", None, spins=False)
        self.zone_lock, self.memory = ShortHold(), ShortHold()
        self.page_table_locks = defaultdict[int, ShortHold](ShortHold)  # of page tables that hold PMDs: one per GiB of the VMA
        self.cores: Cores | None = None  # where vCPUs take turns
        self.actors: list[Task] = []
        self.workers: list[Task] = []  # the actors that have something to do in the step
        self.siblings: dict[int, Task] = {}  # who has the core's other hardware thread, by an actor's number
        self.daemons: list[Task] = []
        self.who = Actor.GUEST
        self.key = 0  # of the step's random numbers
        self.cpus = 1  # that the step's actors have
        self.count = {c.name.lower(): 0 for c in Counter}

    # ---- A step ------------------------------------------------------------------------------------------------------

    def start_daemon(self, kind: Actor, path: Callable[[Task], Iterator[Wait]], first_ns: int) -> None:
        """The daemon's first event comes so late in the run."""
        daemon = Task(0, kind, time=first_ns, resting=True)
        daemon.path = path(daemon)
        self.daemons.append(daemon)

    def run(self, paths: Sequence[Callable[[Task], Iterator[Wait]] | None], who: Actor, max_events: int) -> int:
        """One step: all actors start at time 0, those without a path have nothing to do. Returns when the last one is done, in ns."""
        self.who = who
        self.actors = [Task(i, who, in_guest=path is not None, done=path is None) for i, path in enumerate(paths)]
        for task, path in zip(self.actors, paths, strict=True):
            task.path = path(task) if path else iter(())
        self.workers = [a for a in self.actors if not a.done]
        for number, daemon in enumerate(self.daemons, len(paths)):
            daemon.number = number
            daemon.time = max(0, daemon.time)
        self.start_afresh()
        events = 0
        while ready := self.ready():
            events += 1
            if events > max_events:
                raise RuntimeError(f"no end after {max_events} events")
            self.happen(min(ready, key=self.next_event))
        if not all(a.done for a in self.actors) or not all(d.resting for d in self.daemons):
            raise RuntimeError("all actors sleep")
        self.count["core_wait_ns"] += self.cores.wait_ns if self.cores else 0
        return max(a.time for a in self.actors)

    def start_afresh(self) -> None:
        """What is shared by the actors of one step: cache lines, short locks, the memory bus, CPUs."""
        self.mmu_lock.line, self.mmap_lock.line = CacheLine(), CacheLine()
        self.zone_lock, self.memory = ShortHold(), ShortHold()
        self.page_table_locks.clear()
        self.cpus = self.config.cpus(len(self.workers)) if self.who == Actor.GUEST else len(self.workers)
        self.cores, self.siblings = None, {}
        if self.cpus < len(self.workers):
            self.cores = Cores(self.workers, self.cpus, self.costs[Cost.TIME_SLICE_NS], self.costs[Cost.CONTEXT_SWITCH_NS], self.key)
        elif self.who == Actor.GUEST and self.config.cores is not None:  # a thread on each core, then the second ones
            for one, other in zip(self.workers, self.workers[self.config.cores :], strict=False):
                self.siblings |= {one.number: other, other.number: one}

    def pass_time(self, ns: int) -> None:
        """A step is over: times of the daemons count from the next one's start."""
        for daemon in self.daemons:
            daemon.time -= ns

    # ---- Events ------------------------------------------------------------------------------------------------------

    def ready(self) -> list[Task]:
        """Who can go on: when the step's own actors are done, the daemons, as long as one is in the middle of an operation."""
        going = [a for a in self.actors + self.daemons if a.on_cpu and not (a.done or a.asleep)]
        over = all(d.resting for d in self.daemons) and all(a.done for a in self.actors)
        return [] if over else going

    def next_event(self, task: Task) -> tuple[int, bool, int]:
        """Where it stands in the order of events: the end of its slice, or its own next one."""
        end = Cores.preemption(task)
        return (task.time, task.in_guest, task.number) if end is None else (end, False, task.number)

    def happen(self, task: Task) -> None:
        """The actor's next event."""
        end = Cores.preemption(task)
        if end is None or self.cores is None:
            self.advance(task)
            return
        in_guest = task.in_guest_at(end)
        if self.cores.end_slice(task, end) and in_guest:
            self.count["exits"] += 1
            task.pml = 0

    def advance(self, task: Task) -> None:
        """One event of the actor's own; if it sleeps then or is done, its CPU is free."""
        task.began = task.time
        task.resting = False
        self.follow(task)
        if self.cores and task.kind == Actor.GUEST and (task.done or (task.asleep and not task.spins)):
            self.cores.leave(task, task.began)

    def follow(self, task: Task) -> None:
        """Its path, until it has to wait."""
        for wait in task.path:
            match wait:
                case Take(lock, write):
                    if self.take_lock(task, lock, write):
                        continue
                case SleepOnPage(page):
                    task.sleeps_on = page
                    task.asleep = True
                case Kernel(ns, delay):
                    task.time += self.scaled(task, ns) + delay
                    task.in_guest = False
                case Guest(ns) | Entry(ns) | Rest(ns):
                    task.time += self.scaled(task, ns)
                    task.in_guest = not isinstance(wait, Rest)
                    task.resting = isinstance(wait, Rest)
                    if isinstance(wait, Entry):
                        task.entered = task.time
            return
        task.done = True
        task.in_guest = False

    def scaled(self, task: Task, ns: int) -> int:
        """What its own work takes: longer if another vCPU works on the same core now."""
        return ns * self.costs[Cost.SMT_NS] // 1000 if task.kind == Actor.GUEST and self.shares_core(task) else ns

    def shares_core(self, task: Task) -> bool:
        """Where CPUs are given from vCPU to vCPU: more of them are in use than there are cores."""
        if self.cores and self.config.cores is not None:
            return self.cores.cpus - self.cores.idle > self.config.cores
        return task.number in self.siblings and self.siblings[task.number].works

    # ---- Locks -------------------------------------------------------------------------------------------------------

    def take_lock(self, task: Task, lock: RwLock, write: bool) -> bool:
        """Ask for it. True if the task has it and goes on at once: the lock is free, its cache line the task's own."""
        now, others = task.time, self.cpus - 1
        if others:
            task.time = lock.line.take(task.number, now, self.costs[Cost.LINE_NS] + self.costs[Cost.LINE_CPU_NS] * others)
        task.spins |= lock.spins
        self.count["cache_line_wait_ns"] += task.time - now
        if lock.queue or not lock.admits(write):
            lock.queue.append((task, write))
            task.asleep = True
            return False
        lock.take(write, now)
        return task.time == now

    def take_mmu_lock(self, write: bool) -> Path[None]:
        self.count["mmu_lock_write" if write else "mmu_lock_read"] += 1
        yield Take(self.mmu_lock, write)

    def unlock(self, task: Task, lock: RwLock) -> None:
        task.spins &= not lock.spins
        if lock.writer and lock.hold_counter:
            self.count[lock.hold_counter] += task.time - lock.since
        for other in sorted(lock.release(task.time), key=lambda a: a.number):
            self.count[lock.wait_counter] += max(0, task.time - other.time)
            self.wake(other, task.time)

    def unlock_page(self, task: Task, page: int) -> None:
        for other in self.actors:
            if other.sleeps_on == page:
                self.wake(other, task.time)

    def wake(self, sleeper: Task, now: int) -> None:
        """It goes on, but not before the cache line of the lock it asked for has come."""
        sleeper.time = max(now, sleeper.time)
        sleeper.asleep = False
        sleeper.sleeps_on = None
        if self.cores and not sleeper.on_cpu:
            self.cores.wake(sleeper, now)

    # ---- Delays ------------------------------------------------------------------------------------------------------

    def refill(self, task: Task, nbytes: int) -> int:
        """rmqueue_pcplist(), rmqueue_bulk() for a page of that size; returns the wait for zone->lock."""
        if len(self.workers) == 1:
            return 0
        wait = 0
        if task.free_pages[nbytes] == 0:
            task.free_pages[nbytes] = REFILL[nbytes]
            wait = self.zone_lock.hold(task.time, self.costs[Cost.ZONE_LOCK_NS])
            self.count["zone_lock_wait_ns"] += wait
        task.free_pages[nbytes] -= 1
        return wait

    def move(self, task: Task, traffic: int, work_ns: int) -> int:
        """So many bytes go over the memory bus, all CPUs' together; returns what that takes longer than the CPU itself needs."""
        if not traffic:
            return 0
        alone = self.costs[Cost.MEMORY_2M_NS] * (traffic // PAGE_BYTES) // PMD_PAGES
        share = (self.cpus + len(self.daemons)) * alone  # when everybody else has as much to move
        through = min(share, self.memory.hold(task.time, alone) + alone)
        wait = max(0, through - self.scaled(task, work_ns))
        self.count["bandwidth_wait_ns"] += wait
        return wait

    def lock_page_table(self, task: Task, page: int) -> int:
        """pmd_lock() while a PMD is split; returns the wait."""
        wait = self.page_table_locks[page >> PUD_ORDER].hold(task.time, self.costs[Cost.SPLIT_PMD_NS])
        self.count["page_table_lock_wait_ns"] += wait
        return wait
