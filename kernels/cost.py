"""Cost parameters: virtual nanoseconds of each part of a fault. Counts do not depend on them with one vCPU.

The values here are those of configs/costs/default.toml, which adds range, machine, method and source to each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Cost(IntEnum):
    """Index of each parameter; the lower-case name is the key of a cost file."""

    TOUCH_NS = 0
    """A guest access that the SPTE allows, TLB refill included."""
    VM_EXIT_NS = 1
    """Exit and entry, bare round trip; one half before the handler, one after."""
    KVM_FAULT_NS = 2
    """KVM's own work of one fault: dispatch, caches, walk, cmpxchg; one half before GUP, one after."""
    GUP_FAST_NS = 3
    """One GUP-fast attempt."""
    GUP_SLOW_NS = 4
    """One slow GUP walk, mmap_lock included, handle_mm_fault() not."""
    ZERO_MAP_NS = 5
    """handle_mm_fault() maps the 4K zero page."""
    HUGE_ZERO_MAP_NS = 6
    """handle_mm_fault() maps the huge zero page."""
    ANON_FAULT_NS = 7
    """handle_mm_fault() allocates and maps a 4K anonymous page, clearing left out."""
    SHMEM_FAULT_NS = 8
    """handle_mm_fault() allocates and maps a 4K shmem page, clearing left out."""
    THP_FAULT_NS = 9
    """handle_mm_fault() allocates and maps a THP, clearing left out."""
    HUGETLB_FAULT_NS = 10
    """hugetlb_fault() takes and maps a reserved page, clearing left out."""
    REUSE_NS = 11
    """handle_mm_fault() makes an exclusive page writable."""
    COW_4K_NS = 12
    """wp_page_copy() of a 4K page, clearing and notifiers left out."""
    SPLIT_PMD_NS = 13
    """__split_huge_pmd() of a huge-zero PMD, notifiers left out."""
    HUGE_ZERO_THP_NS = 14
    """do_huge_zero_wp_pmd(), clearing and notifiers left out."""
    CLEAR_4K_NS = 15
    """Clearing a 4K page."""
    CLEAR_2M_NS = 16
    """Clearing 2 MiB of a huge page."""
    COPY_4K_NS = 17
    """Copying a 4K page."""
    NOTIFIER_NS = 18
    """One notifier callback: entry, SRCU, memslot lookup; locks left out."""
    MMU_LOCK_WRITE_NS = 19
    """Hold of mmu_lock for write by a callback that flushes nothing."""
    MMU_LOCK_READ_NS = 20
    """Hold of mmu_lock by one fault, under the TDP MMU for read: stale check and install."""
    TLB_FLUSH_NS = 21
    """A synchronous TLB shootdown, first target."""
    TLB_FLUSH_TARGET_NS = 22
    """The same, each further target."""
    TLB_VICTIM_NS = 23
    """What a vCPU in the guest loses to a shootdown: exit, entry, TLB refill."""
    FILE_MAP_NS = 24
    """handle_mm_fault() maps a page, huge or not, that is in the page cache; fault-around included."""
    COPY_2M_NS = 25
    """Copy of 2 MiB (hugetlb)."""
    FORK_NS = 26
    """fork() or the child's end, page-table entries left out."""
    FORK_PTE_NS = 27
    """fork(): each entry that is copied or write-protected."""
    MADVISE_NS = 28
    """One madvise() call, its work left out."""
    ZAP_PTE_NS = 29
    """MADV_DONTNEED: each entry that goes."""
    SCAN_PTE_NS = 30
    """khugepaged, MADV_COLLAPSE and KSM: looking at one entry or page."""
    COLLAPSE_NS = 31
    """One collapse: allocation and the rest, copying, clearing and notifiers left out."""
    KSM_MERGE_NS = 32
    """KSM merges one page: checksum, trees, comparison, notifiers left out."""
    DIRTY_LOG_NS = 33
    """The ioctl that turns dirty logging on or off or gets the log, its work left out."""
    WRITE_PROTECT_NS = 34
    """Each leaf that is write-protected or made clean."""
    SPLIT_SPTE_NS = 35
    """KVM splits a huge leaf into a table of 512, or makes a huge leaf of a table, or zaps the table."""
    PML_FULL_NS = 36
    """Emptying a full page-modification log, exit left out."""
    MEMORY_2M_NS = 37
    """2 MiB of traffic at the memory bandwidth of the whole host, all CPUs together; a copy is twice its size."""
    LINE_NS = 38
    """Lock and unlock of a word (mmu_lock, mmap_lock) that another CPU had last: two transfers of its cache line."""
    LINE_CPU_NS = 39
    """The same, for each further actor of the step that shares the line."""
    ZONE_LOCK_NS = 40
    """Hold of zone->lock for one refill of a CPU's list: 63 pages, or 2 huge ones."""
    TIME_SLICE_NS = 41
    """With fewer CPUs than vCPUs: how long a thread runs while others wait."""
    CONTEXT_SWITCH_NS = 42
    """From one thread to another on a CPU, what its caches lose included."""
    SMT_NS = 43
    """What 1000 ns of work take while the core's other hardware thread works too."""
    LEGACY_FAULT_NS = 44
    """A fault of the legacy or shadow MMU, beyond one of the TDP MMU, holding mmu_lock for write: walk, rmap, prefetch."""


DEFAULT_COSTS: Mapping[Cost, int] = {
    Cost.TOUCH_NS: 20,
    Cost.VM_EXIT_NS: 500,
    Cost.KVM_FAULT_NS: 600,
    Cost.GUP_FAST_NS: 100,
    Cost.GUP_SLOW_NS: 300,
    Cost.ZERO_MAP_NS: 470,
    Cost.HUGE_ZERO_MAP_NS: 1000,
    Cost.ANON_FAULT_NS: 950,
    Cost.SHMEM_FAULT_NS: 1200,
    Cost.THP_FAULT_NS: 5000,
    Cost.HUGETLB_FAULT_NS: 2000,
    Cost.REUSE_NS: 1100,
    Cost.COW_4K_NS: 1750,
    Cost.SPLIT_PMD_NS: 7900,
    Cost.HUGE_ZERO_THP_NS: 55000,
    Cost.CLEAR_4K_NS: 350,
    Cost.CLEAR_2M_NS: 190000,
    Cost.COPY_4K_NS: 600,
    Cost.NOTIFIER_NS: 100,
    Cost.MMU_LOCK_WRITE_NS: 150,
    Cost.MMU_LOCK_READ_NS: 100,
    Cost.TLB_FLUSH_NS: 1000,
    Cost.TLB_FLUSH_TARGET_NS: 200,
    Cost.TLB_VICTIM_NS: 1500,
    Cost.FILE_MAP_NS: 800,
    Cost.COPY_2M_NS: 250000,
    Cost.FORK_NS: 200000,
    Cost.FORK_PTE_NS: 25,
    Cost.MADVISE_NS: 1000,
    Cost.ZAP_PTE_NS: 50,
    Cost.SCAN_PTE_NS: 10,
    Cost.COLLAPSE_NS: 60000,
    Cost.KSM_MERGE_NS: 3000,
    Cost.DIRTY_LOG_NS: 5000,
    Cost.WRITE_PROTECT_NS: 10,
    Cost.SPLIT_SPTE_NS: 3000,
    Cost.PML_FULL_NS: 3000,
    Cost.MEMORY_2M_NS: 15000,
    Cost.LINE_NS: 120,
    Cost.LINE_CPU_NS: 3,
    Cost.ZONE_LOCK_NS: 1200,
    Cost.TIME_SLICE_NS: 3000000,
    Cost.CONTEXT_SWITCH_NS: 1500,
    Cost.SMT_NS: 1500,
    Cost.LEGACY_FAULT_NS: 400,
}


_IN_ORDER = tuple(Cost)
_ALL = frozenset(Cost)


class CostError(ValueError):
    """A cost is missing, unknown, or no nanosecond count from 0 to 1000 s."""


MAX_COST_NS = 1_000_000_000_000
SMT_RANGE = 1000, 10_000  # smt_ns is no time: what 1000 ns of work take beside a sibling


def check_smt(smt_ns: int) -> None:
    """Raises CostError for a factor that would make shared cores faster, or endlessly slow."""
    if not SMT_RANGE[0] <= smt_ns <= SMT_RANGE[1]:
        raise CostError(f"cost smt_ns = {smt_ns}: {SMT_RANGE[0]} ... {SMT_RANGE[1]} is needed, for 1000 ns of work")


@dataclass(frozen=True, eq=False)
class Charges:
    """Costs, checked, as a run needs them; made once for all points of a cost file."""

    row: NDArray[np.int64]  # (len(Cost),) ns
    total_ns: int
    touch_ns: int
    smt_ns: int


def charges_of(costs: Mapping[Cost, int]) -> Charges:
    """Raises CostError."""
    return Charges(cost_row(costs), sum(costs.values()), costs[Cost.TOUCH_NS], costs[Cost.SMT_NS])


def cost_row(costs: Mapping[Cost, int]) -> NDArray[np.int64]:
    """The vector that jitted code indexes with Cost; shape (len(Cost),), ns. Raises CostError."""
    if missing := [c.name.lower() for c in _ALL if c not in costs]:
        raise CostError(f"costs lack {', '.join(missing)}")
    for cost, value in costs.items():
        if cost in _ALL and (type(value) is not int or not 0 <= value <= MAX_COST_NS):
            raise CostError(f"cost {Cost(cost).name.lower()} = {value!r}: an integer from 0 to {MAX_COST_NS} ns is needed")
    if unknown := [str(c) for c in costs if c not in _ALL]:
        raise CostError(f"unknown cost {unknown[0]}; known: {', '.join(c.name.lower() for c in Cost)}")
    return np.array([costs[c] for c in _IN_ORDER], dtype=np.int64)
