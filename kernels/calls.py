"""What the VMM does in one system call while no vCPU runs: fork, madvise, KSM's work. docs/model.md section 7."""

import numpy as np

from kernels.contention import add_traffic
from kernels.cost import Cost
from kernels.dirty_log import log_get, log_off, log_on
from kernels.jit import jit, shared
from kernels.memory import drop_frames, drop_page, take_thp
from kernels.mmu import zap
from kernels.mmu_notifier import region_of_slot
from kernels.policy import Behaviour
from kernels.primary_mmu import HOST_LEAF, SPLIT_PTE, region_bytes, split_region, thp_fails
from kernels.spec import (
    KSM_PAGE_SHARING,
    PAGE_BYTES,
    PMD_ORDER,
    PMD_PAGES,
    Call,
    Counter,
    Gauge,
    HostPmd,
    HostPte,
    Setup,
    Stream,
    Vm,
    packed,
)
from kernels.state import Env, Machine, host_pte, host_region, host_state, lookup, set_host_pte, slot_end

NO_LIMIT = np.int64(PMD_PAGES)


@jit
def lock_write(m: Machine, env: Env) -> int:
    """One acquisition of mmu_lock for writing by a callback, nobody else being there; returns ns."""
    ns = env.costs[Cost.MMU_LOCK_WRITE_NS]
    m.counters[Counter.MMU_LOCK_WRITE] += 1
    m.counters[Counter.MMU_LOCK_WRITE_HOLD_NS] += ns
    return ns


@shared
def run_pair(m: Machine, env: Env, first: int, end: int, change_pte: int) -> int:
    """One whole invalidation of pages [first, end) of the slot; returns ns."""
    m.counters[Counter.INVALIDATE_RANGE_START] += 1
    m.counters[Counter.INVALIDATE_RANGE_END] += 1
    ns = 2 * env.costs[Cost.NOTIFIER_NS] + lock_write(m, env) + lock_write(m, env)
    if change_pte and env.policy[Behaviour.CHANGE_PTE]:
        m.counters[Counter.CHANGE_PTE] += 1
        ns += env.costs[Cost.NOTIFIER_NS] + lock_write(m, env)
    if zap(m, first, end):
        m.counters[Counter.REMOTE_TLB_FLUSH_REQUESTS] += 1
    m.vm[Vm.SEQ] += 1
    return ns


@jit
def run_region_pair(m: Machine, env: Env, page: int) -> int:
    first, end = region_of_slot(m, page)
    return run_pair(m, env, first, end, 0)


# What fork leaves of a page and of a leaf: copy_present_pte(), copy_huge_pmd(), copy_hugetlb_page_range().
FORKED = {HostPte.ANON_RW: HostPte.ANON_SH, HostPte.ANON_EX: HostPte.ANON_SH, HostPte.ANON_TRW: HostPte.ANON_TSH}
FORKED_PTE = np.int64(packed({pte: FORKED.get(pte, pte) for pte in HostPte}))
SHARED = dict.fromkeys((HostPmd.THP_RW, HostPmd.THP_EX), HostPmd.THP_SH) | dict.fromkeys(
    (HostPmd.HUGE_RW, HostPmd.HUGE_RO), HostPmd.HUGE_SH
)
FORKED_PMD = np.int64(packed({pmd: SHARED.get(pmd, pmd) for pmd in HostPmd}))

# What the child's end leaves of a leaf.
ALONE_PMD = np.int64(packed({pmd: {HostPmd.THP_SH: HostPmd.THP_EX, HostPmd.HUGE_SH: HostPmd.HUGE_RO}.get(pmd, pmd) for pmd in HostPmd}))

MAPPED_PTE = np.int64(packed({pte: pte not in (HostPte.NONE, HostPte.CACHED, HostPte.SHM_BUSY) for pte in HostPte}))


@jit
def fork(m: Machine, env: Env) -> int:
    """copy_page_range() of the slot's VMA; returns ns."""
    ns = env.costs[Cost.FORK_NS]
    m.vm[Vm.CHILD] = 1
    if not m.vm[Vm.ANON_VMA]:  # vma_needs_copy()
        return ns
    ns += run_pair(m, env, m.vm[Vm.SHIFT], slot_end(m), 0)
    entries = 0
    order = m.vm[Vm.HOST_ORDER]
    for region in range(len(m.host_pmd)):
        pmd = m.host_pmd[region]
        entries += lookup(HOST_LEAF, pmd)
        m.host_pmd[region] = lookup(FORKED_PMD, pmd)
        if pmd == HostPmd.TBL:
            for page in range(region << order, (region + 1) << order):
                pte = host_pte(m, page)
                entries += lookup(MAPPED_PTE, pte)
                set_host_pte(m, page, lookup(FORKED_PTE, pte))
    return ns + env.costs[Cost.FORK_PTE_NS] * entries


@jit
def alone_pte(env: Env, pte: int) -> int:
    """A page that the child shared, after its end: wp_can_reuse_anon_folio()."""
    if pte == HostPte.ANON_SH or (pte == HostPte.ANON_TSH and env.policy[Behaviour.SUBPAGE_REUSE]):
        return np.int64(HostPte.ANON_EX)
    return pte


@jit
def child_exit(m: Machine, env: Env) -> int:
    """Returns ns."""
    m.vm[Vm.CHILD] = 0
    m.gauges[Gauge.HELD_BYTES] -= m.vm[Vm.CHILD_BYTES]
    m.vm[Vm.CHILD_BYTES] = 0
    order = m.vm[Vm.HOST_ORDER]
    for region in range(len(m.host_pmd)):
        pmd = m.host_pmd[region]
        m.host_pmd[region] = lookup(ALONE_PMD, pmd)
        if pmd == HostPmd.TBL:
            for page in range(region << order, (region + 1) << order):
                set_host_pte(m, page, alone_pte(env, host_pte(m, page)))
    return env.costs[Cost.FORK_NS]


@shared
def split_leaf(m: Machine, env: Env, region: int) -> int:
    """__split_huge_pmd() of a leaf that is not to go as a whole, its pair included; returns ns."""
    ns = run_region_pair(m, env, region << PMD_ORDER) + env.costs[Cost.SPLIT_PMD_NS]
    pmd = np.int64(m.host_pmd[region])
    if pmd == HostPmd.SHM_THP:  # a file's PMD just goes; its page stays in the cache
        m.counters[Counter.THP_SPLIT_PMD] += 1
        m.host_pmd[region] = HostPmd.CACHED
    elif pmd == HostPmd.THP_EX:
        split_region(m, region, alone_pte(env, np.int64(HostPte.ANON_TSH)))
    else:
        split_region(m, region, lookup(SPLIT_PTE, pmd))
    return ns


@shared
def drop_leaf(m: Machine, env: Env, region: int) -> None:
    """A leaf goes as a whole; what is in the page cache stays there."""
    pmd = m.host_pmd[region]
    nbytes = region_bytes(m)
    shared = pmd == HostPmd.THP_SH or pmd == HostPmd.HUGE_SH
    if HostPmd.THP_RW <= pmd <= HostPmd.THP_SH:
        m.gauges[Gauge.RSS_BYTES] -= nbytes
        m.gauges[Gauge.ANON_HUGE_BYTES] -= nbytes
    cached = env.setup[Setup.SHARED]
    if not cached and pmd != HostPmd.HZ_RO:
        drop_frames(m, nbytes, shared)
    m.host_pmd[region] = HostPmd.CACHED if cached else HostPmd.NONE


@jit
def unmap_pages(m: Machine, env: Env, first: int, end: int) -> int:
    """zap_pte_range(): pages of one table go; returns how many there were."""
    gone = 0
    for page in range(first, end):
        pte = host_pte(m, page)
        if lookup(MAPPED_PTE, pte):
            drop_page(m, pte)
            set_host_pte(m, page, HostPte.CACHED if env.setup[Setup.FILE] else HostPte.NONE)
            gone += 1
    return gone


@jit
def table_is_empty(m: Machine, region: int) -> bool:
    used = 0
    for page in range(region << PMD_ORDER, (region + 1) << PMD_ORDER):
        used += host_pte(m, page) != HostPte.NONE
    return used == 0


@jit
def dontneed_range(m: Machine, env: Env, first: int, end: int) -> int:
    """One madvise(MADV_DONTNEED) over pages [first, end) of the VMA; returns ns."""
    ns = env.costs[Cost.MADVISE_NS] + run_pair(m, env, first, end, 0)
    if env.setup[Setup.HUGETLB] and env.policy[Behaviour.HUGETLB_ZAP_TWICE]:
        ns += run_pair(m, env, first, end, 0)
    m.vm[Vm.CACHED] = env.setup[Setup.FILE]
    order = m.vm[Vm.HOST_ORDER]
    entries = np.int64(0)
    for region in range(first >> order, ((end - 1) >> order) + 1):
        start, stop = region << order, (region + 1) << order
        whole = first <= start and stop <= end
        if lookup(HOST_LEAF, m.host_pmd[region]):
            if whole:
                drop_leaf(m, env, region)
                entries += 1
                continue
            ns += split_leaf(m, env, region)
        if m.host_pmd[region] == HostPmd.TBL:
            entries += unmap_pages(m, env, max(first, start), min(end, stop))
            if whole and env.policy[Behaviour.RECLAIM_PAGE_TABLES] and table_is_empty(m, region):
                m.host_pmd[region] = HostPmd.NONE
    return ns + env.costs[Cost.ZAP_PTE_NS] * entries


@jit
def dontneed(m: Machine, env: Env) -> int:
    """All calls of the step; returns ns."""
    s = env.stream
    shift = m.vm[Vm.SHIFT]
    ns = np.int64(0)
    for first in range(s[Stream.START_PAGE], s[Stream.END_PAGE], s[Stream.EVERY_PAGES]):
        ns += dontneed_range(m, env, shift + first, shift + min(first + s[Stream.SIZE_PAGES], s[Stream.END_PAGE]))
    return ns


@shared
def can_collapse(m: Machine, env: Env, region: int, max_none: int, max_shared: int) -> bool:
    """hpage_collapse_scan_pmd(): a table with enough pages of its own, and one that is writable, or a VMA with an anon_vma."""
    if m.host_pmd[region] != HostPmd.TBL:
        return False
    none, shared, writable = 0, 0, 0
    for page in range(region << PMD_ORDER, (region + 1) << PMD_ORDER):
        pte = host_pte(m, page)
        none += pte == HostPte.NONE or pte == HostPte.Z_RO
        shared += HostPte.ANON_SH <= pte <= HostPte.KSM_RO
        writable += pte == HostPte.ANON_RW or pte == HostPte.ANON_TRW
    enough = writable > 0 or (env.policy[Behaviour.COLLAPSE_READ_ONLY] and m.vm[Vm.ANON_VMA] > 0)
    return enough and none <= max_none and shared <= max_shared


@jit
def copy_into_thp(m: Machine, env: Env, region: int) -> int:
    """__collapse_huge_page_copy(): present pages are copied, the others cleared; returns ns."""
    copied = 0
    for page in range(region << PMD_ORDER, (region + 1) << PMD_ORDER):
        pte = host_pte(m, page)
        copied += HostPte.ANON_RW <= pte <= HostPte.KSM_RO
    cleared = PMD_PAGES - copied
    clear_ns = env.costs[Cost.CLEAR_4K_NS] * cleared
    ns = clear_ns + env.costs[Cost.COPY_4K_NS] * copied
    m.counters[Counter.BYTES_COPIED] += copied * PAGE_BYTES
    m.counters[Counter.BYTES_CLEARED] += cleared * PAGE_BYTES
    m.counters[Counter.CLEAR_NS] += clear_ns
    add_traffic(m, (cleared + 2 * copied) * PAGE_BYTES, ns)
    return ns


@jit
def set_collapsed(m: Machine, region: int) -> None:
    """The new THP is mapped; the old pages go."""
    for page in range(region << PMD_ORDER, (region + 1) << PMD_ORDER):
        drop_page(m, host_pte(m, page))
        set_host_pte(m, page, HostPte.NONE)
    m.host_pmd[region] = HostPmd.THP_RW
    take_thp(m)


@jit
def collapse(m: Machine, env: Env) -> int:
    """madvise_collapse(); returns ns."""
    s = env.stream
    shift = m.vm[Vm.SHIFT]
    ns = env.costs[Cost.MADVISE_NS]
    for region in range((shift + s[Stream.START_PAGE] + PMD_PAGES - 1) >> PMD_ORDER, (shift + s[Stream.END_PAGE]) >> PMD_ORDER):
        if m.host_pmd[region] == HostPmd.TBL:
            ns += env.costs[Cost.SCAN_PTE_NS] * PMD_PAGES
        if env.setup[Setup.FILE]:
            if m.host_pmd[region] == HostPmd.CACHED:
                m.host_pmd[region] = HostPmd.SHM_THP
                ns += env.costs[Cost.FILE_MAP_NS]
            continue
        if m.host_pmd[region] == HostPmd.NONE and not env.policy[Behaviour.COLLAPSE_PASSES_EMPTY]:
            break
        fails = env.setup[Setup.THP_FAILURE_CUT] > 0 and thp_fails(env, region)
        if not fails and can_collapse(m, env, region, NO_LIMIT, NO_LIMIT):
            m.counters[Counter.THP_COLLAPSE_ALLOC] += 1
            ns += env.costs[Cost.COLLAPSE_NS] + run_region_pair(m, env, region << PMD_ORDER) + copy_into_thp(m, env, region)
            set_collapsed(m, region)
    return ns


@jit
def is_selected(page: int, cut: int) -> bool:
    """The page (of the slot) is one of the fraction that has a twin."""
    return ((page + 1) * cut) >> 20 > (page * cut) >> 20


@jit
def is_mergeable(m: Machine, page: int) -> bool:
    """KSM can take the page: anonymous, below a table or part of a THP."""
    pmd = host_state(m, page)
    if pmd == HostPmd.TBL:
        return HostPte.ANON_RW <= host_pte(m, page) <= HostPte.ANON_TSH
    return HostPmd.THP_RW <= pmd <= HostPmd.THP_SH


# split_huge_page(): pages of a THP, by its leaf, when its folio is split as well.
UNFOLDED = np.int64(packed({HostPmd.THP_RW: HostPte.ANON_RW, HostPmd.THP_EX: HostPte.ANON_EX, HostPmd.THP_SH: HostPte.ANON_SH}))


@jit
def unshare_folio(m: Machine, region: int) -> None:
    """The pages of a THP's folio become pages of their own."""
    plain = HostPte.ANON_SH if m.vm[Vm.CHILD] else HostPte.ANON_EX
    for page in range(region << PMD_ORDER, (region + 1) << PMD_ORDER):
        pte = host_pte(m, page)
        if pte == HostPte.ANON_TRW:
            set_host_pte(m, page, HostPte.ANON_RW)
        elif pte == HostPte.ANON_TSH:
            set_host_pte(m, page, plain)


@jit
def is_stable_page(m: Machine) -> bool:
    """The next merge makes a KSM page of the page itself: nothing to replace it with."""
    return m.vm[Vm.KSM_MERGES] % KSM_PAGE_SHARING == 0


@jit
def set_merged(m: Machine, page: int) -> None:
    """The page is a KSM page from now on, or maps one."""
    if is_stable_page(m):
        m.vm[Vm.KSM_FRAMES] += 1
    else:
        drop_frames(m, PAGE_BYTES, host_pte(m, page) >= HostPte.ANON_SH)
    m.vm[Vm.KSM_SHARERS] += 1
    m.vm[Vm.KSM_MERGES] += 1
    set_host_pte(m, page, HostPte.KSM_RO)


@jit
def merge_page(m: Machine, env: Env, page: int) -> int:
    """try_to_merge_one_page() with all its pairs; returns ns."""
    ns = env.costs[Cost.KSM_MERGE_NS]
    region = host_region(m, page)
    pmd = m.host_pmd[region]
    if pmd != HostPmd.TBL:
        ns += run_region_pair(m, env, page) + run_region_pair(m, env, page) + env.costs[Cost.SPLIT_PMD_NS]
        split_region(m, region, lookup(UNFOLDED, pmd))
    pte = host_pte(m, page)
    if pte == HostPte.ANON_TRW or pte == HostPte.ANON_TSH:
        ns += run_region_pair(m, env, page)
        unshare_folio(m, region)
    ns += run_pair(m, env, page, page + 1, 1)
    if not is_stable_page(m):
        ns += run_pair(m, env, page, page + 1, 1)
    set_merged(m, page)
    return ns


@jit
def ksm_merge(m: Machine, env: Env) -> int:
    """Returns ns."""
    shift = m.vm[Vm.SHIFT]
    ns = env.costs[Cost.SCAN_PTE_NS] * m.vm[Vm.PAGES]
    for i in range(m.vm[Vm.PAGES]):
        if is_selected(i, env.stream[Stream.FRACTION_CUT]) and is_mergeable(m, shift + i):
            ns += merge_page(m, env, shift + i)
    return ns


@jit
def make_call(m: Machine, env: Env) -> int:
    """The step's call; returns ns."""
    call = env.stream[Stream.CALL]
    if call == Call.FORK:
        return fork(m, env)
    if call == Call.CHILD_EXIT:
        return child_exit(m, env)
    if call == Call.DONTNEED:
        return dontneed(m, env)
    if call == Call.COLLAPSE:
        return collapse(m, env)
    if call == Call.KSM_MERGE:
        return ksm_merge(m, env)
    if call == Call.LOG_ON:
        return log_on(m, env)
    return log_get(m, env) if call == Call.LOG_GET else log_off(m, env)
