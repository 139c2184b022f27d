"""What actors of one step wait for besides the locks' holders: cache lines, short holds, CPUs (docs/model.md section 12).

All of it is made anew for each step, at time 0. reference_tasks.py asks for it on behalf of an actor, reference_mm.py on
behalf of a page fault.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kernels.reference_workload import FOR_ACTOR, draw, vcpu_key
from kernels.spec import NEVER, PAGE_BYTES, PMD_BYTES, Actor

REFILL = {PAGE_BYTES: 63, PMD_BYTES: 2}  # rmqueue_bulk(): pages that a CPU's list gets at one hold of zone->lock
MIN_SLICE_NS = 1000


@dataclass
class Thread:
    """A thread of the host: its clock, its CPU, and what that CPU keeps for it."""

    number: int
    kind: Actor
    time: int = 0  # of its next event; of one that waits for a lock: when it could go on at the earliest
    began: int = 0  # its last event
    spins: bool = False  # it holds mmu_lock or waits for it: no preemption
    on_cpu: bool = True
    entered: int = 0  # when it is back in the guest; off its CPU: how long after it has one again
    slice_end: int = NEVER
    left: int = 0  # off its CPU: ns of work to do
    queued: int = 0  # off its CPU: since when it waits for one
    free_pages: dict[int, int] = field(default_factory=lambda: dict.fromkeys(REFILL, 0))  # of the CPU's lists, by bytes of the page


@dataclass
class CacheLine:
    """The line that a lock's word is in: who wrote it last, and until when it travels."""

    owner: int = 0
    free: int = 0

    def take(self, asker: int, now: int, transfer_ns: int) -> int:
        """An atomic operation on the word; returns when it is through."""
        if self.owner == asker:
            return now
        self.owner = asker
        self.free = max(now, self.free) + transfer_ns
        return self.free


@dataclass
class ShortHold:
    """What one after the other has for a known time: zone->lock, a page table's lock, the memory bus."""

    free: int = 0

    def hold(self, now: int, ns: int) -> int:
        """Take it as soon as it is free; returns the wait."""
        wait = max(0, self.free - now)
        self.free = now + wait + ns
        return wait


class Cores:
    """Fewer CPUs than vCPUs: threads take turns, first come, first served."""

    def __init__(self, threads: Sequence[Thread], cpus: int, slice_ns: int, switch_ns: int, key: int) -> None:
        self.threads = threads
        self.cpus = cpus
        self.idle = 0  # of the CPUs; none while somebody is queued
        self.slice_ns = max(MIN_SLICE_NS, slice_ns)
        self.switch_ns = switch_ns
        self.wait_ns = 0  # summed over all who were queued
        self.queue = deque(threads[cpus:])
        for thread in threads[:cpus]:
            thread.slice_end = 1 + (draw(vcpu_key(key, thread.number), FOR_ACTOR, 0) >> 1) % self.slice_ns
        for thread in self.queue:
            thread.on_cpu = False

    @staticmethod
    def preemption(thread: Thread) -> int | None:
        """When its slice ends, if that is what happens to it next. One that ended under mmu_lock ends with the unlock."""
        end = max(thread.slice_end, thread.began)
        return end if thread.on_cpu and not thread.spins and thread.time > end else None

    def end_slice(self, thread: Thread, now: int) -> bool:
        """scheduler_tick(). False: nobody waits for the CPU, so the thread keeps it until somebody does."""
        if not self.queue:
            thread.slice_end = NEVER
            return False
        self.enqueue(thread, now)
        self.give_cpu(now)
        return True

    def enqueue(self, thread: Thread, now: int) -> None:
        """It wants a CPU; slices that had ended while nobody did end now."""
        thread.on_cpu = False
        thread.left = thread.time - now
        thread.entered = max(0, thread.entered - now)
        thread.queued = now
        self.queue.append(thread)
        for other in self.threads:
            if other.on_cpu and other.slice_end == NEVER:
                other.slice_end = now

    def leave(self, thread: Thread, now: int) -> None:
        """It sleeps or is done."""
        thread.on_cpu = False
        self.give_cpu(now)

    def give_cpu(self, now: int) -> None:
        """A CPU is free: whoever waits longest goes on there after the switch."""
        if not self.queue:
            self.idle += 1
            return
        head = self.queue.popleft()
        self.wait_ns += now - head.queued
        head.on_cpu = True
        head.time = now + self.switch_ns + head.left
        head.entered += now + self.switch_ns
        head.slice_end = now + self.switch_ns + self.slice_ns

    def wake(self, thread: Thread, now: int) -> None:
        """try_to_wake_up() of a sleeper whose next event is set: onto an idle CPU, or into the queue."""
        if not self.idle:
            self.enqueue(thread, now)
            return
        self.idle -= 1
        thread.on_cpu = True
        thread.slice_end = now + self.slice_ns
