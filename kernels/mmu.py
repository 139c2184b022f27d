"""KVM's TDP page table: which access an SPTE allows, install and zap (arch/x86/kvm/mmu/tdp_mmu.c)."""

import numpy as np

from kernels.jit import jit
from kernels.policy import Behaviour
from kernels.primary_mmu import Env
from kernels.spec import PMD_ORDER, PMD_PAGES, Counter, Gauge, HostPmd, Outcome, Spte, SptePmd
from kernels.state import Machine, region_end, set_spte, spte


@jit
def spte_allows(m: Machine, page: int, write: int) -> bool:
    """The guest's access needs no exit."""
    pmd = m.spte_pmd[page >> PMD_ORDER]
    if pmd == SptePmd.T:
        return spte(m, page) > write  # N < RO < RW < RW_CLEAN, and write is 0 or 1
    return pmd > write


@jit
def mark_dirty(m: Machine, page: int) -> None:
    """The guest wrote through the entry: the processor sets its Dirty bit."""
    region = page >> PMD_ORDER
    if m.spte_pmd[region] == SptePmd.RW_CLEAN:
        m.spte_pmd[region] = SptePmd.RW
    elif m.spte_pmd[region] == SptePmd.T and spte(m, page) == Spte.RW_CLEAN:
        set_spte(m, page, Spte.RW)


@jit
def maps_2m(m: Machine, page: int) -> bool:
    """Level of the new SPTE: 2M where the host has a leaf and the slot holds the whole region (lpage_info of its tail)."""
    region = page >> PMD_ORDER
    pmd = m.host_pmd[region]
    leaf = pmd != HostPmd.NONE and pmd != HostPmd.TBL and pmd != HostPmd.HUGE_BUSY
    return leaf and (region + 1) * PMD_PAGES <= len(m.pte)


@jit
def rewritten(env: Env, old: int, writable: int) -> int:
    """make_spte(): the leaf that a fault writes over `old`."""
    if not writable:
        return Spte.RO
    over_writable = old == Spte.RW or old == Spte.RW_CLEAN
    return Spte.RW_CLEAN if over_writable and env.policy[Behaviour.REWRITE_DROPS_DIRTY] else Spte.RW


@jit
def leaf_after(env: Env, old: int, write: int, writable: int) -> int:
    """The leaf after a fault that found `old`; equal to it where the fault is spurious."""
    if old > write and env.policy[Behaviour.DUPLICATE_IS_SPURIOUS]:
        return old
    return rewritten(env, old, writable)


@jit
def install(m: Machine, env: Env, page: int, write: int, writable: int) -> int:
    """kvm_tdp_mmu_map(), tdp_mmu_map_handle_target_level(): returns Outcome.FIXED or SPURIOUS."""
    region = page >> PMD_ORDER
    huge = maps_2m(m, page)
    if not huge and m.spte_pmd[region] == SptePmd.N:
        m.spte_pmd[region] = SptePmd.T
    old = np.int64(m.spte_pmd[region]) if huge else spte(m, page)
    new = leaf_after(env, old, write, writable)
    if new == old:
        return Outcome.SPURIOUS
    if huge:
        m.spte_pmd[region] = new
    else:
        set_spte(m, page, new)
    if old == Spte.N:
        m.gauges[Gauge.PAGES_2M if huge else Gauge.PAGES_4K] += 1
    return Outcome.FIXED


@jit
def prefetch_4k(m: Machine, page: int) -> None:
    """Patch 2 of the thread: make the new page's SPTE, only where a 4K table exists."""
    if m.spte_pmd[page >> PMD_ORDER] != SptePmd.T:
        return
    if spte(m, page) == Spte.N:
        m.gauges[Gauge.PAGES_4K] += 1
    set_spte(m, page, Spte.RW)
    m.counters[Counter.SPTE_PREFETCH] += 1


@jit
def zap(m: Machine, lo: int, hi: int) -> bool:
    """tdp_mmu_zap_leafs() over [lo, hi) in gfn: leaves go, tables stay. True if a leaf was there."""
    zapped = False
    for region in range(lo >> PMD_ORDER, ((hi - 1) >> PMD_ORDER) + 1):
        pmd = m.spte_pmd[region]
        if pmd == SptePmd.T:
            for page in range(max(lo, region << PMD_ORDER), min(hi, region_end(m, region))):
                if spte(m, page) != Spte.N:
                    set_spte(m, page, Spte.N)
                    m.gauges[Gauge.PAGES_4K] -= 1
                    zapped = True
        elif pmd != SptePmd.N:
            m.spte_pmd[region] = SptePmd.N
            m.gauges[Gauge.PAGES_2M] -= 1
            zapped = True
    return zapped
