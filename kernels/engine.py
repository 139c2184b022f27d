"""Running one step: the event loop for many actors, and the table-driven loop for one.

Both give the same counters, state, times and latencies. The event loop follows every phase. The lone actor's loop
looks each access of a 4K-mapped page up in a table that was made by running the event loop's own phases once for
every state of a page (`learn_page_table`); what is not in the table (first touch of a region, huge mappings) goes
through those phases as well.
"""

from typing import NamedTuple

import numpy as np

from kernels.calls import make_call
from kernels.contention import close_stream, settle, slowed
from kernels.cores import end_slice, leave_event, start_cores
from kernels.daemons import run_daemon_phase, start_daemons, stop_daemons
from kernels.fault import FIRST, begin_access, half_exit, step_phase
from kernels.jit import entry, jit
from kernels.policy import Behaviour
from kernels.schedule import ends_slice, next_actor, next_other, plan_all, plan_event
from kernels.spec import (
    HOST_MASK,
    NEVER,
    PMD_ORDER,
    PMD_PAGES,
    SPTE_SHIFT,
    Actor,
    Counter,
    Cpu,
    Gauge,
    HostPmd,
    HostPte,
    Mmu,
    Phase,
    Setup,
    Spte,
    SptePmd,
    Stream,
    Vm,
)
from kernels.state import Bytes, Env, Int64s, Machine, guest_region, host_state, record_event, spte
from kernels.workload import fetch_access, start_actor

SPTES = len(Spte)
STATES = ((SPTES - 1) << SPTE_SHIFT) + HOST_MASK + 1  # values of a page's byte
CLASSES = 2 * STATES  # state * 2 + write
EXITS_OF_CLASS = 4  # latencies kept per class
LONE = np.int64(0)  # the only actor; typed, so that callees are not compiled again for a literal
LAB_EVENTS = np.int64(64)
FOLDED = (int(Vm.SEQ), int(Vm.CHILD_BYTES), int(Vm.DIRTY), int(Vm.ANON_VMA))  # what an access of one page may change in Machine.vm


CONTENDED = tuple(int(i) for i in Vm if Vm.DELAY <= i <= Vm.TRAFFIC_NS)  # begins afresh with each step


class PageTable(NamedTuple):
    """What one access does to a 4K-mapped page that one actor has for itself, by class (state * 2 + write)."""

    known: Bytes  # (CLASSES,) 1: the rest is valid
    after: Bytes  # (CLASSES,) the page's byte afterwards
    counters: Int64s  # (CLASSES, len(Counter))
    gauges: Int64s  # (CLASSES, len(Gauge))
    vm: Int64s  # (CLASSES, len(Vm)) what is added to Machine.vm
    ns: Int64s  # (CLASSES,)
    latency: Int64s  # (CLASSES, EXITS_OF_CLASS) buckets, -1 for none
    slowest: Int64s  # (CLASSES,)
    seen: Int64s  # (CLASSES,) how often it happened


def new_page_table() -> PageTable:
    return PageTable(
        known=np.zeros(CLASSES, np.uint8),
        after=np.zeros(CLASSES, np.uint8),
        counters=np.zeros((CLASSES, len(Counter)), np.int64),
        gauges=np.zeros((CLASSES, len(Gauge)), np.int64),
        vm=np.zeros((CLASSES, len(Vm)), np.int64),
        ns=np.zeros(CLASSES, np.int64),
        latency=np.zeros((CLASSES, EXITS_OF_CLASS), np.int64),
        slowest=np.zeros(CLASSES, np.int64),
        seen=np.zeros(CLASSES, np.int64),
    )


@jit
def run_events(m: Machine, env: Env, budget: int) -> bool:
    """All actors of the step, in the order of schedule.py. False: more than `budget` events."""
    ahead = looks_ahead(m, env)
    while True:
        actor = next_actor(m)
        if actor < 0:
            return True
        m.vm[Vm.EVENTS] += 1
        if m.vm[Vm.EVENTS] > budget:
            return False
        run_event(m, env, actor)
        if ahead:
            run_ahead(m, env, actor, budget)
        plan_event(m, actor)


@jit
def looks_ahead(m: Machine, env: Env) -> bool:
    """A vCPU's accesses before its next exit change nothing for others, and can be taken out of turn: see run_ahead()."""
    plain = not m.vm[Vm.SLICED] and not len(m.trace)
    return plain and env.stream[Stream.ACTOR] == Actor.GUEST and not (m.vm[Vm.LOGGING] and env.setup[Setup.PML])


@jit
def run_ahead(m: Machine, env: Env, actor: int, budget: int) -> None:
    """Go on with the vCPU's accesses as long as nobody can change what they find: before the next event in flight, and
    before the first thing that another vCPU does after its next access, should that exit."""
    c = m.cpu[actor]
    if c[Cpu.PHASE] != Phase.TOUCH:
        return
    first_half = half_exit(env, FIRST)
    first_half = min(first_half, slowed(env, first_half))  # of whichever vCPU
    horizon = min(m.flight[1], next_other(m.touch, actor) + first_half)
    while c[Cpu.PHASE] == Phase.TOUCH and c[Cpu.TIME] < horizon and m.vm[Vm.EVENTS] < budget:
        m.vm[Vm.EVENTS] += 1
        run_event(m, env, actor)


@jit
def run_event(m: Machine, env: Env, actor: int) -> None:
    """One event of the actor; traced as it begins, but for a fresh access, which is known only once it was fetched."""
    if ends_slice(m, actor):
        end_slice(m, env, actor)
        return
    now = m.cpu[actor, Cpu.TIME]
    going = True
    while going:
        time = m.cpu[actor, Cpu.TIME]
        phase = m.cpu[actor, Cpu.PHASE]
        fresh = phase == Phase.TOUCH and not m.cpu[actor, Cpu.AGAIN]
        if not fresh:
            record_event(m, actor, time, phase)
        going = step_phase(m, env, actor)
        if fresh:
            record_event(m, actor, time, Phase.DONE if m.cpu[actor, Cpu.PHASE] == Phase.DONE else phase)
    leave_event(m, env, actor, now)


@jit
def run_daemon_event(m: Machine, env: Env, actor: int) -> None:
    going = True
    while going:
        record_event(m, actor, m.cpu[actor, Cpu.TIME], m.cpu[actor, Cpu.PHASE])
        close_stream(m, actor)
        begin = m.cpu[actor, Cpu.TIME]
        going = run_daemon_phase(m, env, actor)
        going = settle(m, env, actor, begin) and going


@jit
def next_daemon(m: Machine) -> int:
    """The daemon whose event comes first, as long as one is in the middle of an operation; else -1."""
    found, busy = np.int64(-1), False
    for actor in range(m.vm[Vm.ACTORS], m.vm[Vm.ACTORS] + m.vm[Vm.DAEMONS]):
        busy |= m.cpu[actor, Cpu.PHASE] != Phase.SCAN
        if m.cpu[actor, Cpu.TIME] < NEVER and (found < 0 or m.cpu[actor, Cpu.TIME] < m.cpu[found, Cpu.TIME]):
            found = np.int64(actor)
    return found if busy else np.int64(-1)


@jit
def run_events_beside_daemons(m: Machine, env: Env, budget: int) -> bool:
    """As run_events(), until the step's own actors are done and no daemon is in the middle of something."""
    running = m.vm[Vm.ACTORS]
    while True:
        actor = next_actor(m) if running else next_daemon(m)
        if actor < 0:
            return True
        m.vm[Vm.EVENTS] += 1
        if m.vm[Vm.EVENTS] > budget:
            return False
        if actor >= m.vm[Vm.ACTORS]:
            run_daemon_event(m, env, actor)
        else:
            run_event(m, env, actor)
            running -= m.cpu[actor, Cpu.PHASE] == Phase.DONE
        plan_event(m, actor)


@jit
def start_step(m: Machine, env: Env) -> None:
    m.counters[:] = 0
    m.hist[:] = 0
    m.vm[Vm.FAULT_MAX_NS] = 0
    m.vm[Vm.EVENTS] = 0
    m.vm[Vm.ACTORS] = env.stream[Stream.ACTORS]
    m.vm[Vm.DAEMONS] = 0
    m.pmd_lock[:] = 0
    for i in CONTENDED:
        m.vm[i] = 0
    for actor in range(m.vm[Vm.ACTORS]):
        start_actor(m, env, actor)
    start_cores(m, env)


@jit
def step_ns(m: Machine) -> int:
    """Time from the step's start to the end of its last actor."""
    last = 0
    for actor in range(m.vm[Vm.ACTORS]):
        last = max(last, m.cpu[actor, Cpu.TIME])
    return last


@entry
def run_many(m: Machine, env: Env, budget: int) -> int:
    """One step with all its actors. Returns its ns, or -1 when the budget of events ran out."""
    start_step(m, env)
    plan_all(m, m.vm[Vm.ACTORS])
    if not run_events(m, env, budget):
        return -1
    return step_ns(m)


@entry
def run_beside_daemons(m: Machine, env: Env, budget: int) -> int:
    """One step with all its actors and the daemons. Returns its ns, or -1 when the budget of events ran out."""
    start_step(m, env)
    start_daemons(m, env)
    plan_all(m, m.vm[Vm.ACTORS] + m.vm[Vm.DAEMONS])
    if not run_events_beside_daemons(m, env, budget):
        return -1
    stop_daemons(m)
    return step_ns(m)


@entry
def run_call(m: Machine, env: Env) -> int:
    """One step that is a system call of the VMM. Returns its ns."""
    start_step(m, env)
    m.vm[Vm.ACTORS] = 0  # nobody runs beside it: no flush has a target
    return make_call(m, env)


@jit
def finish_access(m: Machine, env: Env, budget: int) -> bool:
    """Phases of actor 0, alone, until its access is over. False: more than `budget` events."""
    while m.cpu[0, Cpu.PHASE] != Phase.TOUCH or m.cpu[0, Cpu.AGAIN]:
        m.vm[Vm.EVENTS] += 1
        if m.vm[Vm.EVENTS] > budget:
            return False
        step_phase(m, env, LONE)
    return True


@jit
def reset_lab(lab: Machine, m: Machine, kind: int, state: int, write: int) -> None:
    """A one-region machine whose page 0 is in that state, with actor 0 about to access it."""
    lab.host_pmd[0] = HostPmd.TBL
    lab.spte_pmd[0] = SptePmd.T
    lab.pte[0] = state
    for i in range(len(lab.vm)):
        lab.vm[i] = m.vm[i]
    lab.vm[Vm.SHIFT] = 0
    lab.vm[Vm.PAGES] = PMD_PAGES
    lab.vm[Vm.HOST_ORDER] = PMD_ORDER
    lab.vm[Vm.EVENTS] = 0
    lab.vm[Vm.ACTORS] = 1
    lab.counters[:] = 0
    lab.gauges[:] = 0
    lab.hist[:] = 0
    lab.cpu[0, :] = 0
    lab.cpu[0, Cpu.KIND] = kind
    lab.cpu[0, Cpu.WRITE] = write
    lab.cpu[0, Cpu.LIMIT] = 1
    lab.cpu[0, Cpu.WAIT_PAGE] = -1


@jit
def learn_class(lab: Machine, m: Machine, env: Env, table: PageTable, state: int, write: int) -> None:
    k = state * 2 + write
    reset_lab(lab, m, env.stream[Stream.ACTOR], state, write)
    begin_access(lab, env, LONE)
    if not finish_access(lab, env, LAB_EVENTS):
        return
    if env.setup[Setup.MMU] != Mmu.TDP and lab.counters[Counter.GUP_FAST] + lab.counters[Counter.GUP_SLOW] > 0:
        return  # prefetch looks at the neighbours
    table.known[k] = 1
    table.after[k] = lab.pte[0]
    for i in range(len(lab.counters)):
        table.counters[k, i] = lab.counters[i]
    for i in range(len(lab.gauges)):
        table.gauges[k, i] = lab.gauges[i]
    table.ns[k] = lab.cpu[0, Cpu.TIME]
    for i in FOLDED:
        table.vm[k, i] = lab.vm[i] - m.vm[i]
    table.slowest[k] = lab.vm[Vm.FAULT_MAX_NS]
    found = 0
    for bucket in range(len(lab.hist)):
        for _ in range(lab.hist[bucket]):
            table.latency[k, found] = bucket
            found += 1


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
def learn_page_table(lab: Machine, m: Machine, env: Env, table: PageTable) -> None:
    """Run every state a page can be in between accesses, for reading and writing."""
    table.known[:] = 0
    table.seen[:] = 0
    table.latency[:] = -1
    for host in range(HostPte.SHM_BUSY):
        for leaf in range(SPTES):
            for write in range(2):
                if possible_state(host, leaf) and is_local(m, env, host, leaf, write):
                    learn_class(lab, m, env, table, host | (leaf << SPTE_SHIFT), write)


@jit
def fold(m: Machine, table: PageTable) -> None:
    """Add what the table's classes did, as often as each was seen."""
    for k in range(CLASSES):
        n = table.seen[k]
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


@entry
def run_alone(m: Machine, env: Env, budget: int, lab: Machine, table: PageTable) -> int:
    """One step with a single actor. Returns its ns, or -1 when the budget of events ran out."""
    start_step(m, env)
    kind = env.stream[Stream.ACTOR]
    cursor = kind != Actor.GUEST
    pagewise = kind == Actor.GUEST or kind == Actor.VMM or kind == Actor.PREFAULT
    if pagewise:
        learn_page_table(lab, m, env, table)
    while fetch_access(m, env, LONE):
        page = m.cpu[0, Cpu.PAGE]
        tables = pagewise and host_state(m, page) == HostPmd.TBL
        pmd = np.int64(m.spte_pmd[guest_region(m, page)]) if tables else np.int64(SptePmd.N)
        if tables and (pmd == SptePmd.T or (kind == Actor.VMM and pmd == SptePmd.N)):
            k = np.int64(m.pte[page]) * 2 + m.cpu[0, Cpu.WRITE]
            if table.known[k]:
                table.seen[k] += 1
                m.pte[page] = table.after[k]
                m.cpu[0, Cpu.INDEX] += cursor
                continue
        begin_access(m, env, LONE)
        if not finish_access(m, env, budget):
            return -1
    m.cpu[0, Cpu.PHASE] = Phase.DONE
    if pagewise:
        fold(m, table)
    return m.cpu[0, Cpu.TIME]


@entry
def mapped_pages(m: Machine) -> tuple[int, int, int]:
    """(4K leaves, 2M leaves, 1G leaves) counted in the tables: what the gauges must say."""
    small, large, gigantic = 0, 0, 0
    for pud in m.spte_pud:
        gigantic += SptePmd.N < pud < SptePmd.T
    for region in range(len(m.spte_pmd)):
        pmd = m.spte_pmd[region]
        large += SptePmd.N < pmd < SptePmd.T
        if pmd >= SptePmd.T:
            first = m.vm[Vm.SHIFT] + (region << PMD_ORDER)
            for page in range(first, min(first + PMD_PAGES, m.vm[Vm.SHIFT] + m.vm[Vm.PAGES])):
                small += spte(m, page) != Spte.N
    return small, large, gigantic
