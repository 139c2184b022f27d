"""mmu_lock as a fair reader/writer lock in virtual time (queued rwlock: first come, first served); mmap_lock; page locks."""

from kernels.contention import own_line
from kernels.cores import sleep, wake_up
from kernels.jit import jit
from kernels.schedule import plan_event
from kernels.spec import NEVER, Counter, Cpu, MmapLock, Vm
from kernels.state import Env, Machine


@jit
def acquire(m: Machine, env: Env, actor: int, write: int) -> bool:
    """Ask for mmu_lock at the actor's time. True: held, in the same event unless the lock's cache line delays the actor, which
    settle() sees to. False: the actor spins until release() grants the lock."""
    m.counters[Counter.MMU_LOCK_WRITE if write else Counter.MMU_LOCK_READ] += 1
    vm = m.vm
    line_ns = own_line(m, env, actor, Vm.MMU_LINE_OWNER)
    idle = vm[Vm.QUEUE_HEAD] == vm[Vm.QUEUE_TAIL] and not vm[Vm.WRITER]
    if idle and not (write and vm[Vm.READERS] > 0):
        take(m, write, m.cpu[actor, Cpu.TIME])
        vm[Vm.DELAY] += line_ns
        return True
    m.queue[vm[Vm.QUEUE_TAIL]] = actor * 2 + write
    vm[Vm.QUEUE_TAIL] = (vm[Vm.QUEUE_TAIL] + 1) % len(m.queue)
    m.cpu[actor, Cpu.WAIT_TIME] = m.cpu[actor, Cpu.TIME] + line_ns
    m.cpu[actor, Cpu.TIME] = NEVER
    return False


@jit
def take(m: Machine, write: int, now: int) -> None:
    if write:
        m.vm[Vm.WRITER] = 1
        m.vm[Vm.WRITER_SINCE] = now
    else:
        m.vm[Vm.READERS] += 1


@jit
def release(m: Machine, actor: int, write: int) -> None:
    """Give mmu_lock back at the actor's time and grant it to the head of the queue: one writer, or all readers before one."""
    vm = m.vm
    now = m.cpu[actor, Cpu.TIME]
    if write:
        vm[Vm.WRITER] = 0
        m.counters[Counter.MMU_LOCK_WRITE_HOLD_NS] += now - vm[Vm.WRITER_SINCE]
    else:
        vm[Vm.READERS] -= 1
    while vm[Vm.QUEUE_HEAD] != vm[Vm.QUEUE_TAIL] and not vm[Vm.WRITER]:
        head = m.queue[vm[Vm.QUEUE_HEAD]]
        if head & 1 and vm[Vm.READERS] > 0:
            return
        vm[Vm.QUEUE_HEAD] = (vm[Vm.QUEUE_HEAD] + 1) % len(m.queue)
        take(m, head & 1, now)
        wake(m, head >> 1, now)


@jit
def wake(m: Machine, actor: int, now: int) -> None:
    ready = m.cpu[actor, Cpu.WAIT_TIME]
    m.counters[Counter.MMU_LOCK_WAIT_NS] += max(0, now - ready)
    m.cpu[actor, Cpu.TIME] = max(now, ready)
    plan_event(m, actor)


@jit
def wait_for_page(m: Machine, env: Env, actor: int, page: int) -> None:
    """Sleep until wake_page_waiters(): a folio lock (shmem) or hugetlb_fault_mutex of that page."""
    m.cpu[actor, Cpu.WAIT_PAGE] = page
    m.vm[Vm.PAGE_WAITERS] += 1
    sleep(m, env, actor)


@jit
def wake_page_waiters(m: Machine, env: Env, actor: int, page: int) -> None:
    """The actor is done with the page: all that wait for it go on at its time."""
    if m.vm[Vm.PAGE_WAITERS] == 0:
        return
    for other in range(m.vm[Vm.ACTORS]):
        if m.cpu[other, Cpu.WAIT_PAGE] == page:
            m.cpu[other, Cpu.WAIT_PAGE] = -1
            m.vm[Vm.PAGE_WAITERS] -= 1
            wake_up(m, env, other, m.cpu[actor, Cpu.TIME], m.cpu[actor, Cpu.TIME])


@jit
def lock_mmap_read(m: Machine, env: Env, actor: int) -> bool:
    """Slow GUP takes mmap_lock; False: the actor goes on when it has the lock's cache line, or sleeps, since a writer
    (khugepaged) holds the lock or waits for it."""
    c = m.cpu[actor]
    if c[Cpu.MMAP] == MmapLock.READ:
        return True
    line_ns = own_line(m, env, actor, Vm.MMAP_LINE_OWNER)
    if m.vm[Vm.MMAP_WRITER] != MmapLock.NONE:
        wait_for_mmap(m, env, actor, line_ns)
        return False
    c[Cpu.MMAP] = MmapLock.READ
    m.vm[Vm.MMAP_READERS] += 1
    m.vm[Vm.DELAY] += line_ns
    return line_ns == 0


@jit
def wait_for_mmap(m: Machine, env: Env, actor: int, line_ns: int) -> None:
    """Sleep until grant_mmap()."""
    m.cpu[actor, Cpu.MMAP] = MmapLock.WAITS
    m.cpu[actor, Cpu.WAIT_TIME] = m.cpu[actor, Cpu.TIME] + line_ns
    sleep(m, env, actor)


@jit
def unlock_mmap_read(m: Machine, env: Env, actor: int) -> None:
    """The last reader hands mmap_lock to a waiting writer."""
    m.cpu[actor, Cpu.MMAP] = MmapLock.NONE
    m.vm[Vm.MMAP_READERS] -= 1
    if m.vm[Vm.MMAP_READERS] == 0:
        for other in range(m.vm[Vm.ACTORS], m.vm[Vm.ACTORS] + m.vm[Vm.DAEMONS]):
            if m.cpu[other, Cpu.MMAP] == MmapLock.WAITS:
                m.vm[Vm.MMAP_WRITER] = MmapLock.WRITE
                grant_mmap(m, env, other, MmapLock.WRITE, m.cpu[actor, Cpu.TIME])


@jit
def grant_mmap(m: Machine, env: Env, actor: int, how: int, now: int) -> None:
    c = m.cpu[actor]
    m.counters[Counter.MMAP_LOCK_WAIT_NS] += max(0, now - c[Cpu.WAIT_TIME])
    c[Cpu.MMAP] = how
    wake_up(m, env, actor, now, max(now, c[Cpu.WAIT_TIME]))


@jit
def lock_mmap_write(m: Machine, env: Env, actor: int) -> bool:
    """khugepaged takes mmap_lock; False: it waits for the cache line, or sleeps until the readers are gone, and keeps new ones out."""
    c = m.cpu[actor]
    if c[Cpu.MMAP] == MmapLock.WRITE:
        return True
    line_ns = own_line(m, env, actor, Vm.MMAP_LINE_OWNER)
    if m.vm[Vm.MMAP_READERS] > 0:
        m.vm[Vm.MMAP_WRITER] = MmapLock.WAITS
        wait_for_mmap(m, env, actor, line_ns)
        return False
    m.vm[Vm.MMAP_WRITER] = MmapLock.WRITE
    c[Cpu.MMAP] = MmapLock.WRITE
    m.vm[Vm.DELAY] += line_ns
    return line_ns == 0


@jit
def unlock_mmap_write(m: Machine, env: Env, actor: int) -> None:
    """All sleeping readers go on at the writer's time."""
    m.vm[Vm.MMAP_WRITER] = MmapLock.NONE
    m.cpu[actor, Cpu.MMAP] = MmapLock.NONE
    for other in range(m.vm[Vm.ACTORS]):
        if m.cpu[other, Cpu.MMAP] == MmapLock.WAITS:
            m.vm[Vm.MMAP_READERS] += 1
            grant_mmap(m, env, other, MmapLock.READ, m.cpu[actor, Cpu.TIME])
