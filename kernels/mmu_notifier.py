"""One invalidation as KVM sees it: start, change_pte, end (virt/kvm/kvm_main.c), and the flushes it causes.

The sequence (mmu_invalidate_seq) moves at the end, not at the start. The range of what is in progress is a union that
shrinks only when nothing is in progress any more.
"""

import numpy as np

from kernels.contention import is_working, lock_pmd, move_memory, refill
from kernels.cost import Cost
from kernels.jit import jit, shared
from kernels.locks import acquire, release
from kernels.mmu import prefetch_4k, zap
from kernels.policy import Behaviour
from kernels.primary_mmu import LARGE, SMALL, clear, copy, region_bytes, replace_entry
from kernels.schedule import plan_event
from kernels.spec import (
    Action,
    Actor,
    Counter,
    Cpu,
    HostPmd,
    Mmu,
    Phase,
    Setup,
    Vm,
)
from kernels.state import Env, Machine, host_pte, host_region, in_guest, slot_end

NOTHING, TOUCHED = np.int64(0), np.int64(1)
FOR_WRITE = np.int64(1)


@jit
def in_flight_range(m: Machine, page: int) -> bool:
    """An invalidation is in progress, and the page lies in the union of their ranges."""
    vm = m.vm
    return vm[Vm.IN_PROGRESS] > 0 and vm[Vm.RANGE_LO] <= page < vm[Vm.RANGE_HI]


@jit
def is_stale(m: Machine, actor: int) -> bool:
    """mmu_invalidate_retry_gfn(): in the range in progress, or the sequence moved since the fault's snapshot."""
    c = m.cpu[actor]
    return in_flight_range(m, c[Cpu.PAGE]) or m.vm[Vm.SEQ] != c[Cpu.SEQ]


@shared
def kick(m: Machine, env: Env, actor: int, now: int) -> None:
    """A vCPU in the guest takes an interrupt: one exit, and its time; until it is back, requests need no other."""
    c = m.cpu[actor]
    m.counters[Counter.EXITS] += 1
    c[Cpu.PML] = 0
    c[Cpu.TIME] += env.costs[Cost.TLB_VICTIM_NS]
    c[Cpu.GUEST_FROM] = now + env.costs[Cost.TLB_VICTIM_NS]
    plan_event(m, actor)


@jit
def shoot_down(m: Machine, env: Env, targets: int) -> None:
    """The present event waits for so many CPUs to flush their TLBs; none at all is free."""
    if targets == 0:
        return
    ns = env.costs[Cost.TLB_FLUSH_NS] + (targets - 1) * env.costs[Cost.TLB_FLUSH_TARGET_NS]
    m.counters[Counter.TLB_IPIS] += targets
    m.counters[Counter.FLUSH_NS] += ns
    m.vm[Vm.DELAY] += ns


@jit
def flush_guest(m: Machine, env: Env, actor: int) -> None:
    """kvm_flush_remote_tlbs(): kicks every other vCPU that is in the guest."""
    m.counters[Counter.REMOTE_TLB_FLUSH_REQUESTS] += 1
    targets = NOTHING
    now = m.cpu[actor, Cpu.TIME]
    for other in range(m.vm[Vm.ACTORS]):
        if in_guest(m, other, now):
            kick(m, env, other, now)
            targets += 1
    if targets > 0:
        m.counters[Counter.REMOTE_TLB_FLUSH] += 1
    shoot_down(m, env, targets)


@jit
def is_running(m: Machine, actor: int) -> bool:
    """The VMM's page table is on a CPU because of the actor (mm_cpumask)."""
    return is_working(m, actor) and m.cpu[actor, Cpu.KIND] != Actor.IDLE


@jit
def flush_host(m: Machine, env: Env, actor: int) -> None:
    """flush_tlb_mm_range() of the VMM's own page table: every other thread of it on a CPU, in the guest or not."""
    targets = NOTHING
    now = m.cpu[actor, Cpu.TIME]
    for other in range(m.vm[Vm.ACTORS]):
        if other != actor and is_running(m, other):
            targets += 1
            if in_guest(m, other, now):
                kick(m, env, other, now)
    shoot_down(m, env, targets)


@shared
def begin_replacement(m: Machine, env: Env, actor: int, action: int) -> None:
    """handle_mm_fault() begins an action that needs an invalidation: what comes before invalidate_range_start."""
    costs = env.costs
    c = m.cpu[actor]
    ns = costs[Cost.NOTIFIER_NS]
    if action == Action.COW_4K:
        ns += costs[Cost.COW_4K_NS] + clear(m, env, SMALL)
    elif action == Action.COPY_4K:
        ns += costs[Cost.COW_4K_NS] + copy(m, env, SMALL)
    elif action == Action.THP_FOR_HUGE_ZERO:
        ns += costs[Cost.HUGE_ZERO_THP_NS] + clear(m, env, LARGE)
    elif action == Action.COPY_HUGE:
        m.host_pmd[host_region(m, c[Cpu.PAGE])] = HostPmd.HUGE_SH_BUSY
        ns += costs[Cost.HUGETLB_FAULT_NS] + copy(m, env, region_bytes(m))
    m.vm[Vm.ANON_VMA] = 1
    c[Cpu.OLD] = host_pte(m, c[Cpu.PAGE])
    c[Cpu.ACTION] = action
    refill(m, env, actor, action)
    move_memory(m, env, actor)
    c[Cpu.TIME] += ns
    c[Cpu.PHASE] = Phase.START


@jit
def lock_for(m: Machine, env: Env, actor: int, held: int) -> bool:
    """Ask for mmu_lock for write; the actor goes on in phase `held`. True: at once."""
    m.cpu[actor, Cpu.PHASE] = held
    return acquire(m, env, actor, FOR_WRITE)


@jit
def hold(m: Machine, env: Env, actor: int, done: int) -> bool:
    """Keep mmu_lock for a callback's work, and what that waits for."""
    m.cpu[actor, Cpu.TIME] += env.costs[Cost.MMU_LOCK_WRITE_NS]
    m.cpu[actor, Cpu.PHASE] = done
    return False


@jit
def on_start(m: Machine, env: Env, actor: int) -> bool:
    m.counters[Counter.INVALIDATE_RANGE_START] += 1
    if m.cpu[actor, Cpu.KIND] == Actor.OUTSIDE:  # no memslot overlaps: no lock, no sequence
        m.counters[Counter.COW_4K] += 1
        return plan_callback(m, env, actor, TOUCHED, NOTHING)
    return lock_for(m, env, actor, Phase.START_HELD)


@jit
def replaces_page(action: int) -> bool:
    """The pair is over one page, set with set_pte_at_notify(); all others are over the host's region."""
    cow = action == Action.COW_4K or action == Action.COPY_4K
    return cow or action == Action.KSM_PROTECT or action == Action.KSM_REPLACE


@jit
def region_of_slot(m: Machine, page: int) -> tuple[int, int]:
    """The part of the slot that lies in the page's host region, [first, end)."""
    order = m.vm[Vm.HOST_ORDER]
    first = (page >> order) << order
    return max(first, m.vm[Vm.SHIFT]), min(first + (np.int64(1) << order), slot_end(m))


@jit
def open_range(m: Machine, first: int, end: int) -> None:
    """kvm_mmu_invalidate_begin(): one more in progress; the range is a union."""
    vm = m.vm
    alone = vm[Vm.IN_PROGRESS] == 0
    vm[Vm.RANGE_LO] = first if alone else min(first, vm[Vm.RANGE_LO])
    vm[Vm.RANGE_HI] = end if alone else max(end, vm[Vm.RANGE_HI])
    vm[Vm.IN_PROGRESS] += 1


@jit
def on_start_held(m: Machine, env: Env, actor: int) -> bool:
    c = m.cpu[actor]
    first, end = c[Cpu.PAGE], c[Cpu.PAGE] + 1
    if not replaces_page(c[Cpu.ACTION]):
        first, end = region_of_slot(m, c[Cpu.PAGE])
    open_range(m, first, end)
    if zap(m, first, end):
        flush_guest(m, env, actor)
    return hold(m, env, actor, Phase.START_DONE)


@jit
def on_start_done(m: Machine, env: Env, actor: int) -> bool:
    release(m, actor, FOR_WRITE)
    c = m.cpu[actor]
    action = c[Cpu.ACTION]
    replaced = replace_entry(m, c[Cpu.PAGE], action, c[Cpu.OLD])
    ns = NOTHING
    if replaced:
        flush_host(m, env, actor)
    if action == Action.SPLIT_HUGE_ZERO or action == Action.SPLIT_THP:
        ns = env.costs[Cost.SPLIT_PMD_NS]
        lock_pmd(m, env, actor)
    return plan_callback(m, env, actor, np.int64(replaced and replaces_page(action)), ns)


@jit
def plan_callback(m: Machine, env: Env, actor: int, pte_replaced: int, ns: int) -> bool:
    """After the entry was replaced: change_pte where the kernel has it and a PTE was set, else the end."""
    change = pte_replaced and env.policy[Behaviour.CHANGE_PTE]
    m.cpu[actor, Cpu.PHASE] = Phase.CHANGE if change else Phase.END
    m.cpu[actor, Cpu.TIME] += ns + env.costs[Cost.NOTIFIER_NS]
    return False


@jit
def on_change(m: Machine, env: Env, actor: int) -> bool:
    m.counters[Counter.CHANGE_PTE] += 1
    if m.cpu[actor, Cpu.KIND] == Actor.OUTSIDE:
        return plan_callback(m, env, actor, NOTHING, NOTHING)
    return lock_for(m, env, actor, Phase.CHANGE_HELD)


@jit
def on_change_held(m: Machine, env: Env, actor: int) -> bool:
    """set_spte_gfn() finds nothing: start zapped it. Patch 2 makes an SPTE, for a vCPU's own CoW only."""
    kind = m.cpu[actor, Cpu.KIND]
    prefetches = env.policy[Behaviour.CHANGE_PTE_PREFETCH] and env.setup[Setup.MMU] == Mmu.TDP
    if prefetches and (kind == Actor.GUEST or kind == Actor.PREFAULT):
        prefetch_4k(m, m.cpu[actor, Cpu.PAGE])
    return hold(m, env, actor, Phase.CHANGE_DONE)


@jit
def on_change_done(m: Machine, env: Env, actor: int) -> bool:
    release(m, actor, FOR_WRITE)
    return plan_callback(m, env, actor, NOTHING, NOTHING)


@jit
def on_end(m: Machine, env: Env, actor: int) -> bool:
    m.counters[Counter.INVALIDATE_RANGE_END] += 1
    if m.cpu[actor, Cpu.KIND] == Actor.OUTSIDE:
        m.cpu[actor, Cpu.INDEX] += 1
        m.cpu[actor, Cpu.PHASE] = Phase.TOUCH
        return False
    return lock_for(m, env, actor, Phase.END_HELD)


@jit
def on_end_held(m: Machine, env: Env, actor: int) -> bool:
    m.vm[Vm.SEQ] += 1
    m.vm[Vm.IN_PROGRESS] -= 1
    return hold(m, env, actor, Phase.END_DONE)
