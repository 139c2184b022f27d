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
        return spte(m, page) > write  # N < RO < RW, and write is 0 or 1
    return pmd != SptePmd.N and pmd > write


@jit
def maps_2m(m: Machine, page: int) -> bool:
    """Level of the new SPTE: 2M where the host has a leaf and the slot holds the whole region (lpage_info of its tail)."""
    region = page >> PMD_ORDER
    pmd = m.host_pmd[region]
    leaf = pmd != HostPmd.NONE and pmd != HostPmd.TBL and pmd != HostPmd.HUGE_BUSY
    return leaf and (region + 1) * PMD_PAGES <= len(m.pte)


@jit
def outcome_of(env: Env, old: int, new: int, write: int) -> int:
    """RET_PF_* of setting a leaf over `old` (0: non-present); Spte and SptePmd agree on N, RO and RW.

    Equal read-only leaves compare equal. An equal writable one differs in the Dirty bit up to 6.12, so it counts as
    fixed; from 6.13 on any access that is allowed already is spurious."""
    if old == new and old == Spte.RO:
        return Outcome.SPURIOUS
    if old > write and env.policy[Behaviour.DUPLICATE_IS_SPURIOUS]:
        return Outcome.SPURIOUS
    return Outcome.FIXED


@jit
def install_2m(m: Machine, env: Env, region: int, new: int, write: int) -> int:
    old = np.int64(m.spte_pmd[region])
    outcome = outcome_of(env, old, new, write)
    if outcome == Outcome.FIXED:
        m.spte_pmd[region] = new
        if old == SptePmd.N:
            m.gauges[Gauge.PAGES_2M] += 1
    return outcome


@jit
def install_4k(m: Machine, env: Env, page: int, new: int, write: int) -> int:
    region = page >> PMD_ORDER
    if m.spte_pmd[region] == SptePmd.N:
        m.spte_pmd[region] = SptePmd.T
    old = spte(m, page)
    outcome = outcome_of(env, old, new, write)
    if outcome == Outcome.FIXED:
        set_spte(m, page, new)
        if old == Spte.N:
            m.gauges[Gauge.PAGES_4K] += 1
    return outcome


@jit
def install(m: Machine, env: Env, page: int, write: int, writable: int) -> int:
    """kvm_tdp_mmu_map(): returns Outcome.FIXED or SPURIOUS."""
    new = np.int64(Spte.RW if writable else Spte.RO)
    if maps_2m(m, page):
        return install_2m(m, env, page >> PMD_ORDER, new, write)
    return install_4k(m, env, page, new, write)


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
