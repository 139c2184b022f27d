"""Which leaf a fault makes, and what else it maps: offset, slot edges, 1 GiB pages, shadow paging, NX, and each backing's own rule.

Counted by hand from docs/model.md sections 2, 4 and 8; one region of 2 MiB (512 pages) where nothing else is said.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kernels import Access, Call, Collapse, Cost, DirtyLog, HostTouch, Populate, PreFault, Run, Touch, TouchList, simulate
from kernels.spec import HostPmd
from kernels.steps import Step

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
MIB2 = 2 * MIB
THP, HUGETLB, GIGANTIC = "anonymous_thp", "anonymous_hugetlb_2mb", "anonymous_hugetlb_1gb"
READ, WRITE = Touch(access=Access.READ), Touch()
READ_ONE, WRITE_ONE = Touch(access=Access.READ, touches=1), Touch(touches=1)  # page 0
FETCH = Touch(access=Access.EXEC)
FETCH_ONE = Touch(access=Access.EXEC, touches=1)
EACH_2M = Touch(every=MIB2)
LEAVES = ("pages_4k", "pages_2m", "pages_1g")
DIRECT: tuple[dict[str, Any], dict[str, Any]] = ({"mmu": "legacy"}, {"mmu": "shadow", "guest_page": MIB2})  # tables of KVM's own
SMALL: dict[str, Any] = {"mmu": "shadow", "guest_page": PAGE}  # tables that shadow the guest's


def run(*steps: Step, **parameters: Any) -> Run:
    return simulate(steps=steps, **{"memory": MIB2, **parameters})


def last(*steps: Step, **parameters: Any) -> dict[str, int]:
    """Counters of the last step and gauges after it."""
    step = run(*steps, **parameters).steps[-1]
    return step.counters | step.gauges


def of(counters: Mapping[str, int], *names: str) -> tuple[int, ...]:
    return tuple(counters[name] for name in names)


def writes(*gfns: int) -> TouchList:
    return TouchList(np.zeros(len(gfns), np.int64), np.array(gfns), np.ones(len(gfns), bool))


# ---- Alignment of slot and VMA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "leaves", "thps"),
    [
        (0, (0, 2, 0), 2),
        (PAGE, (1024, 0, 0), 3),  # the two regions of the slot lie in three of the VMA
        (MIB, (1024, 0, 0), 3),
        (MIB2, (0, 2, 0), 2),
        (MIB2 + PAGE, (1024, 0, 0), 3),
        (512 * MIB, (0, 2, 0), 2),
    ],
)
@pytest.mark.parametrize("mmu", ["tdp", "legacy"])
def test_an_offset_of_whole_huge_pages_keeps_them_and_any_other_bars_them(
    offset: int, leaves: tuple[int, ...], thps: int, mmu: str
) -> None:
    done = last(WRITE, backing=THP, memory=2 * MIB2, offset=offset, mmu=mmu)
    assert of(done, *LEAVES) == leaves
    assert of(done, "thp_fault_alloc", "anon_huge_bytes", "rss_bytes") == (thps, thps * MIB2, thps * MIB2)


@pytest.mark.parametrize(
    ("offset", "leaves", "host_pages"),
    [
        (0, (0, 0, 1), 1),
        (PAGE, (512, 0, 0), 1),
        (MIB, (512, 0, 0), 1),
        (MIB2, (0, 512, 0), 2),
        (512 * MIB, (0, 512, 0), 2),
        (GIB, (0, 0, 1), 1),
    ],
)
@pytest.mark.parametrize("backing", [GIGANTIC, "shared_hugetlb_1gb"])
def test_a_1_gib_page_is_mapped_as_large_as_the_offset_allows(offset: int, leaves: tuple[int, ...], host_pages: int, backing: str) -> None:
    """One access per 2 MiB: a leaf each, but for the 1G leaf, which serves all 512. Shifted, the slot lies in two host pages; the
    last access, 2 MiB before its end, reaches the second if the shift is that much."""
    done = last(EACH_2M, backing=backing, memory=GIB, offset=offset)
    assert of(done, *LEAVES) == leaves
    assert of(done, "pf_taken", "hits", "pgfault", "bytes_cleared") == (sum(leaves), 512 - sum(leaves), host_pages, host_pages * GIB)


@pytest.mark.parametrize(("mmu", "leaves"), [("tdp", (0, 0, 1)), ("legacy", (0, 0, 1)), ("shadow", (0, 512, 0))])
def test_shadow_paging_maps_no_more_than_2m(mmu: str, leaves: tuple[int, ...]) -> None:
    assert of(last(EACH_2M, backing=GIGANTIC, memory=GIB, mmu=mmu), *LEAVES) == leaves


def test_the_tail_of_a_slot_is_mapped_4k() -> None:
    """Two regions and a half: the VMA reaches to the end of the third, the slot does not."""
    done = last(WRITE, backing=THP, memory=5 * MIB)
    assert of(done, *LEAVES, "pf_taken", "thp_fault_alloc", "rss_bytes") == (256, 2, 0, 2 + 256, 3, 3 * MIB2)


def test_the_tail_of_a_slot_in_1_gib_pages_is_mapped_4k() -> None:
    """513 MiB that begin in the middle of a host page: 256 regions of 2 MiB and a half one, in two host pages."""
    done = last(EACH_2M, backing=GIGANTIC, memory=513 * MIB, offset=512 * MIB)
    assert of(done, *LEAVES, "pgfault") == (1, 256, 0, 2)


def test_hugetlb_under_a_shifted_slot_is_cleared_whole_and_mapped_4k() -> None:
    done = last(WRITE, backing=HUGETLB, memory=3 * MIB, offset=MIB)
    assert of(done, *LEAVES, "pf_taken", "pgfault", "bytes_cleared", "gup_fast") == (768, 0, 0, 768, 2, 2 * MIB2, 766)


# ---- 1 GiB pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backing", "exits"), [(GIGANTIC, (1, 1)), ("shared_hugetlb_1gb", (1, 0))])
def test_a_1_gib_page_is_one_fault_and_a_private_read_leaves_it_read_only(backing: str, exits: tuple[int, int]) -> None:
    done = run(Touch(access=Access.READ, every=MIB2), EACH_2M, backing=backing, memory=GIB)
    assert tuple(step.counters["pf_taken"] for step in done.steps) == exits
    assert of(done.counters, "bytes_cleared", "invalidate_range_start") == (GIB, 0)
    assert of(done.gauges, *LEAVES, "held_bytes", "rss_bytes") == (0, 0, 1, GIB, 0)


def test_dirty_logging_splits_a_1_gib_leaf_513_times() -> None:
    """One 1G leaf into 512 2M leaves, each of these into 512."""
    on = run(WRITE_ONE, DirtyLog(), backing=GIGANTIC, memory=GIB, costs=dict.fromkeys(Cost, 0) | {Cost.SPLIT_SPTE_NS: 1}).steps[-1]
    assert (of(on.gauges, *LEAVES), on.ns, on.counters["remote_tlb_flush_requests"]) == ((262_144, 0, 0), 513, 1)


@pytest.mark.parametrize(("kernel", "leaves"), [("6.12", (0, 0, 0)), ("6.13", (0, 0, 1))])
def test_the_end_of_logging_takes_the_highest_table_first(kernel: str, leaves: tuple[int, ...]) -> None:
    """One zap or recovery of 1 GiB, one flush, not 512."""
    off = last(WRITE_ONE, DirtyLog(), DirtyLog(Call.LOG_OFF), backing=GIGANTIC, memory=GIB, kernel=kernel)
    assert of(off, *LEAVES, "remote_tlb_flush_requests") == (*leaves, 1)


@pytest.mark.parametrize(("kernel", "leaves", "flushes"), [("6.1", (1, 0, 0), 1), ("6.12", (512, 511, 0), 0)])
@pytest.mark.parametrize("way", ["fetch", "dirty log"])
def test_a_4k_leaf_below_a_1g_leaf_zaps_it_or_splits_it_twice(kernel: str, leaves: tuple[int, ...], flushes: int, way: str) -> None:
    steps: tuple[Step, ...] = (FETCH_ONE,) if way == "fetch" else (DirtyLog(), WRITE_ONE)
    done = last(WRITE_ONE, *steps, backing=GIGANTIC, memory=GIB, kernel=kernel, nx_huge_pages=way == "fetch", eager_page_split=False)
    assert of(done, *LEAVES, "remote_tlb_flush_requests") == (*leaves, flushes)


# ---- Shadow paging, and prefetch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mmu", "guest_page", "exits", "leaves"),
    [
        ("tdp", PAGE, 1, (0, 1, 0)),
        ("legacy", PAGE, 1, (0, 1, 0)),
        ("shadow", MIB2, 1, (0, 1, 0)),
        ("shadow", PAGE, 64, (512, 0, 0)),  # eight at a time
    ],
)
def test_the_guests_page_limits_the_leaf_under_shadow_paging_only(mmu: str, guest_page: int, exits: int, leaves: tuple[int, ...]) -> None:
    done = last(WRITE, backing=THP, mmu=mmu, guest_page=guest_page)
    assert of(done, "pf_taken", *LEAVES) == (exits, *leaves)


@pytest.mark.parametrize(("parameters", "exits"), [({"mmu": "tdp"}, 512), *[(mmu, 64) for mmu in (*DIRECT, SMALL)]])
def test_writable_neighbours_are_mapped_eight_at_a_time_but_not_by_the_tdp_mmu(parameters: dict[str, Any], exits: int) -> None:
    """What is mapped so is writable: reads suffice. Each exit is a GUP-fast and an install under the lock; prefetch counts nothing."""
    read, written = run(READ, WRITE, prealloc="populate", **parameters).steps[1:]
    assert of(read.counters, "pf_taken", "pf_fixed", "gup_fast", "spte_prefetch") == (exits, exits, exits, 0)
    assert read.counters["mmu_lock_read"] + read.counters["mmu_lock_write"] == exits
    assert (read.gauges["pages_4k"], written.counters["pf_taken"]) == (512, 0)


@pytest.mark.parametrize("parameters", [*DIRECT, SMALL])
@pytest.mark.parametrize("before", [(), (Populate(access=Access.READ),)])
def test_neighbours_that_the_host_cannot_write_are_not_prefetched(parameters: dict[str, Any], before: tuple[Step, ...]) -> None:
    """Missing pages and zero pages, read one by one."""
    assert of(last(*before, READ, **parameters), "pf_taken", "pages_4k") == (512, 512)


@pytest.mark.parametrize("parameters", [*DIRECT, SMALL])
def test_a_logged_slot_prefetches_nothing(parameters: dict[str, Any]) -> None:
    assert last(DirtyLog(), WRITE, prealloc="populate", **parameters)["pf_taken"] == 512


@pytest.mark.parametrize(
    ("writable", "touched", "direct", "small"),
    [
        ({0, 1, 2, 3, 4, 5, 6, 7}, 3, {0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}),
        ({0, 1, 2, 4, 5, 6, 7}, 0, {0, 1, 2}, {0, 1, 2}),  # one run, 1 ... 7, which ends at 3
        ({0, 1, 2, 4, 5, 6, 7}, 4, {0, 1, 2, 4, 5, 6, 7}, {0, 1, 2, 4}),  # 0 ... 3 gave something, so the next run, 5 ... 7, follows
        ({1, 2, 3, 4, 5, 6, 7}, 4, {4}, {4}),  # 0 ... 3 gave nothing: the end
        ({4, 5, 6, 7}, 0, {0}, {0}),
        ({6, 7, 8, 9, 10}, 7, {7}, {7}),  # 0 ... 6 gave nothing, and 8 is of another group
        ({7, 8, 9, 10}, 8, {8, 9, 10}, {8, 9, 10}),
    ],
)
def test_prefetch_goes_run_by_run_or_entry_by_entry_until_one_gives_nothing(
    writable: set[int], touched: int, direct: set[int], small: set[int]
) -> None:
    """The VMM wrote `writable`, the guest writes `touched` (fresh memory if the VMM did not). Mapped: those that a write hits then."""
    before = [HostTouch(start=gfn / 512, end=(gfn + 1) / 512) for gfn in sorted(writable)]
    for parameters, expected in [(DIRECT[0], direct), (DIRECT[1], direct), (SMALL, small)]:
        mapped = {gfn for gfn in range(16) if last(*before, writes(touched), writes(gfn), **parameters)["hits"]}
        assert mapped == expected, parameters


@pytest.mark.parametrize(
    ("pages", "order", "direct", "small"),
    [
        (5, (0, 1, 2, 3, 4), 5, 1),  # 1 ... 7 reaches beyond the slot: nothing, each time; entry by entry 1 ... 4 are got
        (5, (4, 0, 1, 2, 3), 1, 1),  # 0 ... 3 does not
        (12, tuple(range(12)), 1 + 4, 2),
    ],
)
def test_a_run_that_reaches_beyond_the_slot_ends_the_prefetch(pages: int, order: tuple[int, ...], direct: int, small: int) -> None:
    for parameters, exits in [(DIRECT[0], direct), (DIRECT[1], direct), (SMALL, small)]:
        assert last(writes(*order), memory=pages * PAGE, prealloc="populate", **parameters)["pf_taken"] == exits, parameters


@pytest.mark.parametrize("parameters", [DIRECT[0], SMALL])
def test_prefetch_under_a_shifted_slot_looks_at_the_vmas_pages(parameters: dict[str, Any]) -> None:
    """Page 511 of the slot is the first of the VMA's second region, which is missing when 504 ... 510 are mapped: one exit more."""
    assert of(last(WRITE, backing=THP, offset=PAGE, **parameters), "pf_taken", "thp_fault_alloc") == (65, 2)


@pytest.mark.parametrize(("kernel", "fixed", "flushes"), [("5.15", 1, 0), ("5.16", 2, 1), ("6.12", 2, 1), ("6.13", 1, 0)])
@pytest.mark.parametrize("mmu", ["tdp", "legacy", "shadow"])
def test_a_dirty_bit_that_is_dropped_is_a_flush_of_the_older_mmus(kernel: str, fixed: int, flushes: int, mmu: str) -> None:
    """Two vCPUs write one page: the second fault writes the leaf anew without its Dirty bit, up to 6.12."""
    both = TouchList(np.array([0, 1]), np.array([5, 5]), np.ones(2, bool))
    done = last(both, vcpus=2, kernel=kernel, mmu=mmu)
    assert of(done, "pf_fixed", "pf_spurious", "remote_tlb_flush_requests") == (fixed, 2 - fixed, flushes if mmu != "tdp" else 0)


# ---- nx_huge_pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "flushes", "mapped", "again"),
    [
        ({"kernel": "6.1"}, 1, 1, 511),
        ({"kernel": "6.2"}, 0, 512, 0),
        ({"kernel": "6.12"}, 0, 512, 0),
        ({"kernel": "6.12", "mmu": "legacy"}, 1, 8, 63),  # dropped, and eight at a time
    ],
)
def test_a_fetch_through_a_huge_leaf_drops_it_or_splits_it(parameters: dict[str, Any], flushes: int, mapped: int, again: int) -> None:
    one, rest = run(WRITE, FETCH_ONE, FETCH, backing=THP, nx_huge_pages=True, **parameters).steps[1:]
    assert of(one.counters, "pf_taken", "pf_fixed", "remote_tlb_flush_requests") == (1, 1, flushes)
    assert of(one.gauges, *LEAVES) == (mapped, 0, 0)
    assert rest.counters["pf_taken"] == again


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_without_nx_huge_pages_a_fetch_is_a_read(kernel: str) -> None:
    first, hit = run(FETCH, FETCH, backing=THP, kernel=kernel).steps
    assert of(first.counters, "pf_taken", "reads", "huge_zero_maps") == (1, 512, 1)
    assert hit.counters["hits"] == 512


@pytest.mark.parametrize(("nx", "mapped", "data"), [(True, 1, 511), (False, 512, 0)])
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_data_below_a_table_made_for_a_fetch_stays_4k(kernel: str, nx: bool, mapped: int, data: int) -> None:
    """The fetch came first: its 4K leaf stands alone in a marked table."""
    fetched, read = run(FETCH_ONE, READ, backing=THP, prealloc="populate", nx_huge_pages=nx, kernel=kernel).steps[1:]
    assert fetched.gauges["pages_4k"] + 512 * fetched.gauges["pages_2m"] == mapped
    assert read.counters["pf_taken"] == data


@pytest.mark.parametrize(
    ("kernel", "nx", "exits", "leaves"), [("6.1", True, 512, (512, 0, 0)), ("6.2", True, 1, (0, 1, 0)), ("6.1", False, 1, (0, 1, 0))]
)
def test_data_below_any_other_table_stays_4k_on_6_1_only(kernel: str, nx: bool, exits: int, leaves: tuple[int, ...]) -> None:
    """Collapse leaves the empty table of a split huge zero page, which no fetch made."""
    done = last(READ_ONE, WRITE_ONE, Collapse(), READ, backing=THP, nx_huge_pages=nx, kernel=kernel)
    assert of(done, "pf_taken", *LEAVES) == (exits, *leaves)


# ---- Failing allocations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["6.12", "6.13"])
def test_without_huge_pages_each_region_falls_back_once_and_is_4k_for_good(kernel: str) -> None:
    done = last(WRITE, backing=THP, memory=4 * MIB2, thp_failure=1.0, kernel=kernel)
    assert of(done, "thp_fault_fallback", "thp_fault_alloc", "pf_taken", *LEAVES) == (4, 0, 2048, 2048, 0, 0)
    assert of(done, "rss_bytes", "anon_huge_bytes") == (4 * MIB2, 0)


@pytest.mark.parametrize(("kernel", "fallbacks"), [("6.12", 0), ("6.13", 4)])
def test_the_huge_zero_page_needs_no_allocation_and_its_first_write_tries_one_from_6_13_on(kernel: str, fallbacks: int) -> None:
    """The allocation fails: split, as before. Two exits per written page."""
    read, written = run(READ, WRITE, backing=THP, memory=4 * MIB2, thp_failure=1.0, kernel=kernel).steps
    assert of(read.counters, "huge_zero_maps", "thp_fault_fallback", "pf_taken") == (4, 0, 4)
    assert of(written.counters, "thp_fault_fallback", "thp_split_pmd", "cow_4k", "pf_taken") == (fallbacks, 4, 2048, 4096)


def fallen_back(**parameters: Any) -> frozenset[int]:
    """Regions with a page table after a write to each."""
    done = run(EACH_2M, **{"backing": THP, "memory": 8 * MIB2, "thp_failure": 0.5} | parameters)
    found = frozenset(np.flatnonzero(done.machine.host_pmd == HostPmd.TBL).tolist())
    assert done.counters["thp_fault_fallback"] in (len(found), 0)  # 0: not counted for shmem
    return found


def test_the_same_regions_fail_in_every_configuration_of_a_seed() -> None:
    others: list[dict[str, Any]] = [
        {"kernel": "5.15"},
        {"kernel": "7.3"},
        {"mmu": "shadow"},
        {"vcpus": 4},
        {"policy": "always_writable"},
        {"use_zero_page": False},
        {"backing": "anonymous_default", "thp_enabled": "always"},
        {"backing": "shmem_thp"},
    ]
    for seed in range(4):
        assert {fallen_back(seed=seed, **parameters) for parameters in others} == {fallen_back(seed=seed)}
    assert len({fallen_back(seed=seed) for seed in range(8)} | {fallen_back(replicate=r) for r in range(8)}) > 10


def test_a_fraction_fails_for_that_fraction_of_the_regions() -> None:
    """128 seeds of 8 regions: within 5 standard errors of the binomial; fewer fail, fewer regions (the same draws)."""
    tries = 128 * 8
    for share in (0.1, 0.5, 0.9):
        failed = sum(len(fallen_back(seed=seed, thp_failure=share)) for seed in range(128))
        assert abs(failed - tries * share) < 5 * (tries * share * (1 - share)) ** 0.5
    assert all(fallen_back(seed=seed, thp_failure=0.3) <= fallen_back(seed=seed, thp_failure=0.6) for seed in range(8))


# ---- Backings --------------------------------------------------------------------------------------------------------


def test_shared_hugetlb_is_one_writable_leaf_and_no_rss() -> None:
    done = run(READ, WRITE, backing="shared_hugetlb_2mb", memory=2 * MIB2)
    assert of(done.counters, "pf_taken", "pgfault", "bytes_cleared", "cow_reuse") == (2, 2, 2 * MIB2, 0)
    assert of(done.gauges, *LEAVES, "rss_bytes", "held_bytes") == (0, 2, 0, 0, 2 * MIB2)


@pytest.mark.parametrize(("failure", "exits", "leaves"), [(0.0, 2, (0, 2, 0)), (1.0, 1024, (1024, 0, 0))])
def test_huge_shmem_is_one_writable_leaf_of_the_page_cache(failure: float, exits: int, leaves: tuple[int, ...]) -> None:
    """Neither an anonymous THP (no thp_fault_alloc, no fallback, no rss) nor subject to thp_enabled."""
    done = run(READ, WRITE, backing="shmem_thp", memory=2 * MIB2, thp_failure=failure, thp_enabled="never")
    assert of(done.counters, "pf_taken", "bytes_cleared", "thp_fault_alloc", "thp_fault_fallback") == (exits, 2 * MIB2, 0, 0)
    assert of(done.gauges, *LEAVES, "rss_bytes", "anon_huge_bytes", "held_bytes") == (*leaves, 0, 0, 2 * MIB2)


def test_a_private_file_page_is_read_only_until_it_is_copied() -> None:
    """Read: one page of the file, 1 exit. Written: a copy beside it, 2 exits, 1 pair; rss counts what is mapped, held both."""
    read, written = run(READ, WRITE, backing="private_memfd").steps
    assert of(read.counters, "pf_taken", "pgfault", "bytes_cleared", "zero_page_maps") == (512, 512, MIB2, 0)
    assert of(read.gauges, "rss_bytes", "held_bytes") == (MIB2, MIB2)
    assert of(written.counters, "pf_taken", "cow_4k", "invalidate_range_start", "bytes_copied", "bytes_cleared") == (
        1024,
        512,
        512,
        MIB2,
        0,
    )
    assert of(written.gauges, "rss_bytes", "held_bytes") == (MIB2, 2 * MIB2)


def test_a_first_write_to_a_private_file_copies_without_a_notifier() -> None:
    """do_cow_fault(): the file's page is made (cleared), and copied before anything was mapped."""
    done = last(WRITE, backing="private_memfd")
    assert of(done, "pf_taken", "cow_4k", "invalidate_range_start", "bytes_cleared", "bytes_copied") == (512, 0, 0, MIB2, MIB2)
    assert of(done, "rss_bytes", "held_bytes") == (MIB2, 2 * MIB2)


@pytest.mark.parametrize(
    ("backing", "enabled", "huge"),
    [
        ("anonymous", "always", False),  # MADV_NOHUGEPAGE
        (THP, "always", True),
        (THP, "madvise", True),
        (THP, "never", False),
        ("anonymous_default", "always", True),
        ("anonymous_default", "madvise", False),
        ("anonymous_default", "never", False),
    ],
)
def test_who_gets_a_thp(backing: str, enabled: str, huge: bool) -> None:
    read, written = (last(step, backing=backing, thp_enabled=enabled) for step in (READ, WRITE))
    assert of(read, "pf_taken", "huge_zero_maps", "zero_page_maps") == ((1, 1, 0) if huge else (512, 0, 512))
    assert of(written, "pf_taken", "thp_fault_alloc", "anon_huge_bytes") == ((1, 1, MIB2) if huge else (512, 0, 0))


@pytest.mark.parametrize("mmu", ["tdp", "legacy"])
@pytest.mark.parametrize(("kernel", "exits"), [("6.12", 0), ("6.13", 1)])
def test_a_prefetch_leaves_a_present_leaf_alone_from_6_13(mmu: str, kernel: str, exits: int) -> None:
    """A read-only leaf whose host page became writable without a notifier: KVM_PRE_FAULT_MEMORY would make it writable."""
    steps = [Touch(access=Access.READ, every=MIB2), HostTouch(every=MIB2), PreFault(), EACH_2M]
    assert last(*steps, backing=HUGETLB, kernel=kernel, mmu=mmu)["pf_taken"] == exits
