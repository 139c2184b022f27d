"""Meetings of khugepaged, ksmd and vCPUs that random lives seldom reach, timed by hand, in both implementations.

With FREE costs only what a test names takes time. Both daemons look first at 1 ms unless a test says otherwise.
"""

from typing import Any

import pytest

from kernels import Access, ChildExit, Cost, DontNeed, Fork, Idle, Khugepaged, Ksm, Populate, Run, Touch
from kernels.spec import HOST_MASK, PAGE_BYTES, PMD_BYTES, PMD_PAGES, HostPte, Spread, Vm
from kernels.steps import Step
from tests.test_differential import rows
from tests.test_rare_states import of, run

MS = 1_000_000
FREE = dict.fromkeys(Cost, 0)
READ_EACH, WRITE_EACH = Touch(access=Access.READ, every=PMD_BYTES), Touch(every=PMD_BYTES)  # the first page of each region
SPLIT_ZERO = (READ_EACH, WRITE_EACH)  # 6.12: a page table with one page and 511 zero pages
SPLIT_THP = (Touch(), DontNeed(every=PMD_BYTES))  # a page table with 511 parts of a THP, page 0 missing
BEFORE_CHANGE_PTE_WENT = "6.9"


def meet(*steps: Step, costs: dict[Cost, int], **parameters: Any) -> Run:
    return run(*steps, **{"backing": "anonymous_thp", "kernel": "6.12", "costs": FREE | costs, **parameters})


def pte(done: Run, page: int) -> HostPte:
    return HostPte(done.machine.pte[page] & HOST_MASK)


def ksm_pages(done: Run) -> int:
    return int(done.machine.vm[Vm.KSM_SHARERS])


# ---- ksmd alone, or with a vCPU --------------------------------------------------------------------------------------


def test_ksmd_begins_again_behind_the_last_page() -> None:
    """Two pages, one look a sleep. Page 0 was written anew after both were merged: the third look is at it, not behind the slot."""
    look = {"memory": 2 * PAGE_BYTES, "backing": "anonymous", "ksm": Ksm(pages_to_scan=1, sleep_ms=1)}
    steps = (Touch(), Idle(2 * MS + 1), Touch(touches=1), Idle(MS))
    assert [ksm_pages(meet(*steps[:n], costs={}, **look)) for n in (2, 3, 4)] == [2, 1, 2]


@pytest.mark.parametrize(("shared", "left"), [((), HostPte.ANON_RW), ((Fork(),), HostPte.ANON_SH)])
def test_ksmd_splits_the_folio_of_a_split_thp_with_one_pair(shared: tuple[Step, ...], left: HostPte) -> None:
    """Page 1 is one of 511 parts, ours or a child's too: a pair makes them pages of their own, another merges the page."""
    done = meet(*SPLIT_THP, *shared, Idle(MS + 1), costs={}, ksm=Ksm(pages_to_scan=2, sleep_ms=1))
    assert done.steps[-1].counters["invalidate_range_start"] == 2
    assert (pte(done, 1), pte(done, 2), ksm_pages(done)) == (HostPte.KSM_RO, left, 1)


def test_a_page_reused_before_ksmd_protects_it_gets_one_pair() -> None:
    """ksmd reads page 1, read-only and ours, at 1 ms, and protects it 1 us later. vCPU 0 writes it 400 ns before 1 ms and has it
    writable 100 ns after: the pair changes nothing, and no other follows."""
    writes = Touch(touches=2, think_ns=996_600)  # fork() took 2 us, the write of page 0 an exit of 1 us
    costs = {Cost.NOTIFIER_NS: 1000, Cost.VM_EXIT_NS: 1000}
    ksm = Ksm(pages_to_scan=2, sleep_ms=1, fraction=0.5)  # page 1
    done = meet(Populate(), Fork(), ChildExit(), writes, costs=costs, ksm=ksm, memory=2 * PAGE_BYTES, backing="anonymous")
    assert of(done.steps[-1].counters, "cow_reuse", "invalidate_range_start") == (2, 1)
    assert (pte(done, 1), ksm_pages(done)) == (HostPte.ANON_RW, 0)


def test_a_thp_that_a_vcpu_splits_before_ksmd_stays_one_folio() -> None:
    """ksmd begins to split the THP at 1 ms, with a pair from 1.001 ms on. The write of page 0 at 999.5 us splits it at
    1.00055 ms: ksmd's two pairs find nothing to split, and page 1 stays a part of the THP's folio, not to be merged."""
    costs = {Cost.NOTIFIER_NS: 1000, Cost.VM_EXIT_NS: 100, Cost.TOUCH_NS: 997_400}  # after fork(), 2 us, and an exit
    ksm = Ksm(pages_to_scan=2, sleep_ms=1, fraction=0.5)  # page 1
    done = meet(Populate(), Fork(), rows((0, 0, False), (0, 0, True)), costs=costs, ksm=ksm)
    assert of(done.steps[-1].counters, "thp_split_pmd", "cow_4k", "invalidate_range_start") == (1, 1, 2 + 2)
    assert (pte(done, 0), pte(done, 1), ksm_pages(done)) == (HostPte.ANON_RW, HostPte.ANON_TSH, 0)


# ---- ksmd and khugepaged ---------------------------------------------------------------------------------------------
# A callback takes 1 us: khugepaged, which looks at 1 ms, takes the region's table at 1.001 ms and has its THP at 1.002 ms.


@pytest.mark.parametrize(("merge_ns", "pairs"), [(500, 1), (1500, 0)])
def test_ksmd_lets_a_thp_be_that_came_meanwhile(merge_ns: int, pairs: int) -> None:
    """ksmd looks at a part of a split THP at 1 ms, and acts `merge_ns` later: its pair, from 1.0015 to 1.0025 ms, finds no table
    to split the folio below, and the THP at its end; or there is no table even then, and no pair."""
    daemons = {"khugepaged": Khugepaged(scan_sleep_ms=1), "ksm": Ksm(pages_to_scan=2, sleep_ms=1)}
    done = meet(*SPLIT_THP, Idle(1_100_000), costs={Cost.NOTIFIER_NS: 1000, Cost.KSM_MERGE_NS: merge_ns}, **daemons)
    assert of(done.steps[-1].counters, "thp_collapse_alloc", "invalidate_range_start", "thp_split_pmd") == (1, 1 + pairs, 0)
    assert (done.gauges["anon_huge_bytes"], ksm_pages(done)) == (PMD_BYTES, 0)


def test_ksmd_does_not_protect_a_page_that_is_being_collapsed() -> None:
    """ksmd reads page 0 at 1.0005 ms; at 1.0015 ms it is as it was, but its table is gone."""
    daemons = {"khugepaged": Khugepaged(scan_sleep_ms=1), "ksm": Ksm(pages_to_scan=1, sleep_ms=1)}
    costs = {Cost.NOTIFIER_NS: 1000, Cost.KSM_MERGE_NS: 500}
    done = meet(*SPLIT_ZERO, Idle(1_100_000), costs=costs, kernel=BEFORE_CHANGE_PTE_WENT, **daemons)
    assert of(done.steps[-1].counters, "thp_collapse_alloc", "invalidate_range_start", "change_pte") == (1, 2, 0)


def test_ksmd_does_not_replace_a_page_that_is_being_collapsed() -> None:
    """Page 0 became a KSM page from 1 to 1.003 ms. Page 1 is protected from 2.003 to 2.006 ms, and would be replaced at 2.007 ms;
    khugepaged, its THP there at 2.0055 ms, has the table from 2.0065 to 2.0075 ms. Page 2 is writable all the time."""
    daemons = {"khugepaged": Khugepaged(scan_sleep_ms=2), "ksm": Ksm(pages_to_scan=1, sleep_ms=1)}
    costs = {Cost.NOTIFIER_NS: 1000, Cost.COLLAPSE_NS: 5500}
    steps = (*SPLIT_ZERO, Touch(end=3 / PMD_PAGES), Idle(2_100_000))
    done = meet(*steps, costs=costs, kernel=BEFORE_CHANGE_PTE_WENT, **daemons)
    assert of(done.steps[-1].counters, "thp_collapse_alloc", "invalidate_range_start", "change_pte") == (1, 3 + 1, 2)


# ---- khugepaged and vCPUs: mmap_lock ---------------------------------------------------------------------------------


def test_khugepaged_waits_for_the_cache_line_of_mmap_lock_and_faults_for_khugepaged() -> None:
    """mmap_lock's line comes 1 us after 1 ms, mmu_lock's for the pair 1 us later; the copy of 512 pages takes 512 us. Both vCPUs
    read page 1 at 1.201 ms, the first steps having taken 1 us, and sleep from 1.202 and 1.203 ms, when they have the line, to
    1.514 ms."""
    costs = {Cost.LINE_NS: 1000, Cost.CLEAR_4K_NS: 1000, Cost.COPY_4K_NS: 1000}
    reads = Touch(access=Access.READ, spread=Spread.ALL, touches=4, think_ns=1_200_000)
    done = meet(*SPLIT_ZERO, reads, costs=costs, vcpus=2, khugepaged=Khugepaged(scan_sleep_ms=1))
    assert of(done.steps[-1].counters, "thp_collapse_alloc", "mmap_lock_wait_ns") == (1, 312_000 + 311_000)


def test_khugepaged_looks_again_once_it_has_the_cache_line() -> None:
    """Its THP is there at 1.0008 ms, the line comes 1 us later. The only writable page becomes a KSM page at 1.0015 ms, when
    mmu_lock's line has come, which ksmd asked for at 1.0005 ms: no collapse."""
    daemons = {"khugepaged": Khugepaged(scan_sleep_ms=1), "ksm": Ksm(pages_to_scan=1, sleep_ms=1)}
    costs = {Cost.LINE_NS: 1000, Cost.NOTIFIER_NS: 500, Cost.COLLAPSE_NS: 800}
    waits = Touch(access=Access.READ, spread=Spread.ALL, touches=2, think_ns=1_100_000)
    done = meet(*SPLIT_ZERO, waits, costs=costs, vcpus=2, **daemons)
    assert of(done.steps[-1].counters, "invalidate_range_start", "bytes_copied") == (1, 0)
    assert (done.gauges["anon_huge_bytes"], ksm_pages(done)) == (0, 1)
