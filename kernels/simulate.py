"""The public call: one machine, some steps, the counters.

>>> from kernels import Touch, Access, simulate
>>> run = simulate(kernel="6.5", backing="anonymous_thp", memory=2 << 20, steps=[Touch(access=Access.READ), Touch()])
>>> run.counters["pf_taken"], run.counters["pf_retry"], run.gauges["rss_bytes"]
(1025, 512, 2097152)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from kernels.arena import Arena
from kernels.checks import PointError, check_counts, check_point, check_steps
from kernels.cost import DEFAULT_COSTS, Charges, Cost, charges_of, check_smt
from kernels.draws import DRAW_BITS, signed
from kernels.engine import SPLIT, TOO_LATE
from kernels.kept import Kept
from kernels.policy import Behaviour, behaviours, policy_row
from kernels.primary_mmu import Traits, action_table, traits_of
from kernels.results import COUNTERS, GAUGES, LATENCIES, TOO_LONG, VALUES, At, Results
from kernels.script import NEVER_YEARS, Daemons, Ready, Script, Terms, all_steps
from kernels.spec import (
    NEVER,
    PMD_BYTES,
    PMD_ORDER,
    PMD_PAGES,
    PUD_ORDER,
    PUD_PAGES,
    Backing,
    Mmu,
    Prealloc,
    Setup,
    ThpEnabled,
    Vm,
)
from kernels.state import Bytes, Geometry, Int64s, Machine, geometry_of
from kernels.steps import Khugepaged, Ksm, Step
from kernels.tasks import Chance, Task
from kernels.workload import fraction_cut

NS_PER_MS = 1_000_000
DAEMONS = 2  # khugepaged and ksmd
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
    khugepaged: Khugepaged | None,
    ksm: Ksm | None,
) -> Int64s:
    """The vector that jitted code indexes with Setup, but for what takes many values (Simulator.prepare()); shape (len(Setup),)."""
    row = np.zeros(len(Setup), np.int64)
    shallow = mmu == Mmu.SHADOW and guest_page < PMD_BYTES
    row[Setup.MMU] = mmu
    row[Setup.RECOVER_ORDER] = max_order(geometry)
    row[Setup.MAX_ORDER] = 0 if shallow else min(max_order(geometry), PMD_ORDER if mmu == Mmu.SHADOW else PUD_ORDER)
    row[Setup.DIRECT] = not shallow
    for flag, value in flags.items():
        row[flag] = value
    row[Setup.HUGETLB], row[Setup.SHARED], row[Setup.FILE] = traits.hugetlb, traits.shared, traits.file
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


class _Memory(NamedTuple):
    """What `backing` and its like stand for."""

    traits: Traits
    mmu: Mmu
    prealloc: Prealloc


def _memory_of(backing: Backing | str, thp_enabled: ThpEnabled | str, mmu: Mmu | str, prealloc: Prealloc | str) -> _Memory:
    kind, how = member(Backing, backing, "backing"), member(Mmu, mmu, "mmu")
    return _Memory(traits_of(kind, member(ThpEnabled, thp_enabled, "thp_enabled")), how, member(Prealloc, prealloc, "prealloc"))


class _Policy(NamedTuple):
    """What a kernel with a proposal does."""

    behaviour: Mapping[Behaviour, int]
    row: Int64s


def _policy_of(kernel: str, policy: str) -> _Policy:
    found = behaviours(kernel, policy)
    return _Policy(found, policy_row(found))


class _Slot(NamedTuple):
    """The memslot and the settings that go with it."""

    geometry: Geometry
    setup: Int64s
    daemons: Daemons


def _slot_of(
    memory: int,
    offset: int,
    guest_page: int,
    traits: Traits,
    mmu: Mmu,
    nx_huge_pages: bool,
    eager_page_split: bool,
    pml: bool,
    khugepaged: Khugepaged | None,
    ksm: Ksm | None,
) -> _Slot:
    check_point(memory, offset, guest_page, traits, khugepaged, ksm)
    geometry = geometry_of(memory, offset, traits.gigantic)
    flags = {Setup.NX: nx_huge_pages, Setup.EAGER_SPLIT: eager_page_split, Setup.PML: pml}
    setup = setup_row(traits, geometry, mmu, guest_page, flags, khugepaged, ksm)
    scans = (Setup.KHUGE_PAGES, Setup.KHUGE_SLEEP_NS, Setup.KSM_PAGES, Setup.KSM_SLEEP_NS)
    return _Slot(geometry, setup, Daemons(*(int(setup[each]) for each in scans)))


class Prepared(NamedTuple):
    """A checked configuration: all of a run but what chance decides."""

    geometry: Geometry
    actors: int  # daemons included
    policy: Int64s
    costs: Int64s
    setup: Int64s
    actions: Bytes
    ready: Ready
    trace_rows: int


class Simulator:
    """Simulates one VM after another. What depends on few parameters is made once for all that share it; arrays are used again."""

    def __init__(self, hists: bool = False) -> None:
        """`hists`: the latencies of each step are kept."""
        self.arena = Arena(hists)
        self._memories: Kept[Any, _Memory] = Kept(lambda key: _memory_of(*key))
        self._policies: Kept[Any, _Policy] = Kept(lambda key: _policy_of(*key))
        self._slots: Kept[Any, _Slot] = Kept(lambda key: _slot_of(*key))
        self._checked_counts: Kept[Any, None] = Kept(lambda key: check_counts(*key))
        self._checked_steps: Kept[Any, None] = Kept(lambda key: _check_steps(*key))
        self.machine: Machine  # that the last point ran on; the next run's as well
        self._set: Prepared | None = None  # what the arena's environment holds
        self._steps = self._points = 0  # rows

    def prepare(
        self,
        *,
        script: Script,
        charges: Charges,
        kernel: str,
        policy: str,
        mmu: Mmu | str,
        backing: Backing | str,
        memory: int,
        vcpus: int,
        thp_enabled: ThpEnabled | str,
        use_zero_page: bool,
        offset: int,
        guest_page: int,
        nx_huge_pages: bool,
        eager_page_split: bool,
        pml: bool,
        khugepaged: Khugepaged | None,
        ksm: Ksm | None,
        prealloc: Prealloc | str,
        prealloc_threads: int,
        cores: int | None,
        smt: int,
        trace_rows: int = 0,
        max_events: int | None = None,
    ) -> Prepared:
        """Parameters as those of simulate(), but for what chance decides. Raises what that raises, but for BudgetError."""
        traits, how, before = self._memories[backing, thp_enabled, mmu, prealloc]
        slot = self._slots[memory, offset, guest_page, traits, how, nx_huge_pages, eager_page_split, pml, khugepaged, ksm]
        self._checked_counts[vcpus, prealloc_threads, cores, smt, trace_rows, max_events]
        behaviour, policy_vector = self._policies[kernel, policy]
        if smt > 1:
            check_smt(charges.smt_ns)
        terms = Terms(before, prealloc_threads, slot.geometry.pages, vcpus, charges, slot.daemons, trace_rows > 0, max_events)
        self._checked_steps[script, before, prealloc_threads, kernel, policy, how, traits, slot.geometry]
        setup = slot.setup.copy()
        setup[Setup.CORES], setup[Setup.SMT] = cores or 0, smt
        return Prepared(
            geometry=slot.geometry,
            actors=max(vcpus, script.threads, prealloc_threads if before & Prealloc.POPULATE else 0) + DAEMONS,
            policy=policy_vector,
            costs=charges.row,
            setup=setup,
            actions=action_table(traits, use_zero_page, bool(behaviour[Behaviour.HUGE_ZERO_WRITE_THP])),
            ready=script.ready(terms),
            trace_rows=trace_rows,
        )

    def take(self, seed: int, replicates: ArrayLike, thp_failures: ArrayLike) -> None:
        """What chance decides in the points that run() is asked for: their replicates and the chance that an allocation fails, two
        sequences of one length. Raises PointError for what is no chance."""
        failures = np.asarray(thp_failures, np.float64)
        if len(bad := failures[~((failures >= 0.0) & (failures <= 1.0))]):
            raise PointError(f"thp_failure = {bad[0]}: 0 ... 1 is needed")
        self.arena.make_room(chances=len(failures))
        rows = self.arena.chances.rows[: len(failures)]
        rows[:, Chance.SEED] = signed(seed)
        rows[:, Chance.REPLICATE] = replicates
        rows[:, Chance.THP_FAILURE_CUT] = failures * (1 << DRAW_BITS)

    def run(self, prepared: Prepared, first: int, end: int) -> list[tuple[int, Exception]]:
        """Run points [first, end) of those taken, and add their rows to the results; returns those that came to no end, and have none,
        with why."""
        steps, point, failures = len(prepared.ready.ops), first, list[tuple[int, Exception]]()
        self.arena.make_room(tasks=steps, steps=self._steps + (end - first) * steps, points=self._points + end - first)
        self._set_env(prepared)
        try:
            while point < end:
                point = self._run(prepared, point, end)
                if point < end:
                    failures.append((point, self._failure(prepared)))
                    point += 1
        except MemoryError:  # for a machine
            self.arena.results.at[[At.STEPS, At.POINTS]] = self._steps, self._points
            raise
        done = end - first - len(failures)
        self._points, self._steps = self._points + done, self._steps + done * steps
        return failures

    def _run(self, prepared: Prepared, point: int, end: int) -> int:
        """Points as far as they come to their ends."""
        parts = prepared.ready.parts
        while point < end:
            place = self.arena.place(prepared.geometry, prepared.actors, prepared.trace_rows)
            self.machine, clear = place.machine, int(place.used)
            goal = end if len(parts) == 1 and place.small else point + 1
            for lists, first, last in parts:
                reached, clear = self.arena.run_with(place, lists)(point, goal, first, last, clear), 0
                if reached < goal:
                    return reached
            point = goal
        return point

    def _failure(self, prepared: Prepared) -> PointError | BudgetError:
        """Why the last point came to no end."""
        at = self.arena.results.at
        step, reason = int(at[At.FAILED_STEP]), int(at[At.REASON])
        if reason == TOO_LONG:
            accesses = prepared.ready.accesses[step]
            text = f"{accesses} accesses may take more than {NEVER} ns of virtual time, {NEVER_YEARS} years"
            return PointError(f"{text}: lower touches, think_ns or costs")
        if reason == SPLIT:
            return PointError("skip_hits: a huge page was split, and pages read before fault again: leave skip_hits out")
        if reason == TOO_LATE:
            return PointError(f"virtual time would pass {NEVER} ns, {NEVER_YEARS} years: lower touches, think_ns or costs")
        budget = int(prepared.ready.tasks.rows[step, Task.BUDGET])
        return BudgetError(f"no end after {budget} events: raise max_events, or look at the retries of the last step")

    def _set_env(self, prepared: Prepared) -> None:
        """Copy what differs from the configuration before."""
        before, env, tasks = self._set, self.arena.env, self.arena.tasks
        if prepared is before:
            return
        ready = prepared.ready
        if before is None or ready is not before.ready:
            steps = len(ready.ops)
            tasks.rows[:steps], tasks.streams[:steps], tasks.steps[0] = ready.tasks.rows, ready.tasks.streams, steps
        env.setup[:] = prepared.setup
        if before is None or prepared.policy is not before.policy:
            env.policy[:] = prepared.policy
        if before is None or prepared.costs is not before.costs:
            env.costs[:] = prepared.costs
        if before is None or prepared.actions is not before.actions:
            env.actions[:] = prepared.actions
        self._set = prepared

    def results(self) -> Results:
        """The rows of all runs since the last forget(); they are written over afterwards."""
        found = self.arena.results
        return found._replace(steps=found.steps[: self._steps], points=found.points[: self._points], hists=found.hists[: self._steps])

    def forget(self) -> None:
        """Begin with no rows."""
        self._steps = self._points = 0
        self.arena.results.at[[At.STEPS, At.POINTS]] = 0


def _check_steps(
    script: Script, before: Prealloc, threads: int, kernel: str, policy: str, mmu: Mmu, traits: Traits, geometry: Geometry
) -> None:
    steps = [step for step, _ in all_steps(before, threads, script.steps)]
    check_steps(steps, behaviours(kernel, policy), mmu, kernel, traits, geometry)


def run_of(prepared: Prepared, results: Results, machine: Machine) -> Run:
    """The only point of these results."""
    point, rows = _named(results.points[0]), [_named(row) for row in results.steps]
    steps = [
        StepResult(
            op=op,
            guest=bool(task[Task.GUEST]),
            ns=row["total_ns"],
            counters={name: row[name] for name in COUNTERS},
            gauges={name: row[name] for name in GAUGES},
            hist=hist,
            fault_max_ns=row["fault_max_ns"],
        )
        for op, task, row, hist in zip(prepared.ready.ops, prepared.ready.tasks.rows, rows, results.hists, strict=True)
    ]
    return Run(
        steps=tuple(steps),
        counters={name: point[name] for name in COUNTERS},
        gauges={name: point[name] for name in GAUGES},
        guest_ns=point["guest_ns"],
        total_ns=point["total_ns"],
        latency={name: point[name] for name in LATENCIES},
        trace=machine.trace[: machine.vm[Vm.TRACED]],
        machine=machine,
    )


def _named(row: Int64s) -> dict[str, int]:
    return dict(zip(VALUES, row.tolist(), strict=True))


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
    simulator = Simulator(hists=True)
    prepared = simulator.prepare(
        script=Script(steps),
        charges=charges_of(costs),
        kernel=kernel,
        policy=policy,
        mmu=mmu,
        backing=backing,
        memory=memory,
        vcpus=vcpus,
        thp_enabled=thp_enabled,
        use_zero_page=use_zero_page,
        offset=offset,
        guest_page=guest_page,
        nx_huge_pages=nx_huge_pages,
        eager_page_split=eager_page_split,
        pml=pml,
        khugepaged=khugepaged,
        ksm=ksm,
        prealloc=prealloc,
        prealloc_threads=prealloc_threads,
        cores=cores,
        smt=smt,
        trace_rows=trace_rows,
        max_events=max_events,
    )
    simulator.take(seed, [replicate], [thp_failure])
    for _, failure in simulator.run(prepared, 0, 1):
        raise failure
    return run_of(prepared, simulator.results(), simulator.machine)
