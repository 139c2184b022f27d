"""What actors share besides the meaning of locks, counted by hand: cache lines, zone->lock, PMD locks, bandwidth, cores."""

from typing import Any

import numpy as np
import pytest

from kernels import Access, Cost, DontNeed, Fork, Order, Run, Touch, TouchList, simulate
from kernels.checks import PointError
from kernels.cost import DEFAULT_COSTS, CostError

MIB2, GIB = 2 << 20, 1 << 30
FREE = dict.fromkeys(Cost, 0) | {Cost.TIME_SLICE_NS: 10**9}
READ = Touch(access=Access.READ)


def each_touches(gfns: list[int], costs: dict[Cost, int], **parameters: Any) -> Run:
    """vCPU i writes gfns[i], all at the same time."""
    step = TouchList(np.arange(len(gfns)), np.array(gfns), np.ones(len(gfns), bool))
    before = parameters.pop("before", [])
    return simulate(**{"memory": 4 * MIB2, "vcpus": len(gfns), "costs": FREE | costs, "steps": [*before, step]} | parameters)


@pytest.mark.parametrize("vcpus", [1, 2, 3, 4])
def test_a_lock_word_moves_from_cpu_to_cpu(vcpus: int) -> None:
    """Every fault takes mmap_lock once: vCPU 0 has its line, the others get it one after the other. mmu_lock's line follows in
    the same order, and is free by then: one transfer more for each but the first."""
    run = each_touches(list(range(vcpus)), {Cost.LINE_NS: 100, Cost.LINE_CPU_NS: 4})
    transfer = 100 + 4 * (vcpus - 1)
    assert run.guest_ns == (vcpus * transfer if vcpus > 1 else 0)
    assert run.counters["cache_line_wait_ns"] == sum(i * transfer for i in range(vcpus)) + (vcpus - 1) * transfer


def test_one_vcpu_keeps_its_lock_words() -> None:
    costs = DEFAULT_COSTS | {Cost.LINE_NS: 10**6, Cost.ZONE_LOCK_NS: 10**6}
    for steps in ([READ, Touch()], [Touch()]):
        assert simulate(memory=MIB2, steps=steps, costs=costs).guest_ns == simulate(memory=MIB2, steps=steps).guest_ns


def test_clearing_shares_the_bandwidth_of_the_host() -> None:
    """Alone 100 ns each; the host moves 2 MiB in 60 ns, one after the other: 100, 120, 180, 240."""
    run = each_touches([0, 512, 1024, 1536], {Cost.CLEAR_2M_NS: 100, Cost.MEMORY_2M_NS: 60}, backing="anonymous_thp")
    assert run.guest_ns == 240
    assert run.counters["bandwidth_wait_ns"] == 20 + 80 + 140
    assert run.counters["clear_ns"] == 400


def clearing(vcpus: int) -> Run:
    """Each vCPU faults 32 pages in, 1000 ns each, 100 of them for clearing; the host clears a page in 10 ns."""
    costs = FREE | {Cost.KVM_FAULT_NS: 900, Cost.CLEAR_4K_NS: 100, Cost.MEMORY_2M_NS: 512 * 10}
    return simulate(memory=vcpus * 32 << 12, vcpus=vcpus, costs=costs, steps=[Touch()])


@pytest.mark.parametrize("vcpus", [10, 50, 80, 100])
def test_up_to_the_hosts_bandwidth_nobody_waits_once_the_faults_are_spread(vcpus: int) -> None:
    """All begin at once, and wait for each other that one time: 10 ns more each from the eleventh on."""
    first = [max(0, 10 * (i + 1) - 100) for i in range(vcpus)]
    run = clearing(vcpus)
    assert run.counters["bandwidth_wait_ns"] == sum(first)
    assert run.guest_ns == 32 * 1000 + first[-1]


@pytest.mark.parametrize("vcpus", [101, 150, 200])
def test_beyond_the_hosts_bandwidth_the_rate_is_that(vcpus: int) -> None:
    """A page every 10 ns; what the last fault does besides comes on top."""
    assert 0 <= clearing(vcpus).guest_ns - vcpus * 32 * 10 < 1000


def test_a_page_does_not_wait_for_all_of_a_huge_page() -> None:
    """Both begin at once: 2 MiB, 5120 ns of the bus, and 4 KiB, which half of the bandwidth moves in 20 ns."""
    before = [Touch(vcpus=1, start=0.25, end=0.5), DontNeed(start=0.25, end=0.25 + 1 / 2048)]
    costs = {Cost.CLEAR_4K_NS: 15, Cost.CLEAR_2M_NS: 100_000, Cost.MEMORY_2M_NS: 512 * 10}
    run = each_touches([0, 512], costs, backing="anonymous_thp", before=before)
    assert run.steps[-1].counters["bytes_cleared"] == MIB2 + 4096
    assert run.steps[-1].counters["bandwidth_wait_ns"] == 5


def test_copying_is_traffic_of_twice_its_size() -> None:
    run = each_touches([0], {Cost.COPY_2M_NS: 100, Cost.MEMORY_2M_NS: 60}, backing="anonymous_hugetlb_2mb", before=[Touch(), Fork()])
    assert run.steps[-1].ns == 120


def test_small_pages_come_in_batches_of_63_from_under_one_lock() -> None:
    """Four vCPUs, 64 pages each: two refills each; the first four queue: 0, 1000, 2000, 3000 ns, so do the second four."""
    run = simulate(memory=256 << 12, vcpus=4, costs=FREE | {Cost.ZONE_LOCK_NS: 1000}, steps=[Touch()])
    assert run.counters["zone_lock_wait_ns"] >= 6000
    assert each_touches([0, 1, 2], {Cost.ZONE_LOCK_NS: 1000}).counters["zone_lock_wait_ns"] == 3000


def test_huge_pages_come_in_twos() -> None:
    """vCPU 0 takes four THPs, two refills; vCPU 1 one."""
    step = TouchList(np.array([0, 0, 0, 1]), np.array([0, 512, 1024, 1536]), np.ones(4, bool))
    costs = FREE | {Cost.ZONE_LOCK_NS: 1000, Cost.CLEAR_2M_NS: 10**6}
    run = simulate(memory=4 * MIB2, vcpus=2, backing="anonymous_thp", costs=costs, steps=[step])
    assert run.counters["zone_lock_wait_ns"] == 1000
    assert run.guest_ns == 3 * 10**6


@pytest.mark.parametrize(
    ("backing", "page", "each", "wait"),
    [("anonymous", 4096, 63, 1000), ("anonymous", 4096, 64, 4000), ("anonymous_thp", MIB2, 2, 1000), ("anonymous_thp", MIB2, 3, 4000)],
)
def test_a_list_is_filled_again_when_it_is_empty(backing: str, page: int, each: int, wait: int) -> None:
    """Two vCPUs, a hold of 1000 ns, for which the second one waits. With a page more than a list has, vCPU 0 fills its list again
    behind its first hold, vCPU 1 waits for both, and then for its own first one."""
    costs = FREE | {Cost.ZONE_LOCK_NS: 1000}
    run = simulate(memory=2 * each * page, vcpus=2, backing=backing, costs=costs, steps=[Touch(every=page)])
    assert run.counters["zone_lock_wait_ns"] == wait


@pytest.mark.parametrize(("gfns", "wait"), [([0, 512], 700), ([0, GIB >> 12], 0)])
def test_splits_in_one_gib_take_turns(gfns: list[int], wait: int) -> None:
    reads = TouchList(np.zeros(2, int), np.array(gfns), np.zeros(2, bool))
    costs = {Cost.SPLIT_PMD_NS: 700, Cost.VM_EXIT_NS: 2}
    run = each_touches(gfns, costs, memory=2 * GIB, backing="anonymous_thp", kernel="6.12", before=[reads])
    assert run.counters["page_table_lock_wait_ns"] == wait


def test_two_vcpus_take_turns_on_one_core() -> None:
    """Each has 30 us of work, slices are 10 us, but for the first, which ends somewhere; a switch takes 1 us, a preemption is an exit."""
    costs = FREE | {Cost.TOUCH_NS: 10_000, Cost.TIME_SLICE_NS: 10_000, Cost.CONTEXT_SWITCH_NS: 1_000}
    mapped, touches = Touch(vcpus=1), Touch()
    run = simulate(memory=6 << 12, vcpus=2, cores=1, costs=costs, steps=[mapped, touches])
    assert run.steps[1].counters["core_wait_ns"] > 0
    switches, rest = divmod(run.steps[1].ns - 60_000, 1_000)
    assert (switches in (5, 6), rest) == (True, 0)
    assert run.steps[1].counters["exits"] == switches - 1  # the last slice but one ends with the work


def test_first_slices_end_apart() -> None:
    """Of each CPU, and of each replicate: one run under overcommit is one draw."""
    found = {
        simulate(memory=4 * MIB2, vcpus=8, cores=2, kernel="6.5", replicate=r, backing="anonymous_thp", steps=[READ, Touch()]).guest_ns
        for r in range(8)
    }
    assert len(found) > 4


def test_a_lock_word_is_shared_by_cpus_not_by_vcpus() -> None:
    few, many = (simulate(memory=8 * MIB2, vcpus=v, cores=8, backing="shmem", steps=[Touch()]).guest_ns for v in (8, 512))
    assert many < 1.2 * few
    alone = simulate(memory=MIB2, vcpus=8, cores=1, backing="shmem", steps=[Touch()])
    assert alone.counters["cache_line_wait_ns"] == 0


def test_a_hardware_thread_slows_its_sibling() -> None:
    costs = FREE | {Cost.TOUCH_NS: 1000, Cost.SMT_NS: 1500}
    steps = [Touch(vcpus=1), Touch()]
    alone = simulate(memory=8 << 12, vcpus=2, costs=costs, steps=steps)
    shared = simulate(memory=8 << 12, vcpus=2, cores=1, smt=2, costs=costs, steps=steps)
    assert (alone.steps[1].ns, shared.steps[1].ns) == (4000, 6000)
    three = simulate(memory=9 << 12, vcpus=3, cores=2, smt=2, costs=costs, steps=steps)
    assert three.steps[1].ns == 4500


def test_a_hold_of_mmu_lock_is_from_grant_to_release() -> None:
    """Faults of the legacy MMU: vCPU 0 holds the lock for 50 ns; vCPU 1 has it 100 ns before its cache line is there, then 50 ns more."""
    costs = {Cost.LINE_NS: 100, Cost.MMU_LOCK_READ_NS: 50}
    assert each_touches([0, 512], costs, mmu="legacy").counters["mmu_lock_write_hold_ns"] == 50 + 150


@pytest.mark.parametrize(("mmu", "guest_ns", "hold_ns"), [("tdp", 50, 0), ("legacy", 4 * 450, 4 * 450), ("shadow", 4 * 450, 4 * 450)])
def test_faults_of_the_legacy_and_shadow_mmu_do_more_under_the_lock_and_one_after_the_other(mmu: str, guest_ns: int, hold_ns: int) -> None:
    costs = {Cost.MMU_LOCK_READ_NS: 50, Cost.LEGACY_FAULT_NS: 400}
    run = each_touches([0, 512, 1024, 1536], costs, mmu=mmu)
    assert (run.guest_ns, run.counters["mmu_lock_write_hold_ns"]) == (guest_ns, hold_ns)
    assert run.counters["mmu_lock_wait_ns"] == (0 if mmu == "tdp" else (1 + 2 + 3) * 450)


def test_a_hold_is_as_long_as_it_takes_on_a_shared_core() -> None:
    costs = {Cost.MMU_LOCK_READ_NS: 1000, Cost.SMT_NS: 1500}
    run = each_touches([0, 512], costs, mmu="legacy", cores=1, smt=2)
    assert (run.counters["mmu_lock_write_hold_ns"], run.guest_ns) == (3000, 3000)


def test_waiting_for_others_to_flush_is_no_work_that_a_sibling_slows() -> None:
    """vCPU 0 copies a page while vCPU 1, on the same core, reads: KVM's flush and the host's."""
    step = TouchList(np.array([0] + [1] * 100), np.array([0] + [1] * 100), np.array([True] + [False] * 100))
    costs = FREE | {Cost.TOUCH_NS: 100, Cost.TLB_FLUSH_NS: 1000, Cost.SMT_NS: 1500}
    run = simulate(memory=2 << 12, vcpus=2, cores=1, smt=2, costs=costs, steps=[READ, step])
    assert run.steps[1].counters["flush_ns"] == run.latency["fault_max_ns"] == 2000


def accesses(*counts: int, gfn: int = 0) -> TouchList:
    """vCPU i reads page gfn so many times."""
    vcpu = np.repeat(np.arange(len(counts)), counts)
    return TouchList(vcpu, np.full(len(vcpu), gfn), np.zeros(len(vcpu), bool))


@pytest.mark.parametrize(
    ("counts", "cores", "ns"),
    [
        ((4, 4), 1, 6000),
        ((4, 0), 1, 4000),  # nobody on the other hardware thread
        ((0, 4, 0, 4), 2, 4000),  # two that have something to do, on two cores
        ((2, 4), 1, 5000),  # 2 x 1500 beside the other, then 2 x 1000
        ((2, 2, 4), 1, 7000),  # the third one's turn comes after 3000 ns, and it has the core to itself
    ],
)
def test_only_a_sibling_that_works_slows(counts: tuple[int, ...], cores: int, ns: int) -> None:
    costs = FREE | {Cost.TOUCH_NS: 1000, Cost.SMT_NS: 1500}
    run = simulate(memory=4096, vcpus=len(counts), cores=cores, smt=2, costs=costs, steps=[Touch(vcpus=1), accesses(*counts)])
    assert run.steps[1].ns == ns


def test_a_sibling_that_sleeps_does_not_slow() -> None:
    """vCPU 1 clears a hugetlb page until 1000 ns, vCPU 2, on the core of vCPU 0, sleeps for that page from 0 on and reads it then.
    So the first and the eleventh of vCPU 0's 20 reads take 150 ns instead of 100."""
    step = TouchList(np.array([0] * 20 + [1, 2]), np.array([0] * 20 + [512, 512]), np.array([False] * 20 + [True, False]))
    costs = FREE | {Cost.TOUCH_NS: 100, Cost.SMT_NS: 1500, Cost.CLEAR_2M_NS: 1000}
    steps = [Touch(vcpus=1, end=0.5), step]
    run = simulate(memory=2 * MIB2, vcpus=3, cores=2, smt=2, backing="anonymous_hugetlb_2mb", costs=costs, steps=steps)
    assert run.steps[1].ns == 2 * 150 + 18 * 100


def test_a_sleeper_is_no_target_of_the_hosts_flush() -> None:
    """vCPU 2 sleeps for the hugetlb page that vCPU 1 clears, while vCPU 0 copies another one: vCPU 1 is the only target."""
    step = TouchList(np.array([0, 1, 2]), np.array([0, 512, 512]), np.array([True, True, False]))
    costs = FREE | {Cost.COPY_2M_NS: 100, Cost.CLEAR_2M_NS: 1000}
    parameters: dict[str, Any] = {"memory": 2 * MIB2, "vcpus": 3, "backing": "anonymous_hugetlb_2mb", "costs": costs}
    run = simulate(**parameters, steps=[Touch(vcpus=1, end=0.5), Fork(), step])
    assert (run.steps[-1].counters["cow_huge"], run.steps[-1].counters["tlb_ipis"]) == (1, 1)


@pytest.mark.parametrize("cores", [None, 1, 4])
def test_vcpus_without_work_take_no_turns_and_share_no_lock_words(cores: int | None) -> None:
    """64 vCPUs, of which one has a page to touch."""
    one = simulate(memory=4096, steps=[READ, Touch()])
    many = simulate(memory=4096, vcpus=64, cores=cores, steps=[READ, Touch()])
    assert (many.guest_ns, many.counters) == (one.guest_ns, one.counters)


@pytest.mark.parametrize("smt", [1, 2])
def test_as_many_cores_as_vcpus_is_no_limit(smt: int) -> None:
    free = simulate(memory=4 * MIB2, vcpus=4, steps=[READ, Touch()])
    bound = simulate(memory=4 * MIB2, vcpus=4, cores=4, smt=smt, steps=[READ, Touch()])
    assert (bound.counters, bound.guest_ns) == (free.counters, free.guest_ns)


def storm(**parameters: Any) -> Run:
    """Reads, then writes, four vCPUs."""
    return simulate(**{"memory": 32 << 20, "vcpus": 4, "kernel": "6.5", "steps": [READ, Touch()]} | parameters)


def test_a_vcpu_off_its_core_inside_an_invalidation_makes_the_others_retry() -> None:
    """A CoW needs one retry, its own. On two cores for four vCPUs the others exit in vain until the one goes on."""
    free, bound = storm(), storm(cores=2)
    own = 32 << 20 >> 12
    assert own <= free.counters["pf_retry"] < 1.1 * own
    assert bound.counters["pf_retry"] > 1.5 * own
    assert bound.counters["pf_fixed"] == free.counters["pf_fixed"]
    assert bound.counters["invalidate_range_start"] == free.counters["invalidate_range_start"]


@pytest.mark.parametrize("parameters", [{"policy": "always_writable"}, {"backing": "anonymous_hugetlb_2mb"}])
def test_without_cow_there_is_no_storm(parameters: dict[str, Any]) -> None:
    assert storm(cores=2, **parameters).counters["pf_retry"] == 0


def test_patch_2_is_immune_to_storms() -> None:
    """Its SPTE is there before the window closes: one exit per CoW, whoever has a core."""
    plain, patched = storm(cores=2), storm(cores=2, policy="change_pte_prefetch")
    assert patched.counters["pf_taken"] < 1.01 * (patched.counters["touches"] + patched.counters["pf_retry"])
    assert patched.counters["pf_retry"] < 1.01 * (32 << 20 >> 12)
    assert patched.counters["pf_taken"] < 0.7 * plain.counters["pf_taken"]


@pytest.mark.parametrize(
    "step",
    [
        Touch(touches=10**7, order=Order.RANDOM, repeat=True, think_ns=10**12),
        Touch(touches=2 * 10**7, order=Order.RANDOM, repeat=True, think_ns=10**12),
    ],
)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_time_that_no_clock_holds_is_refused(step: Touch, vcpus: int) -> None:
    with pytest.raises(PointError, match="36 years"):
        simulate(memory=MIB2, vcpus=vcpus, steps=[step])


def test_work_that_takes_no_time_and_costs_that_are_unknown_are_refused() -> None:
    with pytest.raises(CostError, match=r"smt_ns = 0: 1000 \.\.\. 10000"):
        simulate(memory=MIB2, steps=[Touch()], smt=2, cores=1, costs=DEFAULT_COSTS | {Cost.SMT_NS: 0})
    with pytest.raises(CostError, match="unknown cost foo"):
        simulate(memory=MIB2, steps=[Touch()], costs={**DEFAULT_COSTS, "foo": -1})  # type: ignore[dict-item]
