"""One access of one actor, event by event: touch, exit, GUP, host fault, install, retry.

Each `on_*` function is one event at the actor's time. It sets the actor's next phase and time; it returns True when
that next phase belongs to the same event (nothing else can happen in between).
Sources: kvm_tdp_page_fault(), kvm_faultin_pfn(), hva_to_pfn(), kvm_tdp_mmu_map() of 6.1 and 6.12.
"""

import numpy as np

from kernels.contention import move_memory, own_work, refill, settle
from kernels.cost import Cost
from kernels.jit import jit, shared
from kernels.locks import acquire, lock_mmap_read, release, unlock_mmap_read, wait_for_page, wake_page_waiters
from kernels.mmu import WRITABLE, access_allowed, fix_write_protected, install, leaf_allows, leaf_at, leaf_order, set_leaf
from kernels.mmu_notifier import (
    begin_replacement,
    flush_guest,
    in_flight_range,
    is_stale,
    on_change,
    on_change_done,
    on_change_held,
    on_end,
    on_end_held,
    on_start,
    on_start_done,
    on_start_held,
)
from kernels.policy import Behaviour
from kernels.primary_mmu import (
    begin_fault,
    commit_fault,
    count_pgfault,
    find_action,
    host_writable,
    releases_lock,
    settle_action,
)
from kernels.spec import (
    PAGE_BYTES,
    PML_ENTRIES,
    Action,
    Actor,
    Counter,
    Cpu,
    HostPmd,
    Mmu,
    Outcome,
    Phase,
    Setup,
    Spte,
    Stream,
    Vm,
)
from kernels.state import Env, Machine, host_state, record_latency
from kernels.workload import fetch_access

SPURIOUS = np.int64(Outcome.SPURIOUS)
FIXED = np.int64(Outcome.FIXED)
RETRY = np.int64(Outcome.RETRY)  # typed, so that finish_fault() is compiled once
READ, WRITE = np.int64(0), np.int64(1)
FIRST, SECOND = np.int64(0), np.int64(1)
SHORTEST_RETRY_NS = np.int64(1)  # while something is being invalidated, or that would never end


@jit
def on_touch(m: Machine, env: Env, actor: int) -> bool:
    """The next access."""
    if not fetch_access(m, env, actor):
        m.cpu[actor, Cpu.PHASE] = Phase.DONE
        return False
    return begin_access(m, env, actor)


@jit
def begin_access(m: Machine, env: Env, actor: int) -> bool:
    """Start the access that fetch_access() put into the actor's row."""
    c = m.cpu[actor]
    kind = c[Cpu.KIND]
    if kind == Actor.GUEST:
        m.counters[Counter.TOUCHES] += 1
        m.counters[Counter.WRITES if c[Cpu.WRITE] else Counter.READS] += 1
        return try_access(m, env, actor)
    if kind == Actor.PREFAULT:
        c[Cpu.PHASE] = Phase.FAULT
        c[Cpu.TIME] += env.costs[Cost.KVM_FAULT_NS]
    elif kind == Actor.OUTSIDE:
        m.counters[Counter.VMM_PGFAULT] += 1
        m.counters[Counter.BYTES_COPIED] += PAGE_BYTES
        c[Cpu.ACTION] = Action.COW_4K
        c[Cpu.PHASE] = Phase.START
        c[Cpu.TIME] += env.costs[Cost.COW_4K_NS] + env.costs[Cost.COPY_4K_NS] + env.costs[Cost.NOTIFIER_NS]
    elif kind == Actor.IDLE:
        c[Cpu.TIME] += env.stream[Stream.IDLE_NS]
        c[Cpu.INDEX] += 1
    elif kind == Actor.HOST and find_action(m, env, c[Cpu.PAGE], c[Cpu.WRITE]) == Action.NONE:
        c[Cpu.TIME] += env.costs[Cost.TOUCH_NS]
    else:
        c[Cpu.FOLL_WRITE] = c[Cpu.WRITE]
        c[Cpu.PHASE] = Phase.WALK
        c[Cpu.TIME] += env.costs[Cost.GUP_SLOW_NS]
    return False


@jit
def half_exit(env: Env, second: int) -> int:
    """Time from the guest into the fault handler, or (second half) back."""
    exit_ns = env.costs[Cost.VM_EXIT_NS]
    fault_ns = env.costs[Cost.KVM_FAULT_NS]
    first = exit_ns // 2 + fault_ns // 2
    return exit_ns + fault_ns - first if second else first


@jit
def try_access(m: Machine, env: Env, actor: int) -> bool:
    """Execute the instruction: it goes through, or exits with an EPT violation / nested page fault."""
    c = m.cpu[actor]
    page = c[Cpu.PAGE]
    order = leaf_order(m, page)
    leaf = leaf_at(m, page, order)
    if leaf_allows(leaf, c[Cpu.WRITE]) and not (c[Cpu.EXEC] and order and env.setup[Setup.NX]):
        if c[Cpu.WRITE] and leaf == Spte.RW_CLEAN:
            mark_dirty(m, env, actor, order)
        if not c[Cpu.AGAIN]:
            m.counters[Counter.HITS] += 1
        c[Cpu.AGAIN] = 0
        c[Cpu.TIME] += env.costs[Cost.TOUCH_NS] + env.stream[Stream.THINK_NS]
        return False
    c[Cpu.AGAIN] = 1
    c[Cpu.PML] = 0
    m.counters[Counter.EXITS] += 1
    m.counters[Counter.PF_TAKEN] += 1
    c[Cpu.PRESENT] = leaf != Spte.N
    c[Cpu.EXIT_TIME] = c[Cpu.TIME]
    c[Cpu.TIME] += half_exit(env, FIRST)
    c[Cpu.PHASE] = Phase.FAULT
    return False


@jit
def mark_dirty(m: Machine, env: Env, actor: int, order: int) -> None:
    """The processor sets the leaf's Dirty bit; with PML it logs the page, and exits when the log is full."""
    c = m.cpu[actor]
    set_leaf(m, c[Cpu.PAGE], order, WRITABLE)
    if not (m.vm[Vm.LOGGING] and env.setup[Setup.PML]):
        return
    m.vm[Vm.DIRTY] = 1
    c[Cpu.PML] += 1
    if c[Cpu.PML] == PML_ENTRIES:
        c[Cpu.PML] = 0
        m.counters[Counter.EXITS] += 1
        c[Cpu.TIME] += env.costs[Cost.VM_EXIT_NS] + env.costs[Cost.PML_FULL_NS]


@jit
def fast_page_fault(m: Machine, env: Env, actor: int) -> int:
    """A write that found a leaf when it exited: Outcome.SPURIOUS, FIXED, or RETRY for what needs the slow path."""
    c = m.cpu[actor]
    if env.setup[Setup.MMU] == Mmu.SHADOW or not (c[Cpu.PRESENT] and c[Cpu.WRITE]):
        return RETRY
    if access_allowed(m, c[Cpu.PAGE], WRITE):  # another vCPU was faster
        return SPURIOUS
    return FIXED if fix_write_protected(m, c[Cpu.PAGE]) else RETRY


@jit
def on_fault(m: Machine, env: Env, actor: int) -> bool:
    """fast_page_fault(), snapshot of the sequence, pre-check, first GUP-fast (always for write: the slot is writable)."""
    c = m.cpu[actor]
    fast = fast_page_fault(m, env, actor)
    if fast != RETRY:
        m.counters[Counter.PF_FAST] += 1
        return finish_fault(m, env, actor, fast)
    c[Cpu.SEQ] = m.vm[Vm.SEQ]
    if env.policy[Behaviour.STALE_PRECHECK] and in_flight_range(m, c[Cpu.PAGE]):
        return finish_fault(m, env, actor, RETRY)
    c[Cpu.FOLL_WRITE] = 1 if env.policy[Behaviour.ALWAYS_WRITABLE] else c[Cpu.WRITE]
    c[Cpu.TIME] += env.costs[Cost.GUP_FAST_NS]
    if host_writable(m, env, c[Cpu.PAGE]):
        m.counters[Counter.GUP_FAST] += 1
        c[Cpu.MAP_WRITABLE] = 1
        c[Cpu.PHASE] = Phase.MAP
    else:
        m.counters[Counter.GUP_SLOW] += 1
        c[Cpu.TIME] += env.costs[Cost.GUP_SLOW_NS]
        c[Cpu.PHASE] = Phase.WALK
    return False


@jit
def on_walk(m: Machine, env: Env, actor: int) -> bool:
    """Under mmap_lock, slow GUP looks at the host entry: done, or one more handle_mm_fault()."""
    if not lock_mmap_read(m, env, actor):
        return False
    c = m.cpu[actor]
    page = c[Cpu.PAGE]
    action = find_action(m, env, page, c[Cpu.FOLL_WRITE])
    if action == Action.NONE:
        c[Cpu.FAULTED] = 0
        unlock_mmap_read(m, env, actor)
        return finish_gup(m, env, actor)
    count_pgfault(m, env, actor)
    if action == Action.WAIT:
        c[Cpu.FAULTED] = 1
        wait_for_page(m, env, actor, lock_page(m, page))
        return False
    action = settle_action(m, env, page, action, c[Cpu.FOLL_WRITE])
    if action >= Action.COW_4K:
        begin_replacement(m, env, actor, action)
    else:
        c[Cpu.ACTION] = action
        refill(m, env, actor, action)
        ns = begin_fault(m, env, page, action)
        move_memory(m, env, actor)
        c[Cpu.TIME] += ns
        c[Cpu.PHASE] = Phase.COMMIT
    return False


@jit
def lock_page(m: Machine, page: int) -> int:
    """The page that stands for a page lock: the first of a huge page, or the page itself."""
    order = m.vm[Vm.HOST_ORDER]
    return page if host_state(m, page) == HostPmd.TBL else (page >> order) << order


@jit
def on_commit(m: Machine, env: Env, actor: int) -> bool:
    c = m.cpu[actor]
    commit_fault(m, env, c[Cpu.PAGE], c[Cpu.ACTION], c[Cpu.FOLL_WRITE])
    if releases_lock(c[Cpu.ACTION]):
        wake_page_waiters(m, env, actor, lock_page(m, c[Cpu.PAGE]))
    c[Cpu.PHASE] = Phase.WALK
    return True


@jit
def on_end_done(m: Machine, env: Env, actor: int) -> bool:
    """The pair is over. A split goes on in the same handle_mm_fault() with the page itself."""
    release(m, actor, WRITE)
    c = m.cpu[actor]
    done = c[Cpu.ACTION]
    if done == Action.COPY_HUGE:
        wake_page_waiters(m, env, actor, lock_page(m, c[Cpu.PAGE]))
    if done == Action.SPLIT_HUGE_ZERO or done == Action.SPLIT_THP:
        action = find_action(m, env, c[Cpu.PAGE], WRITE)
        if action == Action.COW_4K or action == Action.COPY_4K:
            begin_replacement(m, env, actor, action)
            return False
    c[Cpu.PHASE] = Phase.WALK
    return True


@jit
def finish_gup(m: Machine, env: Env, actor: int) -> bool:
    """Slow GUP has the page. A read tries once more for write: a writable entry makes a writable SPTE at once."""
    c = m.cpu[actor]
    if c[Cpu.KIND] == Actor.VMM:
        step_cursor(m, actor, m.vm[Vm.HOST_ORDER] if host_state(m, c[Cpu.PAGE]) != HostPmd.TBL else 0)
        return False
    if c[Cpu.KIND] == Actor.HOST:
        c[Cpu.TIME] += env.costs[Cost.TOUCH_NS]
        c[Cpu.PHASE] = Phase.TOUCH
        return False
    c[Cpu.MAP_WRITABLE] = host_writable(m, env, c[Cpu.PAGE])
    if not c[Cpu.FOLL_WRITE]:
        c[Cpu.TIME] += env.costs[Cost.GUP_FAST_NS]
    c[Cpu.PHASE] = Phase.MAP
    return False


@jit
def step_cursor(m: Machine, actor: int, order: int) -> None:
    """A VMM or prefault loop goes to the page after this mapping; the cursor counts in the slot."""
    c = m.cpu[actor]
    start = m.vm[Vm.SHIFT] if c[Cpu.KIND] == Actor.PREFAULT else 0  # leaves of KVM are aligned in the slot, the host's in the VMA
    after = ((((c[Cpu.PAGE] - start) >> order) + 1) << order) + start
    c[Cpu.INDEX] = after - m.vm[Vm.SHIFT]
    c[Cpu.PHASE] = Phase.TOUCH


@jit
def lock_mode(env: Env) -> int:
    """A fault takes mmu_lock for reading under the TDP MMU, for writing else."""
    return READ if env.setup[Setup.MMU] == Mmu.TDP else WRITE


@jit
def on_map(m: Machine, env: Env, actor: int) -> bool:
    """Second pre-check, then mmu_lock: for read under TDP, for write else."""
    if env.policy[Behaviour.STALE_PRECHECK] and is_stale(m, actor):
        return finish_fault(m, env, actor, RETRY)
    m.cpu[actor, Cpu.PHASE] = Phase.MAP_HELD
    return acquire(m, env, actor, lock_mode(env))


@jit
def on_map_held(m: Machine, env: Env, actor: int) -> bool:
    c = m.cpu[actor]
    c[Cpu.OUTCOME] = RETRY
    if not is_stale(m, actor):
        c[Cpu.OUTCOME], flushes = install(m, env, actor)
        for _ in range(flushes):
            flush_guest(m, env, actor)
    c[Cpu.TIME] += env.costs[Cost.MMU_LOCK_READ_NS]
    if lock_mode(env) == WRITE:
        c[Cpu.TIME] += env.costs[Cost.LEGACY_FAULT_NS]
    c[Cpu.PHASE] = Phase.MAP_DONE
    return False


@jit
def on_map_done(m: Machine, env: Env, actor: int) -> bool:
    release(m, actor, lock_mode(env))
    return finish_fault(m, env, actor, m.cpu[actor, Cpu.OUTCOME])


@jit
def retry_ns(m: Machine, ns: int) -> int:
    """What lies between two tries: time goes on, also where costs are 0."""
    return max(SHORTEST_RETRY_NS, ns) if m.vm[Vm.IN_PROGRESS] else ns


@jit
def finish_fault(m: Machine, env: Env, actor: int, outcome: int) -> bool:
    """Back into the guest, whatever the outcome; a prefault loops inside the kernel and counts no pf_*."""
    c = m.cpu[actor]
    if c[Cpu.KIND] == Actor.PREFAULT:
        if outcome == Outcome.RETRY:
            c[Cpu.PHASE] = Phase.FAULT
            c[Cpu.TIME] += retry_ns(m, env.costs[Cost.KVM_FAULT_NS])
        else:
            step_cursor(m, actor, leaf_order(m, c[Cpu.PAGE]))
        return False
    back_ns = half_exit(env, SECOND)
    if outcome == Outcome.RETRY:
        m.counters[Counter.PF_RETRY] += 1
        back_ns = retry_ns(m, back_ns)
    elif outcome == Outcome.FIXED:
        m.counters[Counter.PF_FIXED] += 1
    else:
        m.counters[Counter.PF_SPURIOUS] += 1
    record_latency(m, c[Cpu.TIME] - c[Cpu.EXIT_TIME] + own_work(m, env, actor, back_ns))
    c[Cpu.TIME] += back_ns
    c[Cpu.PHASE] = Phase.TOUCH
    return False


@shared
def run_phase(m: Machine, env: Env, actor: int) -> bool:
    """One phase of one actor, but for a fresh access; True if its next phase belongs to the same event."""
    phase = m.cpu[actor, Cpu.PHASE]
    if phase == Phase.TOUCH:  # the re-execution of an access that exited
        return try_access(m, env, actor)
    if phase == Phase.FAULT:
        return on_fault(m, env, actor)
    if phase == Phase.MAP:
        return on_map(m, env, actor)
    if phase == Phase.MAP_HELD:
        return on_map_held(m, env, actor)
    if phase == Phase.MAP_DONE:
        return on_map_done(m, env, actor)
    if phase == Phase.WALK:
        return on_walk(m, env, actor)
    if phase == Phase.COMMIT:
        return on_commit(m, env, actor)
    return run_notifier_phase(m, env, actor, phase)


@jit
def run_notifier_phase(m: Machine, env: Env, actor: int, phase: int) -> bool:
    if phase == Phase.START:
        return on_start(m, env, actor)
    if phase == Phase.START_HELD:
        return on_start_held(m, env, actor)
    if phase == Phase.START_DONE:
        return on_start_done(m, env, actor)
    if phase == Phase.CHANGE:
        return on_change(m, env, actor)
    if phase == Phase.CHANGE_HELD:
        return on_change_held(m, env, actor)
    if phase == Phase.CHANGE_DONE:
        return on_change_done(m, env, actor)
    if phase == Phase.END:
        return on_end(m, env, actor)
    if phase == Phase.END_HELD:
        return on_end_held(m, env, actor)
    return on_end_done(m, env, actor)


@jit
def step_phase(m: Machine, env: Env, actor: int) -> bool:
    """run_phase() in time: with what the phase waits for."""
    c = m.cpu[actor]
    begin = c[Cpu.TIME]
    touching = c[Cpu.PHASE] == Phase.TOUCH
    going = on_touch(m, env, actor) if touching and not c[Cpu.AGAIN] else run_phase(m, env, actor)
    going = settle(m, env, actor, begin) and going
    if not touching:
        c[Cpu.GUEST_FROM] = c[Cpu.TIME]  # in_guest() asks for the phase first
    return going


@shared
def finish_access(m: Machine, env: Env, actor: int, budget: int) -> bool:
    """All phases of the access that begin_access() began, with nobody else there. False: more than `budget` events."""
    c = m.cpu[actor]
    while c[Cpu.PHASE] != Phase.TOUCH or c[Cpu.AGAIN]:
        m.vm[Vm.EVENTS] += 1
        if m.vm[Vm.EVENTS] > budget:
            return False
        begin = c[Cpu.TIME]
        run_phase(m, env, actor)
        settle(m, env, actor, begin)
    return True
