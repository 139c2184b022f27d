# ruff: noqa: E501 (the table reads best with a row a line)
"""The rows of the fault-path oracle: one vCPU, one 2 MiB region, every page read, then every page written."""

import pytest

from kernels import Access, Run, Touch, VmmCow, simulate

READ_WRITE = (Touch(access=Access.READ), Touch())
READ = (Touch(access=Access.READ),)
WRITE = (Touch(),)
THP, SMALL, HUGETLB, SHMEM = "anonymous_thp", "anonymous", "anonymous_hugetlb_2mb", "shmem"
MIB2 = 2 << 20
COLUMNS = (
    "pf_taken",
    "pf_fixed",
    "pf_retry",
    "pgfault",
    "invalidate_range_start",
    "change_pte",
    "mmu_lock_write",
    "remote_tlb_flush_requests",
    "thp_fault_alloc",
    "thp_split_pmd",
    "bytes_cleared",
)


def one_region(steps: tuple[Touch, ...], **parameters: object) -> Run:
    return simulate(memory=MIB2, steps=steps, **parameters)  # type: ignore[arg-type]


ROWS = [
    ("thp, up to 6.9", READ_WRITE, {"backing": THP, "kernel": "6.9"}, (1025, 513, 512, 513, 513, 512, 1538, 1, 0, 1, MIB2)),
    ("thp, 6.1", READ_WRITE, {"backing": THP, "kernel": "6.1"}, (1025, 513, 512, 513, 513, 512, 1538, 1, 0, 1, MIB2)),
    ("thp, 6.10", READ_WRITE, {"backing": THP, "kernel": "6.10"}, (1025, 513, 512, 513, 513, 0, 1026, 1, 0, 1, MIB2)),
    ("thp, 6.12", READ_WRITE, {"backing": THP, "kernel": "6.12"}, (1025, 513, 512, 513, 513, 0, 1026, 1, 0, 1, MIB2)),
    ("thp, 6.13", READ_WRITE, {"backing": THP, "kernel": "6.13"}, (3, 2, 1, 2, 1, 0, 2, 1, 1, 0, MIB2)),
    ("thp, 7.3", READ_WRITE, {"backing": THP, "kernel": "7.3"}, (3, 2, 1, 2, 1, 0, 2, 1, 1, 0, MIB2)),
    ("thp, patch 2", READ_WRITE, {"backing": THP, "kernel": "6.5", "policy": "change_pte_prefetch"}, (514, 2, 512, 513, 513, 512, 1538, 1, 0, 1, MIB2)),
    ("thp, no huge zero page", READ_WRITE, {"backing": THP, "use_zero_page": False}, (1, 1, 0, 1, 0, 0, 0, 0, 1, 0, MIB2)),
    ("thp, always writable", READ_WRITE, {"backing": THP, "policy": "always_writable"}, (1, 1, 0, 1, 0, 0, 0, 0, 1, 0, MIB2)),
    ("thp, write first", WRITE, {"backing": THP}, (1, 1, 0, 1, 0, 0, 0, 0, 1, 0, MIB2)),
    ("thp, reads only", READ, {"backing": THP}, (1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0)),
    ("4K, up to 6.9", READ_WRITE, {"kernel": "6.9"}, (1536, 1024, 512, 1024, 512, 512, 1536, 512, 0, 0, MIB2)),
    ("4K, from 6.10", READ_WRITE, {"kernel": "6.10"}, (1536, 1024, 512, 1024, 512, 0, 1024, 512, 0, 0, MIB2)),
    ("4K, patch 2", READ_WRITE, {"kernel": "6.5", "policy": "change_pte_prefetch"}, (1024, 512, 512, 1024, 512, 512, 1536, 512, 0, 0, MIB2)),
    ("4K, always writable", READ_WRITE, {"policy": "always_writable"}, (512, 512, 0, 512, 0, 0, 0, 0, 0, 0, MIB2)),
    ("4K, write only", WRITE, {}, (512, 512, 0, 512, 0, 0, 0, 0, 0, 0, MIB2)),
    ("THP never", READ_WRITE, {"backing": THP, "thp_enabled": "never"}, (1536, 1024, 512, 1024, 512, 0, 1024, 512, 0, 0, MIB2)),
    ("shmem", READ_WRITE, {"backing": SHMEM}, (512, 512, 0, 512, 0, 0, 0, 0, 0, 0, MIB2)),
    ("hugetlb private: a read leaves it read-only, no notifier", READ_WRITE, {"backing": HUGETLB}, (2, 2, 0, 2, 0, 0, 0, 0, 0, 0, MIB2)),
    ("huge_zero_thp on 6.5 is what 6.13 does", READ_WRITE, {"backing": THP, "kernel": "6.5", "policy": "huge_zero_thp"}, (3, 2, 1, 2, 1, 0, 2, 1, 1, 0, MIB2)),
    ("huge_zero_split on 6.13 is what 6.12 does", READ_WRITE, {"backing": THP, "kernel": "6.13", "policy": "huge_zero_split"}, (1025, 513, 512, 513, 513, 0, 1026, 1, 0, 1, MIB2)),
    ("no_change_pte on 6.5 is what 6.10 does", READ_WRITE, {"kernel": "6.5", "policy": "no_change_pte"}, (1536, 1024, 512, 1024, 512, 0, 1024, 512, 0, 0, MIB2)),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "parameters", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_row(steps: tuple[Touch, ...], parameters: dict[str, object], expected: tuple[int, ...]) -> None:
    run = one_region(steps, **parameters)
    assert {name: run.counters[name] for name in COLUMNS} == dict(zip(COLUMNS, expected, strict=True))


@pytest.mark.parametrize(("backing", "exits", "vmm_faults"), [(SMALL, 512, 512), (THP, 1, 1), (SHMEM, 512, 512), (HUGETLB, 1, 1)])
def test_preallocated_memory_costs_one_exit_per_entry_and_no_host_fault(backing: str, exits: int, vmm_faults: int) -> None:
    run = one_region(READ_WRITE, backing=backing, prealloc="populate")
    moved = {name: run.counters[name] for name in ("pf_taken", "pf_retry", "pgfault", "vmm_pgfault", "gup_fast", "invalidate_range_start")}
    expected = {"pf_taken": exits, "pf_retry": 0, "pgfault": 0, "vmm_pgfault": vmm_faults, "gup_fast": exits, "invalidate_range_start": 0}
    assert moved == expected
    assert run.steps[0].counters["bytes_cleared"] == MIB2
    assert run.counters["bytes_cleared"] == MIB2


def test_pre_fault_after_populate_leaves_no_exit() -> None:
    run = one_region(READ_WRITE, kernel="6.13", prealloc="populate+pre_fault")
    assert run.counters["exits"] == 0
    assert run.counters["hits"] == 1024


def test_pre_fault_of_untouched_memory_installs_read_only_zero_pages() -> None:
    """KVM_PRE_FAULT_MEMORY reads: it saves read exits only, writes still take two."""
    run = one_region(READ_WRITE, kernel="6.12", prealloc="pre_fault")
    assert [step.counters["pf_taken"] for step in run.steps] == [0, 0, 1024]


def test_hugetlb_faults_through_gup_are_counted_from_6_6_on() -> None:
    counts = {
        kernel: one_region(READ_WRITE, backing=HUGETLB, kernel=kernel).counters["pgfault"] for kernel in ("6.1", "6.5", "6.6", "6.12")
    }
    assert counts == {"6.1": 0, "6.5": 0, "6.6": 2, "6.12": 2}


def test_first_exit_of_a_copy_takes_no_lock_for_reading_from_6_8_on() -> None:
    reads = {kernel: one_region(READ_WRITE, kernel=kernel).steps[1].counters["mmu_lock_read"] for kernel in ("6.7", "6.8")}
    assert reads == {"6.7": 1024, "6.8": 512}


@pytest.mark.parametrize(("kernel", "calls"), [("6.5", 3), ("6.10", 2)])
def test_cow_of_vmm_memory_runs_notifiers_but_takes_no_lock(kernel: str, calls: int) -> None:
    counters = simulate(memory=MIB2, kernel=kernel, steps=[VmmCow(pages=7)]).counters
    assert counters["invalidate_range_start"] + counters["change_pte"] + counters["invalidate_range_end"] == 7 * calls
    assert (counters["mmu_lock_write"], counters["vmm_pgfault"], counters["pgfault"], counters["bytes_copied"]) == (0, 7, 0, 7 * 4096)


def test_populate_read_then_write_copies_with_notifiers_of_the_vmm() -> None:
    """A VMM thread's copy is not prefetched by patch 2: no vCPU runs on its CPU."""
    from kernels import Populate

    steps = [Populate(access=Access.READ), Touch(access=Access.READ), Populate(), Touch()]
    run = simulate(memory=MIB2, kernel="6.5", policy="change_pte_prefetch", steps=steps)
    populate, touch = run.steps[2], run.steps[3]
    assert (populate.counters["cow_4k"], populate.counters["remote_tlb_flush_requests"], populate.counters["spte_prefetch"]) == (
        512,
        512,
        0,
    )
    assert (touch.counters["pf_taken"], touch.counters["gup_fast"]) == (512, 512)


def test_a_slot_tail_that_is_no_whole_huge_page_is_mapped_with_4k() -> None:
    run = simulate(memory=MIB2 + 40 * 4096, backing=THP, steps=WRITE)
    assert (run.gauges["pages_2m"], run.gauges["pages_4k"], run.counters["thp_fault_alloc"]) == (1, 40, 2)
    assert run.gauges["rss_bytes"] == 2 * MIB2
