"""The VMM's own page table: what slow GUP finds there, and what handle_mm_fault() makes of it.

`action_table()` is the table of outcomes of handle_mm_fault() for one backing, setting and policy. `begin_fault()`
starts an action and says how long it takes; `commit_fault()` sets the entry where no notifier is involved;
`replace_entry()` does so inside an invalidation. An entry that changed in between makes the work void, as
pmd_none() and pte_same() under the page-table lock do in mm/memory.c and mm/huge_memory.c.
"""

from typing import NamedTuple

import numpy as np

from kernels.cost import Cost
from kernels.jit import jit
from kernels.policy import Behaviour
from kernels.spec import (
    PAGE_BYTES,
    PMD_BYTES,
    PMD_ORDER,
    Action,
    Actor,
    Backing,
    Counter,
    Cpu,
    Gauge,
    HostPmd,
    HostPte,
    Stream,
    ThpEnabled,
)
from kernels.state import Bytes, Int64s, Machine, host_pte, region_end, set_host_pte


class Env(NamedTuple):
    """What a step reads and never writes."""

    policy: Int64s  # (len(Behaviour),)
    costs: Int64s  # (len(Cost),)
    actions: Bytes  # (len(HostPmd), len(HostPte), 2): Action for [pmd, pte, write]
    stream: Int64s  # (len(Stream),)
    list_lo: Int64s  # (actors + 1,): touch_list of actor v is [list_lo[v], list_lo[v + 1])
    list_gfn: Int64s
    list_write: Bytes
    zipf_lo: Int64s  # (bins + 1,) first rank of each bin
    zipf_cut: Int64s  # (bins,) draws of 62 bits below it fall into this bin or an earlier one


class Traits(NamedTuple):
    """What a backing is to handle_mm_fault(), under one host setting."""

    thp: bool  # a fault on an empty PMD makes a THP
    hugetlb: bool
    shmem: bool


def traits_of(backing: Backing, thp_enabled: ThpEnabled) -> Traits:
    """`anonymous` carries MADV_NOHUGEPAGE, `anonymous_thp` MADV_HUGEPAGE (selftests, lib/kvm_util.c)."""
    thp = backing == Backing.ANONYMOUS_THP and thp_enabled != ThpEnabled.NEVER
    return Traits(thp, backing == Backing.ANONYMOUS_HUGETLB_2MB, backing == Backing.SHMEM)


def action_table(traits: Traits, use_zero_page: bool, huge_zero_write_thp: bool) -> Bytes:
    """Action for each (HostPmd, HostPte, write); shape (len(HostPmd), len(HostPte), 2). NONE: the walk is satisfied."""
    table = np.zeros((len(HostPmd), len(HostPte), 2), np.uint8)
    on_pte = {HostPte.NONE: (Action.MAP_ZERO, Action.ALLOC_4K), HostPte.Z_RO: (Action.NONE, Action.COW_4K)}
    if traits.shmem:
        on_pte[HostPte.NONE] = (Action.ALLOC_SHMEM, Action.ALLOC_SHMEM)
    on_pte[HostPte.SHM_BUSY] = (Action.WAIT, Action.WAIT)
    for pte, pair in on_pte.items():
        table[HostPmd.TBL, pte] = pair
    table[HostPmd.NONE] = table[HostPmd.TBL, HostPte.NONE]
    if traits.thp:
        table[HostPmd.NONE] = (Action.MAP_HUGE_ZERO if use_zero_page else Action.ALLOC_THP, Action.ALLOC_THP)
    if traits.hugetlb:
        table[HostPmd.NONE] = Action.ALLOC_HUGE
    table[HostPmd.HZ_RO, :, 1] = Action.THP_FOR_HUGE_ZERO if huge_zero_write_thp else Action.SPLIT_HUGE_ZERO
    table[HostPmd.HUGE_RO, :, 1] = Action.REUSE_HUGE
    table[HostPmd.HUGE_BUSY] = Action.WAIT
    return table


@jit
def find_action(m: Machine, env: Env, page: int, write: int) -> int:
    """What a walk for that access finds to do; Action.NONE: present with the rights asked for."""
    pmd = m.host_pmd[page >> PMD_ORDER]
    pte = host_pte(m, page) if pmd == HostPmd.TBL else 0
    return env.actions[pmd, pte, write]


@jit
def host_writable(m: Machine, env: Env, page: int) -> bool:
    """GUP-fast with FOLL_WRITE succeeds."""
    return find_action(m, env, page, 1) == Action.NONE


@jit
def count_pgfault(m: Machine, env: Env, actor: int, action: int) -> None:
    """One handle_mm_fault(), to the column of who called it; once only for a fault that slept on a page's lock."""
    if m.cpu[actor, Cpu.FAULTED]:
        m.cpu[actor, Cpu.FAULTED] = 0
        return
    pmd = m.host_pmd[m.cpu[actor, Cpu.GFN] >> PMD_ORDER]
    hugetlb = action == Action.ALLOC_HUGE or action == Action.REUSE_HUGE or pmd == HostPmd.HUGE_BUSY
    if hugetlb and not env.policy[Behaviour.HUGETLB_PGFAULT]:
        return
    guest = env.stream[Stream.ACTOR] == Actor.GUEST
    m.counters[Counter.PGFAULT if guest else Counter.VMM_PGFAULT] += 1


@jit
def clear(m: Machine, env: Env, nbytes: int) -> int:
    """Clear fresh memory; returns the time it takes."""
    ns = env.costs[Cost.CLEAR_2M_NS] if nbytes == PMD_BYTES else env.costs[Cost.CLEAR_4K_NS]
    m.counters[Counter.BYTES_CLEARED] += nbytes
    m.counters[Counter.CLEAR_NS] += ns
    return ns


@jit
def begin_fault(m: Machine, env: Env, page: int, action: int) -> int:
    """Allocate and clear for an action that ends in commit_fault(); returns ns until then."""
    costs = env.costs
    region = page >> PMD_ORDER
    if action == Action.MAP_HUGE_ZERO:
        return costs[Cost.HUGE_ZERO_MAP_NS]
    if action == Action.ALLOC_THP:
        return costs[Cost.THP_FAULT_NS] + clear(m, env, PMD_BYTES)
    if action == Action.REUSE_HUGE:
        return costs[Cost.REUSE_NS]
    if action == Action.ALLOC_HUGE:
        m.host_pmd[region] = HostPmd.HUGE_BUSY
        return costs[Cost.HUGETLB_FAULT_NS] + clear(m, env, PMD_BYTES)
    if m.host_pmd[region] == HostPmd.NONE:
        m.host_pmd[region] = HostPmd.TBL  # __pte_alloc() comes before the page
    if action == Action.MAP_ZERO:
        return costs[Cost.ZERO_MAP_NS]
    if action == Action.ALLOC_SHMEM:
        set_host_pte(m, page, HostPte.SHM_BUSY)
        return costs[Cost.SHMEM_FAULT_NS] + clear(m, env, PAGE_BYTES)
    return costs[Cost.ANON_FAULT_NS] + clear(m, env, PAGE_BYTES)


@jit
def hold_memory(m: Machine, nbytes: int, private: bool) -> None:
    m.gauges[Gauge.HELD_BYTES] += nbytes
    if private:
        m.gauges[Gauge.RSS_BYTES] += nbytes


@jit
def commit_pmd(m: Machine, page: int, action: int, write: int) -> None:
    region = page >> PMD_ORDER
    if action == Action.REUSE_HUGE:
        if m.host_pmd[region] == HostPmd.HUGE_RO:
            m.host_pmd[region] = HostPmd.HUGE_RW
            m.counters[Counter.COW_REUSE] += 1
    elif action == Action.ALLOC_HUGE:
        m.host_pmd[region] = HostPmd.HUGE_RW if write else HostPmd.HUGE_RO
        hold_memory(m, PMD_BYTES, False)
    elif m.host_pmd[region] != HostPmd.NONE:  # lost the race for the PMD
        if action == Action.ALLOC_THP:
            m.counters[Counter.BYTES_CLEARED_WASTED] += PMD_BYTES
    elif action == Action.ALLOC_THP:
        m.host_pmd[region] = HostPmd.THP_RW
        m.counters[Counter.THP_FAULT_ALLOC] += 1
        m.gauges[Gauge.ANON_HUGE_BYTES] += PMD_BYTES
        hold_memory(m, PMD_BYTES, True)
    else:
        m.host_pmd[region] = HostPmd.HZ_RO
        m.counters[Counter.HUGE_ZERO_MAPS] += 1


@jit
def commit_pte(m: Machine, page: int, action: int) -> None:
    if action == Action.ALLOC_SHMEM:
        set_host_pte(m, page, HostPte.SHM_RW)
        hold_memory(m, PAGE_BYTES, False)
    elif host_pte(m, page) != HostPte.NONE:  # lost the race for the PTE
        if action == Action.ALLOC_4K:
            m.counters[Counter.BYTES_CLEARED_WASTED] += PAGE_BYTES
    elif action == Action.ALLOC_4K:
        set_host_pte(m, page, HostPte.ANON_RW)
        hold_memory(m, PAGE_BYTES, True)
    else:
        set_host_pte(m, page, HostPte.Z_RO)
        m.counters[Counter.ZERO_PAGE_MAPS] += 1


@jit
def commit_fault(m: Machine, page: int, action: int, write: int) -> None:
    """Set the entry that begin_fault() prepared, unless somebody was faster."""
    if action == Action.MAP_ZERO or action == Action.ALLOC_4K or action == Action.ALLOC_SHMEM:
        commit_pte(m, page, action)
    else:
        commit_pmd(m, page, action, write)


@jit
def replace_entry(m: Machine, page: int, action: int) -> bool:
    """Replace a present entry inside an invalidation; False: it changed since it was read, the work was void."""
    region = page >> PMD_ORDER
    if action == Action.COW_4K:
        if m.host_pmd[region] != HostPmd.TBL or host_pte(m, page) != HostPte.Z_RO:
            m.counters[Counter.BYTES_CLEARED_WASTED] += PAGE_BYTES
            return False
        set_host_pte(m, page, HostPte.ANON_RW)
        m.counters[Counter.COW_4K] += 1
        hold_memory(m, PAGE_BYTES, True)
        return True
    if m.host_pmd[region] != HostPmd.HZ_RO:
        if action == Action.THP_FOR_HUGE_ZERO:
            m.counters[Counter.BYTES_CLEARED_WASTED] += PMD_BYTES
        return False
    if action == Action.SPLIT_HUGE_ZERO:
        m.host_pmd[region] = HostPmd.TBL
        for p in range(region << PMD_ORDER, region_end(m, region)):
            set_host_pte(m, p, HostPte.Z_RO)
        m.counters[Counter.THP_SPLIT_PMD] += 1
        return True
    m.host_pmd[region] = HostPmd.THP_RW
    m.counters[Counter.THP_FAULT_ALLOC] += 1
    m.gauges[Gauge.ANON_HUGE_BYTES] += PMD_BYTES
    hold_memory(m, PMD_BYTES, True)
    return True
