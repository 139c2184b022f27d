"""KVM's page table: what a leaf allows, the level of a new one, install and zap (arch/x86/kvm/mmu/).

A page of the slot is mapped by one leaf of order 18, 9 or 0, or by none. Entries are counted by gfn, pages in the VMA.
"""

import numpy as np

from kernels.jit import jit, shared
from kernels.policy import Behaviour
from kernels.primary_mmu import HOST_LEAF, host_writable
from kernels.spec import (
    PMD_ORDER,
    PMD_PAGES,
    PREFETCH_PAGES,
    PUD_ORDER,
    Actor,
    Counter,
    Cpu,
    Gauge,
    Mmu,
    Outcome,
    Setup,
    Spte,
    SptePmd,
    Vm,
)
from kernels.state import Env, Machine, guest_region, host_state, lookup, set_spte, slot_end, spte

ABSENT, WRITABLE = np.int64(Spte.N), np.int64(Spte.RW)
ONE, MANY = np.int64(1), np.int64(PMD_PAGES)
NO_PAGE = np.int64(-1)
FOUR_K, TWO_M, ONE_G = np.int64(0), np.int64(PMD_ORDER), np.int64(PUD_ORDER)


@jit
def is_leaf(entry: int) -> bool:
    """Of a 2M or 1G entry."""
    return SptePmd.N < entry < SptePmd.T


@jit
def guest_gib(m: Machine, page: int) -> int:
    """KVM's 1G entry of a page of the slot."""
    return (page - m.vm[Vm.SHIFT]) >> PUD_ORDER


@jit
def leaf_order(m: Machine, page: int) -> int:
    """Order of the leaf that maps the page, or could: 0 where no larger one does."""
    if len(m.spte_pud) and is_leaf(m.spte_pud[guest_gib(m, page)]):
        return ONE_G
    return TWO_M if is_leaf(m.spte_pmd[guest_region(m, page)]) else FOUR_K


@jit
def leaf_at(m: Machine, page: int, order: int) -> int:
    """The entry of that order; Spte.N for a 4K one without a table."""
    if order == ONE_G:
        return np.int64(m.spte_pud[guest_gib(m, page)])
    region = guest_region(m, page)
    if order == TWO_M:
        return np.int64(m.spte_pmd[region])
    return spte(m, page) if m.spte_pmd[region] >= SptePmd.T else np.int64(Spte.N)


@jit
def set_leaf(m: Machine, page: int, order: int, leaf: int) -> None:
    if order == ONE_G:
        m.spte_pud[guest_gib(m, page)] = leaf
    elif order == TWO_M:
        m.spte_pmd[guest_region(m, page)] = leaf
    else:
        set_spte(m, page, leaf)


@jit
def leaf_allows(leaf: int, write: int) -> bool:
    return leaf >= (Spte.RW if write else Spte.RO)


@jit
def access_allowed(m: Machine, page: int, write: int) -> bool:
    """The page's leaf lets the guest read or write."""
    return leaf_allows(leaf_at(m, page, leaf_order(m, page)), write)


@jit
def mark_logged(m: Machine, leaf: int) -> None:
    """make_spte(): a writable leaf in a logged slot goes into the dirty bitmap."""
    if m.vm[Vm.LOGGING] and leaf >= Spte.RW:
        m.vm[Vm.DIRTY] = 1


@jit
def count_leaves(m: Machine, order: int, n: int) -> None:
    m.gauges[Gauge.PAGES_4K if order == FOUR_K else Gauge.PAGES_2M if order == TWO_M else Gauge.PAGES_1G] += n


@jit
def fits_slot(m: Machine, page: int, order: int) -> bool:
    """lpage_info: the slot holds the whole huge page."""
    gfn = page - m.vm[Vm.SHIFT]
    return (((gfn >> order) + 1) << order) <= m.vm[Vm.PAGES]


@jit
def largest_order(m: Machine, page: int, limit: int) -> int:
    """Order of the largest leaf that the host's mapping and the slot allow, up to `limit`."""
    order = min(limit, m.vm[Vm.HOST_ORDER] if lookup(HOST_LEAF, host_state(m, page)) else FOUR_K)
    if order == ONE_G and not fits_slot(m, page, ONE_G):
        order = TWO_M
    return order if fits_slot(m, page, TWO_M) else FOUR_K


@jit
def nx_bars(env: Env, entry: int) -> bool:
    """disallowed_hugepage_adjust(): the table at the level of the leaf keeps data faults below it."""
    return entry == SptePmd.T_NX or (entry == SptePmd.T and not env.policy[Behaviour.NX_MARKED_TABLES])


@jit
def target_order(m: Machine, env: Env, page: int, fetch: int) -> int:
    """kvm_mmu_hugepage_adjust(): the level of the new leaf."""
    nx = env.setup[Setup.NX]
    if m.vm[Vm.LOGGING] or (fetch and nx):
        return FOUR_K
    order = largest_order(m, page, env.setup[Setup.MAX_ORDER])
    if nx and order == ONE_G and nx_bars(env, m.spte_pud[guest_gib(m, page)]):
        order = TWO_M
    if nx and order == TWO_M and nx_bars(env, m.spte_pmd[guest_region(m, page)]):
        order = FOUR_K
    return order


@jit
def split_2m(m: Machine, region: int, table: int) -> None:
    """One 2M leaf becomes a table of 4K leaves with its rights."""
    leaf = np.int64(m.spte_pmd[region])
    m.spte_pmd[region] = table
    first = m.vm[Vm.SHIFT] + (region << PMD_ORDER)
    for page in range(first, first + PMD_PAGES):
        set_spte(m, page, leaf)
    count_leaves(m, TWO_M, -ONE)
    count_leaves(m, FOUR_K, MANY)


@jit
def split_1g(m: Machine, gib: int, table: int) -> None:
    """One 1G leaf becomes a table of 2M leaves with its rights."""
    leaf = m.spte_pud[gib]
    m.spte_pud[gib] = table
    first = gib << (PUD_ORDER - PMD_ORDER)
    for region in range(first, first + PMD_PAGES):
        m.spte_pmd[region] = leaf
    count_leaves(m, ONE_G, -ONE)
    count_leaves(m, TWO_M, MANY)


@shared
def remove_2m_table(m: Machine, region: int) -> None:
    """The table below a 2M entry goes with its leaves; the entry is N."""
    first = m.vm[Vm.SHIFT] + (region << PMD_ORDER)
    gone = 0
    for page in range(first, min(first + PMD_PAGES, slot_end(m))):
        if spte(m, page) != Spte.N:
            set_spte(m, page, ABSENT)
            gone += 1
    count_leaves(m, FOUR_K, -gone)
    m.spte_pmd[region] = SptePmd.N


@jit
def remove_1g_table(m: Machine, gib: int) -> None:
    """The table below a 1G entry goes with everything below it; the entry is N."""
    first = gib << (PUD_ORDER - PMD_ORDER)
    for region in range(first, min(first + PMD_PAGES, len(m.spte_pmd))):
        entry = m.spte_pmd[region]
        if entry >= SptePmd.T:
            remove_2m_table(m, region)
        elif entry != SptePmd.N:
            count_leaves(m, TWO_M, -ONE)
            m.spte_pmd[region] = SptePmd.N
    m.spte_pud[gib] = SptePmd.N


@jit
def remove_table(m: Machine, page: int, order: int) -> None:
    if order == ONE_G:
        remove_1g_table(m, guest_gib(m, page))
    else:
        remove_2m_table(m, guest_region(m, page))


@shared
def step_below(m: Machine, env: Env, page: int, order: int, table: int) -> int:
    """Make the entry of that order a table on the way to a smaller leaf; returns flushes that are due.

    A huge leaf is split in place (tdp_mmu_split_huge_page()) or dropped (tdp_mmu_zap_spte_atomic(), drop_large_spte())."""
    entry = leaf_at(m, page, order)
    if entry >= SptePmd.T:
        return 0
    split = env.setup[Setup.MMU] == Mmu.TDP and env.policy[Behaviour.SPLIT_HUGE_SPTE]
    if entry == SptePmd.N or not split:
        set_leaf(m, page, order, table)
        count_leaves(m, order, -1 if entry != SptePmd.N else 0)
        return 1 if entry != SptePmd.N else 0
    if order == ONE_G:
        split_1g(m, guest_gib(m, page), table)
    else:
        split_2m(m, guest_region(m, page), table)
    return 0


@jit
def clear_way(m: Machine, env: Env, page: int, order: int, fetch: int) -> int:
    """Bring the walk down to the leaf's level, free of a table there; returns flushes that are due."""
    table = np.int64(SptePmd.T_NX if fetch and env.setup[Setup.NX] else SptePmd.T)
    flushes = np.int64(0)
    if len(m.spte_pud) and order < ONE_G:
        flushes += step_below(m, env, page, ONE_G, table)
    if order == FOUR_K:
        flushes += step_below(m, env, page, TWO_M, table)
    elif leaf_at(m, page, order) >= SptePmd.T:
        remove_table(m, page, order)
        flushes += 1
    return flushes


@jit
def rewritten(env: Env, old: int, writable: int) -> int:
    """make_spte(): the leaf that a fault writes over `old`."""
    if not writable:
        return Spte.RO
    return Spte.RW_CLEAN if old >= Spte.RW and env.policy[Behaviour.REWRITE_DROPS_DIRTY] else Spte.RW


@jit
def stays(env: Env, old: int, write: int, prefetch: bool) -> bool:
    """The fault leaves the leaf alone: it allows the access, or (pre_fault) is there at all."""
    if not env.policy[Behaviour.DUPLICATE_IS_SPURIOUS] or old == Spte.N:
        return False
    return prefetch or (env.setup[Setup.MMU] == Mmu.TDP and leaf_allows(old, write))


@jit
def install(m: Machine, env: Env, actor: int) -> tuple[int, int]:
    """kvm_tdp_mmu_map() or direct_map(), FNAME(fetch)(): returns (Outcome.FIXED or SPURIOUS, flushes that are due)."""
    c = m.cpu[actor]
    page = c[Cpu.PAGE]
    order = target_order(m, env, page, c[Cpu.EXEC])
    flushes = clear_way(m, env, page, order, c[Cpu.EXEC])
    old = leaf_at(m, page, order)
    new = old
    if not stays(env, old, c[Cpu.WRITE], c[Cpu.KIND] == Actor.PREFAULT):
        new = np.int64(rewritten(env, old, c[Cpu.MAP_WRITABLE]))
        mark_logged(m, new)
    if new == old:
        return np.int64(Outcome.SPURIOUS), flushes
    if new == Spte.RW_CLEAN and env.setup[Setup.MMU] != Mmu.TDP:
        flushes += 1  # mmu_spte_update(): a Dirty bit went
    set_leaf(m, page, order, new)
    count_leaves(m, order, 1 if old == Spte.N else 0)
    if order == FOUR_K and env.setup[Setup.MMU] != Mmu.TDP and m.vm[Vm.IN_PROGRESS] == 0 and not m.vm[Vm.LOGGING]:
        prefetch_neighbours(m, env, page)
    return np.int64(Outcome.FIXED), flushes


@shared
def fill_run(m: Machine, env: Env, first: int, end: int) -> int:
    """direct_pte_prefetch_many(): GUP-fast for write over a run of missing entries; returns how many it filled."""
    if end > slot_end(m):
        return 0
    page = first
    while page < end and host_writable(m, env, page):
        set_spte(m, page, WRITABLE)
        page += 1
    count_leaves(m, FOUR_K, page - first)
    return page - first


@jit
def prefetch_neighbours(m: Machine, env: Env, page: int) -> None:
    """The aligned group of 8 pages around a new 4K leaf: __direct_pte_prefetch(), FNAME(pte_prefetch)()."""
    shift = m.vm[Vm.SHIFT]
    first = shift + ((page - shift) & ~(PREFETCH_PAGES - 1))
    direct = env.setup[Setup.DIRECT]
    start = NO_PAGE
    for p in range(first, first + PREFETCH_PAGES):
        if p < slot_end(m) and spte(m, p) != Spte.N:
            if start != NO_PAGE and fill_run(m, env, start, p) == 0:
                return
            start = NO_PAGE
        elif direct:
            start = p if start == NO_PAGE else start
        elif fill_run(m, env, p, p + 1) == 0:
            return
    if start != NO_PAGE:
        fill_run(m, env, start, first + PREFETCH_PAGES)


@jit
def prefetch_4k(m: Machine, page: int) -> None:
    """Patch 2 of the thread: make the new page's SPTE, only where a 4K table exists."""
    if m.spte_pmd[guest_region(m, page)] < SptePmd.T:
        return
    if spte(m, page) == Spte.N:
        count_leaves(m, FOUR_K, ONE)
    set_spte(m, page, WRITABLE)
    mark_logged(m, WRITABLE)
    m.counters[Counter.SPTE_PREFETCH] += 1


@jit
def fix_write_protected(m: Machine, page: int) -> bool:
    """fast_page_fault() over a write-protected leaf: writable again, but for a huge one in a logged slot."""
    order = leaf_order(m, page)
    if leaf_at(m, page, order) != Spte.WP or (order and m.vm[Vm.LOGGING]):
        return False
    set_leaf(m, page, order, WRITABLE)
    mark_logged(m, WRITABLE)
    return True


@jit
def zap_4k(m: Machine, first: int, end: int) -> int:
    """4K leaves of pages [first, end) of one table go; returns how many."""
    gone = 0
    for page in range(first, end):
        if spte(m, page) != Spte.N:
            set_spte(m, page, ABSENT)
            gone += 1
    count_leaves(m, FOUR_K, -gone)
    return gone


@shared
def zap(m: Machine, first: int, end: int) -> bool:
    """tdp_mmu_zap_leafs() over pages [first, end) of the slot: leaves go, tables stay. True if a leaf was there."""
    shift = m.vm[Vm.SHIFT]
    lo, hi = first - shift, end - shift
    zapped = False
    if len(m.spte_pud):
        for gib in range(lo >> PUD_ORDER, ((hi - 1) >> PUD_ORDER) + 1):
            if is_leaf(m.spte_pud[gib]):
                m.spte_pud[gib] = SptePmd.N
                count_leaves(m, ONE_G, -ONE)
                zapped = True
    for region in range(lo >> PMD_ORDER, ((hi - 1) >> PMD_ORDER) + 1):
        pmd = m.spte_pmd[region]
        if pmd >= SptePmd.T:
            start = region << PMD_ORDER
            zapped |= zap_4k(m, shift + max(lo, start), shift + min(hi, start + PMD_PAGES)) > 0
        elif pmd != SptePmd.N:
            m.spte_pmd[region] = SptePmd.N
            count_leaves(m, TWO_M, -ONE)
            zapped = True
    return zapped
