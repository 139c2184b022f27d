"""Hypothesis strategies: whole configurations of `simulate()`, small enough for the reference to follow."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kernels.checks import StepChecks
from kernels.cost import DEFAULT_COSTS, Cost
from kernels.policy import PROPOSALS, Behaviour, PolicyError, behaviours
from kernels.primary_mmu import traits_of
from kernels.spec import PAGE_BYTES, PMD_BYTES, PMD_PAGES, PUD_PAGES, Access, Backing, Call, Mmu, Order, Prealloc, Spread, ThpEnabled
from kernels.state import geometry_of
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

EXAMPLES = int(os.environ.get("FAULTSWEEP_EXAMPLES", "2000"))
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
thorough = settings(max_examples=max(100, EXAMPLES // 5), deadline=None, derandomize="CI" in os.environ, suppress_health_check=CHECKS)

KERNELS = ("5.15", "5.17", "5.18", "6.1", "6.2", "6.5", "6.6", "6.7", "6.8", "6.10", "6.11", "6.13", "6.14", "6.15", "6.18", "7.3")
UNITS_PER_STEP = 120  # of all vCPUs together
MAX_EVENTS = 60_000
GIGANTIC = (Backing.ANONYMOUS_HUGETLB_1GB, Backing.SHARED_HUGETLB_1GB)


def policies_of(kernel: str) -> list[str]:
    """The proposals that make sense on that kernel."""
    found = []
    for name in PROPOSALS:
        try:
            behaviours(kernel, name)
        except PolicyError:
            continue
        found.append(name)
    return found


def pages_of(backing: Backing) -> st.SearchStrategy[int]:
    """1 to 4 regions; the last one may be short where the backing allows it."""
    if backing in GIGANTIC:
        return st.just(PUD_PAGES)
    regions = st.sampled_from((1, 1, 1, 2, 3, 4))
    if traits_of(backing, ThpEnabled.ALWAYS).hugetlb:
        return regions.map(lambda n: n * PMD_PAGES)
    short = st.one_of(st.just(0), st.integers(0, PMD_PAGES - 1))
    return st.tuples(regions, short).map(lambda pair: pair[0] * PMD_PAGES - pair[1])


def costs() -> st.SearchStrategy[Mapping[Cost, int]]:
    """The defaults; or small values with zeros, so that events tie; or values of very different size."""
    small = st.lists(st.integers(0, 7), min_size=len(Cost), max_size=len(Cost))
    mixed = st.lists(st.sampled_from((0, 1, 3, 50, 1000, 1001, 250_000)), min_size=len(Cost), max_size=len(Cost))
    short = DEFAULT_COSTS | {Cost.TIME_SLICE_NS: 10_000}
    return st.one_of(
        st.sampled_from((DEFAULT_COSTS, short)),
        st.tuples(st.one_of(small, mixed), st.sampled_from((1000, 1001, 1500))).map(
            lambda drawn: dict(zip(Cost, drawn[0], strict=True)) | {Cost.SMT_NS: drawn[1]}
        ),
    )


@st.composite
def touch(draw: st.DrawFn, pages: int, vcpus: int) -> Touch:
    """Every field. `every` is widened until the step has at most UNITS_PER_STEP visits."""
    bounds = sorted((draw(st.integers(0, 16)) / 16, draw(st.integers(0, 16)) / 16))
    start, end = bounds if bounds[0] < bounds[1] else (0.0, 1.0)
    spread = draw(st.sampled_from(Spread))
    actors = draw(st.none() | st.integers(1, vcpus + 1))
    taking_part = min(vcpus, actors or vcpus)
    most = UNITS_PER_STEP // (taking_part if spread == Spread.ALL else 1)
    nbytes = (int(end * pages) - int(start * pages)) * PAGE_BYTES
    wish = draw(st.sampled_from((PAGE_BYTES, PAGE_BYTES, 3 * PAGE_BYTES, 512, 70_001, 1 << 20)))
    every = max(1, wish, -(-nbytes // most))
    at = draw(st.just(0) | st.integers(0, 5 * PAGE_BYTES))
    order = draw(st.sampled_from((Order.SEQUENTIAL, Order.RANDOM, Order.STRIDED, Order.ZIPF)))
    repeat = draw(st.booleans())
    units = max(0, -(-(nbytes - at) // every))
    limit = UNITS_PER_STEP if repeat or order == Order.ZIPF else units * (taking_part if spread == Spread.ALL else 1)
    return Touch(
        access=draw(st.sampled_from((Access.WRITE, Access.READ, Access.READ, Access.PAIRS, Access.MIXED, Access.EXEC))),
        order=order,
        start=start,
        end=end,
        every=every,
        at=at,
        stride=draw(st.integers(1, 40)),
        theta=draw(st.sampled_from((0.0, 0.5, 0.99, 1.0, 1.5, 3.0))),
        write_percent=draw(st.sampled_from((0.0, 12.5, 50.0, 99.9, 100.0))),
        read_first=draw(st.sampled_from((0.0, 0.3, 1.0))),
        touches=draw(st.none() | st.integers(0, limit)),
        repeat=repeat,
        spread=spread,
        vcpus=actors,
        window=draw(st.sampled_from((1, 2, 7, 1000))),
        think_ns=draw(st.sampled_from((0, 0, 1, 900))),
    )


@st.composite
def touch_list(draw: st.DrawFn, pages: int, vcpus: int) -> TouchList:
    """A few pages that all vCPUs fight for, and any others."""
    gfn = st.one_of(st.integers(0, min(3, pages - 1)), st.integers(0, pages - 1))
    rows = draw(st.lists(st.tuples(st.integers(0, vcpus - 1), gfn, st.booleans()), max_size=60))
    return TouchList(
        vcpu=np.array([r[0] for r in rows], np.int64),
        gfn=np.array([r[1] for r in rows], np.int64),
        write=np.array([r[2] for r in rows], bool),
    )


def parts() -> st.SearchStrategy[tuple[float, float]]:
    """Parts of memory, in sixteenths, mostly all of it."""
    some = st.tuples(st.integers(0, 16), st.integers(0, 16)).map(lambda pair: (min(pair) / 16, max(pair) / 16))
    return st.one_of(st.just((0.0, 1.0)), some)


@st.composite
def host_touch(draw: st.DrawFn, pages: int) -> HostTouch:
    start, end = draw(parts())
    every = draw(st.sampled_from((PAGE_BYTES, 3 * PAGE_BYTES, 70_001, PMD_BYTES)))
    most = max(1, int(end * pages) - int(start * pages)) * PAGE_BYTES
    access = draw(st.sampled_from((Access.READ, Access.WRITE)))
    return HostTouch(access=access, start=start, end=end, every=max(every, most // UNITS_PER_STEP))


@st.composite
def dontneed(draw: st.DrawFn, pages: int, unit: int) -> DontNeed:
    """Whole, in part, or piecewise; `unit`: pages of the backing's own page."""
    start, end = draw(parts())
    if draw(st.booleans()) or pages <= 2 * unit:
        return DontNeed(start=start, end=end)
    most = max(1, pages // unit // 4)
    every = draw(st.integers(max(1, pages // unit // 32), max(most, pages // unit // 32 + 1)))
    at, size = draw(st.integers(0, 2 * every)), draw(st.integers(1, every))
    return DontNeed(start=start, end=end, every=every * unit * PAGE_BYTES, at=at * unit * PAGE_BYTES, size=size * unit * PAGE_BYTES)


def steps_of(pages: int, vcpus: int, unit: int) -> dict[str, st.SearchStrategy[Step]]:
    """A strategy for every op."""
    accesses = st.sampled_from((Access.READ, Access.WRITE))
    return {
        "touch": touch(pages, vcpus),
        "touch_list": touch_list(pages, vcpus),
        "populate": st.builds(Populate, access=accesses, threads=st.integers(1, 3)),
        "pre_fault": st.just(PreFault()),
        "host_touch": host_touch(pages),
        "vmm_cow": st.builds(VmmCow, pages=st.integers(0, 20)),
        "idle": st.builds(Idle, ns=st.sampled_from((0, 1, 999_999, 2_500_000))),
        "fork": st.just(Fork()),
        "child_exit": st.just(ChildExit()),
        "log_on": st.just(DirtyLog(Call.LOG_ON)),
        "log_get": st.just(DirtyLog(Call.LOG_GET)),
        "log_off": st.just(DirtyLog(Call.LOG_OFF)),
        "dontneed": dontneed(pages, unit),
        "collapse": parts().map(lambda part: Collapse(*part)),
        "ksm_merge": st.builds(KsmMerge, fraction=st.sampled_from((0.0, 0.1, 0.5, 1.0))),
    }


def checks_of(point: dict[str, Any]) -> StepChecks:
    """What knows which steps can come next on that point."""
    traits = traits_of(point["backing"], point["thp_enabled"])
    geometry = geometry_of(point["memory"], point["offset"], traits.gigantic)
    return StepChecks(behaviours(point["kernel"], point["policy"]), point["mmu"], point["kernel"], traits, geometry)


def daemons() -> st.SearchStrategy[tuple[Khugepaged | None, Ksm | None]]:
    """Mostly none; else so quick that they do something within a step."""
    khugepaged = st.builds(
        Khugepaged, pages_to_scan=st.sampled_from((512, 1024, 4096)), scan_sleep_ms=st.just(1), max_ptes_none=st.sampled_from((0, 300, 511))
    )
    ksm = st.builds(Ksm, pages_to_scan=st.sampled_from((1, 10, 64)), sleep_ms=st.just(1), fraction=st.sampled_from((0.3, 1.0)))
    none = st.none()
    return st.one_of(st.tuples(none, none), st.tuples(none, none), st.tuples(st.one_of(none, khugepaged), st.one_of(none, ksm)))


def offsets(backing: Backing) -> st.SearchStrategy[int]:
    """Mostly none. Hugetlb takes offsets of its own page and of others."""
    some = st.sampled_from((1, 7, 8, 256, 511, PMD_PAGES, 3 * PMD_PAGES, PMD_PAGES + 1, PUD_PAGES // 2))
    return st.one_of(st.just(0), st.just(0), some).map(lambda pages: pages * PAGE_BYTES)


@st.composite
def points(draw: st.DrawFn, max_vcpus: int = 16, max_threads: int = 3, gigantic: bool = True) -> dict[str, Any]:
    """Keyword arguments of simulate(), without steps; `gigantic`: with 1 GiB pages, rarely."""
    kernel = draw(st.sampled_from(KERNELS))
    mmu = draw(st.sampled_from((Mmu.TDP, Mmu.TDP, Mmu.TDP, Mmu.LEGACY, Mmu.SHADOW)))
    policies = [p for p in policies_of(kernel) if mmu == Mmu.TDP or p != "change_pte_prefetch"]
    policy = draw(st.sampled_from(policies + [p for p in policies if p in ("mainline", "change_pte_prefetch")] * 2))
    common = (Backing.ANONYMOUS, Backing.ANONYMOUS_THP, Backing.ANONYMOUS_THP, Backing.ANONYMOUS_DEFAULT)
    rare = (GIGANTIC[draw(st.integers(0, 1))],) if gigantic else ()
    backing = draw(st.sampled_from((*[b for b in Backing if b not in GIGANTIC], *common * 3, *rare)))
    pages = draw(pages_of(backing))
    pre_fault = bool(behaviours(kernel, policy)[Behaviour.PRE_FAULT_MEMORY]) and mmu != Mmu.SHADOW
    prealloc = [p for p in Prealloc if pre_fault or not p & Prealloc.PRE_FAULT]
    if backing in GIGANTIC:
        prealloc = [Prealloc.NONE]
    khugepaged, ksm = draw(daemons())
    cores = draw(st.one_of(st.none(), st.integers(1, 3), st.integers(1, max_vcpus)))
    return {
        "kernel": kernel,
        "policy": policy,
        "mmu": mmu,
        "backing": backing,
        "memory": pages * PAGE_BYTES,
        "vcpus": draw(st.one_of(st.integers(1, min(4, max_vcpus)), st.integers(1, max_vcpus))),
        "cores": cores,
        "smt": draw(st.sampled_from((1, 2))) if cores else 1,
        "thp_enabled": draw(st.sampled_from((ThpEnabled.MADVISE, ThpEnabled.ALWAYS, ThpEnabled.ALWAYS, ThpEnabled.NEVER))),
        "use_zero_page": draw(st.sampled_from((True, True, False))),
        "thp_failure": draw(st.sampled_from((0.0, 0.0, 0.0, 0.4, 1.0))),
        "offset": draw(offsets(backing)),
        "guest_page": draw(st.sampled_from((PMD_BYTES, PMD_BYTES, PAGE_BYTES))),
        "nx_huge_pages": draw(st.sampled_from((False, False, True))),
        "eager_page_split": draw(st.sampled_from((True, True, False))),
        "pml": draw(st.sampled_from((False, False, True))),
        "khugepaged": khugepaged,
        "ksm": ksm,
        "prealloc": draw(st.sampled_from((Prealloc.NONE,) * 5 + tuple(prealloc))),
        "prealloc_threads": draw(st.integers(1, max_threads)),
        "costs": draw(costs()),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "replicate": draw(st.integers(0, 5)),
        "max_events": MAX_EVENTS,
    }


def unit_of(backing: Backing) -> int:
    """Pages of the backing's own page: what dontneed must be multiples of."""
    traits = traits_of(backing, ThpEnabled.ALWAYS)
    return 1 if not traits.hugetlb else PUD_PAGES if traits.gigantic else PMD_PAGES


@st.composite
def configurations(draw: st.DrawFn, max_vcpus: int = 16, max_threads: int = 3, gigantic: bool = True) -> dict[str, Any]:
    """Keyword arguments of simulate(): a point and steps that can follow one another on it."""
    point = draw(points(max_vcpus, max_threads, gigantic))
    by_op = steps_of(point["memory"] // PAGE_BYTES, point["vcpus"], unit_of(point["backing"]))
    if max_threads == 1:
        by_op["populate"] = st.builds(Populate, access=st.sampled_from((Access.READ, Access.WRITE)))
    ops = st.sampled_from(("touch",) * 6 + ("touch_list",) * 3 + tuple(by_op))
    checks = checks_of(point)
    steps = []
    for _ in range(draw(st.integers(1, 7))):
        step = draw(by_op[draw(ops)])
        if not checks.fault(step):
            steps.append(step)
    return point | {"steps": steps}
