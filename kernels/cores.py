"""Fewer CPUs than vCPUs: time slices, a queue of those that wait, and what sleeping and waking do. docs/model.md section 12."""

import numpy as np

from kernels.contention import ANY_SIBLING
from kernels.cost import Cost
from kernels.draws import SALT_ACTOR, actor_key, draw
from kernels.jit import jit, shared
from kernels.schedule import plan_event, takes_turns
from kernels.spec import NEVER, Actor, Counter, Cpu, OnCpu, Phase, Setup, Stream, Vm
from kernels.state import Env, Machine, in_guest

SHORTEST_SLICE_NS = np.int64(1000)


@jit
def slice_ns(env: Env) -> int:
    return max(SHORTEST_SLICE_NS, env.costs[Cost.TIME_SLICE_NS])


@jit
def first_slice(env: Env, actor: int) -> int:
    """When an actor's first slice ends: anywhere in a slice, since the clocks of CPUs do not tick together."""
    bits = draw(actor_key(env.stream[Stream.KEY], actor), SALT_ACTOR, np.int64(0))
    return 1 + np.int64(bits >> np.uint64(1)) % slice_ns(env)


@jit
def list_workers(m: Machine) -> int:
    """Those who have something to do, in order, where the run queue will be; returns how many they are."""
    workers = np.int64(0)
    for actor in range(m.vm[Vm.ACTORS]):
        if m.cpu[actor, Cpu.PHASE] != Phase.DONE:
            m.run_queue[workers] = actor
            workers += 1
    return workers


@jit
def start_cores(m: Machine, env: Env) -> None:
    """Give CPUs to those of the step's actors who have something to do."""
    vm = m.vm
    workers = list_workers(m)
    cores = env.setup[Setup.CORES]
    vm[Vm.WORKERS] = vm[Vm.CPUS] = workers
    vm[Vm.SLICED] = 0
    if env.stream[Stream.ACTOR] != Actor.GUEST or cores == 0:
        return
    cpus = cores * env.setup[Setup.SMT]
    if workers > cpus:
        vm[Vm.CPUS] = cpus
        start_turns(m, env, workers, cpus)
        return
    for k in range(cores, workers):  # a vCPU on each core, then the second ones
        one, other = m.run_queue[k - cores], m.run_queue[k]
        m.cpu[one, Cpu.SIBLING], m.cpu[other, Cpu.SIBLING] = other + 1, one + 1


@shared
def start_turns(m: Machine, env: Env, workers: int, cpus: int) -> None:
    """The first vCPUs get CPUs, the others wait in the order of their numbers."""
    vm = m.vm
    vm[Vm.SLICED] = 1
    vm[Vm.ENDLESS] = 0
    vm[Vm.FREE_CPUS] = 0
    vm[Vm.RUN_HEAD] = vm[Vm.RUN_TAIL] = cpus
    for k in range(workers):
        actor = m.run_queue[k]
        m.cpu[actor, Cpu.SIBLING] = ANY_SIBLING if env.setup[Setup.SMT] > 1 else 0
        if k < cpus:
            m.cpu[actor, Cpu.SLICE_END] = first_slice(env, actor)
        else:
            enqueue(m, actor, np.int64(0), np.int64(0))


@shared
def enqueue(m: Machine, actor: int, now: int, rest: int) -> None:
    """The actor waits for a CPU, with so much of its work left."""
    vm = m.vm
    c = m.cpu[actor]
    c[Cpu.ON_CPU] = OnCpu.QUEUED
    c[Cpu.OFF_TIME] = now
    c[Cpu.REST] = rest
    c[Cpu.TIME] = NEVER
    c[Cpu.GUEST_FROM] = max(0, c[Cpu.GUEST_FROM] - now)
    m.run_queue[vm[Vm.RUN_TAIL]] = actor
    vm[Vm.RUN_TAIL] = (vm[Vm.RUN_TAIL] + 1) % len(m.run_queue)
    if vm[Vm.ENDLESS]:
        end_slices(m, now)


@shared
def end_slices(m: Machine, now: int) -> None:
    """Somebody waits: slices that had run out end now."""
    m.vm[Vm.ENDLESS] = 0
    for other in range(m.vm[Vm.ACTORS]):
        if m.cpu[other, Cpu.SLICE_END] == NEVER:
            m.cpu[other, Cpu.SLICE_END] = now
            plan_event(m, other)


@shared
def free_cpu(m: Machine, env: Env, now: int) -> None:
    """A CPU has nobody: the head of the queue goes on there."""
    vm = m.vm
    if vm[Vm.RUN_HEAD] == vm[Vm.RUN_TAIL]:
        vm[Vm.FREE_CPUS] += 1
        return
    actor = m.run_queue[vm[Vm.RUN_HEAD]]
    vm[Vm.RUN_HEAD] = (vm[Vm.RUN_HEAD] + 1) % len(m.run_queue)
    c = m.cpu[actor]
    m.counters[Counter.CORE_WAIT_NS] += now - c[Cpu.OFF_TIME]
    begin = now + env.costs[Cost.CONTEXT_SWITCH_NS]
    c[Cpu.ON_CPU] = OnCpu.RUNS
    c[Cpu.TIME] = begin + c[Cpu.REST]
    c[Cpu.GUEST_FROM] += begin
    c[Cpu.SLICE_END] = begin + slice_ns(env)
    plan_event(m, actor)


@shared
def end_slice(m: Machine, env: Env, actor: int) -> None:
    """The actor leaves its CPU to the next in the queue, if there is one."""
    vm = m.vm
    c = m.cpu[actor]
    now = c[Cpu.SLICE_END]
    if vm[Vm.RUN_HEAD] == vm[Vm.RUN_TAIL]:
        c[Cpu.SLICE_END] = NEVER
        vm[Vm.ENDLESS] = 1
        return
    if in_guest(m, actor, now):
        m.counters[Counter.EXITS] += 1
        c[Cpu.PML] = 0
    enqueue(m, actor, now, c[Cpu.TIME] - now)
    free_cpu(m, env, now)


@jit
def leave_event(m: Machine, env: Env, actor: int, now: int) -> None:
    """After an event at `now`: a slice that ran out meanwhile ends with it; who is done leaves its CPU."""
    if not takes_turns(m, actor):
        return
    c = m.cpu[actor]
    c[Cpu.SLICE_END] = max(c[Cpu.SLICE_END], now)
    if c[Cpu.PHASE] == Phase.DONE:
        c[Cpu.SLICE_END] = 0
        free_cpu(m, env, now)


@shared
def sleep(m: Machine, env: Env, actor: int) -> None:
    """The actor sleeps from its time on, until wake_up()."""
    c = m.cpu[actor]
    now = c[Cpu.TIME]
    c[Cpu.TIME] = NEVER
    c[Cpu.ON_CPU] = OnCpu.SLEEPS
    if takes_turns(m, actor):
        c[Cpu.SLICE_END] = 0
        free_cpu(m, env, now)


@shared
def wake_up(m: Machine, env: Env, actor: int, now: int, ready: int) -> None:
    """The actor may go on from `ready` on; on a CPU that is free, or as soon as it gets one."""
    c = m.cpu[actor]
    if not takes_turns(m, actor):
        c[Cpu.ON_CPU] = OnCpu.RUNS
        c[Cpu.TIME] = ready
    elif m.vm[Vm.FREE_CPUS] > 0:
        m.vm[Vm.FREE_CPUS] -= 1
        c[Cpu.ON_CPU] = OnCpu.RUNS
        c[Cpu.TIME] = ready
        c[Cpu.SLICE_END] = now + slice_ns(env)
    else:
        enqueue(m, actor, now, ready - now)
    plan_event(m, actor)
