"""The executable specification: the same meaning as simulate.simulate(), in plain Python, to be read next to the kernel.

reference_config.py says what a point is; reference_host.py and reference_sptes.py are the two page tables as plain
state; reference_tasks.py runs actors in virtual time, reference_time.py is what they share; reference_notifier.py,
reference_mm.py and reference_kvm.py are the paths they follow, reference_daemons.py khugepaged and KSM,
reference_calls.py the VMM's system calls.
Nothing of the compiled implementation is imported: tests/test_differential.py compares the two, figure by figure.

Rules: mm/memory.c, mm/huge_memory.c, mm/hugetlb.c, virt/kvm/kvm_main.c and arch/x86/kvm/mmu/ of 6.1 and 6.12.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

from kernels.cost import DEFAULT_COSTS, Cost
from kernels.policy import Behaviour, behaviours
from kernels.reference_calls import CallStep, call
from kernels.reference_config import Config
from kernels.reference_daemons import start_daemons
from kernels.reference_kvm import Kvm
from kernels.reference_tasks import Guest, Task, Wait
from kernels.reference_workload import host_pages, list_accesses, skipped_part, step_key, touch_accesses, vcpu_key
from kernels.spec import (
    PAGE_BYTES,
    PMD_BYTES,
    PMD_ORDER,
    PUD_ORDER,
    Access,
    Actor,
    Backing,
    Gauge,
    HostPmd,
    HostPte,
    Mmu,
    Prealloc,
    Spte,
    SptePmd,
    ThpEnabled,
)
from kernels.steps import (
    ChildExit,
    Collapse,
    DirtyLog,
    DontNeed,
    Fork,
    HostTouch,
    Idle,
    Khugepaged,
    Ksm,
    KsmMerge,
    Populate,
    PreFault,
    Step,
    Touch,
    TouchList,
    VmmCow,
)

MAX_EVENTS = 10_000_000
OPS: Mapping[type[Step], str] = {
    Touch: "touch",
    TouchList: "touch_list",
    Populate: "populate",
    PreFault: "pre_fault",
    VmmCow: "vmm_cow",
    HostTouch: "host_touch",
    Idle: "idle",
    Fork: "fork",
    ChildExit: "child_exit",
    DirtyLog: "dirty_log",
    DontNeed: "dontneed",
    Collapse: "collapse",
    KsmMerge: "ksm_merge",
}
E = TypeVar("E", Backing, Mmu, ThpEnabled, Prealloc)
T = TypeVar("T")
ActorPath = Callable[[Task], Iterator[Wait]]


# ---- A step ----------------------------------------------------------------------------------------------------------


def idle(_task: Task, ns: int) -> Iterator[Wait]:
    """Time passes."""
    yield Guest(ns)


def path_over(path: Callable[[Task, Iterator[T]], Iterator[Wait]], items: Iterator[T]) -> ActorPath | None:
    """An actor's path over these, or None if there are none."""
    for first in items:
        return lambda task: path(task, chain((first,), items))
    return None


def paths_of(vm: Kvm, step: Step, vcpus: int) -> tuple[Actor, list[ActorPath | None]]:
    """Who runs in the step, and one path per actor; None for one that has nothing to do."""
    pages = vm.config.pages
    match step:
        case Populate():
            n, write = min(step.threads, pages), step.access == Access.WRITE
            parts = [range(pages * i // n, pages * (i + 1) // n) for i in range(n)]
            return Actor.VMM, [partial(vm.populate, part=part, write=write) for part in parts]
        case PreFault():
            return Actor.PREFAULT, [vm.pre_fault_memory]
        case VmmCow():
            return Actor.OUTSIDE, [partial(vm.cow_outside, pages=step.pages) if step.pages else None]
        case HostTouch():
            return Actor.HOST, [path_over(partial(vm.host_touch, write=step.access == Access.WRITE), host_pages(step, pages))]
        case Idle():
            return Actor.IDLE, [partial(idle, ns=step.ns)]
        case TouchList():
            return Actor.GUEST, [path_over(partial(vm.vcpu, think_ns=0), own) for own in list_accesses(step, vcpus)]
        case Touch(skip_hits=True):
            start, units, visits = skipped_part(step, pages, vcpus)
            own = vcpu_key(vm.key, 0)
            return Actor.GUEST, [partial(vm.skipping_vcpu, step=step, start=start, n=units, touches=visits, key=own)]
        case Touch():
            made = touch_accesses(step, pages, vcpus, vm.key)
            return Actor.GUEST, [path_over(partial(vm.vcpu, think_ns=step.think_ns), own) for own in made]
    raise TypeError(f"{step} has no actors")


def run_step(vm: Kvm, step: Step, vcpus: int, max_events: int) -> "Result":
    """Its actors one event after the other, or its system call at one go."""
    vm.count, vm.latencies = dict.fromkeys(vm.count, 0), []
    if isinstance(step, CallStep):
        ns = call(vm, step)
    else:
        who, paths = paths_of(vm, step, vcpus)
        ns = vm.run(paths, who, max_events)
    vm.pass_time(ns)
    return Result(OPS[type(step)], ns, vm.count, gauges(vm), sorted(vm.latencies))


def all_steps(steps: Sequence[Step], prealloc: Prealloc, threads: int) -> list[tuple[int, Step]]:
    """What runs, each with its number among the workload's steps."""
    before: list[tuple[int, Step]] = []
    if prealloc & Prealloc.POPULATE:
        before.append((-1, Populate(threads=threads)))
    if prealloc & Prealloc.PRE_FAULT:
        before.append((-1, PreFault()))
    return before + list(enumerate(steps))


# ---- Results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One step: counters by their lower-case name, gauges as they stand after it, all fault latencies, sorted."""

    op: str
    ns: int
    counters: dict[str, int]
    gauges: dict[str, int]
    latencies: list[int]


@dataclass(frozen=True)
class Reference:
    """The steps, their sum, and the VM at the end."""

    steps: list[Result]
    counters: dict[str, int]
    gauges: dict[str, int]
    host_pmd: list[HostPmd]  # per host region
    spte_pud: list[SptePmd]  # per GiB of the slot; empty but for 1 GiB backings
    spte_pmd: list[SptePmd]  # per 2 MiB of the slot
    host_pte: list[HostPte | None]  # per page of the VMA; None where the region has no table
    spte: list[Spte | None]  # per page of the slot; None where there is no table
    seq: int
    logging: bool
    dirty: bool
    child_bytes: int  # frames that only the child has
    ksm_sharers: int
    ksm_frames: int


def gauges(vm: Kvm) -> dict[str, int]:
    found = {
        Gauge.PAGES_4K: vm.sptes.leaves[0],
        Gauge.PAGES_2M: vm.sptes.leaves[PMD_ORDER],
        Gauge.PAGES_1G: vm.sptes.leaves.get(PUD_ORDER, 0),
        Gauge.RSS_BYTES: vm.host.rss,
        Gauge.ANON_HUGE_BYTES: vm.host.anon_huge,
        Gauge.HELD_BYTES: vm.host.held,
    }
    return {gauge.name.lower(): found[gauge] for gauge in Gauge}


def host_entries(vm: Kvm, region: int) -> list[HostPte | None]:
    span = vm.host.span(region)
    return [vm.host.pte(page) for page in span] if vm.host.pmd(region) == HostPmd.TBL else [None] * len(span)


def kvm_entries(vm: Kvm, index: int) -> list[Spte | None]:
    """Of a 2M region, as far as it lies in the slot."""
    gfns = range(index << PMD_ORDER, min(index + 1 << PMD_ORDER, vm.config.pages))
    table = vm.sptes.at(PMD_ORDER, gfns.start) in (SptePmd.T, SptePmd.T_NX)
    return [Spte(vm.sptes.at(0, gfn)) for gfn in gfns] if table else [None] * len(gfns)


def end_state(vm: Kvm, results: list[Result]) -> Reference:
    regions, pages, puds = range(vm.config.regions), vm.config.pages, PUD_ORDER in vm.config.orders
    large = range(0, pages, 1 << PMD_ORDER)
    return Reference(
        steps=results,
        counters={name: sum(r.counters[name] for r in results) for name in vm.count},
        gauges=gauges(vm),
        host_pmd=[vm.host.pmd(region) for region in regions],
        spte_pud=[vm.sptes.at(PUD_ORDER, gfn) for gfn in range(0, pages, 1 << PUD_ORDER)] if puds else [],
        spte_pmd=[vm.sptes.at(PMD_ORDER, gfn) for gfn in large],
        host_pte=[pte for region in regions for pte in host_entries(vm, region)],
        spte=[leaf for index in range(len(large)) for leaf in kvm_entries(vm, index)],
        seq=vm.seq,
        logging=vm.logging,
        dirty=vm.dirty,
        child_bytes=vm.host.child_bytes,
        ksm_sharers=vm.host.ksm_sharers,
        ksm_frames=vm.host.ksm_frames,
    )


# ---- The public call -------------------------------------------------------------------------------------------------


def member(kind: type[E], value: E | str) -> E:
    """The enum member of a name like 'anonymous_thp', or the member itself."""
    return kind[value.upper().replace("+", "_")] if isinstance(value, str) else value


def simulate(
    *,
    steps: Sequence[Step],
    kernel: str = "6.12",
    policy: str = "mainline",
    backing: Backing | str = Backing.ANONYMOUS,
    memory: int = 1 << 30,
    vcpus: int = 1,
    mmu: Mmu | str = Mmu.TDP,
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
    max_events: int | None = None,
) -> Reference:
    """As simulate.simulate(), slowly. Raises ValueError for what cannot be, RuntimeError after `max_events` in one step."""
    if smt not in (1, 2) or (cores is not None and cores < 1):
        raise ValueError(f"cores = {cores}, smt = {smt}: at least one core, one or two hardware threads")
    config = Config(
        pages=memory // PAGE_BYTES,
        backing=member(Backing, backing),
        behaviour=behaviours(kernel, policy),
        costs=costs,
        thp_enabled=member(ThpEnabled, thp_enabled),
        use_zero_page=use_zero_page,
        thp_failure=thp_failure,
        offset=offset,
        mmu=member(Mmu, mmu),
        guest_page=guest_page,
        nx_huge_pages=nx_huge_pages,
        eager_page_split=eager_page_split,
        pml=pml,
        cores=cores,
        smt=smt,
    )
    todo = all_steps(steps, member(Prealloc, prealloc), prealloc_threads)
    if any(isinstance(step, PreFault) for _, step in todo) and not config.behaviour[Behaviour.PRE_FAULT_MEMORY]:
        raise ValueError(f"kernel {kernel} has no KVM_PRE_FAULT_MEMORY")
    vm = Kvm(config)
    start_daemons(vm, khugepaged, ksm)
    results = []
    for number, step in todo:
        vm.key = step_key(seed, replicate, number)
        results.append(run_step(vm, step, vcpus, MAX_EVENTS if max_events is None else max_events))
    return end_state(vm, results)
