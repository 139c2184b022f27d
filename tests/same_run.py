"""What it means that two runs of one configuration are the same."""

import numpy as np

from kernels import Run
from kernels.spec import Vm


def check_same(fast: Run, slow: Run) -> None:
    """Every step's counters, gauges, times and latencies, their sums, and the machine at the end."""
    for mine, theirs in zip(fast.steps, slow.steps, strict=True):
        assert mine.counters == theirs.counters
        assert mine.gauges == theirs.gauges
        assert (mine.op, mine.guest, mine.ns, mine.fault_max_ns) == (theirs.op, theirs.guest, theirs.ns, theirs.fault_max_ns)
        assert np.array_equal(mine.hist, theirs.hist)
    assert (fast.counters, fast.gauges, fast.latency) == (slow.counters, slow.gauges, slow.latency)
    assert (fast.guest_ns, fast.total_ns) == (slow.guest_ns, slow.total_ns)
    for name in ("host_pmd", "spte_pud", "spte_pmd", "pte"):
        assert np.array_equal(getattr(fast.machine, name), getattr(slow.machine, name)), name
    for index in (Vm.SEQ, Vm.LOGGING, Vm.DIRTY, Vm.CHILD_BYTES, Vm.ANON_VMA, Vm.KSM_SHARERS, Vm.KSM_FRAMES, Vm.CACHED):
        assert fast.machine.vm[index] == slow.machine.vm[index], index.name
