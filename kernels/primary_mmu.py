"""The VMM's own page table: what a walk finds there, and what handle_mm_fault() makes of it.

`action_table()` is the table of outcomes of handle_mm_fault() for one backing, setting and policy. `begin_fault()`
starts an action and says how long it takes; `commit_fault()` sets the entry where no notifier is involved;
`replace_entry()` does so inside an invalidation. An entry that changed in between makes the work void, as
pmd_none() and pte_same() under the page-table lock do in mm/memory.c and mm/huge_memory.c.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from kernels.contention import add_traffic
from kernels.cost import Cost
from kernels.draws import SALT_THP, THP_KEY, draw, drawn_below
from kernels.jit import jit, shared
from kernels.memory import drop_page, take_huge, take_page, take_thp
from kernels.policy import Behaviour
from kernels.spec import (
    FAULT_AROUND_PAGES,
    PAGE_BYTES,
    PAGE_SHIFT,
    PMD_BYTES,
    PMD_ORDER,
    PMD_PAGES,
    Action,
    Actor,
    Backing,
    Counter,
    Cpu,
    Gauge,
    HostPmd,
    HostPte,
    Setup,
    Stream,
    ThpEnabled,
    Vm,
    packed,
)
from kernels.state import Bytes, Env, Machine, host_pte, host_region, host_state, lookup, set_host_pte


class Traits(NamedTuple):
    """What a backing is to handle_mm_fault(), under one host setting."""

    thp: bool = False  # a fault on an empty region makes a THP
    collapsible: bool = False  # the VMA may hold one, whatever the setting
    hugetlb: bool = False
    gigantic: bool = False  # 1 GiB pages
    shared: bool = False
    file: bool = False  # shmem or memfd: pages live in the page cache


@lru_cache
def traits_of(backing: Backing, thp_enabled: ThpEnabled) -> Traits:
    """`anonymous` carries MADV_NOHUGEPAGE, `anonymous_thp` MADV_HUGEPAGE (selftests, lib/kvm_util.c)."""
    table = {
        Backing.ANONYMOUS: Traits(),
        Backing.ANONYMOUS_THP: Traits(thp=thp_enabled != ThpEnabled.NEVER, collapsible=True),
        Backing.ANONYMOUS_DEFAULT: Traits(thp=thp_enabled == ThpEnabled.ALWAYS, collapsible=True),
        Backing.ANONYMOUS_HUGETLB_2MB: Traits(hugetlb=True),
        Backing.ANONYMOUS_HUGETLB_1GB: Traits(hugetlb=True, gigantic=True),
        Backing.SHARED_HUGETLB_2MB: Traits(hugetlb=True, shared=True),
        Backing.SHARED_HUGETLB_1GB: Traits(hugetlb=True, gigantic=True, shared=True),
        Backing.SHMEM: Traits(shared=True, file=True),
        Backing.SHMEM_THP: Traits(thp=True, collapsible=True, shared=True, file=True),
        Backing.PRIVATE_MEMFD: Traits(file=True),
    }
    return table[backing]


def pte_actions(traits: Traits) -> dict[HostPte, tuple[Action, Action]]:
    """Action for a read and for a write of a page below a page table."""
    on = dict.fromkeys((HostPte.ANON_SH, HostPte.ANON_TSH, HostPte.KSM_RO, HostPte.FILE_RO), (Action.NONE, Action.COPY_4K))
    on[HostPte.NONE] = (Action.MAP_ZERO, Action.ALLOC_4K)
    on[HostPte.Z_RO] = (Action.NONE, Action.COW_4K)
    on[HostPte.ANON_EX] = (Action.NONE, Action.REUSE_4K)
    on[HostPte.CACHED] = (Action.MAP_CACHED, Action.MAP_CACHED if traits.shared else Action.COW_FILE)
    on[HostPte.SHM_BUSY] = (Action.WAIT, Action.WAIT)
    if traits.file:
        on[HostPte.NONE] = (Action.ALLOC_SHMEM, Action.ALLOC_SHMEM) if traits.shared else (Action.READ_FILE, Action.COW_FILE)
    return on


def empty_actions(traits: Traits, use_zero_page: bool) -> tuple[Action, Action] | None:
    """Action for a read and for a write of a region without a page table; None: as for an empty page."""
    if traits.hugetlb:
        return Action.ALLOC_HUGE, Action.ALLOC_HUGE
    if not traits.thp:
        return None
    if traits.file:
        return Action.ALLOC_SHMEM_THP, Action.ALLOC_SHMEM_THP
    return (Action.MAP_HUGE_ZERO if use_zero_page else Action.ALLOC_THP), Action.ALLOC_THP


@lru_cache
def action_table(traits: Traits, use_zero_page: bool, huge_zero_write_thp: bool) -> Bytes:
    """Action for each (HostPmd, HostPte, write); shape (len(HostPmd), len(HostPte), 2), read only. NONE: the walk is satisfied."""
    table = np.zeros((len(HostPmd), len(HostPte), 2), np.uint8)
    for pte, pair in pte_actions(traits).items():
        table[HostPmd.TBL, pte] = pair
    table[HostPmd.NONE] = empty_actions(traits, use_zero_page) or table[HostPmd.TBL, HostPte.NONE]
    on_write = {
        HostPmd.HZ_RO: Action.THP_FOR_HUGE_ZERO if huge_zero_write_thp else Action.SPLIT_HUGE_ZERO,
        HostPmd.THP_EX: Action.REUSE_THP,
        HostPmd.THP_SH: Action.SPLIT_THP,
        HostPmd.HUGE_RO: Action.REUSE_HUGE,
        HostPmd.HUGE_SH: Action.COPY_HUGE,
        HostPmd.HUGE_SH_BUSY: Action.WAIT,
    }
    for pmd, action in on_write.items():
        table[pmd, :, 1] = action
    table[HostPmd.CACHED] = Action.MAP_CACHED_HUGE
    table[HostPmd.HUGE_BUSY] = table[HostPmd.COLLAPSING] = Action.WAIT
    table.flags.writeable = False
    return table


SMALL, LARGE = np.int64(PAGE_BYTES), np.int64(PMD_BYTES)
FOR_WRITE = np.int64(1)
HOST_LEAF = np.int64(packed(dict.fromkeys(range(HostPmd.HZ_RO, HostPmd.SHM_THP + 1), 1)))

# What a page becomes when the leaf above it is split: __split_huge_zero_page_pmd(), __split_huge_pmd_locked().
SPLIT_PTE = np.int64(packed({HostPmd.HZ_RO: HostPte.Z_RO, HostPmd.THP_RW: HostPte.ANON_TRW, HostPmd.THP_SH: HostPte.ANON_TSH}))


@jit
def find_action(m: Machine, env: Env, page: int, write: int) -> int:
    """What a walk for that access finds to do; Action.NONE: present with the rights asked for."""
    pmd = host_state(m, page)
    pte = host_pte(m, page) if pmd == HostPmd.TBL else 0
    return np.int64(env.actions[pmd, pte, write])


@jit
def host_writable(m: Machine, env: Env, page: int) -> bool:
    """GUP-fast with FOLL_WRITE succeeds."""
    return find_action(m, env, page, FOR_WRITE) == Action.NONE


@jit
def count_pgfault(m: Machine, env: Env, actor: int) -> None:
    """One handle_mm_fault(), to the column of who called it; once only for a fault that slept on a page's lock."""
    c = m.cpu[actor]
    if c[Cpu.FAULTED]:
        c[Cpu.FAULTED] = 0
        return
    if env.setup[Setup.HUGETLB] and not env.policy[Behaviour.HUGETLB_PGFAULT] and c[Cpu.KIND] != Actor.HOST:
        return
    m.counters[Counter.PGFAULT if c[Cpu.KIND] == Actor.GUEST else Counter.VMM_PGFAULT] += 1


@jit
def clear(m: Machine, env: Env, nbytes: int) -> int:
    """Clear fresh memory; returns the time it takes."""
    ns = env.costs[Cost.CLEAR_4K_NS] if nbytes == PAGE_BYTES else env.costs[Cost.CLEAR_2M_NS] * (nbytes // PMD_BYTES)
    m.counters[Counter.BYTES_CLEARED] += nbytes
    m.counters[Counter.CLEAR_NS] += ns
    add_traffic(m, nbytes, ns)
    return ns


@jit
def copy(m: Machine, env: Env, nbytes: int) -> int:
    """Copy memory; returns the time it takes."""
    ns = env.costs[Cost.COPY_4K_NS] if nbytes == PAGE_BYTES else env.costs[Cost.COPY_2M_NS] * (nbytes // PMD_BYTES)
    m.counters[Counter.BYTES_COPIED] += nbytes
    add_traffic(m, 2 * nbytes, ns)
    return ns


@jit
def region_bytes(m: Machine) -> int:
    """Bytes of a host region: of a hugetlb page."""
    return 1 << (m.vm[Vm.HOST_ORDER] + PAGE_SHIFT)


@jit
def thp_fails(env: Env, region: int) -> bool:
    """The 2M allocation for that region fails: a draw of the step, the same in every configuration."""
    return drawn_below(draw(env.stream[Stream.KEY] ^ THP_KEY, SALT_THP, region), env.setup[Setup.THP_FAILURE_CUT])


@jit
def is_last_subpage(m: Machine, env: Env, page: int) -> bool:
    """The page is the only part of its THP that anybody still maps, on a kernel that reuses it then."""
    if not env.policy[Behaviour.LAST_SUBPAGE_REUSE] or m.vm[Vm.CHILD] or host_pte(m, page) != HostPte.ANON_TSH:
        return False
    first = (page >> PMD_ORDER) << PMD_ORDER
    mapped = 0
    for p in range(first, first + PMD_PAGES):
        mapped += host_pte(m, p) == HostPte.ANON_TSH or host_pte(m, p) == HostPte.ANON_TRW
    return mapped == 1


@jit
def settle_action(m: Machine, env: Env, page: int, action: int, write: int) -> int:
    """The action, or what the fault does instead: no huge page can be had, or a page need not be copied."""
    if is_last_subpage(m, env, page):
        return Action.REUSE_4K
    needs_thp = action == Action.ALLOC_THP or action == Action.ALLOC_SHMEM_THP or action == Action.THP_FOR_HUGE_ZERO
    region = host_region(m, page)
    if not needs_thp or not thp_fails(env, region):
        return action
    if action != Action.ALLOC_SHMEM_THP:
        m.counters[Counter.THP_FAULT_FALLBACK] += 1
        m.vm[Vm.ANON_VMA] = 1
    if action == Action.THP_FOR_HUGE_ZERO:
        return Action.SPLIT_HUGE_ZERO
    m.host_pmd[region] = HostPmd.TBL
    return np.int64(env.actions[HostPmd.TBL, HostPte.NONE, write])


@jit
def begin_fault(m: Machine, env: Env, page: int, action: int) -> int:
    """Allocate, clear and copy for an action that ends in commit_fault(); returns ns until then."""
    if action == Action.MAP_HUGE_ZERO or action == Action.ALLOC_THP or action == Action.ALLOC_SHMEM_THP or action == Action.ALLOC_HUGE:
        return begin_huge(m, env, page, action)
    costs = env.costs
    if action >= Action.REUSE_4K:
        return costs[Cost.REUSE_NS]
    if action == Action.MAP_CACHED_HUGE:
        return costs[Cost.FILE_MAP_NS]
    region = host_region(m, page)
    if m.host_pmd[region] == HostPmd.NONE:
        m.host_pmd[region] = HostPmd.TBL  # __pte_alloc() comes before the page
    if action == Action.MAP_ZERO:
        return costs[Cost.ZERO_MAP_NS]
    if action == Action.MAP_CACHED:
        return costs[Cost.FILE_MAP_NS]
    if action == Action.ALLOC_4K:
        m.vm[Vm.ANON_VMA] = 1
        return costs[Cost.ANON_FAULT_NS] + clear(m, env, SMALL)
    ns = np.int64(0)
    if action == Action.COW_FILE:
        m.vm[Vm.ANON_VMA] = 1
        ns += costs[Cost.ANON_FAULT_NS] + copy(m, env, SMALL)
        if host_pte(m, page) == HostPte.CACHED:
            return ns
    set_host_pte(m, page, np.int64(HostPte.SHM_BUSY))
    return ns + costs[Cost.SHMEM_FAULT_NS] + clear(m, env, SMALL)


@jit
def begin_huge(m: Machine, env: Env, page: int, action: int) -> int:
    costs = env.costs
    if action == Action.ALLOC_HUGE or action == Action.ALLOC_SHMEM_THP:
        m.host_pmd[host_region(m, page)] = HostPmd.HUGE_BUSY
    if not env.setup[Setup.SHARED]:
        m.vm[Vm.ANON_VMA] = 1
    if action == Action.MAP_HUGE_ZERO:
        return costs[Cost.HUGE_ZERO_MAP_NS]
    ns = costs[Cost.HUGETLB_FAULT_NS] if action == Action.ALLOC_HUGE else costs[Cost.THP_FAULT_NS]
    return ns + clear(m, env, region_bytes(m))


@jit
def releases_lock(action: int) -> bool:
    """The action's commit ends a page's lock, for which others may wait."""
    huge = action == Action.ALLOC_HUGE or action == Action.ALLOC_SHMEM_THP
    return huge or action == Action.ALLOC_SHMEM or action == Action.READ_FILE or action == Action.COW_FILE


@jit
def commit_pmd(m: Machine, env: Env, page: int, action: int, write: int) -> None:
    region = host_region(m, page)
    pmd = m.host_pmd[region]
    if action == Action.REUSE_HUGE or action == Action.REUSE_THP:
        if pmd == HostPmd.HUGE_RO or pmd == HostPmd.THP_EX:
            m.host_pmd[region] = HostPmd.HUGE_RW if pmd == HostPmd.HUGE_RO else HostPmd.THP_RW
            m.counters[Counter.COW_REUSE] += 1
    elif action == Action.ALLOC_HUGE:
        m.host_pmd[region] = HostPmd.HUGE_RW if write or env.setup[Setup.SHARED] else HostPmd.HUGE_RO
        m.gauges[Gauge.HELD_BYTES] += region_bytes(m)
    elif action == Action.ALLOC_SHMEM_THP:
        m.host_pmd[region] = HostPmd.SHM_THP
        m.gauges[Gauge.HELD_BYTES] += PMD_BYTES
    elif action == Action.MAP_CACHED_HUGE:
        if pmd == HostPmd.CACHED:
            m.host_pmd[region] = HostPmd.HUGE_RW if env.setup[Setup.HUGETLB] else HostPmd.SHM_THP
    elif pmd != HostPmd.NONE:  # lost the race for the PMD
        if action == Action.ALLOC_THP:
            m.counters[Counter.BYTES_CLEARED_WASTED] += PMD_BYTES
    elif action == Action.ALLOC_THP:
        map_thp(m, region)
    else:
        m.host_pmd[region] = HostPmd.HZ_RO
        m.counters[Counter.HUGE_ZERO_MAPS] += 1


@jit
def map_thp(m: Machine, region: int) -> None:
    """A fault maps the THP it made."""
    m.host_pmd[region] = HostPmd.THP_RW
    m.counters[Counter.THP_FAULT_ALLOC] += 1
    take_thp(m)


@jit
def map_around(m: Machine, env: Env, page: int) -> None:
    """do_fault_around(): the aligned 16 pages around a read fault, as far as they are in the page cache and not mapped."""
    first = page & ~(FAULT_AROUND_PAGES - 1)
    for p in range(first, first + FAULT_AROUND_PAGES):
        if host_pte(m, p) == HostPte.CACHED:
            map_file(m, env, p)


@jit
def map_file(m: Machine, env: Env, page: int) -> None:
    """Map a page of the page cache."""
    if env.setup[Setup.SHARED]:
        set_host_pte(m, page, np.int64(HostPte.SHM_RW))
    else:
        set_host_pte(m, page, np.int64(HostPte.FILE_RO))
        m.gauges[Gauge.RSS_BYTES] += PAGE_BYTES


@jit
def commit_file(m: Machine, env: Env, page: int, action: int, write: int) -> None:
    pte = host_pte(m, page)
    if pte == HostPte.SHM_BUSY:
        m.gauges[Gauge.HELD_BYTES] += PAGE_BYTES
    if action == Action.COW_FILE:
        if pte == HostPte.SHM_BUSY or pte == HostPte.CACHED:
            set_host_pte(m, page, np.int64(HostPte.ANON_RW))
            take_page(m)
        return
    if pte == HostPte.SHM_BUSY or pte == HostPte.CACHED:
        map_file(m, env, page)
    if not write:
        map_around(m, env, page)


@jit
def commit_pte(m: Machine, page: int, action: int) -> None:
    pte = host_pte(m, page)
    if action == Action.REUSE_4K:
        if pte == HostPte.ANON_EX or pte == HostPte.ANON_TSH:
            set_host_pte(m, page, np.int64(HostPte.ANON_RW if pte == HostPte.ANON_EX else HostPte.ANON_TRW))
            m.counters[Counter.COW_REUSE] += 1
    elif pte != HostPte.NONE:  # lost the race for the PTE
        if action == Action.ALLOC_4K:
            m.counters[Counter.BYTES_CLEARED_WASTED] += PAGE_BYTES
    elif action == Action.ALLOC_4K:
        set_host_pte(m, page, np.int64(HostPte.ANON_RW))
        take_page(m)
    else:
        set_host_pte(m, page, np.int64(HostPte.Z_RO))
        m.counters[Counter.ZERO_PAGE_MAPS] += 1


@jit
def commit_fault(m: Machine, env: Env, page: int, action: int, write: int) -> None:
    """Set the entry that begin_fault() prepared, unless somebody was faster."""
    if action == Action.MAP_ZERO or action == Action.ALLOC_4K or action == Action.REUSE_4K:
        commit_pte(m, page, action)
    elif action == Action.ALLOC_SHMEM or action == Action.READ_FILE or action == Action.MAP_CACHED or action == Action.COW_FILE:
        commit_file(m, env, page, action, write)
    else:
        commit_pmd(m, env, page, action, write)


@shared
def split_region(m: Machine, region: int, pte: int) -> None:
    """A leaf becomes a page table whose pages are all `pte`."""
    if m.host_pmd[region] != HostPmd.HZ_RO:
        m.gauges[Gauge.ANON_HUGE_BYTES] -= PMD_BYTES
    m.host_pmd[region] = HostPmd.TBL
    m.counters[Counter.THP_SPLIT_PMD] += 1
    for p in range(region << PMD_ORDER, (region + 1) << PMD_ORDER):
        set_host_pte(m, p, pte)


@jit
def replace_pte(m: Machine, page: int, action: int, old: int) -> bool:
    """wp_page_copy() under the page-table lock: pte_same()?"""
    if host_pte(m, page) != old:
        if action == Action.COW_4K:
            m.counters[Counter.BYTES_CLEARED_WASTED] += PAGE_BYTES
        return False
    if action == Action.COW_4K:
        take_page(m)
    else:
        m.counters[Counter.COW_KSM] += old == HostPte.KSM_RO
        drop_page(m, old)
        take_page(m)
    set_host_pte(m, page, np.int64(HostPte.ANON_RW))
    m.counters[Counter.COW_4K] += 1
    return True


@jit
def replace_entry(m: Machine, page: int, action: int, old: int) -> bool:
    """Replace a present entry inside an invalidation; False: it changed since it was read, the work was void."""
    if action == Action.COW_4K or action == Action.COPY_4K:
        return replace_pte(m, page, action, old)
    region = host_region(m, page)
    pmd = np.int64(m.host_pmd[region])
    if action == Action.COPY_HUGE:
        m.host_pmd[region] = HostPmd.HUGE_RW
        m.counters[Counter.COW_HUGE] += 1
        take_huge(m, region_bytes(m))
        return True
    if pmd != (HostPmd.THP_SH if action == Action.SPLIT_THP else HostPmd.HZ_RO):
        if action == Action.THP_FOR_HUGE_ZERO:
            m.counters[Counter.BYTES_CLEARED_WASTED] += PMD_BYTES
        return False
    if action == Action.THP_FOR_HUGE_ZERO:
        map_thp(m, region)
    else:
        split_region(m, region, lookup(SPLIT_PTE, pmd))
    return True
