"""One invalidation as KVM sees it: start, change_pte, end (virt/kvm/kvm_main.c), and the flushes it causes.

The sequence (mmu_invalidate_seq) moves at the end, not at the start. The range of what is in progress is a union that
shrinks only when nothing is in progress any more.
"""

from kernels.cost import Cost
from kernels.jit import jit
from kernels.locks import acquire, release
from kernels.mmu import prefetch_4k, zap
from kernels.policy import Behaviour
from kernels.primary_mmu import Env, clear, replace_entry
from kernels.schedule import plan_event
from kernels.spec import (
    PAGE_BYTES,
    PMD_BYTES,
    PMD_ORDER,
    PMD_PAGES,
    Action,
    Actor,
    Counter,
    Cpu,
    Phase,
    Stream,
    Vm,
)
from kernels.state import Machine, in_guest


@jit
def in_flight_range(m: Machine, gfn: int) -> bool:
    """An invalidation is in progress, and the gfn lies in the union of their ranges."""
    vm = m.vm
    return vm[Vm.IN_PROGRESS] > 0 and vm[Vm.RANGE_LO] <= gfn < vm[Vm.RANGE_HI]


@jit
def is_stale(m: Machine, actor: int) -> bool:
    """mmu_invalidate_retry_gfn(): in the range in progress, or the sequence moved since the fault's snapshot."""
    c = m.cpu[actor]
    return in_flight_range(m, c[Cpu.GFN]) or m.vm[Vm.SEQ] != c[Cpu.SEQ]


@jit
def kick(m: Machine, env: Env, actor: int) -> None:
    """A vCPU in the guest takes an interrupt: one exit, and its time."""
    m.counters[Counter.EXITS] += 1
    m.cpu[actor, Cpu.TIME] += env.costs[Cost.TLB_VICTIM_NS]
    plan_event(m, actor)


@jit
def shootdown_ns(m: Machine, env: Env, targets: int) -> int:
    """Time of a synchronous shootdown of so many CPUs; none at all is free."""
    if targets == 0:
        return 0
    ns = env.costs[Cost.TLB_FLUSH_NS] + (targets - 1) * env.costs[Cost.TLB_FLUSH_TARGET_NS]
    m.counters[Counter.TLB_IPIS] += targets
    m.counters[Counter.FLUSH_NS] += ns
    return ns


@jit
def flush_guest(m: Machine, env: Env, actor: int) -> int:
    """kvm_flush_remote_tlbs(): kicks every other vCPU that is in the guest; returns ns."""
    m.counters[Counter.REMOTE_TLB_FLUSH_REQUESTS] += 1
    targets = 0
    if env.stream[Stream.ACTOR] == Actor.GUEST:
        for other in range(m.vm[Vm.ACTORS]):
            if other != actor and in_guest(m, other):
                kick(m, env, other)
                targets += 1
    if targets > 0:
        m.counters[Counter.REMOTE_TLB_FLUSH] += 1
    return shootdown_ns(m, env, targets)


@jit
def flush_host(m: Machine, env: Env, actor: int) -> int:
    """flush_tlb_mm_range() of the VMM's own page table: every other running thread of it, in the guest or not; returns ns."""
    guests = env.stream[Stream.ACTOR] == Actor.GUEST
    targets = 0
    for other in range(m.vm[Vm.ACTORS]):
        if other != actor and m.cpu[other, Cpu.PHASE] != Phase.DONE:
            targets += 1
            if guests and in_guest(m, other):
                kick(m, env, other)
    return shootdown_ns(m, env, targets)


@jit
def begin_replacement(m: Machine, env: Env, actor: int, action: int) -> None:
    """handle_mm_fault() begins an action that needs an invalidation: what comes before invalidate_range_start."""
    costs = env.costs
    ns = costs[Cost.NOTIFIER_NS]
    if action == Action.COW_4K:
        ns += costs[Cost.COW_4K_NS] + clear(m, env, PAGE_BYTES)
    elif action == Action.THP_FOR_HUGE_ZERO:
        ns += costs[Cost.HUGE_ZERO_THP_NS] + clear(m, env, PMD_BYTES)
    m.cpu[actor, Cpu.ACTION] = action
    m.cpu[actor, Cpu.TIME] += ns
    m.cpu[actor, Cpu.PHASE] = Phase.START


@jit
def lock_for(m: Machine, actor: int, held: int) -> bool:
    """Ask for mmu_lock for write; the actor goes on in phase `held`. True: at once."""
    m.cpu[actor, Cpu.PHASE] = held
    return acquire(m, actor, 1)


@jit
def hold(m: Machine, env: Env, actor: int, flush_ns: int, done: int) -> bool:
    """Keep mmu_lock for a callback's work and its flush."""
    ns = env.costs[Cost.MMU_LOCK_WRITE_NS] + flush_ns
    m.counters[Counter.MMU_LOCK_WRITE_HOLD_NS] += ns
    m.cpu[actor, Cpu.TIME] += ns
    m.cpu[actor, Cpu.PHASE] = done
    return False


@jit
def on_start(m: Machine, env: Env, actor: int) -> bool:
    m.counters[Counter.INVALIDATE_RANGE_START] += 1
    if env.stream[Stream.ACTOR] == Actor.OUTSIDE:  # no memslot overlaps: no lock, no sequence
        m.counters[Counter.COW_4K] += 1
        return plan_callback(m, env, actor, 1, 0)
    return lock_for(m, actor, Phase.START_HELD)


@jit
def on_start_held(m: Machine, env: Env, actor: int) -> bool:
    c = m.cpu[actor]
    lo = c[Cpu.GFN]
    hi = lo + 1
    if c[Cpu.ACTION] != Action.COW_4K:
        lo = (lo >> PMD_ORDER) << PMD_ORDER
        hi = min(lo + PMD_PAGES, len(m.pte))
    vm = m.vm
    alone = vm[Vm.IN_PROGRESS] == 0
    vm[Vm.RANGE_LO] = lo if alone else min(lo, vm[Vm.RANGE_LO])
    vm[Vm.RANGE_HI] = hi if alone else max(hi, vm[Vm.RANGE_HI])
    vm[Vm.IN_PROGRESS] += 1
    flush_ns = flush_guest(m, env, actor) if zap(m, lo, hi) else 0
    return hold(m, env, actor, flush_ns, Phase.START_DONE)


@jit
def on_start_done(m: Machine, env: Env, actor: int) -> bool:
    release(m, actor, 1)
    action = m.cpu[actor, Cpu.ACTION]
    replaced = replace_entry(m, m.cpu[actor, Cpu.GFN], action)
    ns = flush_host(m, env, actor) if replaced else 0
    if action == Action.SPLIT_HUGE_ZERO:
        ns += env.costs[Cost.SPLIT_PMD_NS]
    return plan_callback(m, env, actor, replaced and action == Action.COW_4K, ns)


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
    if env.stream[Stream.ACTOR] == Actor.OUTSIDE:
        return plan_callback(m, env, actor, 0, 0)
    return lock_for(m, actor, Phase.CHANGE_HELD)


@jit
def on_change_held(m: Machine, env: Env, actor: int) -> bool:
    """set_spte_gfn() finds nothing: start zapped it. Patch 2 makes an SPTE, for a vCPU's own CoW only."""
    if env.policy[Behaviour.CHANGE_PTE_PREFETCH] and env.stream[Stream.ACTOR] != Actor.VMM:
        prefetch_4k(m, m.cpu[actor, Cpu.GFN])
    return hold(m, env, actor, 0, Phase.CHANGE_DONE)


@jit
def on_change_done(m: Machine, env: Env, actor: int) -> bool:
    release(m, actor, 1)
    return plan_callback(m, env, actor, 0, 0)


@jit
def on_end(m: Machine, env: Env, actor: int) -> bool:
    m.counters[Counter.INVALIDATE_RANGE_END] += 1
    if env.stream[Stream.ACTOR] == Actor.OUTSIDE:
        m.cpu[actor, Cpu.INDEX] += 1
        m.cpu[actor, Cpu.PHASE] = Phase.TOUCH
        return False
    return lock_for(m, actor, Phase.END_HELD)


@jit
def on_end_held(m: Machine, env: Env, actor: int) -> bool:
    m.vm[Vm.SEQ] += 1
    m.vm[Vm.IN_PROGRESS] -= 1
    return hold(m, env, actor, 0, Phase.END_DONE)
