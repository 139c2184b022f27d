"""Running one step: the event loop for any number of actors, which follows every phase (alone.py: the fast loop for one)."""

import numpy as np

from kernels.calls import make_call
from kernels.contention import settle
from kernels.cores import end_slice, leave_event, start_cores
from kernels.daemons import run_daemon_phase, start_daemons, stop_daemons
from kernels.fault import FIRST, half_exit, step_phase
from kernels.jit import entry, jit, shared
from kernels.schedule import ends_slice, next_actor, next_other, plan_all, plan_event
from kernels.spec import (
    NEVER,
    PMD_ORDER,
    PMD_PAGES,
    Actor,
    Cpu,
    Phase,
    Setup,
    Spte,
    SptePmd,
    Stream,
    Vm,
)
from kernels.state import Env, Machine, record_event, spte
from kernels.workload import start_actor

UNKNOWN = np.int64(-1)
# How a step ended. SPLIT: a huge page was, so that pages read before fault again.
OVER, NO_END, SPLIT, TOO_LATE = np.int64(0), np.int64(-1), np.int64(-2), np.int64(-3)
CONTENDED = tuple(int(i) for i in Vm if Vm.DELAY <= i <= Vm.TRAFFIC_NS)  # begins afresh with each step


@jit
def run_events(m: Machine, env: Env, budget: int) -> int:
    """In the order of schedule.py, until the step's own actors are done and no daemon is in the middle of something.

    OVER, NO_END: more than `budget` events, or TOO_LATE: nobody goes on before NEVER."""
    ahead = looks_ahead(m, env)
    running = m.vm[Vm.WORKERS]
    while True:
        actor = next_actor(m) if running else next_daemon(m)
        if actor < 0:
            return TOO_LATE if running else OVER
        if actor >= m.vm[Vm.ACTORS]:
            m.vm[Vm.EVENTS] += 1
            run_daemon_event(m, env, actor)
        else:
            run_actor(m, env, actor, budget, ahead)
            running -= m.cpu[actor, Cpu.PHASE] == Phase.DONE
        if m.vm[Vm.EVENTS] > budget:
            return NO_END
        plan_event(m, actor)


@jit
def looks_ahead(m: Machine, env: Env) -> bool:
    """A vCPU's accesses before its next exit change nothing for others, and can be taken out of turn: see horizon_of()."""
    plain = not m.vm[Vm.SLICED] and not m.vm[Vm.DAEMONS] and not len(m.trace)
    return plain and env.stream[Stream.ACTOR] == Actor.GUEST and not (m.vm[Vm.LOGGING] and env.setup[Setup.PML])


@jit
def horizon_of(m: Machine, env: Env, actor: int) -> int:
    """Until then nobody can change what the vCPU's accesses find: before the next event in flight, and before the first thing
    that another vCPU does after its next access, should that exit."""
    first_half = 0 if m.cpu[actor, Cpu.SIBLING] else half_exit(env, FIRST)  # a sibling that is done speeds the other up
    return min(m.flight[1], next_other(m.touch, actor) + first_half)


@jit
def run_actor(m: Machine, env: Env, actor: int, budget: int, ahead: bool) -> None:
    """The actor's next event; with `ahead` its accesses behind it too, up to their horizon and one event more than `budget`."""
    c = m.cpu[actor]
    horizon = UNKNOWN
    while True:
        m.vm[Vm.EVENTS] += 1
        run_event(m, env, actor)
        if not ahead or c[Cpu.PHASE] != Phase.TOUCH or m.vm[Vm.EVENTS] > budget:
            return
        if horizon == UNKNOWN:
            horizon = horizon_of(m, env, actor)
        if c[Cpu.TIME] >= horizon:
            return


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


@shared
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


@shared
def run_many(m: Machine, env: Env, budget: int) -> int:
    """One step with all its actors, and the daemons if there are any. Returns its ns, or why there is none: NO_END, TOO_LATE."""
    start_step(m, env)
    start_daemons(m, env)
    plan_all(m, m.vm[Vm.ACTORS] + m.vm[Vm.DAEMONS])
    ended = run_events(m, env, budget)
    if ended != OVER:
        return ended
    stop_daemons(m)
    return step_ns(m)


@shared
def run_call(m: Machine, env: Env) -> int:
    """One step that is a system call of the VMM. Returns its ns."""
    start_step(m, env)
    m.vm[Vm.ACTORS] = 0  # nobody runs beside it: no flush has a target
    return make_call(m, env)


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
