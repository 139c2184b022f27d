"""The public call: one machine, some steps, the counters.

>>> from kernels import Touch, Access, simulate
>>> run = simulate(kernel="6.5", backing="anonymous_thp", memory=2 << 20, steps=[Touch(access=Access.READ), Touch()])
>>> run.counters["pf_taken"], run.counters["pf_retry"], run.gauges["rss_bytes"]
(1025, 512, 2097152)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from kernels.checks import MOST_EVENTS, PointError, check_counts, check_point, check_steps
from kernels.cost import DEFAULT_COSTS, Cost, check_smt, cost_row
from kernels.draws import cut, step_key
from kernels.engine import SPLIT, TOO_LATE
from kernels.loops import Loop, run_loop
from kernels.policy import Behaviour, behaviours, policy_row
from kernels.primary_mmu import Traits, action_table, traits_of
from kernels.spec import (
    NEVER,
    PMD_BYTES,
    PMD_ORDER,
    PMD_PAGES,
    PUD_ORDER,
    PUD_PAGES,
    Actor,
    Backing,
    Counter,
    Gauge,
    Mmu,
    Order,
    Prealloc,
    Setup,
    Stream,
    ThpEnabled,
    Vm,
)
from kernels.state import Env, Geometry, Int64s, Machine, bucket_top, geometry_of, new_machine
from kernels.steps import Khugepaged, Ksm, Populate, PreFault, Step, Touch, TouchList, op_of
from kernels.workload import Accesses, accesses_of, fraction_cut, stream_of

COUNTERS = tuple(counter.name.lower() for counter in Counter)
GAUGES = tuple(gauge.name.lower() for gauge in Gauge)
PERCENTILES: Mapping[str, tuple[int, int]] = {
    "fault_p50_ns": (50, 100),
    "fault_p90_ns": (90, 100),
    "fault_p99_ns": (99, 100),
    "fault_p999_ns": (999, 1000),
}
NS_PER_MS = 1_000_000
DAEMONS = 2  # khugepaged and ksmd
EVENTS_PER_ACCESS = 4096  # a step that needs more has run into a storm that does not end
FAULTS_PER_PAGE = 4  # a read, a write, each after a loss of the page
NEVER_YEARS = NEVER // (365 * 86_400 * 10**9)
E = TypeVar("E", Backing, ThpEnabled, Prealloc, Mmu)


class BudgetError(RuntimeError):
    """A step needed more events than its budget: the machine makes no progress."""


@dataclass(frozen=True)
class StepResult:
    """Counters of one step (names of spec.Counter, lower case), the state after it (spec.Gauge), its time."""

    op: str
    guest: bool
    ns: int
    counters: dict[str, int]
    gauges: dict[str, int]
    hist: Int64s = field(repr=False)
    fault_max_ns: int = 0


@dataclass(frozen=True)
class Run:
    """What `simulate()` returns: totals, the steps they are made of, and the machine as it was left."""

    steps: tuple[StepResult, ...]
    counters: dict[str, int]
    gauges: dict[str, int]
    guest_ns: int
    total_ns: int
    latency: dict[str, int]
    trace: Int64s = field(repr=False)  # (events, len(Trace))
    machine: Machine = field(repr=False)


def member(kind: type[E], value: Any, name: str) -> E:
    """The enum member of a name like 'anonymous_thp' (or the member itself). Raises PointError."""
    if isinstance(value, kind):
        return value
    try:
        return kind[str(value).upper().replace("+", "_")]
    except KeyError:
        raise PointError(f"{name} = {value!r} is unknown; known: {', '.join(k.name.lower() for k in kind)}") from None


def all_steps(prealloc: Prealloc, prealloc_threads: int, steps: Sequence[Step]) -> list[tuple[Step, int]]:
    """What runs: the VMM's preallocation, then the workload, each with its number among the workload's steps."""
    before: list[tuple[Step, int]] = []
    if prealloc & Prealloc.POPULATE:
        before.append((Populate(threads=prealloc_threads), -1))
    if prealloc & Prealloc.PRE_FAULT:
        before.append((PreFault(), -1))
    return before + [(step, i) for i, step in enumerate(steps)]


def actors_of(steps: Sequence[tuple[Step, int]], vcpus: int) -> int:
    return max([vcpus] + [step.threads for step, _ in steps if isinstance(step, Populate)])


def loop_of(m: Machine, env: Env) -> Loop:
    """The lone actor's loop where there is one actor and nobody beside it or watching. Raises PointError."""
    beside = env.setup[Setup.KHUGEPAGED] or env.setup[Setup.KSM]
    if env.stream[Stream.SKIP_HITS] and (beside or len(m.trace)):
        raise PointError("skip_hits leaves no single touch to trace, or to run beside khugepaged or KSM: leave it out")
    if env.stream[Stream.ACTOR] == Actor.CALL:
        return Loop.CALL
    return Loop.MANY if beside or env.stream[Stream.ACTORS] > 1 or len(m.trace) else Loop.ALONE


def run_step(m: Machine, env: Env, budget: int) -> int:
    """One step; returns its ns. Raises PointError, BudgetError."""
    ns = run_loop(loop_of(m, env), m, env, budget)
    if ns == SPLIT:
        raise PointError("skip_hits: a huge page was split, and pages read before fault again: leave skip_hits out")
    if ns == TOO_LATE:
        raise PointError(f"virtual time would pass {NEVER} ns, {NEVER_YEARS} years: lower touches, think_ns or costs")
    if ns < 0:
        raise BudgetError(f"no end after {budget} events: raise max_events, or look at the retries of the last step")
    return ns


def _result(step: Step, m: Machine, ns: int) -> StepResult:
    return StepResult(
        op=op_of(step),
        guest=isinstance(step, Touch | TouchList),
        ns=ns,
        counters=dict(zip(COUNTERS, m.counters.tolist(), strict=True)),
        gauges=dict(zip(GAUGES, m.gauges.tolist(), strict=True)),
        hist=m.hist.copy(),
        fault_max_ns=int(m.vm[Vm.FAULT_MAX_NS]),
    )


def latency_of(hist: Int64s, fault_max_ns: int) -> dict[str, int]:
    """Percentiles of a histogram as the top of their bucket, never above the maximum; 0 without a fault."""
    if not fault_max_ns:  # without a fault, and where faults take no time
        return dict.fromkeys((*PERCENTILES, "fault_max_ns"), 0)
    cumulative = np.cumsum(hist)
    total = int(cumulative[-1])
    found = {}
    for name, (part, whole) in PERCENTILES.items():
        rank = -(-total * part // whole)
        bucket = int(np.searchsorted(cumulative, max(1, rank)))
        found[name] = min(fault_max_ns, bucket_top(bucket)) if total else 0
    return found | {"fault_max_ns": fault_max_ns}


def _run(results: list[StepResult], m: Machine) -> Run:
    hist = np.sum([r.hist for r in results], axis=0) if len(results) > 1 else results[0].hist if results else m.hist
    totals = [sum(values) for values in zip(*(r.counters.values() for r in results), strict=True)]
    return Run(
        steps=tuple(results),
        counters=dict(zip(COUNTERS, totals or [0] * len(COUNTERS), strict=True)),
        gauges=dict(zip(GAUGES, m.gauges.tolist(), strict=True)),
        guest_ns=sum(r.ns for r in results if r.guest),
        total_ns=sum(r.ns for r in results),
        latency=latency_of(hist, max((r.fault_max_ns for r in results), default=0)),
        trace=m.trace[: m.vm[Vm.TRACED]],
        machine=m,
    )


def _daemon_events(env: Env, made: Accesses) -> int:
    """About how many events the daemons need at most while a step runs."""
    ns = int(env.stream[Stream.IDLE_NS]) + accesses_of(made) * (int(env.stream[Stream.THINK_NS]) + 10 * int(env.costs.sum()))
    events = 0
    for pages, sleep in ((Setup.KHUGE_PAGES, Setup.KHUGE_SLEEP_NS), (Setup.KSM_PAGES, Setup.KSM_SLEEP_NS)):
        if env.setup[sleep]:
            events += (1 + ns // int(env.setup[sleep])) * 16 * (int(env.setup[pages]) + 1)
    return events


def _budget(env: Env, made: Accesses, max_events: int | None) -> int:
    if max_events is not None:
        return max_events
    return min(MOST_EVENTS, 65536 + EVENTS_PER_ACCESS * accesses_of(made) + _daemon_events(env, made))


def check_time(made: Accesses, costs: Mapping[Cost, int], pages: int, clock: int) -> None:
    """Refuse a step that may end after NEVER: each actor's own accesses, one after the other, and the faults of all. Raises PointError."""
    accesses, actors = accesses_of(made), max(1, int(made.stream[Stream.ACTORS]))
    own = accesses if made.stream[Stream.ORDER] == Order.LIST else -(-accesses // actors) + 1
    ns = own * (int(made.stream[Stream.THINK_NS]) + costs[Cost.TOUCH_NS]) + min(accesses, FAULTS_PER_PAGE * pages) * sum(costs.values())
    if clock + ns + int(made.stream[Stream.IDLE_NS]) >= NEVER:
        raise PointError(
            f"{accesses} accesses may take more than {NEVER} ns of virtual time, {NEVER_YEARS} years: lower touches, think_ns or costs"
        )


def max_order(geometry: Geometry) -> int:
    """Order of the largest leaf that the shift of host against guest addresses allows."""
    if geometry.shift % PMD_PAGES:
        return 0
    return PMD_ORDER if geometry.shift % PUD_PAGES else PUD_ORDER


def setup_row(
    traits: Traits,
    geometry: Geometry,
    mmu: Mmu,
    guest_page: int,
    flags: Mapping[Setup, bool],
    thp_failure: float,
    khugepaged: Khugepaged | None,
    ksm: Ksm | None,
) -> Int64s:
    """The vector that jitted code indexes with Setup; shape (len(Setup),)."""
    row = np.zeros(len(Setup), np.int64)
    shallow = mmu == Mmu.SHADOW and guest_page < PMD_BYTES
    row[Setup.MMU] = mmu
    row[Setup.RECOVER_ORDER] = max_order(geometry)
    row[Setup.MAX_ORDER] = 0 if shallow else min(max_order(geometry), PMD_ORDER if mmu == Mmu.SHADOW else PUD_ORDER)
    row[Setup.DIRECT] = not shallow
    for flag, value in flags.items():
        row[flag] = value
    row[Setup.HUGETLB], row[Setup.SHARED], row[Setup.FILE] = traits.hugetlb, traits.shared, traits.file
    row[Setup.THP_FAILURE_CUT] = cut(thp_failure)
    if khugepaged and traits.thp and traits.collapsible and not traits.file:
        row[Setup.KHUGEPAGED] = 1
        row[Setup.KHUGE_PAGES] = khugepaged.pages_to_scan
        row[Setup.KHUGE_SLEEP_NS] = khugepaged.scan_sleep_ms * NS_PER_MS
        row[Setup.KHUGE_MAX_NONE] = khugepaged.max_ptes_none
    if ksm and not (traits.hugetlb or traits.shared or traits.file):
        row[Setup.KSM] = 1
        row[Setup.KSM_PAGES] = ksm.pages_to_scan
        row[Setup.KSM_SLEEP_NS] = ksm.sleep_ms * NS_PER_MS
        row[Setup.KSM_CUT] = fraction_cut(ksm.fraction)
    return row


def simulate(
    *,
    steps: Sequence[Step],
    kernel: str = "6.12",
    policy: str = "mainline",
    mmu: Mmu | str = Mmu.TDP,
    backing: Backing | str = Backing.ANONYMOUS,
    memory: int = 1 << 30,
    vcpus: int = 1,
    thp_enabled: ThpEnabled | str = ThpEnabled.MADVISE,
    use_zero_page: bool = True,
    thp_failure: float = 0.0,
    offset: int = 0,
    guest_page: int = PMD_BYTES,
    nx_huge_pages: bool = False,
    eager_page_split: bool = True,
    pml: bool = False,
    khugepaged: Khugepaged | None = None,
    ksm: Ksm | None = None,
    prealloc: Prealloc | str = Prealloc.NONE,
    prealloc_threads: int = 1,
    cores: int | None = None,
    smt: int = 1,
    costs: Mapping[Cost, int] = DEFAULT_COSTS,
    seed: int = 0,
    replicate: int = 0,
    trace_rows: int = 0,
    max_events: int | None = None,
) -> Run:
    """Simulate one VM.

    `memory` is the data memslot in bytes, `offset` the host's address minus the guest's, in bytes; `steps` run one after the
    other, inside each all vCPUs at once. `cores` of `smt` hardware threads each run the vCPUs; None: a CPU for everybody.
    `seed` and `replicate` choose the random numbers of the workload and of failing allocations, nothing else. With `trace_rows`
    the first so many events are kept in `Run.trace`. Raises PointError, WorkloadError, policy.PolicyError,
    policy.UnknownKernelError, cost.CostError, BudgetError.
    """
    kind, how = member(Backing, backing, "backing"), member(Mmu, mmu, "mmu")
    traits = traits_of(kind, member(ThpEnabled, thp_enabled, "thp_enabled"))
    check_point(memory, offset, guest_page, thp_failure, traits, khugepaged, ksm)
    check_counts(vcpus, prealloc_threads, cores, smt, trace_rows, max_events)
    behaviour = behaviours(kernel, policy)
    todo = all_steps(member(Prealloc, prealloc, "prealloc"), prealloc_threads, steps)
    geometry = geometry_of(memory, offset, traits.gigantic)
    check_steps([step for step, _ in todo], behaviour, how, kernel, traits, geometry)
    flags = {Setup.NX: nx_huge_pages, Setup.EAGER_SPLIT: eager_page_split, Setup.PML: pml}
    setup = setup_row(traits, geometry, how, guest_page, flags, thp_failure, khugepaged, ksm)
    setup[Setup.CORES], setup[Setup.SMT] = cores or 0, smt
    m = new_machine(geometry, actors_of(todo, vcpus) + DAEMONS, trace_rows)
    m.vm[Vm.KHUGE_TIME], m.vm[Vm.KSM_TIME] = setup[Setup.KHUGE_SLEEP_NS], setup[Setup.KSM_SLEEP_NS]
    actions = action_table(traits, use_zero_page, bool(behaviour[Behaviour.HUGE_ZERO_WRITE_THP]))
    policy_vector, cost_vector = policy_row(behaviour), cost_row(costs)
    if smt > 1:
        check_smt(costs)
    results = []
    for step, number in todo:
        made = stream_of(step, geometry.pages, vcpus, step_key(seed, replicate, number))
        lists = (made.list_lo, made.list_gfn, made.list_write, made.zipf_lo, made.zipf_cut)
        env = Env(policy_vector, cost_vector, setup, actions, made.stream, *lists)
        check_time(made, costs, geometry.pages, int(m.vm[Vm.CLOCK]))
        ns = run_step(m, env, _budget(env, made, max_events))
        results.append(_result(step, m, ns))
        m.vm[Vm.CLOCK] += ns
    return _run(results, m)
