"""Hypothesis strategies: whole configurations of `simulate()`, small enough for the reference to follow."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kernels.cost import DEFAULT_COSTS, Cost
from kernels.policy import PROPOSALS, Behaviour, PolicyError, behaviours
from kernels.spec import PAGE_BYTES, PMD_PAGES, Access, Backing, Order, Prealloc, Spread, ThpEnabled
from kernels.steps import Populate, PreFault, Step, Touch, TouchList, VmmCow

KERNELS = ("5.15", "6.1", "6.5", "6.6", "6.8", "6.10", "6.11", "6.13", "7.3")
UNITS_PER_STEP = 300  # of all vCPUs together
MAX_EVENTS = 60_000


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
    regions = st.sampled_from((1, 1, 1, 2, 3, 4))
    if backing == Backing.ANONYMOUS_HUGETLB_2MB:
        return regions.map(lambda n: n * PMD_PAGES)
    short = st.one_of(st.just(0), st.integers(0, PMD_PAGES - 1))
    return st.tuples(regions, short).map(lambda pair: pair[0] * PMD_PAGES - pair[1])


def costs() -> st.SearchStrategy[Mapping[Cost, int]]:
    """The defaults; or small values with zeros, so that events tie; or values of very different size."""
    small = st.lists(st.integers(0, 7), min_size=len(Cost), max_size=len(Cost))
    mixed = st.lists(st.sampled_from((0, 1, 3, 50, 1000, 1001, 250_000)), min_size=len(Cost), max_size=len(Cost))
    return st.one_of(st.just(DEFAULT_COSTS), st.one_of(small, mixed).map(lambda values: dict(zip(Cost, values, strict=True))))


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
        access=draw(st.sampled_from((Access.WRITE, Access.READ, Access.READ, Access.PAIRS, Access.MIXED))),
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


@st.composite
def step(draw: st.DrawFn, pages: int, vcpus: int, pre_fault: bool) -> Step:
    kinds = (Touch,) * 6 + (TouchList,) * 3 + (Populate, Populate, VmmCow) + (PreFault,) * pre_fault
    kind = draw(st.sampled_from(kinds))
    if kind is Touch:
        return draw(touch(pages, vcpus))
    if kind is TouchList:
        return draw(touch_list(pages, vcpus))
    if kind is Populate:
        return Populate(access=draw(st.sampled_from((Access.READ, Access.WRITE))), threads=draw(st.integers(1, 3)))
    return VmmCow(pages=draw(st.integers(0, 20))) if kind is VmmCow else PreFault()


@st.composite
def configurations(draw: st.DrawFn, max_vcpus: int = 8, max_threads: int = 3) -> dict[str, Any]:
    """Keyword arguments of simulate()."""
    kernel = draw(st.sampled_from(KERNELS))
    policies = policies_of(kernel)
    policy = draw(st.sampled_from(policies + [p for p in policies if p in ("mainline", "change_pte_prefetch")] * 2))
    backing = draw(st.sampled_from((*Backing, Backing.ANONYMOUS, Backing.ANONYMOUS_THP, Backing.ANONYMOUS_THP)))
    pages = draw(pages_of(backing))
    vcpus = draw(st.integers(1, max_vcpus))
    pre_fault = bool(behaviours(kernel, policy)[Behaviour.PRE_FAULT_MEMORY])
    prealloc = [p for p in Prealloc if pre_fault or not p & Prealloc.PRE_FAULT]
    some = step(pages, vcpus, pre_fault)
    return {
        "kernel": kernel,
        "policy": policy,
        "backing": backing,
        "memory": pages * PAGE_BYTES,
        "vcpus": vcpus,
        "thp_enabled": draw(st.sampled_from((ThpEnabled.MADVISE, ThpEnabled.ALWAYS, ThpEnabled.MADVISE, ThpEnabled.NEVER))),
        "use_zero_page": draw(st.sampled_from((True, True, False))),
        "prealloc": draw(st.sampled_from((Prealloc.NONE,) * 5 + tuple(prealloc))),
        "prealloc_threads": draw(st.integers(1, max_threads)),
        "costs": draw(costs()),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "replicate": draw(st.integers(0, 5)),
        "steps": [draw(some) for _ in range(draw(st.integers(1, 4)))],
        "max_events": MAX_EVENTS,
    }
