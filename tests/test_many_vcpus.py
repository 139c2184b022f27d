"""What several vCPUs do to each other: litmus cases with their reason."""

from typing import Any

import numpy as np
import pytest

from kernels import Access, Cost, Idle, Khugepaged, Order, PreFault, Run, Touch, TouchList, simulate
from kernels.cost import DEFAULT_COSTS

MIB2 = 2 << 20


def together(gfns: list[int], writes: list[int], **parameters: object) -> Run:
    """Each vCPU makes one access, all at the same time."""
    step = TouchList(np.arange(len(gfns)), np.array(gfns), np.array(writes, bool))
    before = parameters.pop("before", [])
    return simulate(memory=2 * MIB2, vcpus=len(gfns), steps=[*before, step], **parameters)  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(("kernel", "fixed", "spurious"), [("5.15", 1, 1), ("5.16", 2, 0), ("6.12", 2, 0), ("6.13", 1, 1)])
def test_second_vcpu_on_a_writable_leaf(kernel: str, fixed: int, spurious: int) -> None:
    """From 5.16 to 6.12 the second one writes an entry that differs in the Dirty bit, and counts as fixed."""
    run = together([5, 5], [1, 1], kernel=kernel)
    assert (run.counters["pf_taken"], run.counters["pf_fixed"], run.counters["pf_spurious"]) == (2, fixed, spurious)
    assert run.gauges["rss_bytes"] == 4096


@pytest.mark.parametrize(("kernel", "fixed"), [("5.15", 1), ("6.1", 2), ("6.12", 2), ("6.13", 1)])
def test_third_vcpu_in_flight_finds_the_entry_that_the_second_wrote(kernel: str, fixed: int) -> None:
    """The second one's entry has no Dirty bit; the third one writes the same, unless a guest write set the bit meanwhile."""
    run = together([5] * 6, [0] * 6, kernel=kernel, backing="shmem")
    assert (run.counters["pf_taken"], run.counters["pf_fixed"], run.counters["pf_spurious"]) == (6, fixed, 6 - fixed)


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "6.13"])
def test_second_vcpu_on_a_read_only_leaf_is_spurious(kernel: str) -> None:
    run = together([5, 5], [0, 0], kernel=kernel)
    assert (run.counters["pf_fixed"], run.counters["pf_spurious"]) == (1, 1)


def test_both_clear_a_thp_and_one_is_thrown_away() -> None:
    run = together([5, 9], [1, 1], backing="anonymous_thp")
    assert (run.counters["thp_fault_alloc"], run.counters["bytes_cleared"], run.counters["bytes_cleared_wasted"]) == (1, 2 * MIB2, MIB2)
    assert run.gauges["anon_huge_bytes"] == MIB2


def test_hugetlb_and_shmem_faults_wait_for_the_page_instead() -> None:
    for backing in ("anonymous_hugetlb_2mb", "shmem"):
        run = together([5, 5, 5], [1, 1, 1], backing=backing)
        assert run.counters["bytes_cleared_wasted"] == 0
        assert run.counters["pgfault"] == 3


def test_loser_of_a_huge_zero_split_still_invalidates_2m() -> None:
    """Its invalidation is issued before the PMD is looked at again, so it zaps what was installed meanwhile."""
    read = Touch(access=Access.READ, every=MIB2)
    one = simulate(memory=2 * MIB2, kernel="6.12", backing="anonymous_thp", steps=[read, Touch(every=MIB2, end=0.5)])
    two = together([0, 7], [1, 1], kernel="6.12", backing="anonymous_thp", before=[read])
    assert one.counters["thp_split_pmd"] == two.counters["thp_split_pmd"] == 1
    assert two.counters["invalidate_range_start"] == 4  # two splits tried, two pages copied
    assert two.counters["cow_4k"] == 2


def test_loser_of_a_huge_zero_thp_throws_its_page_away() -> None:
    read = Touch(access=Access.READ, every=MIB2)
    run = together([0, 7], [1, 1], kernel="6.13", backing="anonymous_thp", before=[read])
    counters = run.steps[-1].counters
    assert (counters["thp_fault_alloc"], counters["bytes_cleared_wasted"], counters["invalidate_range_start"]) == (1, MIB2, 2)


def test_two_vcpus_that_write_fresh_memory_count_as_one() -> None:
    one = simulate(memory=16 * MIB2, steps=[Touch()]).counters
    two = simulate(memory=16 * MIB2, vcpus=2, steps=[Touch()]).counters
    assert {name: two[name] for name in ("pf_taken", "pf_fixed", "pgfault", "mmu_lock_read", "gup_slow")} == {
        name: one[name] for name in ("pf_taken", "pf_fixed", "pgfault", "mmu_lock_read", "gup_slow")
    }


@pytest.mark.parametrize("kernel", ["6.5", "6.12"])
def test_cow_with_many_vcpus_adds_retries_and_nothing_else(kernel: str) -> None:
    """pf_fixed, pgfault, invalidations, locks for write, flush requests and the end state are those of one vCPU."""
    steps = [Touch(access=Access.READ), Touch()]
    one = simulate(memory=8 * MIB2, kernel=kernel, steps=steps)
    many = simulate(memory=8 * MIB2, kernel=kernel, vcpus=8, steps=steps)
    same = ("pf_fixed", "pgfault", "invalidate_range_start", "change_pte", "mmu_lock_write", "remote_tlb_flush_requests", "cow_4k")
    assert {name: many.counters[name] for name in same} == {name: one.counters[name] for name in same}
    assert many.counters["pf_retry"] >= one.counters["pf_retry"]
    assert np.array_equal(many.machine.pte, one.machine.pte)


def test_patch_2_is_immune_to_retries_of_others() -> None:
    """The SPTE is made inside the own window: one exit per copy, however many vCPUs copy."""
    steps = [Touch(access=Access.READ), Touch(order=Order.RANDOM)]
    run = simulate(memory=8 * MIB2, kernel="6.5", policy="change_pte_prefetch", vcpus=16, steps=steps)
    assert run.steps[1].counters["cow_4k"] == 4096
    assert run.steps[1].counters["pf_taken"] == 4096


@pytest.mark.parametrize(("victim_ns", "exits"), [(0, 2), (1500, 1)])
def test_a_copy_interrupts_a_vcpu_in_the_guest(victim_ns: int, exits: int) -> None:
    """KVM's own flush and that of the VMM's page table: two IPIs for the vCPU that only reads meanwhile, and one exit if the
    second one finds it on its way back from the first."""
    costs = {**DEFAULT_COSTS, Cost.TLB_VICTIM_NS: victim_ns}
    actors, gfns = [0] + [1] * 1000, [0] + [300] * 1000
    copy = TouchList(np.array(actors), np.array(gfns), np.array([True] + [False] * 1000))
    counters = simulate(memory=MIB2, vcpus=2, costs=costs, steps=[Touch(access=Access.READ), copy]).steps[1].counters
    assert (counters["remote_tlb_flush_requests"], counters["remote_tlb_flush"], counters["tlb_ipis"]) == (1, 1, 2)
    assert counters["exits"] == counters["pf_taken"] + exits
    assert counters["flush_ns"] == 2 * DEFAULT_COSTS[Cost.TLB_FLUSH_NS]


def test_a_vcpu_that_faults_all_the_time_is_hardly_ever_in_the_guest() -> None:
    """kvm_request_needs_ipi(): who is outside needs no IPI, so what an interrupt costs a vCPU in the guest matters little."""

    def total(victim_ns: int) -> int:
        costs = {**DEFAULT_COSTS, Cost.TLB_VICTIM_NS: victim_ns}
        return simulate(memory=4 * MIB2, vcpus=16, costs=costs, steps=[Touch(access=Access.READ), Touch()]).total_ns

    assert total(5000) < 1.05 * total(0)


RETRYING = (Cost.TOUCH_NS, Cost.GUP_FAST_NS, Cost.GUP_SLOW_NS, Cost.MMU_LOCK_READ_NS, Cost.LINE_NS, Cost.LINE_CPU_NS)


@pytest.mark.parametrize(("kernel", "free"), [("6.12", ()), ("6.12", RETRYING), ("6.5", RETRYING)])
def test_a_retry_takes_time_even_where_exits_take_none(kernel: str, free: tuple[Cost, ...]) -> None:
    """Else a fault inside somebody's invalidation would retry for ever, and that invalidation would never end."""
    costs = DEFAULT_COSTS | dict.fromkeys((Cost.VM_EXIT_NS, Cost.KVM_FAULT_NS, *free), 0)
    run = simulate(memory=MIB2, kernel=kernel, vcpus=8, costs=costs, steps=[Touch(access=Access.READ), Touch()])
    assert run.counters["pf_fixed"] == 1024
    assert run.counters["fault_ns"] >= run.counters["pf_retry"] >= 512


def test_prefaulting_in_no_time_waits_for_khugepaged() -> None:
    """KVM_PRE_FAULT_MEMORY, 100 ns a page, is in the region while khugepaged's pair over it is open, 1 us from 1.001 ms on."""
    costs = dict.fromkeys(Cost, 0) | {Cost.NOTIFIER_NS: 1000, Cost.MMU_LOCK_READ_NS: 100}
    parameters: dict[str, Any] = {"memory": MIB2, "backing": "anonymous_thp", "khugepaged": Khugepaged(512, 1), "costs": costs}
    split = [Touch(access=Access.READ), Touch(touches=1)]
    elapsed = simulate(**parameters, steps=split).total_ns
    run = simulate(**parameters, steps=[*split, Idle(975_000 - elapsed), PreFault()])
    assert run.steps[-1].counters["thp_collapse_alloc"] == 1
    assert run.steps[-1].ns == 26_000 + 1_000 + 100  # pages one by one until the pair, its wait, one leaf of 2 MiB


def test_more_vcpus_copy_the_same_pages_faster() -> None:
    totals = [simulate(memory=8 * MIB2, vcpus=n, steps=[Touch(access=Access.READ), Touch()]).total_ns for n in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)


def test_writers_of_mmu_lock_wait_for_each_other() -> None:
    costs = {**DEFAULT_COSTS, Cost.MMU_LOCK_WRITE_NS: 50_000}
    run = simulate(memory=MIB2, vcpus=4, costs=costs, steps=[Touch(access=Access.READ), Touch()])
    cheap = simulate(memory=MIB2, vcpus=4, steps=[Touch(access=Access.READ), Touch()])
    assert run.counters["mmu_lock_wait_ns"] > 10 * cheap.counters["mmu_lock_wait_ns"]
    assert run.guest_ns > run.counters["mmu_lock_write_hold_ns"] >= run.counters["mmu_lock_write"] * 50_000


def test_1024_vcpus_finish_and_touch_every_page_once() -> None:
    run = simulate(memory=64 * MIB2, vcpus=1024, steps=[Touch()])
    assert run.counters["touches"] == run.counters["pf_fixed"] == 64 * 512
