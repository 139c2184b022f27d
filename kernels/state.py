"""The machine: host page table, KVM's page table, locks, actors and counters as one NamedTuple of arrays."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.jit import jit
from kernels.spec import (
    HIST_BUCKETS,
    HIST_SUB_BITS,
    HOST_MASK,
    PMD_ORDER,
    PMD_PAGES,
    SPTE_SHIFT,
    Counter,
    Cpu,
    Gauge,
    HostPmd,
    Phase,
    SptePmd,
    Trace,
    Vm,
)

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Machine(NamedTuple):
    """State of one VM and of the memory behind its data memslot. Numbers of pages: `memory / 4096`; of regions: rounded up."""

    host_pmd: Bytes  # (regions,) HostPmd
    spte_pmd: Bytes  # (regions,) SptePmd
    pte: Bytes  # (pages,) HostPte | Spte << SPTE_SHIFT, valid below a HostPmd.TBL / SptePmd.T
    vm: Int64s  # (len(Vm),)
    cpu: Int64s  # (actors, len(Cpu))
    queue: Int64s  # (actors + 1,) who waits for mmu_lock: actor * 2 + (asks for write)
    tree: Int64s  # (2 * leaves,) tournament of next events, see schedule.py
    counters: Int64s  # (len(Counter),) of the current step
    gauges: Int64s  # (len(Gauge),)
    hist: Int64s  # (HIST_BUCKETS,) fault latencies of the current step
    trace: Int64s  # (rows, len(Trace)); 0 rows: nothing is recorded


def leaves_of(actors: int) -> int:
    """Leaves of the tournament tree: the next power of two, at least 2."""
    return max(2, 1 << (actors - 1).bit_length())


def new_machine(pages: int, actors: int, trace_rows: int = 0) -> Machine:
    """A machine with nothing mapped. `pages` >= 1, `actors` >= 1."""
    regions = -(-pages // PMD_PAGES)
    return Machine(
        host_pmd=np.zeros(regions, np.uint8),
        spte_pmd=np.zeros(regions, np.uint8),
        pte=np.zeros(pages, np.uint8),
        vm=np.zeros(len(Vm), np.int64),
        cpu=np.zeros((actors, len(Cpu)), np.int64),
        queue=np.zeros(actors + 1, np.int64),
        tree=np.zeros(2 * leaves_of(actors), np.int64),
        counters=np.zeros(len(Counter), np.int64),
        gauges=np.zeros(len(Gauge), np.int64),
        hist=np.zeros(HIST_BUCKETS, np.int64),
        trace=np.zeros((trace_rows, len(Trace)), np.int64),
    )


def state_bytes(memory_bytes: int, actors: int) -> int:
    """Bytes that new_machine() takes for that memory: what a sweep must have free per point."""
    pages = memory_bytes >> 12
    return pages + 2 * -(-pages // PMD_PAGES) + actors * (len(Cpu) + 5) * 8 + HIST_BUCKETS * 8


@jit
def host_pte(m: Machine, page: int) -> int:
    return np.int64(m.pte[page]) & HOST_MASK


@jit
def spte(m: Machine, page: int) -> int:
    return np.int64(m.pte[page]) >> SPTE_SHIFT


@jit
def set_host_pte(m: Machine, page: int, value: int) -> None:
    m.pte[page] = (np.int64(m.pte[page]) & ~HOST_MASK) | value


@jit
def set_spte(m: Machine, page: int, value: int) -> None:
    m.pte[page] = (np.int64(m.pte[page]) & HOST_MASK) | (value << SPTE_SHIFT)


@jit
def region_end(m: Machine, region: int) -> int:
    """One past the last page of a region; the last region may be short."""
    return min((region + 1) << PMD_ORDER, len(m.pte))


@jit
def latency_bucket(ns: int) -> int:
    """Index of the log-linear bucket that holds a latency; exact below 256 ns, then 128 buckets per octave."""
    shift = 0
    value = ns >> (HIST_SUB_BITS + 1)
    while value > 0:
        value >>= 1
        shift += 1
    return min(HIST_BUCKETS - 1, (shift << HIST_SUB_BITS) + (ns >> shift))


def bucket_top(bucket: int) -> int:
    """The largest latency that falls into a bucket: what a percentile reports."""
    if bucket < 2 << HIST_SUB_BITS:
        return bucket
    shift = (bucket >> HIST_SUB_BITS) - 1
    return ((bucket - (shift << HIST_SUB_BITS) + 1) << shift) - 1


@jit
def record_latency(m: Machine, ns: int) -> None:
    m.counters[Counter.FAULT_NS] += ns
    m.hist[latency_bucket(ns)] += 1
    m.vm[Vm.FAULT_MAX_NS] = max(m.vm[Vm.FAULT_MAX_NS], ns)


@jit
def record_event(m: Machine, actor: int, time: int, phase: int) -> None:
    """Append one row to the trace, if there is room."""
    row = m.vm[Vm.TRACED]
    if row >= len(m.trace):
        return
    m.vm[Vm.TRACED] = row + 1
    c = m.cpu[actor]
    page = min(c[Cpu.GFN], len(m.pte) - 1)
    region = page >> PMD_ORDER
    m.trace[row, Trace.TIME] = m.vm[Vm.CLOCK] + time
    m.trace[row, Trace.ACTOR] = actor
    m.trace[row, Trace.PHASE] = phase
    m.trace[row, Trace.GFN] = c[Cpu.GFN]
    m.trace[row, Trace.WRITE] = c[Cpu.WRITE]
    m.trace[row, Trace.HOST_PMD] = m.host_pmd[region]
    m.trace[row, Trace.SPTE_PMD] = m.spte_pmd[region]
    m.trace[row, Trace.HOST_PTE] = host_pte(m, page) if m.host_pmd[region] == HostPmd.TBL else -1
    m.trace[row, Trace.SPTE] = spte(m, page) if m.spte_pmd[region] == SptePmd.T else -1
    m.trace[row, Trace.SEQ] = m.vm[Vm.SEQ]


@jit
def in_guest(m: Machine, actor: int) -> bool:
    """True while the actor runs guest code: a KVM flush request kicks it."""
    return m.cpu[actor, Cpu.PHASE] == Phase.TOUCH
