"""khugepaged and KSM beside the steps, counted by hand from docs/model.md section 10.

With FREE costs only what a test names takes time, so that the daemons' looks fall on whole milliseconds.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kernels import (
    Access,
    ChildExit,
    Cost,
    DontNeed,
    Fork,
    Idle,
    Khugepaged,
    Ksm,
    Run,
    Touch,
    TouchList,
    simulate,
)
from kernels.spec import Vm
from kernels.steps import Step

MIB2 = 2 << 20
PAGE = 4096
MS = 1_000_000
THP = "anonymous_thp"
FREE = dict.fromkeys(Cost, 0)
READ, WRITE = Touch(access=Access.READ), Touch()
READ_EACH, WRITE_EACH = Touch(access=Access.READ, every=MIB2), Touch(every=MIB2)  # the first page of each region
SPLIT_ZERO = (READ_EACH, WRITE_EACH)  # up to 6.12: a page table with one page and 511 zero pages
SPLIT_THP = (WRITE, DontNeed(every=MIB2))  # a page table with 511 parts of a THP, the first page missing
PAIR = ("invalidate_range_start", "change_pte", "mmu_lock_write", "remote_tlb_flush_requests")


def run(*steps: Step, **parameters: Any) -> Run:
    return simulate(steps=steps, **{"memory": MIB2, "costs": FREE, **parameters})


def of(counters: Mapping[str, int], *names: str) -> tuple[int, ...]:
    return tuple(counters[name] for name in names)


def after_a_pass(*steps: Step, **parameters: Any) -> int:
    """How many regions khugepaged's first pass collapses."""
    settings = {"backing": THP, "kernel": "6.12", "khugepaged": Khugepaged(scan_sleep_ms=1)}
    return run(*steps, Idle(MS + 1), **settings | parameters).steps[-1].counters["thp_collapse_alloc"]


# ---- khugepaged ------------------------------------------------------------------------------------------------------


def test_khugepageds_first_pass_is_one_sleep_after_the_start() -> None:
    daemon = {"backing": THP, "memory": 3 * MIB2, "kernel": "6.12", "khugepaged": Khugepaged(scan_sleep_ms=10)}
    before, after = run(*SPLIT_ZERO, Idle(10 * MS - 1), Idle(2), **daemon).steps[2:]
    assert (before.counters["thp_collapse_alloc"], after.counters["thp_collapse_alloc"]) == (0, 3)


@pytest.mark.parametrize(
    ("pages_to_scan", "collapsed"),
    [(512, [1] * 9 + [0]), (513, [2, 2, 2, 2, 1, 0]), (1024, [2, 2, 2, 2, 1, 0]), (4096, [8, 1, 0]), (100_000, [9, 0])],
)
def test_khugepaged_looks_at_so_many_pages_per_pass_region_by_region(pages_to_scan: int, collapsed: list[int]) -> None:
    """512 pages of the budget each, the last region whole; the default of 4096 is 8 regions. Nine regions wait, a pass is 1 ms."""
    idles = [Idle(MS + 1)] + [Idle(MS)] * (len(collapsed) - 1)
    settings = Khugepaged(pages_to_scan=pages_to_scan, scan_sleep_ms=1)
    done = run(*SPLIT_ZERO, *idles, backing=THP, memory=9 * MIB2, kernel="6.12", khugepaged=settings)
    assert [step.counters["thp_collapse_alloc"] for step in done.steps[2:]] == collapsed


def test_khugepaged_goes_round_once_per_pass_whatever_is_left_of_its_budget() -> None:
    """Two THPs, nothing to collapse: looks at 1.0 and 1.1 ms, 100 us each, then a sleep, then at 2.2 ms again. Region 0 gets its
    page table at 1.05 ms. Round and round until 4096 pages are looked at, it would be found at 1.2 ms."""
    daemon = {"khugepaged": Khugepaged(scan_sleep_ms=1), "costs": FREE | {Cost.SCAN_PTE_NS: 100_000}}
    idles = [Idle(1_050_000), DontNeed(end=1 / 1024), Idle(1_100_000), Idle(100_000)]
    done = run(WRITE, *idles, backing=THP, memory=2 * MIB2, kernel="6.12", **daemon)
    assert [step.counters["thp_collapse_alloc"] for step in done.steps] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(("max_ptes_none", "thps"), [(511, 1), (510, 0)])
def test_khugepaged_counts_zero_pages_as_none(max_ptes_none: int, thps: int) -> None:
    """One page of its own, 511 zero pages."""
    assert after_a_pass(*SPLIT_ZERO, khugepaged=Khugepaged(scan_sleep_ms=1, max_ptes_none=max_ptes_none)) == thps


@pytest.mark.parametrize(("max_ptes_none", "thps"), [(100, 1), (99, 0)])
def test_khugepaged_counts_missing_pages(max_ptes_none: int, thps: int) -> None:
    """100 pages dropped of a split THP."""
    steps = (WRITE, DontNeed(every=MIB2, size=100 * PAGE))
    assert after_a_pass(*steps, khugepaged=Khugepaged(scan_sleep_ms=1, max_ptes_none=max_ptes_none)) == thps


@pytest.mark.parametrize(
    ("steps", "thps"),
    [
        ((READ, DontNeed(every=MIB2)), 0),  # 511 zero pages
        ((*SPLIT_THP, Fork(), WRITE, ChildExit(), Fork(), ChildExit()), 0),  # 512 pages of its own, all read-only
        ((*SPLIT_THP, Fork(), WRITE, ChildExit(), Fork(), ChildExit(), WRITE_EACH), 1),  # one of them reused
    ],
)
def test_khugepaged_wants_a_writable_page(steps: tuple[Step, ...], thps: int) -> None:
    assert after_a_pass(*steps) == thps


@pytest.mark.parametrize(("written", "thps"), [(255, 0), (256, 1)])
def test_khugepaged_leaves_regions_with_more_than_256_shared_pages(written: int, thps: int) -> None:
    """511 pages are shared with the child, page 0 is missing: writing `written` pages from 0 on leaves 512 - written shared."""
    assert after_a_pass(*SPLIT_THP, Fork(), Touch(end=written / 512)) == thps


@pytest.mark.parametrize("parameters", [{"backing": "anonymous"}, {"backing": "shmem"}, {"thp_enabled": "never"}])
def test_khugepaged_stays_away_from_memory_without_thps(parameters: dict[str, Any]) -> None:
    assert after_a_pass(WRITE, **parameters) == 0


def test_a_collapsed_region_is_zapped_once_and_then_mapped_2m_with_one_flush() -> None:
    """One page is there and mapped: copied, one flush. The 2M leaf replaces KVM's empty 4K table: one flush, one exit."""
    daemon = {"backing": THP, "kernel": "6.12", "khugepaged": Khugepaged(scan_sleep_ms=1)}
    idle, read, written = run(*SPLIT_ZERO, Idle(MS + 1), READ, WRITE, **daemon).steps[2:]
    assert of(idle.counters, *PAIR) == (1, 0, 2, 1)
    assert of(idle.counters, "bytes_copied", "bytes_cleared") == (PAGE, 511 * PAGE)
    assert of(idle.gauges, "anon_huge_bytes", "held_bytes", "pages_4k") == (MIB2, MIB2, 0)
    assert of(read.counters, "pf_taken", "pgfault", "remote_tlb_flush_requests") == (1, 0, 1)
    assert (read.gauges["pages_2m"], written.counters["pf_taken"]) == (1, 0)


@pytest.mark.parametrize(("access", "alone"), [(Access.READ, (1, 0, 0)), (Access.WRITE, (2, 1, 1))])
def test_a_fault_during_the_copy_waits_and_finds_the_thp(access: Access, alone: tuple[int, int, int]) -> None:
    """The copy takes 1 + 511 us from 1 ms on, after the pair. The setup has taken 1 us, so the second access, 1200 us after the
    first, comes at 1201 us: its slow GUP waits 311 us for mmap_lock and then finds all it asks for, a write too. Without the
    daemon: a zero page, mapped 4K, and copied for a write."""
    costs = FREE | {Cost.CLEAR_4K_NS: 1000, Cost.COPY_4K_NS: 1000}
    steps = (*SPLIT_ZERO, Touch(access=access, touches=2, think_ns=1_200_000))
    waited = run(*steps, backing=THP, kernel="6.12", costs=costs, khugepaged=Khugepaged(scan_sleep_ms=1))
    names = ("pf_taken", "pgfault", "cow_4k")
    assert of(waited.steps[-1].counters, *names, "mmap_lock_wait_ns") == (1, 0, 0, 311_000)
    assert waited.gauges["pages_2m"] == 1
    undisturbed = run(*steps, backing=THP, kernel="6.12", costs=costs)
    assert of(undisturbed.steps[-1].counters, *names, "mmap_lock_wait_ns") == (*alone, 0)


def test_a_waiting_writer_of_mmap_lock_stops_new_readers() -> None:
    """Each access takes 10 us. The last step begins at 21 us, after two accesses and one copied page. vCPU 0 makes 95, then holds
    mmap_lock for reading from 971 to 1071 us (it clears a THP elsewhere); khugepaged asks for it at 1000, vCPU 1 after 100
    accesses at 1021. khugepaged waits 71 us, then copies 512; vCPU 1 waits for both, 562 us, not for nothing."""
    costs = FREE | {Cost.TOUCH_NS: 10_000, Cost.CLEAR_4K_NS: 1000, Cost.COPY_4K_NS: 1000, Cost.CLEAR_2M_NS: 100_000}
    vcpus, gfns = [0] * 96 + [1] * 101, [0] * 95 + [512] + [0] * 100 + [1]
    last = TouchList(np.array(vcpus), np.array(gfns), np.array([gfn == 512 for gfn in gfns]))
    before = [Touch(access=access, touches=1, vcpus=1) for access in (Access.READ, Access.WRITE)]
    daemon = Khugepaged(scan_sleep_ms=1)
    done = run(*before, last, backing=THP, memory=2 * MIB2, vcpus=2, kernel="6.12", costs=costs, khugepaged=daemon)
    assert of(done.steps[-1].counters, "thp_collapse_alloc", "mmap_lock_wait_ns") == (1, 71_000 + 562_000)


# ---- KSM -------------------------------------------------------------------------------------------------------------


def merged_after(sleeps: int, pages_to_scan: int, **parameters: Any) -> list[int]:
    """KSM pages after 1, 2, ... sleeps."""
    daemon = Ksm(pages_to_scan=pages_to_scan, sleep_ms=1)
    runs = (run(WRITE, Idle(n * MS + 1), ksm=daemon, **parameters) for n in range(1, sleeps + 1))
    return [int(done.machine.vm[Vm.KSM_SHARERS]) for done in runs]


def test_ksm_goes_through_the_pages_in_turn_and_begins_again() -> None:
    assert merged_after(6, pages_to_scan=100) == [100, 200, 300, 400, 500, 512]


@pytest.mark.parametrize(("kernel", "calls"), [("6.9", 1022), ("6.10", 0)])
def test_ksm_merges_as_one_call_would(kernel: str, calls: int) -> None:
    """512 pages, of which 0 and 256 make the two KSM pages with one pair, all others two; each is mapped once, so 512 flushes."""
    idle = run(WRITE, Idle(MS + 1), kernel=kernel, ksm=Ksm(pages_to_scan=512, sleep_ms=1)).steps[-1]
    assert of(idle.counters, *PAIR) == (1022, calls, 2 * 1022 + calls, 512)
    assert of(idle.gauges, "rss_bytes", "held_bytes", "pages_4k") == (MIB2, 2 * PAGE, 0)


@pytest.mark.parametrize(("kernel", "one_pair"), [("6.1", 3), ("6.9", 3), ("6.10", 2), ("6.12", 2)])
def test_ksm_takes_mmu_lock_three_times_a_pair_while_change_pte_exists(kernel: str, one_pair: int) -> None:
    """A page a sleep: page 0 makes the KSM page, 1 ... 255 join it, 256 makes another."""
    idles = [Idle(MS + 1), Idle(MS), Idle(253 * MS), Idle(MS), Idle(MS), Idle(MS)]
    steps = run(WRITE, *idles, kernel=kernel, ksm=Ksm(pages_to_scan=1, sleep_ms=1)).steps[1:]
    locks = [step.counters["mmu_lock_write"] for step in steps]
    assert locks == [one_pair, 2 * one_pair, 253 * 2 * one_pair, 2 * one_pair, one_pair, 2 * one_pair]


def test_ksm_takes_the_fraction_that_has_a_twin() -> None:
    """Every other page: 256 merges, of which the first has one pair."""
    idle = run(WRITE, Idle(MS + 1), ksm=Ksm(pages_to_scan=512, sleep_ms=1, fraction=0.5)).steps[-1]
    assert (idle.counters["invalidate_range_start"], idle.gauges["held_bytes"]) == (511, (256 + 1) * PAGE)


def test_ksm_splits_a_thp_with_two_pairs_before_its_pages() -> None:
    idle = run(WRITE, Idle(MS + 1), backing=THP, ksm=Ksm(pages_to_scan=512, sleep_ms=1), kernel="6.1").steps[-1]
    assert of(idle.counters, *PAIR, "thp_split_pmd") == (2 + 1022, 1022, 2 * 1024 + 1022, 1, 1)


@pytest.mark.parametrize("backing", ["shmem", "private_memfd", "anonymous_hugetlb_2mb"])
def test_ksm_stays_away_from_memory_that_is_not_private_and_anonymous(backing: str) -> None:
    idle = run(WRITE, Idle(MS + 1), backing=backing, ksm=Ksm(pages_to_scan=512, sleep_ms=1)).steps[-1]
    assert idle.counters["invalidate_range_start"] == 0


def test_a_guests_write_takes_a_ksm_page_apart_again() -> None:
    """Two exits and a copy each."""
    written = run(WRITE, Idle(MS + 1), WRITE, ksm=Ksm(pages_to_scan=512, sleep_ms=1)).steps[-1]
    assert of(written.counters, "pf_taken", "cow_ksm", "cow_4k", "bytes_copied") == (1024, 512, 512, MIB2)
    assert written.gauges["held_bytes"] == MIB2


@pytest.mark.parametrize(("kernel", "calls"), [("6.1", 1), ("6.12", 0)])
def test_a_page_written_between_its_pairs_is_not_merged(kernel: str, calls: int) -> None:
    """Two pages; a callback takes 1 us. From 1 ms on page 0 becomes the KSM page in one pair. The first pair of page 1 protects
    it; vCPU 0, which writes it every 100 ns, makes it its own again before the second pair begins 1 us later, which so leaves
    it alone: three pairs, of which two changed a PTE. Without the writes page 1 joins page 0."""
    point = {"memory": 2 * PAGE, "kernel": kernel, "ksm": Ksm(pages_to_scan=2, sleep_ms=1)}
    costs = FREE | {Cost.NOTIFIER_NS: 1000, Cost.VM_EXIT_NS: 100, Cost.TOUCH_NS: 100}
    writing = run(WRITE, Touch(start=0.5, repeat=True, touches=11_000), costs=costs, **point)
    assert of(writing.steps[-1].counters, "invalidate_range_start", "change_pte", "cow_reuse", "cow_ksm") == (3, 2 * calls, 1, 0)
    assert (writing.machine.vm[Vm.KSM_SHARERS], writing.gauges["held_bytes"]) == (1, 2 * PAGE)
    resting = run(WRITE, Idle(1_100_000), costs=costs, **point)
    assert of(resting.steps[-1].counters, "invalidate_range_start", "change_pte") == (3, 3 * calls)
    assert (resting.machine.vm[Vm.KSM_SHARERS], resting.gauges["held_bytes"]) == (2, PAGE)


# ---- Steps -----------------------------------------------------------------------------------------------------------

TOTAL = 6 * MS
CUTS = ([MS] * 6, [0, TOTAL - 1, 1], [MS + 1, 0, 2 * MS, TOTAL - 3 * MS - 1], [MS - 3] + [9770] * 300, [MS + 60_000, 150_000, 1], [7] * 20)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "parameters",
    [
        {"backing": THP, "khugepaged": Khugepaged(scan_sleep_ms=1, pages_to_scan=1024)},
        {"ksm": Ksm(pages_to_scan=30, sleep_ms=1)},
        {"backing": THP, "khugepaged": Khugepaged(scan_sleep_ms=2), "ksm": Ksm(pages_to_scan=50, sleep_ms=1, fraction=0.3)},
    ],
)
def test_where_idle_time_is_cut_changes_nothing(parameters: dict[str, Any], cut: list[int]) -> None:
    """Also in the middle of a merge or collapse, which the step's end waits for. Default costs."""
    point: dict[str, Any] = {"memory": 4 * MIB2, "kernel": "6.12"} | parameters
    pieces = [*cut, TOTAL - sum(cut)]
    whole, apart = (simulate(steps=[*SPLIT_ZERO, *idles, WRITE], **point) for idles in ([Idle(TOTAL)], [Idle(ns) for ns in pieces]))
    assert whole.steps[2].counters["invalidate_range_start"] > 0  # the daemons did something while idle
    assert (apart.counters, apart.gauges, apart.total_ns) == (whole.counters, whole.gauges, whole.total_ns)
    for mine, theirs in zip(apart.machine[:4], whole.machine[:4], strict=True):  # the page tables
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("cut", [[2_500_000], [900_000, 1_600_000], [1_500_000, 1_000_000]])
def test_two_daemons_keep_their_order_wherever_a_step_ends(cut: list[int]) -> None:
    """khugepaged copies 4 us a page, from 1 to 3.048 ms. KSM looks at page 0 at 2 ms: a region that is being collapsed has no
    anonymous page to merge. So the huge zero page's split stays the only one, and the THP lasts."""
    costs = FREE | {Cost.CLEAR_4K_NS: 4000, Cost.COPY_4K_NS: 4000}
    daemons = {"khugepaged": Khugepaged(scan_sleep_ms=1), "ksm": Ksm(pages_to_scan=1, sleep_ms=2)}
    done = run(*SPLIT_ZERO, *[Idle(ns) for ns in cut], backing=THP, kernel="6.12", costs=costs, **daemons)
    assert of(done.counters, "thp_collapse_alloc", "thp_split_pmd") == (1, 1)
    assert done.gauges["anon_huge_bytes"] == MIB2
