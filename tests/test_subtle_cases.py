"""The 23 cases that a naive simulator gets wrong, numbered as in the specification of the fault path, one test each.

Each docstring says what the naive rule would give. One region of 2 MiB where nothing else is said: pages 0 ... 511.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kernels import (
    Access,
    ChildExit,
    Collapse,
    Cost,
    DirtyLog,
    DontNeed,
    Fork,
    HostTouch,
    Idle,
    Khugepaged,
    PreFault,
    Run,
    Touch,
    TouchList,
    simulate,
)
from kernels.spec import SptePmd, Vm
from kernels.steps import Step

MIB2 = 2 << 20
PAGE = 4096
THP, HUGETLB = "anonymous_thp", "anonymous_hugetlb_2mb"
READ, WRITE = Touch(access=Access.READ), Touch()
READ_ONE, WRITE_ONE = Touch(access=Access.READ, touches=1, vcpus=1), Touch(touches=1, vcpus=1)  # page 0
HOST_READ = HostTouch(access=Access.READ)  # the VMM's page table only: KVM maps nothing
SPLIT = DontNeed(every=MIB2)  # the first page of each THP goes, so its PMD is split
FREE = dict.fromkeys(Cost, 0)


def run(*steps: Step, **parameters: Any) -> Run:
    return simulate(steps=steps, **{"memory": MIB2, **parameters})


def last(*steps: Step, **parameters: Any) -> dict[str, int]:
    """Counters of the last step."""
    return run(*steps, **parameters).steps[-1].counters


def of(counters: Mapping[str, int], *names: str) -> tuple[int, ...]:
    return tuple(counters[name] for name in names)


def at_once(*accesses: tuple[int, int, int]) -> TouchList:
    """(vcpu, gfn, write) each, in order per vCPU."""
    vcpu, gfn, write = zip(*accesses, strict=True)
    return TouchList(np.array(vcpu), np.array(gfn), np.array(write, bool))


def beside_a_copy(kernel: str, gfn: int, early: bool, **costs: int) -> dict[str, int]:
    """vCPU 0 copies page 0, vCPU 1 accesses `gfn` at the same time or `early` = False: 1520 ns later.

    A notifier callback takes 1000 ns, an exit 100 (half before the snapshot), all else nothing but `costs`. So vCPU 0 takes
    its snapshot at 50 ns, `invalidate_range_start` is at 1050, `_end` at 2050, or after `change_pte` (up to 6.9) at 3050.
    """
    chosen = {Cost.VM_EXIT_NS: 100, Cost.NOTIFIER_NS: 1000, Cost.TOUCH_NS: 1520} | {Cost[name.upper()]: ns for name, ns in costs.items()}
    before: list[Step] = [
        HostTouch(access=Access.READ, end=1 / 512),
        at_once((0, 300, 1)),
    ]  # page 0: zero page, not mapped by KVM; 300: mapped
    second = [(1, gfn, 1)] if early else [(1, 300, 0), (1, gfn, 1)]
    return last(*before, at_once((0, 0, 1), *second), kernel=kernel, vcpus=2, costs=FREE | chosen)


@pytest.mark.parametrize("kernel", ["5.15", "6.1", "6.12", "7.3"])
def test_01_the_second_exit_of_a_copy_is_the_faults_own_notifier_not_a_race(kernel: str) -> None:
    """One vCPU, one zero page, written: two exits. Naive: one, as nobody else is there to race with."""
    assert of(last(READ_ONE, WRITE_ONE, kernel=kernel), "pf_taken", "pf_retry", "pf_fixed") == (2, 1, 1)


@pytest.mark.parametrize(("kernel", "read_again"), [("6.1", 511), ("6.12", 511), ("6.13", 0)])
def test_02_the_huge_zero_page_is_mapped_2m_until_the_first_write_takes_it_away(kernel: str, read_again: int) -> None:
    """512 reads cost one exit; up to 6.12 one write takes the other 511 pages away. Naive: 512 exits at first, none then."""
    first, _, again = run(READ, WRITE_ONE, READ, backing=THP, kernel=kernel).steps
    assert (first.counters["pf_taken"], first.gauges["pages_2m"], again.counters["pf_taken"]) == (1, 1, read_again)


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_03_the_first_write_to_a_huge_zero_region_takes_two_exits_though_it_runs_two_pairs(kernel: str) -> None:
    """Split and copy happen inside one GUP, even one handle_mm_fault(): one retry. Naive: one retry per pair, three exits."""
    done = run(READ_ONE, WRITE_ONE, backing=THP, kernel=kernel)
    assert of(done.steps[-1].counters, "invalidate_range_start", "thp_split_pmd", "cow_4k", "pgfault", "pf_taken") == (2, 1, 1, 1, 2)
    assert done.machine.vm[Vm.SEQ] == 2


def test_04_patch_2_does_not_help_that_first_write_and_fixes_nothing() -> None:
    """No 4K table is there at the first copy. At the second one the prefetched SPTE saves an exit, but the fault itself returns
    RETRY. Naive: one exit each, counted as fixed."""
    thp = {"backing": THP, "kernel": "6.5", "policy": "change_pte_prefetch"}
    names = ("pf_taken", "pf_fixed", "pf_retry", "spte_prefetch")
    assert of(last(READ_ONE, WRITE_ONE, **thp), *names) == (2, 1, 1, 0)
    assert of(last(READ_ONE, WRITE_ONE, at_once((0, 1, 1)), **thp), *names) == (1, 0, 1, 1)


@pytest.mark.parametrize(
    ("steps", "backing", "pairs"),
    [
        ((WRITE,), "anonymous", 0),
        ((WRITE,), THP, 0),
        ((WRITE, Fork(), ChildExit(), WRITE), "anonymous", 0),
        ((WRITE, Fork(), ChildExit(), WRITE), THP, 0),
        ((READ, WRITE), HUGETLB, 0),
        ((READ, WRITE), "anonymous", 512),
        ((WRITE, Fork(), WRITE), "anonymous", 512),
    ],
)
def test_05_only_replacing_or_splitting_a_present_mapping_notifies(steps: tuple[Step, ...], backing: str, pairs: int) -> None:
    """Writes to fresh memory and reuse faults change the host entry without a pair. Naive: one pair for each changed entry."""
    counters = last(*steps, backing=backing)
    assert of(counters, "invalidate_range_start", "pf_retry") == (pairs, pairs)
    assert counters["pgfault"] > 0  # the host entries did change


@pytest.mark.parametrize(("kernel", "locks"), [("6.9", 3), ("6.10", 2)])
def test_06_a_flush_needs_a_zapped_leaf_but_lock_and_sequence_do_not(kernel: str, locks: int) -> None:
    """512 zero pages that only the VMM read, then copied: no flush. Naive: one flush request per pair, or no lock without one."""
    unmapped, mapped = run(HOST_READ, WRITE, kernel=kernel), run(READ, WRITE, kernel=kernel)
    assert of(unmapped.steps[-1].counters, "remote_tlb_flush_requests", "mmu_lock_write") == (0, 512 * locks)
    assert of(mapped.steps[-1].counters, "remote_tlb_flush_requests", "mmu_lock_write") == (512, 512 * locks)
    assert unmapped.machine.vm[Vm.SEQ] == mapped.machine.vm[Vm.SEQ] == 512


@pytest.mark.parametrize(("kernel", "storm", "locks"), [("6.5", 15, 17), ("6.12", 5, 1)])
def test_07_the_address_counts_during_an_invalidation_only(kernel: str, storm: int, locks: int) -> None:
    """vCPU 1 faults at 1520 ns, its check is at 1570, then every 100 ns; vCPU 0 alone takes two exits, one of them a retry.

    Page 0 is in the range: a retry at 1570, 1670, ... until the end at 2050 or 3050; then vCPU 1 maps the page, which saves
    vCPU 0 its second exit. From 6.8 on a stale exit takes no mmu_lock. Page 100 is not in the range: mapped at once. If its GUP
    lasts beyond the end, the sequence makes it stale wherever it is. Naive: the range test always, or the sequence only, makes
    two of the three alike."""
    names = ("pf_taken", "pf_retry")
    assert of(beside_a_copy(kernel, gfn=0, early=False), *names, "mmu_lock_read") == (1 + storm + 1, 1 + storm, locks)
    assert of(beside_a_copy(kernel, gfn=100, early=False), *names) == (2 + 1, 1)
    assert of(beside_a_copy(kernel, gfn=100, early=False, anon_fault_ns=2000), *names) == (2 + 2, 1 + 1)


@pytest.mark.parametrize("kernel", ["6.5", "6.12"])
def test_08_the_sequence_moves_at_the_end_not_at_the_start(kernel: str) -> None:
    """Two faults of vCPU 1 on page 100: snapshot at 50 and check at 1550 have the start between them: not stale. Snapshot at
    1570 and check at 3570 have the end between them: stale. Naive (at the start): the other way round."""
    assert beside_a_copy(kernel, gfn=100, early=True, anon_fault_ns=1500)["pf_retry"] == 1  # vCPU 0's own
    assert beside_a_copy(kernel, gfn=100, early=False, anon_fault_ns=2000)["pf_retry"] == 2


@pytest.mark.parametrize(
    "parameters",
    [{"backing": "shmem"}, {"prealloc": "populate"}, {"backing": THP, "use_zero_page": False}, {"backing": "shared_hugetlb_2mb"}],
)
def test_09_a_read_may_install_a_writable_leaf(parameters: dict[str, Any]) -> None:
    """Reads try GUP for write before and after. Naive: each read leaves a read-only leaf, and each first write exits again."""
    assert of(last(READ, WRITE, **parameters), "pf_taken", "hits") == (0, 512)


@pytest.mark.parametrize("use_zero_page", [True, False])
def test_10_use_zero_page_does_not_concern_the_4k_zero_page(use_zero_page: bool) -> None:
    """512 reads of 4K memory map the zero page and take no memory. Naive: 512 pages are cleared without use_zero_page."""
    small = run(READ, use_zero_page=use_zero_page)
    assert (small.counters["zero_page_maps"], small.counters["bytes_cleared"], small.gauges["rss_bytes"]) == (512, 0, 0)
    assert run(READ, backing=THP, use_zero_page=use_zero_page).counters["huge_zero_maps"] == use_zero_page


@pytest.mark.parametrize(("backing", "exits", "reused"), [(HUGETLB, 1, 1), ("shared_hugetlb_2mb", 0, 0), ("shmem", 0, 0)])
def test_11_a_read_of_private_hugetlb_leaves_it_read_only(backing: str, exits: int, reused: int) -> None:
    """The first write is one exit more, without a notifier. Naive: none, as for shared hugetlb and shmem."""
    assert of(last(READ, WRITE, backing=backing), "pf_taken", "cow_reuse", "invalidate_range_start") == (exits, reused, 0)


@pytest.mark.parametrize("kernel", ["6.11", "6.12", "6.13"])
def test_12_kvm_pre_fault_memory_faults_for_read(kernel: str) -> None:
    """On untouched memory it maps 512 zero pages; writes still take two exits. Naive: 2 MiB allocated and no exit at all."""
    before, written = run(PreFault(), WRITE, kernel=kernel).steps
    assert (before.counters["zero_page_maps"], before.gauges["rss_bytes"], before.gauges["pages_4k"]) == (512, 0, 512)
    assert of(written.counters, "pf_taken", "cow_4k") == (1024, 512)


@pytest.mark.parametrize("backing", ["anonymous", THP])
def test_13_a_page_that_one_vcpu_touched_is_free_for_all(backing: str) -> None:
    """Naive: an SPTE per vCPU, so that each of the three others takes its own exit per leaf."""
    others = at_once(*[(vcpu, gfn, 1) for vcpu in (1, 2, 3) for gfn in range(512)])
    assert of(last(Touch(vcpus=1), others, vcpus=4, backing=backing), "pf_taken", "hits") == (0, 3 * 512)


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_14_a_zap_keeps_the_table_and_the_next_2m_leaf_flushes(kernel: str) -> None:
    """Collapse zaps the one 4K leaf (one flush); the 2M leaf replaces the empty table (another). Naive: no second flush."""
    steps = (READ_ONE, WRITE_ONE, Collapse(), READ)
    zapped = run(*steps[:-1], backing=THP, kernel=kernel)
    assert (zapped.steps[-1].counters["remote_tlb_flush_requests"], zapped.gauges["pages_4k"]) == (1, 0)
    assert zapped.machine.spte_pmd[0] == SptePmd.T
    mapped = run(*steps, backing=THP, kernel=kernel)
    assert of(mapped.steps[-1].counters, "pf_taken", "remote_tlb_flush_requests") == (1, 1)
    assert mapped.gauges["pages_2m"] == 1


def test_15_zero_mappings_are_no_allocations_and_host_faults_are_no_exits() -> None:
    """Three regions read: three huge zero mappings, no memory. 4K read, then written: 1536 exits, of which the 512 that
    re-execute a copied write cause no host fault. Where the VMM wrote before, GUP-fast does; where it read, the slow walk finds
    the zero page: 512 exits, no fault. Naive: memory per mapping, pgfault = exits, or = slow GUPs."""
    zero = run(READ, backing=THP, memory=3 * MIB2)
    assert (zero.counters["huge_zero_maps"], zero.counters["thp_fault_alloc"], zero.gauges["held_bytes"]) == (3, 0, 0)
    assert "thp_zero_page_alloc" not in zero.counters
    assert of(run(READ, WRITE).counters, "pf_taken", "pgfault") == (1536, 1024)
    assert of(last(WRITE, prealloc="populate"), "pf_taken", "gup_fast", "pgfault") == (512, 512, 0)
    assert of(last(HOST_READ, READ), "pf_taken", "gup_slow", "pgfault") == (512, 512, 0)


@pytest.mark.parametrize(("kernel", "thps", "exits"), [("6.1", 0, 512), ("6.13", 0, 512), ("6.14", 1, 1)])
def test_16_a_page_table_bars_a_thp_until_khugepaged(kernel: str, thps: int, exits: int) -> None:
    """A THP, split, then dropped as a whole: the empty table stays (up to 6.13) and takes 4K pages, until khugepaged's first pass,
    one second after the start. Naive: an empty region takes a THP again."""
    steps = (WRITE, SPLIT, DontNeed(), WRITE, Idle(2_000_000_000), WRITE)
    done = run(*steps, backing=THP, kernel=kernel, khugepaged=Khugepaged(scan_sleep_ms=1000)).steps
    assert of(done[3].counters, "thp_fault_alloc", "pf_taken") == (thps, exits)
    assert done[4].counters["thp_collapse_alloc"] == 1 - thps
    assert (done[5].gauges["pages_2m"], done[5].counters["pf_taken"]) == (1, 1 - thps)


@pytest.mark.parametrize(
    ("kernel", "backing", "before", "gfn", "alloc", "cleared", "wasted", "pairs"),
    [
        ("6.12", THP, (), 7, 1, 2 * MIB2, MIB2, 0),
        ("6.13", THP, (), 7, 1, 2 * MIB2, MIB2, 0),
        ("6.12", THP, (READ_ONE,), 7, 0, 2 * PAGE, 0, 4),  # two splits, one of them in vain, and two copies
        ("6.13", THP, (READ_ONE,), 7, 1, 2 * MIB2, MIB2, 2),
        ("6.12", "anonymous", (), 0, 0, 2 * PAGE, PAGE, 0),  # the same on a small scale
        ("6.12", "anonymous", (READ_ONE,), 0, 0, 2 * PAGE, PAGE, 2),
        ("6.12", "shmem", (), 0, 0, PAGE, 0, 0),  # but these are cleared under a lock: the second one waits
        ("6.12", "shmem_thp", (), 7, 0, MIB2, 0, 0),
        ("6.12", HUGETLB, (), 7, 0, MIB2, 0, 0),
    ],
)
def test_17_the_loser_of_a_thp_race_clears_and_invalidates_in_vain(
    kernel: str, backing: str, before: tuple[Step, ...], gfn: int, alloc: int, cleared: int, wasted: int, pairs: int
) -> None:
    """Two vCPUs write page 0 and page `gfn` at once. Naive: the loser sees the winner's entry before it does any work."""
    counters = last(*before, at_once((0, 0, 1), (1, gfn, 1)), backing=backing, kernel=kernel, vcpus=2)
    names = ("thp_fault_alloc", "bytes_cleared", "bytes_cleared_wasted", "invalidate_range_start")
    assert of(counters, *names) == (alloc, cleared, wasted, pairs)


@pytest.mark.parametrize(
    ("mapped", "gfn", "requests", "kicks", "ipis", "exits"),
    [
        (False, 300, 0, 0, 1, 2 + 1),  # vCPU 1 in the guest: each IPI is an exit
        (True, 300, 1, 1, 2, 2 + 2),
        (True, 100, 1, 0, 1, 2 + 2),  # vCPU 1 in a fault of its own, which is stale once: no IPI of KVM's, one of the host's
    ],
)
def test_18_the_hosts_own_tlb_flush_hits_vcpus_too(mapped: bool, gfn: int, requests: int, kicks: int, ipis: int, exits: int) -> None:
    """vCPU 0 copies a page in 1 us; vCPU 1 accesses one that is mapped (300) or fresh (100), 10 us long. Naive: one IPI where KVM
    zaps a leaf, none where not, wherever the vCPU is."""
    before = [at_once((0, 300, 1)), READ_ONE if mapped else HostTouch(access=Access.READ, end=1 / 512)]
    costs = FREE | {Cost.TOUCH_NS: 10_000, Cost.ANON_FAULT_NS: 10_000, Cost.COW_4K_NS: 1000}
    counters = last(*before, at_once((0, 0, 1), (1, gfn, int(gfn == 100))), vcpus=2, costs=costs)
    assert of(counters, "remote_tlb_flush_requests", "remote_tlb_flush", "tlb_ipis", "exits") == (requests, kicks, ipis, exits)
    assert counters["pf_taken"] == (4 if gfn == 100 else 2)


@pytest.mark.parametrize("kernel", ["5.15", "6.1", "6.12", "6.13"])
def test_19_a_write_protected_page_is_fixed_without_lock_and_gup_and_a_zero_page_is_not(kernel: str) -> None:
    """Naive: a slow fault for each (512 GUPs and locks), or the lockless fix for every read-only leaf."""
    names = ("pf_taken", "pf_fixed", "pf_fast", "mmu_lock_read", "mmu_lock_write", "gup_fast", "gup_slow", "pgfault")
    assert of(last(WRITE, DirtyLog(), WRITE, kernel=kernel), *names) == (512, 512, 512, 0, 0, 0, 0, 0)
    assert of(last(READ, DirtyLog(), WRITE, kernel=kernel), "pf_taken", "pf_fast", "cow_4k") == (1024, 0, 512)


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.3"])
def test_20_a_misaligned_slot_is_mapped_4k_over_the_hosts_thps(kernel: str) -> None:
    """One page off: the slot's 1024 pages lie in three host regions, each a THP cleared once; the other 1021 exits find them.
    Naive: two 2M leaves, or no THP."""
    done = run(WRITE, backing=THP, memory=2 * MIB2, offset=PAGE, kernel=kernel)
    assert of(done.counters, "thp_fault_alloc", "bytes_cleared", "pf_taken", "gup_slow", "gup_fast") == (3, 3 * MIB2, 1024, 3, 1021)
    assert of(done.gauges, "pages_2m", "pages_4k") == (0, 1024)


@pytest.mark.parametrize(("kernel", "flushes", "read_again"), [("6.1", 1, 511), ("6.2", 0, 0), ("6.12", 0, 0)])
@pytest.mark.parametrize("way", ["fetch", "dirty log"])
def test_21_a_huge_leaf_in_the_way_is_zapped_or_split(kernel: str, flushes: int, read_again: int, way: str) -> None:
    """A fetch with nx_huge_pages, or a write with dirty logging, needs a 4K leaf below a 2M one. Naive: no difference of 511."""
    if way == "fetch":
        steps: tuple[Step, ...] = (WRITE, Touch(access=Access.EXEC, touches=1), READ)
    else:
        steps = (WRITE, DirtyLog(), WRITE_ONE, READ)
    done = run(*steps, backing=THP, kernel=kernel, nx_huge_pages=way == "fetch", eager_page_split=False).steps
    assert of(done[-2].counters, "pf_taken", "remote_tlb_flush_requests") == (1, flushes)
    assert done[-1].counters["pf_taken"] == read_again


@pytest.mark.parametrize("kernel", ["6.13", "7.3"])
def test_22_a_thp_for_the_huge_zero_page_is_cleared_before_the_invalidation(kernel: str) -> None:
    """vCPU 0 clears for 1 ms. vCPU 1 reads the same region 900 times meanwhile, each a hit: the zero page is still mapped.
    vCPU 1 clears a fresh THP elsewhere, 100 ns longer: the end falls into its fault, which is stale. Naive (invalidation
    first): the reads exit, again and again, or the end comes too early for the second fault to see."""
    costs = FREE | {Cost.VM_EXIT_NS: 100, Cost.TOUCH_NS: 1000, Cost.CLEAR_2M_NS: 1_000_000, Cost.THP_FAULT_NS: 100}
    point = {"backing": THP, "memory": 2 * MIB2, "vcpus": 2, "kernel": kernel, "costs": costs}
    reader = last(READ_ONE, at_once((0, 0, 1), *[(1, gfn % 512, 0) for gfn in range(900)]), **point)
    assert of(reader, "hits", "pf_taken", "pf_retry") == (900, 2, 1)
    writer = last(READ_ONE, at_once((0, 0, 1), (1, 512, 1)), **point)
    assert of(writer, "thp_fault_alloc", "pf_taken", "pf_retry") == (2, 4, 2)


@pytest.mark.parametrize(
    ("kernel", "write", "fixed", "spurious"),
    [("5.15", 1, 1, 1), ("6.1", 1, 2, 0), ("6.12", 1, 2, 0), ("6.13", 1, 1, 1), ("5.15", 0, 1, 1), ("6.12", 0, 1, 1), ("6.13", 0, 1, 1)],
)
def test_23_the_second_fault_on_a_page_is_fixed_or_spurious(kernel: str, write: int, fixed: int, spurious: int) -> None:
    """The writable leaf is written anew without its Dirty bit (5.16 ... 6.12); the zero page's compares equal. Naive: fixed
    twice, or one exit saved."""
    counters = last(at_once((0, 5, write), (1, 5, write)), kernel=kernel, vcpus=2)
    assert of(counters, "pf_taken", "pf_fixed", "pf_spurious", "pf_retry") == (2, fixed, spurious, 0)
