"""What one access of a lone actor does, looked up: a table made by running the event loop's own phases once per class.

A class is the state of the page (its byte) and whether the access writes; further classes stand for the first access of
a 2M region and for an access that a huge leaf allows. A class is learned when its first access comes, on a machine of
one region (the lab). Only what concerns the page alone (or its region) can be learned: see is_local().
"""

from typing import NamedTuple

import numpy as np

from kernels.fault import begin_access, finish_access
from kernels.jit import jit, shared
from kernels.policy import Behaviour
from kernels.spec import (
    HIST_BUCKETS,
    HOST_MASK,
    PMD_ORDER,
    PMD_PAGES,
    SPTE_SHIFT,
    Access,
    Actor,
    Counter,
    Cpu,
    Gauge,
    HostPmd,
    HostPte,
    Mmu,
    Setup,
    Spte,
    SptePmd,
    Stream,
    Vm,
)
from kernels.state import Bytes, Env, Int64s, Machine

STATES = ((len(Spte) - 1) << SPTE_SHIFT) + HOST_MASK + 1  # values of a page's byte
PAGE_CLASSES = 2 * STATES  # state * 2 + write
FRESH = np.int64(PAGE_CLASSES)  # + write: nothing is mapped in the region yet
LEAF = np.int64(PAGE_CLASSES + 2)  # + write: a 2M or 1G leaf is there
CLASSES = PAGE_CLASSES + 4
UNKNOWN = 255  # in PageTable.after: to be done by the phases
EXITS_OF_CLASS = 4  # latencies kept per class
LANES = 4  # copies of PageTable.seen: an increment need not wait for the one before
LONE = np.int64(0)  # the only actor; typed, so that callees are not compiled again for a literal
LAB_EVENTS = np.int64(64)
FOLDED = (int(Vm.SEQ), int(Vm.CHILD_BYTES), int(Vm.DIRTY), int(Vm.ANON_VMA))  # what an access of one page may change in Machine.vm


class PageTable(NamedTuple):
    """What one access does, by class."""

    tried: Bytes  # (CLASSES,) 1: it was looked into whether the class can be known
    after: Bytes  # (CLASSES,) the page's byte afterwards; UNKNOWN: the rest is not valid
    host_pmd: Bytes  # (CLASSES,) the region's entries afterwards
    spte_pmd: Bytes  # (CLASSES,)
    counters: Int64s  # (CLASSES, len(Counter))
    gauges: Int64s  # (CLASSES, len(Gauge))
    vm: Int64s  # (CLASSES, len(Vm)) what is added to Machine.vm
    ns: Int64s  # (CLASSES,)
    latency: Int64s  # (CLASSES, EXITS_OF_CLASS) buckets, -1 for none
    slowest: Int64s  # (CLASSES,)
    seen: Int64s  # (LANES * CLASSES,) how often it happened, in so many copies


def new_page_table() -> PageTable:
    return PageTable(
        tried=np.zeros(CLASSES, np.uint8),
        after=np.zeros(CLASSES, np.uint8),
        host_pmd=np.zeros(CLASSES, np.uint8),
        spte_pmd=np.zeros(CLASSES, np.uint8),
        counters=np.zeros((CLASSES, len(Counter)), np.int64),
        gauges=np.zeros((CLASSES, len(Gauge)), np.int64),
        vm=np.zeros((CLASSES, len(Vm)), np.int64),
        ns=np.zeros(CLASSES, np.int64),
        latency=np.zeros((CLASSES, EXITS_OF_CLASS), np.int64),
        slowest=np.zeros(CLASSES, np.int64),
        seen=np.zeros(LANES * CLASSES, np.int64),
    )


@jit
def forget_all(table: PageTable) -> None:
    table.tried[:] = 0
    table.after[:] = UNKNOWN
    table.latency[:] = -1
    table.seen[:] = 0


@shared
def run_access(m: Machine, env: Env, budget: int) -> bool:
    """The access in the row of actor 0, alone, until it is over. False: more than `budget` events."""
    begin_access(m, env, LONE)
    return finish_access(m, env, LONE, budget)


@jit
def reset_lab(lab: Machine, m: Machine, env: Env) -> None:
    """A one-region machine with actor 0 about to access its page 0. The latencies of the last one are taken out already."""
    for i in range(len(lab.vm)):
        lab.vm[i] = m.vm[i]
    lab.vm[Vm.SHIFT] = 0
    lab.vm[Vm.PAGES] = PMD_PAGES
    lab.vm[Vm.HOST_ORDER] = PMD_ORDER
    lab.vm[Vm.EVENTS] = 0
    lab.vm[Vm.ACTORS] = 1
    lab.vm[Vm.FAULT_MAX_NS] = 0
    lab.vm[Vm.MEMORY_FREE] = 0
    lab.counters[:] = 0
    lab.gauges[:] = 0
    lab.cpu[:] = 0
    lab.cpu[0, Cpu.KIND] = env.stream[Stream.ACTOR]
    lab.cpu[0, Cpu.EXEC] = env.stream[Stream.ACTOR] == Actor.GUEST and env.stream[Stream.ACCESS] == Access.EXEC
    lab.cpu[0, Cpu.LIMIT] = 1
    lab.cpu[0, Cpu.WAIT_PAGE] = -1


@jit
def take_latencies(lab: Machine, table: PageTable, k: int) -> bool:
    """Move the lab's latencies into the class and out of the lab; False: there are more than it can keep."""
    exits = lab.counters[Counter.PF_FIXED] + lab.counters[Counter.PF_SPURIOUS] + lab.counters[Counter.PF_RETRY]
    found, bucket = np.int64(0), np.int64(0)
    while found < exits and bucket < HIST_BUCKETS:
        if lab.hist[bucket] == 0:
            bucket += 1
            continue
        lab.hist[bucket] -= 1
        if found < EXITS_OF_CLASS:
            table.latency[k, found] = bucket
        found += 1
    return exits <= EXITS_OF_CLASS


@jit
def possible_state(host: int, leaf: int) -> bool:
    """No SPTE without a host entry, no writable SPTE over a read-only one."""
    if host == HostPte.NONE or host == HostPte.CACHED:
        return leaf == Spte.N
    writable = host == HostPte.ANON_RW or host == HostPte.ANON_TRW or host == HostPte.SHM_RW
    return writable or leaf <= Spte.RO


@jit
def is_local(m: Machine, env: Env, host: int, leaf: int, write: int) -> bool:
    """What the access does concerns this page alone, and does not depend on what was before."""
    if host == HostPte.CACHED or (host == HostPte.NONE and m.vm[Vm.CACHED] and not write):
        return False  # fault-around
    copies = write or env.policy[Behaviour.ALWAYS_WRITABLE]
    if (host == HostPte.KSM_RO or host == HostPte.ANON_TSH) and copies:
        return False  # the last sharer frees the KSM pages; the last part of a THP is not copied
    return not (m.vm[Vm.LOGGING] and env.setup[Setup.PML] and (leaf == Spte.RW_CLEAN or leaf == Spte.N or write))


@jit
def fills_pages(env: Env) -> bool:
    """A region without a page table gets one, and the page what it would get below a page table."""
    same_read = env.actions[HostPmd.NONE, HostPte.NONE, 0] == env.actions[HostPmd.TBL, HostPte.NONE, 0]
    return same_read and env.actions[HostPmd.NONE, HostPte.NONE, 1] == env.actions[HostPmd.TBL, HostPte.NONE, 1]


@jit
def lab_was_local(lab: Machine, m: Machine, env: Env, k: int) -> bool:
    """What the lab did to its region and its neighbours is what any other region would see."""
    if k >= LEAF:
        return lab.counters[Counter.HITS] == 1
    small = lab.host_pmd[0] == HostPmd.TBL
    if (small or k < FRESH) and env.setup[Setup.MMU] != Mmu.TDP and lab.counters[Counter.GUP_FAST] + lab.counters[Counter.GUP_SLOW] > 0:
        return False  # prefetch looks at the neighbours
    if k < FRESH:
        return True
    if small:
        return fills_pages(env) and (lab.spte_pmd[0] == SptePmd.T or lab.spte_pmd[0] == SptePmd.N)
    aligned = m.vm[Vm.SHIFT] % PMD_PAGES == 0
    whole = lab.pte[0] == 0 and lab.spte_pmd[0] < SptePmd.T and lab.cpu[0, Cpu.KIND] == Actor.GUEST
    return aligned and whole and env.setup[Setup.THP_FAILURE_CUT] == 0


@shared
def learn(lab: Machine, m: Machine, env: Env, table: PageTable, k: int) -> bool:
    """Find out what the class does. False: it has to be done by the phases."""
    if table.tried[k]:
        return table.after[k] != UNKNOWN
    table.tried[k] = 1
    state, write = (k >> 1, k & 1) if k < FRESH else (np.int64(0), k & 1)
    leaf = state >> SPTE_SHIFT
    if k < LEAF and not (possible_state(state & HOST_MASK, leaf) and is_local(m, env, state & HOST_MASK, leaf, write)):
        return False
    reset_lab(lab, m, env)
    lab.host_pmd[0] = HostPmd.TBL if k < FRESH else HostPmd.NONE if k < LEAF else HostPmd.THP_RW
    lab.spte_pmd[0] = SptePmd.T if k < FRESH else SptePmd.N if k < LEAF else SptePmd.RW
    lab.pte[0] = state
    lab.cpu[0, Cpu.WRITE] = write
    over = run_access(lab, env, LAB_EVENTS)
    if not (take_latencies(lab, table, k) and over and lab_was_local(lab, m, env, k)):
        return False
    table.after[k] = lab.pte[0]
    table.host_pmd[k], table.spte_pmd[k] = lab.host_pmd[0], lab.spte_pmd[0]
    for i in range(len(lab.counters)):
        table.counters[k, i] = lab.counters[i]
    for i in range(len(lab.gauges)):
        table.gauges[k, i] = lab.gauges[i]
    table.ns[k] = lab.cpu[0, Cpu.TIME]
    for i in FOLDED:
        table.vm[k, i] = lab.vm[i] - m.vm[i]
    table.slowest[k] = lab.vm[Vm.FAULT_MAX_NS]
    return True


@jit
def fold(m: Machine, table: PageTable) -> None:
    """Add what the classes did, as often as each was seen."""
    for k in range(CLASSES):
        n = np.int64(0)
        for lane in range(LANES):
            n += table.seen[lane * CLASSES + k]
        if n == 0:
            continue
        for i in range(len(m.counters)):
            m.counters[i] += n * table.counters[k, i]
        for i in range(len(m.gauges)):
            m.gauges[i] += n * table.gauges[k, i]
        for i in FOLDED:
            m.vm[i] += n * table.vm[k, i]
        m.cpu[0, Cpu.TIME] += n * table.ns[k]
        m.vm[Vm.FAULT_MAX_NS] = max(m.vm[Vm.FAULT_MAX_NS], table.slowest[k])
        for i in range(EXITS_OF_CLASS):
            if table.latency[k, i] >= 0:
                m.hist[table.latency[k, i]] += n
    m.vm[Vm.DIRTY] = min(m.vm[Vm.DIRTY], 1)
    m.vm[Vm.ANON_VMA] = min(m.vm[Vm.ANON_VMA], 1)
