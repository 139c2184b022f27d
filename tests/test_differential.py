"""The compiled implementation against the executable specification, figure by figure, over random lives of a VM.

FAULTSWEEP_EXAMPLES sets how many lives the state machine draws (default 2,000, what CI runs), a thousand to a test, each
test with a seed of its own. How many ran is printed at the end of the test run, and checked.
"""

from collections import Counter as Tally
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kernels import reference
from kernels.cost import Cost
from kernels.engine import mapped_pages
from kernels.simulate import BudgetError, Run, simulate
from kernels.spec import (
    HIST_BUCKETS,
    HOST_MASK,
    PAGE_BYTES,
    PMD_BYTES,
    PMD_PAGES,
    SPTE_SHIFT,
    Access,
    Backing,
    HostPmd,
    HostPte,
    MmapLock,
    Spte,
    SptePmd,
    Vm,
)
from kernels.state import Machine
from kernels.steps import Fork, Ksm, Populate, PreFault, Step, Touch, TouchList
from tests.strategies import CHECKS, EXAMPLES, KERNELS, checks_of, points, steps_of, unit_of

LIVES = 1000  # of one test

ran = Tally[str]()


def bucket_of(ns: int) -> int:
    """Log-linear: below 256 ns one bucket per ns, then 128 per power of two."""
    octave = max(0, ns.bit_length() - 8)
    return min(HIST_BUCKETS - 1, 128 * octave + ns // 2**octave)


def host_ptes(m: Machine) -> list[int | None]:
    """HostPte per page of the VMA; None where the region has no table."""
    tables = np.repeat(m.host_pmd == HostPmd.TBL, 1 << m.vm[Vm.HOST_ORDER])
    return [int(b) & HOST_MASK if t else None for b, t in zip(m.pte.tolist(), tables.tolist(), strict=True)]


def sptes(m: Machine) -> list[int | None]:
    """Spte per page of the slot; None where KVM has no table for the region."""
    shift, pages = int(m.vm[Vm.SHIFT]), int(m.vm[Vm.PAGES])
    tables = np.repeat(m.spte_pmd >= SptePmd.T, PMD_PAGES)[:pages]
    return [b >> SPTE_SHIFT if t else None for b, t in zip(m.pte[shift : shift + pages].tolist(), tables.tolist(), strict=True)]


LEAVES = (HostPmd.HZ_RO, HostPmd.THP_RW, HostPmd.THP_EX, HostPmd.THP_SH, HostPmd.HUGE_RW, HostPmd.HUGE_RO, HostPmd.HUGE_SH, HostPmd.SHM_THP)
WRITABLE_LEAVES = (HostPmd.THP_RW, HostPmd.HUGE_RW, HostPmd.SHM_THP)
WRITABLE_PAGES = (HostPte.ANON_RW, HostPte.ANON_TRW, HostPte.SHM_RW)
THPS = (HostPmd.THP_RW, HostPmd.THP_EX, HostPmd.THP_SH)
ANONYMOUS = (HostPte.ANON_RW, HostPte.ANON_TRW, HostPte.ANON_EX, HostPte.ANON_SH, HostPte.ANON_TSH)


def check_leaf(m: Machine, page: int, leaf: int) -> None:
    """No SPTE without a host entry, no writable one (or one that becomes so without a fault) over a read-only entry."""
    host, pte = HostPmd(m.host_pmd[page >> m.vm[Vm.HOST_ORDER]]), HostPte(m.pte[page] & HOST_MASK)
    assert host in LEAVES or (host == HostPmd.TBL and pte not in (HostPte.NONE, HostPte.CACHED, HostPte.SHM_BUSY))
    if leaf >= Spte.WP:
        assert host in WRITABLE_LEAVES or (host == HostPmd.TBL and pte in WRITABLE_PAGES)


def check_sptes(m: Machine) -> None:
    shift, pages = int(m.vm[Vm.SHIFT]), int(m.vm[Vm.PAGES])
    for gib, pud in enumerate(m.spte_pud):
        if SptePmd.N < pud < SptePmd.T:
            check_leaf(m, shift + (gib << 18), pud)
            assert not m.spte_pmd[gib << 9 : (gib + 1) << 9].any()
    for region in np.flatnonzero(m.spte_pmd):
        first = shift + int(region) * PMD_PAGES
        pmd = m.spte_pmd[region]
        leaves = m.pte[first : min(first + PMD_PAGES, shift + pages)] >> SPTE_SHIFT
        if pmd < SptePmd.T:
            check_leaf(m, first, pmd)
            assert not leaves.any()
        elif m.host_pmd[first >> m.vm[Vm.HOST_ORDER]] == HostPmd.TBL or leaves.any():
            for i in np.flatnonzero(leaves):
                check_leaf(m, first + int(i), leaves[i])


def check_frames(run: Run, backing: Backing) -> None:
    """Conservation: frames that the gauges say the host gave are those that the page tables, the page cache and the child hold."""
    m = run.machine
    region_bytes = PAGE_BYTES << int(m.vm[Vm.HOST_ORDER])
    pmds = Tally(m.host_pmd.tolist())
    ptes = Tally(pte for pte in host_ptes(m) if pte)
    thps = sum(pmds[pmd] for pmd in THPS) * PMD_BYTES
    anonymous = sum(ptes[pte] for pte in ANONYMOUS) * PAGE_BYTES
    mapped_file = ptes[HostPte.FILE_RO] * PAGE_BYTES
    assert run.gauges["rss_bytes"] == thps + anonymous + mapped_file + ptes[HostPte.KSM_RO] * PAGE_BYTES
    assert run.gauges["anon_huge_bytes"] == thps
    huge = (HostPmd.HUGE_RW, HostPmd.HUGE_RO, HostPmd.HUGE_SH, HostPmd.SHM_THP, HostPmd.CACHED)
    cache = ptes[HostPte.FILE_RO] + ptes[HostPte.SHM_RW] + ptes[HostPte.CACHED]
    if backing == Backing.PRIVATE_MEMFD:  # the page of the file stays behind its copy
        cache += anonymous // PAGE_BYTES
    held = thps + anonymous + sum(pmds[pmd] for pmd in huge) * region_bytes + cache * PAGE_BYTES
    assert run.gauges["held_bytes"] == held + int(m.vm[Vm.CHILD_BYTES]) + int(m.vm[Vm.KSM_FRAMES]) * PAGE_BYTES
    assert m.vm[Vm.KSM_SHARERS] == ptes[HostPte.KSM_RO]


def check_invariants(run: Run, backing: Backing) -> None:
    """What holds in every state, whatever happened."""
    for c in (*(step.counters for step in run.steps), run.counters):
        assert c["touches"] == c["reads"] + c["writes"]
        assert c["pf_taken"] == c["pf_fixed"] + c["pf_spurious"] + c["pf_retry"]
        assert c["invalidate_range_start"] == c["invalidate_range_end"]
        assert c["pf_fast"] <= c["pf_fixed"] + c["pf_spurious"]
        assert c["exits"] >= c["pf_taken"]
        assert 0 <= c["hits"] <= c["touches"]
    m = run.machine
    assert tuple(run.gauges[f"pages_{size}"] for size in ("4k", "2m", "1g")) == mapped_pages(m)
    assert m.vm[Vm.IN_PROGRESS] == m.vm[Vm.READERS] == m.vm[Vm.WRITER] == m.vm[Vm.PAGE_WAITERS] == 0
    assert m.vm[Vm.MMAP_READERS] == 0
    assert m.vm[Vm.MMAP_WRITER] == MmapLock.NONE
    assert not set(m.host_pmd.tolist()) & {HostPmd.HUGE_BUSY, HostPmd.HUGE_SH_BUSY, HostPmd.COLLAPSING}
    check_sptes(m)
    check_frames(run, backing)


def check_steps(run: Run, expected: reference.Reference) -> None:
    assert [step.op for step in run.steps] == [step.op for step in expected.steps]
    for mine, theirs in zip(run.steps, expected.steps, strict=True):
        assert mine.counters == theirs.counters
        assert mine.gauges == theirs.gauges
        assert mine.ns == theirs.ns
        assert mine.fault_max_ns == max(theirs.latencies, default=0)
        buckets = Tally(bucket_of(ns) for ns in theirs.latencies)
        assert {int(b): int(mine.hist[b]) for b in np.flatnonzero(mine.hist)} == buckets
    assert run.counters == expected.counters
    assert run.gauges == expected.gauges


def check_end_state(m: Machine, expected: reference.Reference) -> None:
    assert m.host_pmd.tolist() == expected.host_pmd
    assert m.spte_pud.tolist() == expected.spte_pud
    assert m.spte_pmd.tolist() == expected.spte_pmd
    assert host_ptes(m) == expected.host_pte
    assert sptes(m) == expected.spte
    for index, value in (
        (Vm.SEQ, expected.seq),
        (Vm.LOGGING, expected.logging),
        (Vm.DIRTY, expected.dirty),
        (Vm.CHILD_BYTES, expected.child_bytes),
        (Vm.KSM_SHARERS, expected.ksm_sharers),
        (Vm.KSM_FRAMES, expected.ksm_frames),
    ):
        assert m.vm[index] == value, index.name


def expect(configuration: dict[str, Any]) -> reference.Reference | None:
    """What the reference says; None where the machine makes no progress."""
    try:
        return reference.simulate(**configuration)
    except RuntimeError as error:
        assert "no end" in str(error)
        return None


def check(configuration: dict[str, Any], expected: reference.Reference | None) -> None:
    """The compiled implementation says the same, and what holds always holds."""
    if expected is None:
        with pytest.raises(BudgetError):
            simulate(**configuration)
        return
    run = simulate(**configuration)
    check_steps(run, expected)
    check_end_state(run.machine, expected)
    backing = configuration.get("backing", Backing.ANONYMOUS)
    check_invariants(run, backing if isinstance(backing, Backing) else Backing[backing.upper()])


def compare(configuration: dict[str, Any]) -> None:
    """One configuration through both."""
    check(configuration, expect(configuration))


class LifeOfAVm(RuleBasedStateMachine):
    """Any point, and any steps that can follow one another; both implementations run the whole life at its end."""

    @initialize(point=points())
    def boot(self, point: dict[str, Any]) -> None:
        self.point = point
        self.steps: list[Step] = []
        self.checks = checks_of(point)
        self.by_op = steps_of(point["memory"] // PAGE_BYTES, point["vcpus"], unit_of(point["backing"]))

    def add(self, data: st.DataObject, op: str) -> None:
        step = data.draw(self.by_op[op])
        if not self.checks.fault(step):
            self.steps.append(step)

    @rule(data=st.data(), op=st.sampled_from(("touch", "touch", "touch_list")))
    def guest(self, data: st.DataObject, op: str) -> None:
        self.add(data, op)

    @rule(data=st.data(), op=st.sampled_from(("populate", "host_touch", "vmm_cow", "idle", "pre_fault")))
    def vmm(self, data: st.DataObject, op: str) -> None:
        self.add(data, op)

    @rule(data=st.data(), op=st.sampled_from(("dontneed", "collapse", "ksm_merge")))
    def madvise(self, data: st.DataObject, op: str) -> None:
        self.add(data, op)

    @rule(data=st.data())
    def family(self, data: st.DataObject) -> None:
        self.add(data, "child_exit" if self.checks.child else "fork")

    @rule(data=st.data(), state=st.sampled_from(("log_on", "log_get", "log_off")))
    def dirty_log(self, data: st.DataObject, state: str) -> None:
        self.add(data, state)

    @precondition(lambda self: len(self.steps) > 0)
    @rule(index=st.integers(0, 10))
    def again(self, index: int) -> None:
        """The same step once more: what was done before must be found."""
        step = self.steps[index % len(self.steps)]
        if not self.checks.fault(step):
            self.steps.append(step)

    def teardown(self) -> None:
        if getattr(self, "steps", None):
            compare(self.point | {"steps": self.steps})
            ran["lives"] += 1
            ran["steps"] += len(self.steps)


@pytest.mark.parametrize("shard", range(-(-EXAMPLES // LIVES)))
def test_lives_of_a_vm_are_the_same_in_both(shard: int, record_property: Callable[[str, int], None]) -> None:
    """The state machine. conftest.py prints how many lives were compared."""
    ran.clear()
    lives = min(LIVES, EXAMPLES - shard * LIVES)
    wanted = settings(max_examples=lives, stateful_step_count=8, deadline=None, database=None, suppress_health_check=CHECKS)
    run_state_machine_as_test(seed(shard)(type("LifeOfAVm", (LifeOfAVm,), {})), settings=wanted)
    record_property("lives of a VM compared with the reference", ran["lives"])
    record_property("steps of these lives", ran["steps"])
    assert ran["lives"] >= lives


def rows(*accesses: tuple[int, int, bool]) -> TouchList:
    """(vcpu, gfn, write) each."""
    vcpu, gfn, write = zip(*accesses, strict=True)
    return TouchList(vcpu=np.array(vcpu, np.int64), gfn=np.array(gfn, np.int64), write=np.array(write, bool))


@pytest.mark.parametrize("kernel", KERNELS)
def test_write_that_another_vcpu_made_possible_is_fast(kernel: str) -> None:
    """vCPU 1 exits on the read-only leaf just before vCPU 0 makes it writable: fast_page_fault() finds it spurious."""
    first = Touch(access=Access.READ, vcpus=1, touches=1)
    race = rows((0, 0, True), *[(1, 0, False)] * 85, (1, 1, True))
    configuration = {"kernel": kernel, "backing": "anonymous_hugetlb_2mb", "memory": PMD_BYTES, "vcpus": 2, "steps": [first, race]}
    assert reference.simulate(**configuration).counters["pf_fast"] == 1
    compare(configuration)


@pytest.mark.parametrize("kernel", ["6.11", "6.12", "6.13", "7.3"])
def test_prefetch_over_a_leaf(kernel: str) -> None:
    """The VMM made the page writable behind a read-only SPTE: from 6.13 on KVM_PRE_FAULT_MEMORY leaves any leaf as it is."""
    steps = [Touch(access=Access.READ, touches=1), Populate(access=Access.WRITE), PreFault(), Touch(touches=1)]
    configuration = {"kernel": kernel, "backing": "anonymous_hugetlb_2mb", "memory": PMD_BYTES, "steps": steps}
    assert reference.simulate(**configuration).steps[-1].counters["pf_fixed"] == (kernel in ("6.13", "7.3"))
    compare(configuration)


def test_copy_by_the_vmm_is_not_prefetched() -> None:
    """Patch 2 needs a running vCPU: what MADV_POPULATE_WRITE copies under mapped zero pages costs the guest one exit each."""
    steps = [Touch(access=Access.READ), Populate(access=Access.WRITE), Touch()]
    configuration = {"kernel": "6.5", "policy": "change_pte_prefetch", "backing": "anonymous", "memory": PMD_BYTES, "steps": steps}
    expected = reference.simulate(**configuration)
    assert (expected.counters["change_pte"], expected.counters["spte_prefetch"], expected.steps[-1].counters["pf_fixed"]) == (512, 0, 512)
    compare(configuration)


def test_a_second_retry_of_a_prefault_is_as_long_as_the_first() -> None:
    """The nanosecond that a retry takes while something is being invalidated is not paid by the next one, after KSM is through."""
    free = dict.fromkeys(Cost, 0) | {Cost.GUP_FAST_NS: 250_000, Cost.NOTIFIER_NS: 1000, Cost.LINE_NS: 50, Cost.SMT_NS: 1000}
    merging = Ksm(pages_to_scan=1, sleep_ms=1, fraction=0.3)
    compare(
        {"kernel": "6.11", "memory": PMD_BYTES, "prealloc": "populate+pre_fault", "prealloc_threads": 3, "ksm": merging}
        | {"costs": free, "steps": [Fork()]}
    )
