"""The machine: host page table, KVM's page table, locks, actors and counters as one NamedTuple of arrays."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.jit import jit, shared
from kernels.spec import (
    HIST_BUCKETS,
    HIST_SUB_BITS,
    HOST_MASK,
    PMD_ORDER,
    PMD_PAGES,
    PUD_ORDER,
    PUD_PAGES,
    SPTE_SHIFT,
    Actor,
    Counter,
    Cpu,
    Gauge,
    HostPmd,
    OnCpu,
    Phase,
    SptePmd,
    Trace,
    Vm,
)

Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Machine(NamedTuple):
    """State of one VM and of the memory behind its data memslot.

    Pages are counted in the VMA (page of gfn g: g + shift), host regions too; KVM's entries by gfn.
    """

    host_pmd: Bytes  # (host regions,) HostPmd
    spte_pud: Bytes  # (GiBs of the slot,) SptePmd, for 1 GiB hugetlb; else (0,)
    spte_pmd: Bytes  # (2M regions of the slot,) SptePmd; N below a 1G leaf
    pte: Bytes  # (pages of the VMA,) HostPte | Spte << SPTE_SHIFT; 0 where there is no table
    vm: Int64s  # (len(Vm),)
    cpu: Int64s  # (actors and daemons, len(Cpu))
    queue: Int64s  # (actors + 1,) who waits for mmu_lock: actor * 2 + (asks for write)
    run_queue: Int64s  # (actors + 1,) who waits for a CPU
    pmd_lock: Int64s  # (GiBs of the VMA + 1,) when the lock of that table of PMDs is free
    flight: Int64s  # (2 * leaves,) tournament of the next events of actors in flight, see schedule.py
    touch: Int64s  # (2 * leaves,) the same of actors in the guest
    counters: Int64s  # (len(Counter),) of the current step
    gauges: Int64s  # (len(Gauge),)
    hist: Int64s  # (HIST_BUCKETS,) fault latencies of the current step
    trace: Int64s  # (rows, len(Trace)); 0 rows: nothing is recorded


class Env(NamedTuple):
    """What a step reads and never writes."""

    policy: Int64s  # (len(Behaviour),)
    costs: Int64s  # (len(Cost),)
    setup: Int64s  # (len(Setup),)
    actions: Bytes  # (len(HostPmd), len(HostPte), 2): Action for [pmd, pte, write]
    stream: Int64s  # (len(Stream),)
    list_lo: Int64s  # (actors + 1,): touch_list of actor v is [list_lo[v], list_lo[v + 1])
    list_gfn: Int64s
    list_write: Bytes
    zipf_lo: Int64s  # (bins + 1,) first rank of each bin
    zipf_cut: Int64s  # (bins,) draws of 62 bits below it fall into this bin or an earlier one


class Geometry(NamedTuple):
    """Where the slot lies in its VMA; all in pages of 4 KiB."""

    pages: int  # of the slot
    shift: int  # page of the VMA that is gfn 0
    host_order: int  # of a host region: 9, or 18 for 1 GiB hugetlb

    @property
    def vma_pages(self) -> int:
        """From the host page boundary before the slot to the one behind it."""
        return -(-(self.shift + self.pages) >> self.host_order) << self.host_order


def geometry_of(memory_bytes: int, offset_bytes: int, gigantic: bool) -> Geometry:
    """The slot of a point; `gigantic`: 1 GiB hugetlb."""
    host_pages = PUD_PAGES if gigantic else PMD_PAGES
    return Geometry(memory_bytes >> 12, (offset_bytes >> 12) % host_pages, PUD_ORDER if gigantic else PMD_ORDER)


def leaves_of(actors: int) -> int:
    """Leaves of the tournament tree: the next power of two, at least 2."""
    return max(2, 1 << (actors - 1).bit_length())


def new_machine(geometry: Geometry, actors: int, trace_rows: int = 0) -> Machine:
    """A machine with nothing mapped, for so many actors, daemons included (>= 1)."""
    gigantic = geometry.host_order == PUD_ORDER
    m = Machine(
        host_pmd=np.zeros(geometry.vma_pages >> geometry.host_order, np.uint8),
        spte_pud=np.zeros(-(-geometry.pages // PUD_PAGES) if gigantic else 0, np.uint8),
        spte_pmd=np.zeros(-(-geometry.pages // PMD_PAGES), np.uint8),
        pte=np.zeros(geometry.vma_pages, np.uint8),
        vm=np.zeros(len(Vm), np.int64),
        cpu=np.zeros((actors, len(Cpu)), np.int64),
        queue=np.zeros(actors + 1, np.int64),
        run_queue=np.zeros(actors + 1, np.int64),
        pmd_lock=np.zeros((geometry.vma_pages >> PUD_ORDER) + 1, np.int64),
        flight=np.zeros(2 * leaves_of(actors), np.int64),
        touch=np.zeros(2 * leaves_of(actors), np.int64),
        counters=np.zeros(len(Counter), np.int64),
        gauges=np.zeros(len(Gauge), np.int64),
        hist=np.zeros(HIST_BUCKETS, np.int64),
        trace=np.zeros((trace_rows, len(Trace)), np.int64),
    )
    m.vm[Vm.SHIFT], m.vm[Vm.PAGES], m.vm[Vm.HOST_ORDER] = geometry.shift, geometry.pages, geometry.host_order
    return m


@shared
def clear_machine(m: Machine) -> None:
    """As new_machine() made it; `hist` is cleared by each step, the trace is not."""
    shift, pages, host_order = m.vm[Vm.SHIFT], m.vm[Vm.PAGES], m.vm[Vm.HOST_ORDER]
    m.host_pmd[:] = 0
    m.spte_pud[:] = 0
    m.spte_pmd[:] = 0
    m.pte[:] = 0
    m.vm[:] = 0
    m.cpu[:] = 0
    m.queue[:] = 0
    m.run_queue[:] = 0
    m.pmd_lock[:] = 0
    m.flight[:] = 0
    m.touch[:] = 0
    m.counters[:] = 0
    m.gauges[:] = 0
    m.vm[Vm.SHIFT], m.vm[Vm.PAGES], m.vm[Vm.HOST_ORDER] = shift, pages, host_order


def state_bytes(memory_bytes: int, actors: int) -> int:
    """Bytes that new_machine() takes for that memory: what a sweep must have free per point."""
    pages = memory_bytes >> 12
    return pages + 2 * -(-pages // PMD_PAGES) + actors * (len(Cpu) + 10) * 8 + HIST_BUCKETS * 8


@jit
def lookup(table: int, key: int) -> int:
    """Value of a table that spec.packed() made."""
    return (table >> (4 * np.int64(key))) & 15


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
def host_region(m: Machine, page: int) -> int:
    return page >> m.vm[Vm.HOST_ORDER]


@jit
def host_state(m: Machine, page: int) -> int:
    """HostPmd of the page's region."""
    return np.int64(m.host_pmd[page >> m.vm[Vm.HOST_ORDER]])


@jit
def guest_region(m: Machine, page: int) -> int:
    """KVM's 2M region of a page of the slot."""
    return (page - m.vm[Vm.SHIFT]) >> PMD_ORDER


@jit
def slot_end(m: Machine) -> int:
    """One past the slot's last page."""
    return m.vm[Vm.SHIFT] + m.vm[Vm.PAGES]


@jit
def latency_bucket(ns: int) -> int:
    """Index of the log-linear bucket that holds a latency; exact below 256 ns, then 128 buckets per octave."""
    shift = 0
    value = ns >> (HIST_SUB_BITS + 1)
    while value > 0:
        value >>= 1
        shift += 1
    return min(HIST_BUCKETS - 1, (shift << HIST_SUB_BITS) + (ns >> shift))


@jit
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


@shared
def append_row(m: Machine, actor: int, time: int, phase: int) -> None:
    row = m.vm[Vm.TRACED]
    m.vm[Vm.TRACED] = row + 1
    c = m.cpu[actor]
    page = min(c[Cpu.PAGE], slot_end(m) - 1)
    region = guest_region(m, page) % len(m.spte_pmd)  # any, of an actor that had no access yet: its page is 0
    m.trace[row, Trace.TIME] = m.vm[Vm.CLOCK] + time
    m.trace[row, Trace.ACTOR] = actor
    m.trace[row, Trace.PHASE] = phase
    m.trace[row, Trace.GFN] = c[Cpu.PAGE] - m.vm[Vm.SHIFT]
    m.trace[row, Trace.WRITE] = 2 if c[Cpu.EXEC] else c[Cpu.WRITE]
    m.trace[row, Trace.HOST_PMD] = host_state(m, page)
    m.trace[row, Trace.SPTE_PMD] = m.spte_pmd[region]
    m.trace[row, Trace.HOST_PTE] = host_pte(m, page) if host_state(m, page) == HostPmd.TBL else -1
    m.trace[row, Trace.SPTE] = spte(m, page) if m.spte_pmd[region] >= SptePmd.T else -1
    m.trace[row, Trace.SEQ] = m.vm[Vm.SEQ]


@jit
def record_event(m: Machine, actor: int, time: int, phase: int) -> None:
    """Append one row to the trace, if there is room."""
    if m.vm[Vm.TRACED] < len(m.trace):
        append_row(m, actor, time, phase)


@jit
def in_guest(m: Machine, actor: int, now: int) -> bool:
    """The actor runs guest code at that time, and is not on its way back there: a KVM flush request kicks it."""
    c = m.cpu[actor]
    runs = c[Cpu.PHASE] == Phase.TOUCH and c[Cpu.KIND] == Actor.GUEST and c[Cpu.ON_CPU] == OnCpu.RUNS
    return runs and c[Cpu.GUEST_FROM] <= now
