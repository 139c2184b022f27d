"""The compiled implementation against the executable specification, figure by figure, over random configurations.

FAULTSWEEP_EXAMPLES sets how many configurations each test draws (default 300); in CI the draw is always the same.
"""

import os
from collections import Counter as Tally
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from kernels import reference
from kernels.engine import mapped_pages
from kernels.simulate import BudgetError, Run, simulate
from kernels.spec import HIST_BUCKETS, HOST_MASK, PMD_BYTES, PMD_PAGES, SPTE_SHIFT, Access, HostPmd, HostPte, Spte, SptePmd, Vm
from kernels.state import Machine
from kernels.steps import Populate, PreFault, Touch, TouchList
from tests.strategies import KERNELS, configurations

EXAMPLES = int(os.environ.get("FAULTSWEEP_EXAMPLES", "300"))
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def bucket_of(ns: int) -> int:
    """Log-linear: below 256 ns one bucket per ns, then 128 per power of two."""
    octave = max(0, ns.bit_length() - 8)
    return min(HIST_BUCKETS - 1, 128 * octave + ns // 2**octave)


def host_ptes(m: Machine) -> list[int | None]:
    """HostPte per page; None where the region has no table."""
    return [int(b) & HOST_MASK if m.host_pmd[page // PMD_PAGES] == HostPmd.TBL else None for page, b in enumerate(m.pte)]


def sptes(m: Machine) -> list[int | None]:
    """Spte per page; None where KVM has no table for the region."""
    return [int(b) >> SPTE_SHIFT if m.spte_pmd[page // PMD_PAGES] == SptePmd.T else None for page, b in enumerate(m.pte)]


def check_invariants(run: Run) -> None:
    """What holds in every state, whatever happened."""
    for c in (*(step.counters for step in run.steps), run.counters):
        assert c["touches"] == c["reads"] + c["writes"]
        assert c["pf_taken"] == c["pf_fixed"] + c["pf_spurious"] + c["pf_retry"]
        assert c["invalidate_range_start"] == c["invalidate_range_end"]
    m = run.machine
    assert (run.gauges["pages_4k"], run.gauges["pages_2m"]) == mapped_pages(m)
    assert m.vm[Vm.IN_PROGRESS] == m.vm[Vm.READERS] == m.vm[Vm.WRITER] == m.vm[Vm.PAGE_WAITERS] == 0
    for region, pmd in enumerate(m.spte_pmd):
        host = m.host_pmd[region]
        if pmd in (SptePmd.RO, SptePmd.RW):
            assert host in (HostPmd.HZ_RO, HostPmd.THP_RW, HostPmd.HUGE_RO, HostPmd.HUGE_RW)
            assert pmd == SptePmd.RO or host in (HostPmd.THP_RW, HostPmd.HUGE_RW)
    for page, (leaf, pte) in enumerate(zip(sptes(m), host_ptes(m), strict=True)):
        if leaf in (None, Spte.N):
            continue
        host = m.host_pmd[page // PMD_PAGES]
        assert host not in (HostPmd.NONE, HostPmd.HUGE_BUSY)
        assert pte not in (HostPte.NONE, HostPte.SHM_BUSY)
        if leaf == Spte.RW:
            assert host in (HostPmd.THP_RW, HostPmd.HUGE_RW) or pte in (HostPte.ANON_RW, HostPte.SHM_RW)


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
    assert m.spte_pmd.tolist() == expected.spte_pmd
    assert host_ptes(m) == expected.host_pte
    assert sptes(m) == expected.spte
    assert m.vm[Vm.SEQ] == expected.seq


def compare(configuration: dict[str, Any]) -> None:
    """One configuration through both; a machine that makes no progress makes none in either."""
    try:
        run = simulate(**configuration)
    except BudgetError:
        try:
            reference.simulate(**configuration)
        except RuntimeError:
            return
        raise
    expected = reference.simulate(**configuration)
    check_steps(run, expected)
    check_end_state(run.machine, expected)
    check_invariants(run)


@quick
@given(configurations())
def test_simulate_equals_the_reference(configuration: dict[str, Any]) -> None:
    compare(configuration)


@quick
@given(configurations(max_vcpus=1, max_threads=1))
def test_lone_actor_loop_equals_event_loop(configuration: dict[str, Any]) -> None:
    """A trace makes simulate() take the event loop where it would take the table-driven one."""
    fast, slow = simulate(**configuration), simulate(**configuration, trace_rows=1)
    for mine, theirs in zip(fast.steps, slow.steps, strict=True):
        assert mine.counters == theirs.counters
        assert mine.gauges == theirs.gauges
        assert (mine.op, mine.guest, mine.ns, mine.fault_max_ns) == (theirs.op, theirs.guest, theirs.ns, theirs.fault_max_ns)
        assert np.array_equal(mine.hist, theirs.hist)
    assert (fast.counters, fast.gauges, fast.latency) == (slow.counters, slow.gauges, slow.latency)
    assert (fast.guest_ns, fast.total_ns) == (slow.guest_ns, slow.total_ns)
    assert fast.machine.host_pmd.tolist() == slow.machine.host_pmd.tolist()
    assert fast.machine.spte_pmd.tolist() == slow.machine.spte_pmd.tolist()
    assert host_ptes(fast.machine) == host_ptes(slow.machine)
    assert sptes(fast.machine) == sptes(slow.machine)
    assert fast.machine.vm[Vm.SEQ] == slow.machine.vm[Vm.SEQ]


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
