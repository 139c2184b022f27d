"""The public call: one machine, some steps, the counters.

>>> from kernels import Touch, Access, simulate
>>> run = simulate(kernel="6.5", backing="anonymous_thp", memory=2 << 20, steps=[Touch(access=Access.READ), Touch()])
>>> run.counters["pf_taken"], run.counters["pf_retry"], run.gauges["rss_bytes"]
(1025, 512, 2097152)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from kernels.cost import DEFAULT_COSTS, Cost, cost_row
from kernels.engine import PageTable, new_page_table, run_alone, run_many
from kernels.policy import Behaviour, behaviours, policy_row
from kernels.primary_mmu import Env, action_table, traits_of
from kernels.spec import (
    KVM_MAX_VCPUS,
    MAX_MEMORY_BYTES,
    PAGE_BYTES,
    PAGE_SHIFT,
    PMD_BYTES,
    PMD_PAGES,
    Backing,
    Counter,
    Gauge,
    Prealloc,
    Stream,
    ThpEnabled,
    Vm,
)
from kernels.state import Int64s, Machine, bucket_top, new_machine
from kernels.steps import Populate, PreFault, Step, Touch, TouchList, WorkloadError, check_touch
from kernels.workload import Accesses, accesses_of, step_key, stream_of

PERCENTILES: Mapping[str, tuple[int, int]] = {
    "fault_p50_ns": (50, 100),
    "fault_p90_ns": (90, 100),
    "fault_p99_ns": (99, 100),
    "fault_p999_ns": (999, 1000),
}
EVENTS_PER_ACCESS = 4096  # a step that needs more has run into a storm that does not end
E = TypeVar("E", Backing, ThpEnabled, Prealloc)


class PointError(ValueError):
    """A parameter that the model cannot take: named, with its value and what would do."""


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


def check_size(memory: int, backing: Backing) -> None:
    if not PAGE_BYTES <= memory <= MAX_MEMORY_BYTES or memory % PAGE_BYTES:
        below = max(PAGE_BYTES, memory // PAGE_BYTES * PAGE_BYTES)
        raise PointError(
            f"memory = {memory} bytes: a multiple of {PAGE_BYTES} from {PAGE_BYTES} to {MAX_MEMORY_BYTES} is needed; "
            f"nearest: {below} and {below + PAGE_BYTES}"
        )
    if backing == Backing.ANONYMOUS_HUGETLB_2MB and memory % PMD_BYTES:
        raise PointError(f"memory = {memory} bytes: not a multiple of the huge page, {PMD_BYTES} bytes")


def check_count(name: str, value: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise PointError(f"{name} = {value!r}: an integer from 1 to {limit} is needed")


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


def step_name(step: Step) -> str:
    """The op of a study file: TouchList -> touch_list."""
    name = type(step).__name__
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


@lru_cache(maxsize=1)
def _lab() -> tuple[Machine, PageTable]:
    return new_machine(PMD_PAGES, 1), new_page_table()


def run_step(m: Machine, env: Env, budget: int) -> int:
    """One step; the lone actor's loop where there is one actor and nobody watches. Raises BudgetError."""
    if env.stream[Stream.ACTORS] == 1 and not len(m.trace):
        ns = run_alone(m, env, budget, *_lab())
    else:
        ns = run_many(m, env, budget)
    if ns < 0:
        raise BudgetError(f"no end after {budget} events: raise max_events, or look at the retries of the last step")
    return int(ns)


def _result(step: Step, m: Machine, ns: int) -> StepResult:
    return StepResult(
        op=step_name(step),
        guest=isinstance(step, Touch | TouchList),
        ns=ns,
        counters={c.name.lower(): int(m.counters[c]) for c in Counter},
        gauges={g.name.lower(): int(m.gauges[g]) for g in Gauge},
        hist=m.hist.copy(),
        fault_max_ns=int(m.vm[Vm.FAULT_MAX_NS]),
    )


def latency_of(hist: Int64s, fault_max_ns: int) -> dict[str, int]:
    """Percentiles of a histogram as the top of their bucket, never above the maximum; 0 without a fault."""
    cumulative = np.cumsum(hist)
    total = int(cumulative[-1])
    found = {}
    for name, (part, whole) in PERCENTILES.items():
        rank = -(-total * part // whole)
        bucket = int(np.searchsorted(cumulative, max(1, rank)))
        found[name] = min(fault_max_ns, bucket_top(bucket)) if total else 0
    return found | {"fault_max_ns": fault_max_ns}


def _run(results: list[StepResult], m: Machine) -> Run:
    hist = np.sum([r.hist for r in results], axis=0) if results else m.hist
    return Run(
        steps=tuple(results),
        counters={c.name.lower(): sum(r.counters[c.name.lower()] for r in results) for c in Counter},
        gauges={g.name.lower(): int(m.gauges[g]) for g in Gauge},
        guest_ns=sum(r.ns for r in results if r.guest),
        total_ns=sum(r.ns for r in results),
        latency=latency_of(hist, max((r.fault_max_ns for r in results), default=0)),
        trace=m.trace[: m.vm[Vm.TRACED]],
        machine=m,
    )


def _check_step(step: Step, behaviour: Mapping[Behaviour, int], kernel: str) -> None:
    if isinstance(step, Touch) and (faults := check_touch(step)):
        raise WorkloadError("touch: " + "; ".join(faults))
    if isinstance(step, PreFault) and not behaviour[Behaviour.PRE_FAULT_MEMORY]:
        raise PointError(f"pre_fault: kernel {kernel} has no KVM_PRE_FAULT_MEMORY; 6.11 is the first that has it")


def _budget(made: Accesses, max_events: int | None) -> int:
    return max_events if max_events is not None else 65536 + EVENTS_PER_ACCESS * accesses_of(made)


def simulate(
    *,
    steps: Sequence[Step],
    kernel: str = "6.12",
    policy: str = "mainline",
    backing: Backing | str = Backing.ANONYMOUS,
    memory: int = 1 << 30,
    vcpus: int = 1,
    thp_enabled: ThpEnabled | str = ThpEnabled.MADVISE,
    use_zero_page: bool = True,
    prealloc: Prealloc | str = Prealloc.NONE,
    prealloc_threads: int = 1,
    costs: Mapping[Cost, int] = DEFAULT_COSTS,
    seed: int = 0,
    replicate: int = 0,
    trace_rows: int = 0,
    max_events: int | None = None,
) -> Run:
    """Simulate one VM.

    `memory` is the data memslot in bytes; `steps` run one after the other, inside each all vCPUs at once. `seed` and
    `replicate` choose the random numbers of the workload, nothing else. With `trace_rows` the first so many events are
    kept in `Run.trace`. Raises PointError, WorkloadError, policy.PolicyError, policy.UnknownKernelError,
    cost.CostError, BudgetError.
    """
    kind = member(Backing, backing, "backing")
    thp = member(ThpEnabled, thp_enabled, "thp_enabled")
    check_size(memory, kind)
    check_count("vcpus", vcpus, KVM_MAX_VCPUS)
    check_count("prealloc_threads", prealloc_threads, KVM_MAX_VCPUS)
    behaviour = behaviours(kernel, policy)
    todo = all_steps(member(Prealloc, prealloc, "prealloc"), prealloc_threads, steps)
    for step, _ in todo:
        _check_step(step, behaviour, kernel)
    pages = memory >> PAGE_SHIFT
    m = new_machine(pages, actors_of(todo, vcpus), trace_rows)
    actions = action_table(traits_of(kind, thp), use_zero_page, bool(behaviour[Behaviour.HUGE_ZERO_WRITE_THP]))
    policy_vector, cost_vector = policy_row(behaviour), cost_row(costs)
    results = []
    for step, number in todo:
        made = stream_of(step, pages, vcpus, step_key(seed, replicate, number))
        env = Env(
            policy_vector, cost_vector, actions, made.stream, made.list_lo, made.list_gfn, made.list_write, made.zipf_lo, made.zipf_cut
        )
        ns = run_step(m, env, _budget(made, max_events))
        results.append(_result(step, m, ns))
        m.vm[Vm.CLOCK] += ns
    return _run(results, m)
