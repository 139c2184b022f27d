"""Dirty logging of the slot: on, get, off (kvm_mmu_slot_apply_flags(), kvm_get_dirty_log_protect()). No vCPU runs meanwhile."""

import numpy as np

from kernels.cost import Cost
from kernels.jit import jit
from kernels.mmu import (
    FOUR_K,
    ONE,
    ONE_G,
    TWO_M,
    count_leaves,
    is_leaf,
    largest_order,
    remove_1g_table,
    remove_2m_table,
    split_1g,
    split_2m,
    zap_4k,
)
from kernels.policy import Behaviour
from kernels.spec import PMD_ORDER, PMD_PAGES, PUD_ORDER, Counter, Mmu, Setup, Spte, SptePmd, Vm
from kernels.state import Env, Machine, set_spte, slot_end, spte

TABLE = np.int64(SptePmd.T)


@jit
def table_pages(m: Machine, region: int) -> tuple[int, int]:
    """Pages of a 2M region of the slot, [first, end)."""
    first = m.vm[Vm.SHIFT] + (region << PMD_ORDER)
    return first, min(first + PMD_PAGES, slot_end(m))


@jit
def split_all(m: Machine) -> int:
    """kvm_mmu_slot_try_split_huge_pages(): every huge leaf down to 4K; returns how many were split."""
    split = 0
    for gib in range(len(m.spte_pud)):
        if is_leaf(m.spte_pud[gib]):
            split_1g(m, gib, TABLE)
            split += 1
    for region in range(len(m.spte_pmd)):
        if is_leaf(m.spte_pmd[region]):
            split_2m(m, region, TABLE)
            split += 1
    return split


@jit
def logged_leaf(leaf: int, pml: int) -> int:
    """What a leaf becomes when its writes are to be seen: write-protected, or with PML clean."""
    if leaf < Spte.RW:
        return leaf
    return Spte.RW_CLEAN if pml else Spte.WP


@jit
def protect_huge(m: Machine) -> int:
    """kvm_mmu_slot_remove_write_access() on huge leaves; returns how many changed."""
    changed = 0
    for gib in range(len(m.spte_pud)):
        if is_leaf(m.spte_pud[gib]) and m.spte_pud[gib] >= SptePmd.RW:
            m.spte_pud[gib] = SptePmd.WP
            changed += 1
    for region in range(len(m.spte_pmd)):
        if is_leaf(m.spte_pmd[region]) and m.spte_pmd[region] >= SptePmd.RW:
            m.spte_pmd[region] = SptePmd.WP
            changed += 1
    return changed


@jit
def protect_4k(m: Machine, pml: int) -> int:
    """The same on 4K leaves, or with PML kvm_mmu_slot_leaf_clear_dirty(); returns how many changed."""
    changed = 0
    for region in range(len(m.spte_pmd)):
        if m.spte_pmd[region] >= SptePmd.T:
            first, end = table_pages(m, region)
            for page in range(first, end):
                leaf = spte(m, page)
                new = np.int64(logged_leaf(leaf, pml))
                if new != leaf:
                    set_spte(m, page, new)
                    changed += 1
    return changed


@jit
def lock_for_log(m: Machine, env: Env) -> None:
    """The walks of dirty logging take mmu_lock for reading under the TDP MMU, for writing with rmaps."""
    m.counters[Counter.MMU_LOCK_READ if env.setup[Setup.MMU] == Mmu.TDP else Counter.MMU_LOCK_WRITE] += 1


@jit
def log_on(m: Machine, env: Env) -> int:
    """Returns ns."""
    ns = env.costs[Cost.DIRTY_LOG_NS]
    if m.vm[Vm.LOGGING]:
        return ns
    m.vm[Vm.LOGGING] = 1
    if env.setup[Setup.EAGER_SPLIT] and env.policy[Behaviour.EAGER_SPLIT] and env.setup[Setup.MMU] == Mmu.TDP:
        lock_for_log(m, env)
        ns += env.costs[Cost.SPLIT_SPTE_NS] * split_all(m)
    pml = env.setup[Setup.PML]
    if pml:
        lock_for_log(m, env)
    lock_for_log(m, env)
    m.counters[Counter.REMOTE_TLB_FLUSH_REQUESTS] += 1
    return ns + env.costs[Cost.WRITE_PROTECT_NS] * (protect_4k(m, pml) + protect_huge(m))


@jit
def log_get(m: Machine, env: Env) -> int:
    """Returns ns."""
    ns = env.costs[Cost.DIRTY_LOG_NS]
    m.counters[Counter.MMU_LOCK_WRITE] += 1
    if not m.vm[Vm.DIRTY]:
        return ns
    m.vm[Vm.DIRTY] = 0
    m.counters[Counter.REMOTE_TLB_FLUSH_REQUESTS] += 1
    return ns + env.costs[Cost.WRITE_PROTECT_NS] * protect_4k(m, env.setup[Setup.PML])


@jit
def first_leaf_2m(m: Machine, region: int) -> int:
    """The first leaf in order of address below a 2M entry, or the entry itself; Spte.N: there is none."""
    entry = np.int64(m.spte_pmd[region])
    if entry < SptePmd.T:
        return entry
    first, end = table_pages(m, region)
    for page in range(first, end):
        if spte(m, page) != Spte.N:
            return spte(m, page)
    return np.int64(Spte.N)


@jit
def first_leaf_1g(m: Machine, gib: int) -> int:
    first = gib << (PUD_ORDER - PMD_ORDER)
    for region in range(first, min(first + PMD_PAGES, len(m.spte_pmd))):
        leaf = first_leaf_2m(m, region)
        if leaf != Spte.N:
            return leaf
    return np.int64(Spte.N)


@jit
def end_tables(m: Machine, env: Env) -> int:
    """TDP: tables that one leaf could replace are zapped, or replaced in place; returns how many."""
    recover = env.policy[Behaviour.RECOVER_HUGE_SPTE]
    limit = env.setup[Setup.RECOVER_ORDER]
    ended = 0
    for gib in range(len(m.spte_pud)):
        page = m.vm[Vm.SHIFT] + (gib << PUD_ORDER)
        if m.spte_pud[gib] >= SptePmd.T and largest_order(m, page, limit) == ONE_G:
            leaf = first_leaf_1g(m, gib)
            if leaf != Spte.N or not recover:
                remove_1g_table(m, gib)
                ended += 1
            if leaf != Spte.N and recover:
                m.spte_pud[gib] = leaf
                count_leaves(m, ONE_G, ONE)
    for region in range(len(m.spte_pmd)):
        page = m.vm[Vm.SHIFT] + (region << PMD_ORDER)
        if m.spte_pmd[region] >= SptePmd.T and largest_order(m, page, limit) >= TWO_M:
            leaf = first_leaf_2m(m, region)
            if leaf != Spte.N or not recover:
                remove_2m_table(m, region)
                ended += 1
            if leaf != Spte.N and recover:
                m.spte_pmd[region] = leaf
                count_leaves(m, TWO_M, ONE)
    m.counters[Counter.REMOTE_TLB_FLUSH_REQUESTS] += min(ended, 1) if recover else ended
    return ended


@jit
def zap_collapsible(m: Machine, env: Env) -> int:
    """The rmap MMUs: 4K leaves of direct tables where a huge leaf could be; returns how many went."""
    gone = 0
    for region in range(len(m.spte_pmd)):
        first, end = table_pages(m, region)
        if m.spte_pmd[region] >= SptePmd.T and largest_order(m, first, env.setup[Setup.RECOVER_ORDER]) > FOUR_K:
            gone += zap_4k(m, first, end)
    m.counters[Counter.REMOTE_TLB_FLUSH_REQUESTS] += gone > 0
    return gone


@jit
def log_off(m: Machine, env: Env) -> int:
    """Returns ns."""
    ns = env.costs[Cost.DIRTY_LOG_NS]
    if not m.vm[Vm.LOGGING]:
        return ns
    m.vm[Vm.LOGGING] = m.vm[Vm.DIRTY] = 0
    lock_for_log(m, env)
    if env.setup[Setup.MMU] == Mmu.TDP:
        return ns + env.costs[Cost.SPLIT_SPTE_NS] * end_tables(m, env)
    if not env.setup[Setup.DIRECT]:
        return ns
    return ns + env.costs[Cost.WRITE_PROTECT_NS] * zap_collapsible(m, env)
