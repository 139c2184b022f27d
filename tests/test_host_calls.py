"""System calls of the VMM, counted by hand from docs/model.md sections 7 to 9; and what is refused.

One region of 2 MiB (512 pages) where nothing else is said. A pair takes mmu_lock for writing twice, and once more where
it calls change_pte; it asks for one flush if a leaf was there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kernels import (
    DEFAULT_COSTS,
    Access,
    Call,
    ChildExit,
    Collapse,
    Cost,
    DirtyLog,
    DontNeed,
    Fork,
    HostTouch,
    Idle,
    KsmMerge,
    Populate,
    PreFault,
    Run,
    Touch,
    TouchList,
    simulate,
)
from kernels.spec import Vm
from kernels.steps import Step, WorkloadError

MIB2 = 2 << 20
PAGE = 4096
THP, HUGETLB, SHARED_HUGETLB, MEMFD = "anonymous_thp", "anonymous_hugetlb_2mb", "shared_hugetlb_2mb", "private_memfd"
READ, WRITE = Touch(access=Access.READ), Touch()
READ_ONE, WRITE_ONE = Touch(access=Access.READ, touches=1), Touch(touches=1)  # page 0
FORK, CHILD_EXIT = Fork(), ChildExit()
ZAP, ZAP_FIRST_PAGES = DontNeed(), DontNeed(every=MIB2)  # everything; the first page of each region
LOG_ON, LOG_GET, LOG_OFF = DirtyLog(Call.LOG_ON), DirtyLog(Call.LOG_GET), DirtyLog(Call.LOG_OFF)
PAIR = ("invalidate_range_start", "invalidate_range_end", "change_pte", "mmu_lock_write", "remote_tlb_flush_requests")
FAULTS = ("pf_taken", "pf_retry", "pgfault")


def run(*steps: Step, **parameters: Any) -> Run:
    return simulate(steps=steps, **{"memory": MIB2, **parameters})


def last(*steps: Step, **parameters: Any) -> dict[str, int]:
    """Counters of the last step and gauges after it."""
    step = run(*steps, **parameters).steps[-1]
    return step.counters | step.gauges


def of(counters: Mapping[str, int], *names: str) -> tuple[int, ...]:
    return tuple(counters[name] for name in names)


def accesses(*rows: tuple[int, int]) -> TouchList:
    """(gfn, write) each, of vCPU 0."""
    gfn, write = zip(*rows, strict=True)
    return TouchList(np.zeros(len(rows), np.int64), np.array(gfn), np.array(write, bool))


def moved(counters: Mapping[str, int]) -> dict[str, int]:
    """What is not 0."""
    return {name: value for name, value in counters.items() if value}


# ---- fork, child_exit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
@pytest.mark.parametrize("backing", ["anonymous", THP, HUGETLB])
def test_fork_is_one_pair_over_the_whole_guest(kernel: str, backing: str) -> None:
    forked = run(WRITE, FORK, backing=backing, memory=2 * MIB2, kernel=kernel)
    assert of(forked.steps[-1].counters, *PAIR) == (1, 1, 0, 2, 1)
    assert of(forked.gauges, "pages_4k", "pages_2m") == (0, 0)
    assert forked.machine.vm[Vm.SEQ] == 1


@pytest.mark.parametrize(
    ("before", "backing", "pairs"),
    [
        (WRITE, "shmem", 0),
        (WRITE, "shmem_thp", 0),
        (WRITE, SHARED_HUGETLB, 0),
        (READ, "anonymous", 0),  # 4K zero pages need no anon_vma
        (READ, MEMFD, 0),
        (Idle(), THP, 0),
        (READ, THP, 1),  # the huge zero page does
        (READ, HUGETLB, 1),
        (WRITE, MEMFD, 1),
    ],
)
def test_fork_leaves_alone_what_the_child_can_fault_in_itself(before: Step, backing: str, pairs: int) -> None:
    """vma_needs_copy(): no pair, and what is mapped stays mapped, without an anon_vma."""
    first, forked = run(before, FORK, backing=backing).steps
    assert of(forked.counters, "invalidate_range_start", "mmu_lock_write") == (pairs, 2 * pairs)
    assert forked.gauges["pages_4k"] == (0 if pairs else first.gauges["pages_4k"])


def test_a_page_shared_with_the_child_is_copied_in_two_exits_and_the_child_keeps_the_old_one() -> None:
    written, ended = run(WRITE, FORK, WRITE, CHILD_EXIT).steps[-2:]
    assert of(written.counters, *FAULTS, "cow_4k", "bytes_copied") == (1024, 512, 512, 512, MIB2)
    assert of(written.gauges, "rss_bytes", "held_bytes") == (MIB2, 2 * MIB2)
    assert of(ended.gauges, "rss_bytes", "held_bytes") == (MIB2, MIB2)


def test_the_childs_end_is_no_notifier_and_leaves_read_only_leaves_which_are_reused() -> None:
    """Reads after the fork map 512 pages read-only: they stay. Each first write is one exit, and not the lockless one."""
    ended, written = run(WRITE, FORK, READ, CHILD_EXIT, WRITE).steps[-2:]
    assert (moved(ended.counters), ended.gauges["pages_4k"]) == ({}, 512)
    assert of(written.counters, *FAULTS, "cow_reuse", "pf_fast", "invalidate_range_start") == (512, 0, 512, 512, 0, 0)


def test_a_reused_page_can_be_shared_again() -> None:
    counters = last(WRITE, FORK, CHILD_EXIT, WRITE_ONE, FORK, WRITE)
    assert of(counters, "cow_4k", "cow_reuse", "held_bytes") == (512, 0, 2 * MIB2)


@pytest.mark.parametrize(("kernel", "calls"), [("6.1", 512), ("6.12", 0)])
def test_a_thp_shared_with_the_child_is_split_once_and_then_copied_page_by_page(kernel: str, calls: int) -> None:
    """Page 0: split and copy in one host fault, two pairs; 511 others: one each. 2 exits a page. Locks: 2 x 513, and change_pte."""
    counters = last(WRITE, FORK, WRITE, backing=THP, kernel=kernel)
    assert of(counters, *FAULTS) == (1024, 512, 512)
    assert of(counters, *PAIR[:4], "thp_split_pmd", "cow_4k") == (513, 513, calls, 1026 + calls, 1, 512)
    assert of(counters, "held_bytes", "anon_huge_bytes", "pages_4k") == (2 * MIB2, 0, 512)


def test_a_thp_that_the_child_no_longer_shares_is_reused_in_one_exit() -> None:
    counters = last(WRITE, FORK, CHILD_EXIT, WRITE, backing=THP)
    assert of(counters, *FAULTS, "cow_reuse", "pages_2m", "held_bytes") == (1, 0, 1, 1, 1, MIB2)


@pytest.mark.parametrize(
    ("kernel", "copied", "reused"), [("6.1", 510, 1), ("6.6", 510, 1), ("6.7", 511, 0), ("6.12", 511, 0), ("6.15", 0, 511)]
)
def test_parts_of_a_thp_are_copied_after_the_childs_end_until_6_15(kernel: str, copied: int, reused: int) -> None:
    """511 parts are left; up to 6.6 the last one is reused, for its folio has one reference left. A copy is two exits."""
    counters = last(WRITE, FORK, WRITE_ONE, CHILD_EXIT, WRITE, backing=THP, kernel=kernel)
    assert of(counters, "cow_4k", "cow_reuse", "pf_taken", "held_bytes") == (copied, reused, 2 * copied + reused, MIB2)


def test_a_shared_hugetlb_page_of_a_private_mapping_is_copied_whole() -> None:
    shared = last(WRITE, FORK, WRITE, backing=HUGETLB)
    assert of(shared, "pf_taken", "cow_huge", *PAIR[:1], "bytes_copied", "held_bytes") == (2, 1, 1, MIB2, 2 * MIB2)
    assert last(WRITE, FORK, WRITE, CHILD_EXIT, backing=HUGETLB)["held_bytes"] == MIB2
    alone = last(WRITE, FORK, CHILD_EXIT, WRITE, backing=HUGETLB)
    assert of(alone, "pf_taken", "cow_huge", "cow_reuse", "invalidate_range_start") == (1, 0, 1, 0)


# ---- dontneed --------------------------------------------------------------------------------------------------------


def test_dontneed_is_one_pair_and_gives_the_memory_back() -> None:
    zapped, written = run(WRITE, ZAP, WRITE).steps[-2:]
    assert of(zapped.counters, *PAIR) == (1, 1, 0, 2, 1)
    assert of(zapped.gauges, "pages_4k", "rss_bytes", "held_bytes") == (0, 0, 0)
    assert of(written.counters, *FAULTS, "bytes_cleared") == (512, 0, 512, MIB2)


def test_dontneed_of_untouched_memory_is_a_pair_without_a_flush() -> None:
    assert of(last(ZAP), *PAIR) == (1, 1, 0, 2, 0)


@pytest.mark.parametrize(("start", "end"), [(0.25, 0.75), (0.5, 1.0)])
def test_dontneed_of_a_part_takes_its_pages_only(start: float, end: float) -> None:
    zapped, read = run(WRITE, DontNeed(start=start, end=end), READ).steps[-2:]
    pages = int(512 * (end - start))
    assert (zapped.counters["invalidate_range_start"], zapped.gauges["rss_bytes"]) == (1, (512 - pages) * PAGE)
    assert of(read.counters, "hits", "zero_page_maps") == (512 - pages, pages)


def test_dontneed_of_one_page_per_thp_splits_each() -> None:
    """Two pairs a region: the call's, which zaps the 2M leaf, then the split's, which finds nothing. Afterwards every page
    faults once: 511 parts of the THP through GUP-fast, and the page that went."""
    zapped, written, again = run(WRITE, ZAP_FIRST_PAGES, WRITE, ZAP_FIRST_PAGES, backing=THP, memory=4 * MIB2).steps[1:]
    assert of(zapped.counters, *PAIR, "thp_split_pmd") == (8, 8, 0, 16, 4, 4)
    assert of(zapped.gauges, "anon_huge_bytes", "rss_bytes") == (0, 4 * 511 * PAGE)
    assert of(written.counters, *FAULTS, "gup_fast") == (2048, 0, 4, 4 * 511)
    assert of(again.counters, *PAIR, "thp_split_pmd") == (4, 4, 0, 8, 4, 0)


def test_dontneed_calls_of_some_pages_each() -> None:
    """Three pages at 512 KiB of each MiB: 128 ... 130 and 384 ..., where the part ends after one page."""
    zapped = run(WRITE, DontNeed(every=MIB2 // 2, at=MIB2 // 4, size=3 * PAGE, end=385 / 512)).steps[-1]
    assert (zapped.counters["invalidate_range_start"], zapped.gauges["rss_bytes"]) == (2, MIB2 - 4 * PAGE)


def test_dontneed_of_a_page_splits_the_huge_zero_page_into_small_ones() -> None:
    """511 zero pages are there without a host fault; one is mapped anew."""
    zapped, read = run(READ, ZAP_FIRST_PAGES, READ, backing=THP).steps[1:]
    assert of(zapped.counters, *PAIR, "thp_split_pmd") == (2, 2, 0, 4, 1, 1)
    assert of(read.counters, *FAULTS, "zero_page_maps", "gup_slow") == (512, 0, 1, 1, 512)


@pytest.mark.parametrize(("kernel", "copied", "reused"), [("6.1", 510, 1), ("6.12", 511, 0), ("6.15", 0, 511)])
def test_dontneed_of_a_page_of_a_thp_after_the_childs_end_leaves_parts_that_are_copied_until_6_15(
    kernel: str, copied: int, reused: int
) -> None:
    """Page 0 is fresh memory: one exit. Of the 511 parts the last one is reused up to 6.6."""
    counters = last(WRITE, FORK, CHILD_EXIT, ZAP_FIRST_PAGES, WRITE, backing=THP, kernel=kernel)
    assert of(counters, "cow_4k", "cow_reuse", "pf_taken") == (copied, reused, 1 + 2 * copied + reused)


def test_dontneed_leaves_to_the_child_what_it_shares() -> None:
    zapped, ended = run(WRITE, FORK, ZAP, CHILD_EXIT, backing=THP).steps[-2:]
    assert of(zapped.gauges, "rss_bytes", "held_bytes") == (0, MIB2)
    assert ended.gauges["held_bytes"] == 0


@pytest.mark.parametrize(("kernel", "whole"), [("6.13", False), ("6.14", True)])
def test_dontneed_over_a_whole_region_frees_its_page_table_from_6_14_on(kernel: str, whole: bool) -> None:
    """A THP needs a region without a page table; two calls over one half each never free it."""
    halves = (DontNeed(end=0.5), DontNeed(start=0.5))
    parameters = {"backing": THP, "kernel": kernel}
    assert of(last(WRITE, ZAP_FIRST_PAGES, ZAP, WRITE, **parameters), "thp_fault_alloc", "pf_taken") == ((1, 1) if whole else (0, 512))
    assert of(last(WRITE, ZAP_FIRST_PAGES, *halves, WRITE, **parameters), "thp_fault_alloc", "pf_taken") == (0, 512)


@pytest.mark.parametrize(("kernel", "pairs"), [("5.18", 2), ("6.1", 2), ("6.2", 1), ("6.12", 1)])
def test_dontneed_of_hugetlb_runs_two_pairs_until_6_1(kernel: str, pairs: int) -> None:
    """The second pair finds nothing mapped: one flush. Private pages go, shared ones stay in the page cache."""
    private = run(WRITE, ZAP, WRITE, backing=HUGETLB, kernel=kernel).steps
    assert of(private[1].counters, *PAIR) == (pairs, pairs, 0, 2 * pairs, 1)
    assert (private[1].gauges["held_bytes"], private[2].counters["bytes_cleared"]) == (0, MIB2)
    shared = run(WRITE, ZAP, READ, backing=SHARED_HUGETLB, kernel=kernel).steps
    assert (shared[1].gauges["held_bytes"], shared[2].counters["pf_taken"], shared[2].counters["bytes_cleared"]) == (MIB2, 1, 0)


@pytest.mark.parametrize(("backing", "rss"), [("shmem", 0), (MEMFD, MIB2)])
@pytest.mark.parametrize(("offset", "groups"), [(0, 32), (8 * PAGE, 33)])
def test_a_read_of_a_cached_page_maps_16_around_it(backing: str, rss: int, offset: int, groups: int) -> None:
    """Aligned groups of the VMA: 512 pages that begin 8 pages behind such a border lie in 8 + 31 x 16 + 8. KVM maps 4K each."""
    zapped, read = run(WRITE, ZAP, READ, backing=backing, offset=offset).steps[1:]
    assert of(zapped.gauges, "rss_bytes", "held_bytes") == (0, MIB2)
    assert of(read.counters, "pf_taken", "pgfault", "bytes_cleared", "bytes_copied") == (512, groups, 0, 0)
    assert of(read.gauges, "rss_bytes", "held_bytes") == (rss, MIB2)


def test_fault_around_maps_the_aligned_16_and_no_more() -> None:
    """Page 20 brings 16 ... 31: no fault for the two ends, one each for the neighbours beyond."""
    reads = [last(WRITE, ZAP, accesses((20, 0)), accesses((gfn, 0)), backing="shmem")["pgfault"] for gfn in (15, 16, 31, 32)]
    assert reads == [1, 0, 0, 1]


def test_a_write_to_a_cached_page_maps_that_page_only() -> None:
    assert of(last(WRITE, ZAP, WRITE, backing="shmem"), "pgfault", "bytes_cleared") == (512, 0)
    assert of(last(WRITE, ZAP, WRITE, backing=MEMFD), "pgfault", "bytes_copied", "held_bytes") == (512, MIB2, 2 * MIB2)


@pytest.mark.parametrize(("call", "pairs", "splits"), [(ZAP, 1, 0), (ZAP_FIRST_PAGES, 2, 1)])
def test_a_huge_page_of_shmem_vanishes_whole_and_comes_back_whole(call: Step, pairs: int, splits: int) -> None:
    zapped, read = run(WRITE, call, READ, backing="shmem_thp").steps[1:]
    assert of(zapped.counters, "invalidate_range_start", "thp_split_pmd") == (pairs, splits)
    assert of(read.counters, "pf_taken", "pgfault", "bytes_cleared") == (1, 1, 0)
    assert of(read.gauges, "pages_2m", "held_bytes") == (1, MIB2)


# ---- collapse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_collapse_copies_what_is_there_and_clears_the_rest(kernel: str) -> None:
    """A split huge zero page with one page written. The pair zaps its leaf (a flush), the 2M leaf replaces the table (a flush)."""
    collapsed, read, written = run(READ_ONE, WRITE_ONE, Collapse(), READ, WRITE, backing=THP, kernel=kernel).steps[2:]
    assert of(collapsed.counters, *PAIR, "thp_collapse_alloc") == (1, 1, 0, 2, 1, 1)
    assert of(collapsed.counters, "bytes_copied", "bytes_cleared", "thp_fault_alloc") == (PAGE, 511 * PAGE, 0)
    assert of(collapsed.gauges, "pages_4k", "anon_huge_bytes", "held_bytes") == (0, MIB2, MIB2)
    assert of(read.counters, *FAULTS, "remote_tlb_flush_requests") == (1, 0, 0, 1)
    assert (read.gauges["pages_2m"], written.counters["pf_taken"]) == (1, 0)


@pytest.mark.parametrize(
    ("steps", "parameters", "thps"),
    [
        ((Collapse(),), {}, 0),  # no page table
        ((WRITE, Collapse()), {}, 0),  # a THP already
        ((READ, ZAP_FIRST_PAGES, Collapse()), {}, 0),  # zero pages only: none is writable
        ((READ, ZAP_FIRST_PAGES, Collapse()), {"kernel": "6.18"}, 4),  # which needs none since; the huge zero page brought an anon_vma
        ((Touch(start=0.5), ZAP_FIRST_PAGES, Collapse()), {"kernel": "6.18"}, 0),  # nothing in the first region: it ends there
        ((Touch(start=0.5), ZAP_FIRST_PAGES, Collapse()), {"kernel": "7.0"}, 2),
        ((READ, Collapse()), {"kernel": "6.18", "backing": "anonymous_default"}, 0),  # 4K zero pages bring none
        ((READ, READ_ONE, WRITE_ONE, Collapse()), {"kernel": "6.18", "backing": "anonymous_default"}, 4),  # one page anywhere does
        ((READ, READ_ONE, WRITE_ONE, Collapse()), {"backing": "anonymous_default"}, 1),
        ((WRITE, ZAP_FIRST_PAGES, FORK, Collapse()), {"kernel": "6.17"}, 0),  # all are shared: none is writable
        ((WRITE, ZAP_FIRST_PAGES, FORK, Collapse()), {"kernel": "6.18"}, 4),  # but there
        ((WRITE, ZAP_FIRST_PAGES, FORK, Touch(every=MIB2), Collapse()), {}, 4),  # one written suffices, 511 shared or not
        ((WRITE, ZAP_FIRST_PAGES, Collapse()), {}, 4),
        ((WRITE, ZAP_FIRST_PAGES, Collapse(start=0.1, end=0.9)), {}, 2),  # whole regions only
        ((WRITE, ZAP_FIRST_PAGES, Collapse()), {"thp_failure": 1.0}, 0),  # never got a THP, and gets none now
        ((WRITE, Collapse()), {"backing": "anonymous_default", "thp_enabled": "madvise"}, 4),
        ((WRITE, Collapse()), {"thp_enabled": "never"}, 4),
    ],
)
def test_collapse_takes_whole_regions_with_a_page_table_and_a_writable_page(
    steps: tuple[Step, ...], parameters: dict[str, Any], thps: int
) -> None:
    collapsed = last(*steps, **{"backing": THP, "memory": 4 * MIB2} | parameters)
    assert of(collapsed, "thp_collapse_alloc", "invalidate_range_start") == (thps, thps)


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_collapse_maps_a_cached_huge_page_of_shmem_again_and_does_nothing_else(kernel: str) -> None:
    """No pair, no THP of its own: the guest's exit finds it through GUP-fast."""
    collapsed, read = run(WRITE, ZAP, Collapse(), READ, backing="shmem_thp", kernel=kernel).steps[2:]
    assert moved(collapsed.counters) == {}
    assert of(read.counters, *FAULTS, "gup_fast") == (1, 0, 0, 1)
    assert of(read.gauges, "pages_2m", "held_bytes") == (1, MIB2)


def test_collapse_copies_shared_pages_and_leaves_the_childs_to_the_child() -> None:
    collapsed, ended = run(WRITE, FORK, WRITE_ONE, Collapse(), CHILD_EXIT, backing=THP).steps[-2:]
    assert of(collapsed.counters, "bytes_copied", "bytes_cleared") == (MIB2, 0)
    assert (collapsed.gauges["held_bytes"], ended.gauges["held_bytes"]) == (2 * MIB2, MIB2)


# ---- ksm_merge -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "calls"), [("6.9", 1022), ("6.10", 0)])
def test_ksm_merges_a_page_in_two_pairs_and_every_256th_in_one(kernel: str, calls: int) -> None:
    """512 merges, of which 0 and 256 make the two KSM pages: 2 x 510 + 2 pairs. The first pair of each page zaps its leaf."""
    merged, read, written = run(WRITE, KsmMerge(), READ, WRITE, kernel=kernel).steps[1:]
    assert of(merged.counters, *PAIR) == (1022, 1022, calls, 2 * 1022 + calls, 512)
    assert of(merged.gauges, "rss_bytes", "held_bytes") == (MIB2, 2 * PAGE)
    assert of(read.counters, *FAULTS) == (512, 0, 0)
    assert of(written.counters, *FAULTS, "cow_ksm", "cow_4k", "bytes_copied") == (1024, 512, 512, 512, 512, MIB2)
    assert written.gauges["held_bytes"] == MIB2


def test_ksm_merges_a_fraction_and_counts_on_from_call_to_call() -> None:
    """256 pages, one KSM page among them: 511 pairs. The other 256 begin with merge 256: once more."""
    half, rest = run(WRITE, KsmMerge(0.5), KsmMerge(1.0)).steps[1:]
    assert (half.counters["invalidate_range_start"], half.gauges["held_bytes"]) == (511, 257 * PAGE)
    assert (rest.counters["invalidate_range_start"], rest.gauges["held_bytes"]) == (511, 2 * PAGE)


@pytest.mark.parametrize(("kernel", "calls"), [("6.1", 1022), ("6.12", 0)])
def test_ksm_splits_a_thp_first_with_two_pairs_of_their_own(kernel: str, calls: int) -> None:
    """They call no change_pte, and leave nothing mapped for the others to flush."""
    merged = last(WRITE, KsmMerge(), backing=THP, kernel=kernel)
    assert of(merged, *PAIR, "thp_split_pmd") == (2 + 1022, 2 + 1022, calls, 2 * 1024 + calls, 1, 1)


def test_ksm_gives_the_parts_of_a_split_thp_folios_of_their_own_with_one_pair() -> None:
    """Page 0 was replaced and merges as it is: its leaf, a flush. Page 1 is a part: a pair over the region, which zaps the
    other 511, a flush; then its own two pairs, as all others."""
    merged = last(WRITE, ZAP_FIRST_PAGES, WRITE, KsmMerge(), backing=THP)
    assert of(merged, *PAIR, "thp_split_pmd") == (1 + 1022, 1 + 1022, 0, 2 * 1023, 2, 0)


def test_ksm_leaves_zero_pages_alone() -> None:
    assert last(READ, KsmMerge())["invalidate_range_start"] == 0


def test_the_last_sharers_end_frees_the_ksm_pages() -> None:
    half, whole = run(WRITE, KsmMerge(), DontNeed(end=0.5), DontNeed(start=0.5)).steps[2:]
    assert (half.gauges["held_bytes"], whole.gauges["held_bytes"]) == (2 * PAGE, 0)


def test_always_writable_lets_reads_break_ksm_pages() -> None:
    """Two exits each, as a write."""
    assert of(last(WRITE, KsmMerge(), READ, policy="always_writable"), "pf_taken", "cow_ksm") == (1024, 512)


# ---- dirty_log -------------------------------------------------------------------------------------------------------

LOCKS = ("mmu_lock_read", "mmu_lock_write", "remote_tlb_flush_requests")


@pytest.mark.parametrize(
    ("parameters", "reads", "writes"),
    [
        ({"kernel": "5.17"}, 1, 0),  # write protection
        ({"kernel": "5.18"}, 2, 0),  # eager splitting too
        ({"kernel": "7.3", "eager_page_split": False}, 1, 0),
        ({"pml": True}, 3, 0),  # Dirty bits of 4K leaves, write protection of huge ones
        ({"mmu": "legacy"}, 0, 1),
        ({"mmu": "legacy", "pml": True}, 0, 2),
        ({"mmu": "shadow"}, 0, 1),
    ],
)
def test_logging_on_takes_its_locks_and_one_flush_even_if_nothing_is_mapped(parameters: dict[str, Any], reads: int, writes: int) -> None:
    on, again = run(LOG_ON, LOG_ON, **parameters).steps
    assert of(on.counters, *LOCKS) == (reads, writes, 1)
    assert moved(again.counters) == {}


@pytest.mark.parametrize("mmu", ["tdp", "legacy"])
def test_each_round_costs_one_lockless_exit_per_written_page(mmu: str) -> None:
    """on: write-protected. get: so again, one flush; with nothing dirty only the lock. off: pages of a 4K host mapping stay
    protected, for the next write to find."""
    steps = run(WRITE, LOG_ON, WRITE, LOG_GET, LOG_GET, WRITE, LOG_GET, LOG_OFF, WRITE, WRITE, mmu=mmu).steps
    for number in (2, 5, 8):
        assert of(steps[number].counters, "pf_taken", "pf_fixed", "pf_fast", "gup_fast", *LOCKS[:2]) == (512, 512, 512, 0, 0, 0)
    assert [of(steps[number].counters, *LOCKS[1:]) for number in (3, 4, 6)] == [(1, 1), (1, 0), (1, 1)]
    assert of(steps[7].counters, *LOCKS) == ((1, 0, 0) if mmu == "tdp" else (0, 1, 0))
    assert steps[9].counters["pf_taken"] == 0


def test_logging_off_that_is_off_does_nothing() -> None:
    assert moved(last(LOG_OFF)) == {}


def test_a_read_in_a_logged_slot_marks_dirty_what_it_maps_writable() -> None:
    """Populated pages: mapped RW, so writes cost nothing until the next get. Zero pages: clean."""
    read, written, got = run(LOG_ON, READ, WRITE, LOG_GET, prealloc="populate").steps[2:]
    assert (read.counters["pf_taken"], written.counters["pf_taken"], got.counters["remote_tlb_flush_requests"]) == (512, 0, 1)
    assert of(last(LOG_ON, READ, LOG_GET), *LOCKS) == (0, 1, 0)


def test_eager_splitting_leaves_4k_leaves_only() -> None:
    """Two 2M leaves split, 1024 4K leaves protected: the ioctl's time says how many."""
    on = run(WRITE, LOG_ON, backing=THP, memory=2 * MIB2).steps[-1]
    assert of(on.gauges, "pages_4k", "pages_2m") == (1024, 0)
    ns = {cost: DEFAULT_COSTS[cost] for cost in (Cost.DIRTY_LOG_NS, Cost.SPLIT_SPTE_NS, Cost.WRITE_PROTECT_NS)}
    assert on.ns == ns[Cost.DIRTY_LOG_NS] + 2 * ns[Cost.SPLIT_SPTE_NS] + 1024 * ns[Cost.WRITE_PROTECT_NS]


@pytest.mark.parametrize(("kernel", "flushes", "mapped", "exits"), [("6.1", 3, 0, 3), ("6.12", 3, 0, 3), ("6.13", 1, 3, 0)])
def test_logging_off_zaps_tables_until_6_12_and_recovers_huge_leaves_from_6_13_on(
    kernel: str, flushes: int, mapped: int, exits: int
) -> None:
    """Three regions: one flush each, and one exit each later; or one flush in all, and none."""
    off, read = run(WRITE, LOG_ON, WRITE, LOG_OFF, READ, backing=THP, memory=3 * MIB2, kernel=kernel).steps[3:]
    assert of(off.counters, *LOCKS) == (1, 0, flushes)
    assert of(off.gauges, "pages_4k", "pages_2m") == (0, mapped)
    assert of(read.counters, "pf_taken", "remote_tlb_flush_requests") == (exits, 0)


@pytest.mark.parametrize(
    ("between", "exits"),
    [
        ((), 1),  # all protected
        ((accesses((0, 1)),), 0),  # the first leaf is writable
        ((accesses((1, 1)),), 1),  # the second one is
        ((WRITE, LOG_GET), 1),
    ],
)
def test_a_recovered_huge_leaf_has_the_rights_of_the_first_small_one(between: tuple[Step, ...], exits: int) -> None:
    """Write-protected: reads are free, the first write is one lockless exit for 2 MiB."""
    read, written = run(WRITE, LOG_ON, *between, LOG_OFF, READ, WRITE, backing=THP, kernel="6.13").steps[-2:]
    assert read.counters["pf_taken"] == 0
    assert of(written.counters, "pf_taken", "pf_fast") == (exits, exits)


def test_a_table_without_leaves_is_not_recovered() -> None:
    """fork zaps all 512; the next 2M leaf replaces the table that stayed: a flush."""
    off, read = run(WRITE, LOG_ON, FORK, LOG_OFF, READ, backing=THP, kernel="6.13").steps[-2:]
    assert of(off.counters, *LOCKS) == (1, 0, 0)
    assert of(read.counters, "pf_taken", "remote_tlb_flush_requests", "pgfault") == (1, 1, 0)


@pytest.mark.parametrize(
    ("kernel", "eager", "fast", "flushes"),
    [("5.17", True, 0, 1), ("6.1", False, 0, 1), ("6.2", False, 511, 0), ("6.12", False, 511, 0), ("6.1", True, 512, 0)],
)
def test_without_eager_splitting_the_first_write_breaks_the_huge_leaf(kernel: str, eager: bool, fast: int, flushes: int) -> None:
    """The 2M leaf is write-protected: one slow exit. Then 511 protected children take the lockless path, or (up to 6.1) 511
    missing leaves the slow one, after a flush. 5.17 knows no eager splitting."""
    on, written = run(WRITE, LOG_ON, WRITE, backing=THP, kernel=kernel, eager_page_split=eager).steps[1:]
    assert on.gauges["pages_2m"] == (0 if fast == 512 else 1)
    assert of(written.counters, "pf_taken", "pf_fast", "remote_tlb_flush_requests") == (512, fast, flushes)
    assert written.gauges["pages_4k"] == 512


@pytest.mark.parametrize(("pages", "full"), [(511, 0), (512, 1), (1023, 1), (1024, 2)])
@pytest.mark.parametrize("backing", ["anonymous", THP])
def test_pml_exits_once_per_512_written_pages(pages: int, full: int, backing: str) -> None:
    """No fault: exits, but no pf_taken. The Dirty bit of a page is set once a round."""
    part = Touch(end=pages / 1024)
    steps = run(WRITE, LOG_ON, part, part, LOG_GET, part, memory=2 * MIB2, pml=True, backing=backing).steps
    assert [of(steps[number].counters, "exits", "pf_taken") for number in (2, 3, 5)] == [(full, 0), (0, 0), (full, 0)]
    assert steps[4].counters["remote_tlb_flush_requests"] == 1


def test_clean_pages_are_no_longer_logged_once_logging_is_off() -> None:
    """4K leaves stay as they are: writable, Dirty bits clear. 512 writes set them, into no buffer."""
    assert of(last(WRITE, LOG_ON, LOG_OFF, WRITE, pml=True), "exits", "hits") == (0, 512)


@pytest.mark.parametrize(("between", "exits", "faults"), [((), 1, 0), (((700, 1),), 1, 1)])
def test_any_exit_empties_the_pml_buffer(between: tuple[tuple[int, int], ...], exits: int, faults: int) -> None:
    """600 clean pages are written: the log is full once. A fault after the first 300 empties it: 300 and 300 are no 512."""
    rows = [(gfn, 1) for gfn in range(300)], between, [(gfn, 1) for gfn in range(300, 600)]
    counters = last(Touch(end=600 / 1024), LOG_ON, accesses(*[row for part in rows for row in part]), memory=2 * MIB2, pml=True)
    assert of(counters, "exits", "pf_taken") == (exits, faults)


@pytest.mark.parametrize("mmu", ["legacy", "shadow"])
def test_other_mmus_drop_each_huge_leaf_at_its_first_write_and_keep_empty_tables(mmu: str) -> None:
    """No eager splitting: 2M leaves stay, protected. 512 slow exits and one flush a region; off zaps 4K leaves, one flush
    in all; the next 2M leaf replaces a table, one flush a region."""
    on, written, off, read = run(WRITE, LOG_ON, WRITE, LOG_OFF, READ, backing=THP, memory=2 * MIB2, mmu=mmu).steps[1:]
    assert of(on.gauges, "pages_4k", "pages_2m") == (0, 2)
    assert of(written.counters, "pf_taken", "pf_fast", "gup_fast", *LOCKS) == (1024, 0, 1024, 0, 1024, 2)
    assert of(off.counters, *LOCKS) == (0, 1, 1)
    assert of(off.gauges, "pages_4k", "pages_2m") == (0, 0)
    assert of(read.counters, "pf_taken", "remote_tlb_flush_requests") == (2, 2)


def test_shadow_paging_of_4k_guest_pages_fixes_with_the_lock_and_zaps_nothing() -> None:
    """No fast_page_fault(): 512 slow exits. Its tables shadow the guest's: none is collapsible."""
    written, off = run(WRITE, LOG_ON, WRITE, LOG_OFF, backing=THP, mmu="shadow", guest_page=PAGE).steps[2:]
    assert of(written.counters, "pf_taken", "pf_fast", *LOCKS) == (512, 0, 0, 512, 0)
    assert (of(off.counters, *LOCKS), off.gauges["pages_4k"]) == ((0, 1, 0), 512)


# ---- host_touch, idle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backing", "faults"), [("anonymous", 1024), (THP, 2), ("shmem", 1024), (HUGETLB, 2)])
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_the_vmms_own_accesses_fault_in_its_page_table_only(backing: str, faults: int, kernel: str) -> None:
    """Counted as the VMM's, hugetlb too on 6.1 (unlike GUP); a second time nothing faults; the guest's exits find the pages."""
    touched, again, written = run(HostTouch(), HostTouch(), WRITE, backing=backing, memory=2 * MIB2, kernel=kernel).steps
    assert of(touched.counters, "vmm_pgfault", "pgfault", "touches", "exits", "bytes_cleared") == (faults, 0, 0, 0, 2 * MIB2)
    assert of(touched.gauges, "pages_4k", "pages_2m") == (0, 0)
    assert again.counters["vmm_pgfault"] == 0
    assert of(written.counters, "pf_taken", "gup_fast", "pgfault") == (faults, faults, 0)


@pytest.mark.parametrize(("kernel", "faults"), [("6.5", 0), ("6.6", 1)])
def test_populating_hugetlb_counts_as_gup_does(kernel: str, faults: int) -> None:
    assert last(Populate(), backing=HUGETLB, kernel=kernel)["vmm_pgfault"] == faults


def test_the_vmms_write_under_a_mapped_zero_page_is_one_pair_and_one_exit_later() -> None:
    written, touched = run(READ, HostTouch(), WRITE).steps[1:]
    assert of(written.counters, *PAIR, "vmm_pgfault", "cow_4k") == (512, 512, 0, 1024, 512, 512, 512)
    assert of(touched.counters, *FAULTS, "gup_fast") == (512, 0, 0, 512)


def test_the_vmm_touches_the_part_it_is_told_to() -> None:
    touched = last(HostTouch(start=0.25, end=0.75, every=MIB2), backing=THP, memory=4 * MIB2)
    assert of(touched, "vmm_pgfault", "thp_fault_alloc", "anon_huge_bytes") == (2, 2, 2 * MIB2)


def test_idle_takes_its_time_and_nothing_else() -> None:
    written, idle, again = run(WRITE, Idle(12_345), WRITE).steps
    assert (moved(idle.counters), idle.gauges, idle.ns) == ({}, written.gauges, 12_345)
    assert again.counters["hits"] == 512


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "parameters", "words"),
    [
        ((LOG_GET,), {}, ("dirty_log (step 0)", "logging is off", "put state = 'on' before it")),
        ((LOG_ON, LOG_OFF, LOG_GET), {}, ("dirty_log (step 2)", "logging is off", "put state = 'on' before it")),
        ((CHILD_EXIT,), {}, ("child_exit (step 0)", "there is no child", "put fork before it")),
        ((FORK, CHILD_EXIT, CHILD_EXIT), {}, ("child_exit (step 2)", "there is no child", "put fork before it")),
        ((FORK, WRITE, FORK), {}, ("fork (step 2)", "still lives", "put child_exit in between")),
        ((Collapse(),), {"backing": THP, "kernel": "6.0"}, ("collapse (step 0)", "kernel 6.0 has no MADV_COLLAPSE", "6.1 is the first")),
        ((Collapse(),), {"backing": "anonymous"}, ("collapse (step 0)", "may hold THPs", "anonymous_thp, anonymous_default")),
        ((Collapse(),), {"backing": "shmem"}, ("collapse (step 0)", "may hold THPs", "shmem_thp")),
        ((PreFault(),), {"kernel": "6.10"}, ("pre_fault (step 0)", "kernel 6.10 has no KVM_PRE_FAULT_MEMORY", "6.11 is the first")),
        ((PreFault(),), {"mmu": "shadow"}, ("pre_fault (step 0)", "'shadow'", "needs EPT or NPT")),
        ((DontNeed(end=0.75),), {"backing": HUGETLB, "memory": 2 * MIB2}, ("dontneed (step 0)", "hugetlb", "whole pages of 2097152 bytes")),
        ((ZAP_FIRST_PAGES,), {"backing": SHARED_HUGETLB}, ("dontneed (step 0)", "hugetlb", "whole pages of 2097152 bytes")),
        ((ZAP,), {"backing": HUGETLB, "kernel": "5.17"}, ("dontneed (step 0)", "kernel 5.17 has no MADV_DONTNEED of hugetlb", "5.18")),
        ((DontNeed(every=PAGE, size=2 * PAGE),), {}, ("dontneed (step 0)", "size = 8192", "every = 4096")),
        ((DontNeed(every=100),), {}, ("dontneed (step 0)", "every = 100 bytes", "a multiple of 4096 is needed")),
        ((KsmMerge(),), {"backing": "shmem"}, ("ksm_merge (step 0)", "private anonymous memory only")),
        ((KsmMerge(),), {"backing": HUGETLB}, ("ksm_merge (step 0)", "private anonymous memory only")),
        ((KsmMerge(),), {"backing": MEMFD}, ("ksm_merge (step 0)", "private anonymous memory only")),
        ((KsmMerge(1.5),), {}, ("ksm_merge (step 0)", "fraction = 1.5", "0 ... 1 is needed")),
        ((HostTouch(access=Access.EXEC),), {}, ("host_touch (step 0)", "access = exec", "read or write is needed")),
        ((Idle(-1),), {}, ("idle (step 0)", "ns = -1", "0 ...")),
    ],
)
def test_a_step_that_cannot_be_is_refused_with_op_reason_and_cure(
    steps: tuple[Step, ...], parameters: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(WorkloadError) as caught:
        run(*steps, **parameters)
    assert all(word in str(caught.value) for word in words), caught.value


def test_all_faults_of_a_workload_are_named_at_once() -> None:
    with pytest.raises(WorkloadError, match=r"child_exit \(step 0\): .*; ksm_merge \(step 2\): .*; dirty_log \(step 3\): "):
        run(CHILD_EXIT, WRITE, KsmMerge(), LOG_GET, backing="shmem")


@pytest.mark.parametrize(
    ("steps", "parameters"),
    [
        ((FORK, CHILD_EXIT, FORK), {}),
        ((LOG_ON, LOG_GET, LOG_OFF, LOG_ON, LOG_GET), {}),
        ((Collapse(),), {"backing": "anonymous_default", "kernel": "6.1", "thp_enabled": "never"}),
        ((PreFault(),), {"kernel": "6.11", "mmu": "legacy"}),
        ((DontNeed(end=0.5),), {"backing": HUGETLB, "memory": 2 * MIB2, "kernel": "5.18"}),
    ],
)
def test_what_is_just_allowed_runs(steps: tuple[Step, ...], parameters: dict[str, Any]) -> None:
    assert len(run(*steps, **parameters).steps) == len(steps)
