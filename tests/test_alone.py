"""The lone actor's loop against the plain event loop: long steps, so that blocks end and regions change inside them.

A trace makes simulate() take the event loop. The generator of accesses is compared one by one as well.
"""

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import Access, Order, PreFault, Run, Touch, TouchList, simulate
from kernels.blocks import BLOCK, VISITS, fill_block, next_run
from kernels.jit import entry
from kernels.simulate import BudgetError
from kernels.spec import PAGE_BYTES, PMD_BYTES, PMD_PAGES, Actor, Backing, Call, Cpu, Mmu, Stream, Vm
from kernels.state import Bytes, Env, Geometry, Int64s, Machine, new_machine
from kernels.steps import ChildExit, Collapse, DirtyLog, DontNeed, Fork, HostTouch, KsmMerge, Populate, Step, VmmCow
from kernels.workload import fetch_access, start_actor, stream_of
from tests.same_run import check_same
from tests.strategies import checks_of, configurations, points, thorough


def compare(**configuration: Any) -> Run:
    """Both loops; a machine that makes no progress makes none in either."""
    try:
        slow = simulate(**configuration, trace_rows=1)
    except BudgetError:
        with pytest.raises(BudgetError):
            simulate(**configuration)
        raise
    fast = simulate(**configuration)
    check_same(fast, slow)
    return fast


@st.composite
def long_touch(draw: st.DrawFn, pages: int) -> Touch:
    """Up to several blocks of accesses."""
    start, end = draw(st.sampled_from(((0.0, 1.0), (0.0, 1.0), (0.25, 1.0), (0.1, 0.6), (0.5, 0.51))))
    every = draw(st.sampled_from((PAGE_BYTES, PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES, 1000, 70_001, PMD_BYTES)))
    at = draw(st.sampled_from((0, 0, 1, PAGE_BYTES, 3 * PAGE_BYTES + 5)))
    order = draw(st.sampled_from((Order.SEQUENTIAL, Order.RANDOM, Order.RANDOM, Order.STRIDED, Order.ZIPF)))
    repeat = draw(st.booleans())
    units = max(0, -(-((int(end * pages) - int(start * pages)) * PAGE_BYTES - at) // every))
    most = 4 * BLOCK if repeat or order == Order.ZIPF else units
    return Touch(
        access=draw(st.sampled_from((Access.WRITE, Access.READ, Access.PAIRS, Access.MIXED, Access.MIXED, Access.EXEC))),
        order=order,
        start=start,
        end=end,
        every=every,
        at=at,
        stride=draw(st.sampled_from((1, 2, 7, 512, 513, 5000))),
        theta=draw(st.sampled_from((0.0, 0.99))),
        write_percent=draw(st.sampled_from((0.0, 30.0, 100.0))),
        read_first=draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        touches=draw(st.none() | st.integers(0, most)),
        repeat=repeat,
        window=draw(st.sampled_from((1, 2, 7, VISITS - 1, VISITS, VISITS + 1, 1000))),
        think_ns=draw(st.sampled_from((0, 3))),
    )


@st.composite
def long_list(draw: st.DrawFn, pages: int) -> TouchList:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.sampled_from((0, 1, 100, BLOCK, 3 * BLOCK + 1)))
    return TouchList(np.zeros(rows, np.int64), rng.integers(0, draw(st.sampled_from((1, pages))), rows), rng.random(rows) < 0.4)


def steps_of(pages: int) -> st.SearchStrategy[Step]:
    """Mostly touches; what comes between them leaves memory in every state."""
    accesses = st.sampled_from((Access.READ, Access.WRITE))
    states = st.sampled_from((Call.LOG_ON, Call.LOG_GET, Call.LOG_OFF))
    parts = st.sampled_from(((0.0, 1.0), (0.0, 0.5), (0.3, 0.8)))
    calls = (
        st.just(Fork()),
        st.just(ChildExit()),
        st.builds(DirtyLog, states),
        parts.map(lambda part: DontNeed(*part)),
        parts.map(lambda part: Collapse(*part)),
        st.builds(KsmMerge, fraction=st.sampled_from((0.1, 1.0))),
    )
    actors = (
        st.builds(Populate, access=accesses),
        st.just(PreFault()),
        st.builds(HostTouch, access=accesses, every=st.sampled_from((PAGE_BYTES, 3 * PAGE_BYTES, PMD_BYTES))),
        st.just(VmmCow(pages=pages + 9)),
    )
    touches = long_touch(pages)
    return st.one_of(touches, touches, touches, long_list(pages), st.one_of(*calls), st.one_of(*actors))


@st.composite
def lives(draw: st.DrawFn) -> dict[str, Any]:
    """A point with one vCPU, without daemons, and steps that can follow one another on it."""
    point = draw(points(max_vcpus=1, max_threads=1, gigantic=False)) | {"khugepaged": None, "ksm": None, "max_events": None}
    checks = checks_of(point)
    steps: list[Step] = []
    for step in draw(st.lists(steps_of(point["memory"] // PAGE_BYTES), min_size=1, max_size=8)):
        if not checks.fault(step):
            steps.append(step)
    return point | {"steps": steps}


@thorough
@given(lives())
def test_lone_actor_equals_the_event_loop(configuration: dict[str, Any]) -> None:
    compare(**configuration)


def mixed(touches: int, **parameters: Any) -> Touch:
    return Touch(access=Access.MIXED, write_percent=40.0, order=Order.RANDOM, repeat=True, touches=touches, **parameters)


@pytest.mark.parametrize("backing", [b for b in Backing if b.name.endswith("1GB")])
@pytest.mark.parametrize("offset", [0, 5 * PMD_BYTES])
def test_gigantic_pages(backing: Backing, offset: int) -> None:
    """2M regions change their mode with the 1G entry above them: by the first touch, by logging, by the copy after a fork."""
    private = backing == Backing.ANONYMOUS_HUGETLB_1GB
    log = [DirtyLog(Call.LOG_ON), mixed(3000), DirtyLog(Call.LOG_GET), mixed(3000), DirtyLog(Call.LOG_OFF), mixed(3000)]
    family = [Fork(), mixed(3000), ChildExit(), mixed(500)] if private else []
    for eager in (False, True):
        compare(backing=backing, memory=2 << 30, offset=offset, eager_page_split=eager, steps=[mixed(2000), *log, *family])


@pytest.mark.parametrize("mmu", Mmu)
@pytest.mark.parametrize("offset", [0, 1, 255, 511])
@pytest.mark.parametrize("backing", [Backing.ANONYMOUS, Backing.ANONYMOUS_THP, Backing.SHMEM, Backing.PRIVATE_MEMFD])
def test_shifted_slots(backing: Backing, offset: int, mmu: Mmu) -> None:
    """Where host regions lie across the guest's, each part has its own mode."""
    steps = [Touch(access=Access.READ, end=0.4), mixed(5000), Touch(), Touch(access=Access.READ, order=Order.STRIDED, stride=300)]
    compare(backing=backing, memory=5 * PMD_BYTES + 77 * PAGE_BYTES, offset=offset * PAGE_BYTES, mmu=mmu, steps=steps)


@pytest.mark.parametrize("pml", [False, True])
@pytest.mark.parametrize("backing", [Backing.ANONYMOUS, Backing.ANONYMOUS_THP, Backing.SHARED_HUGETLB_2MB])
def test_dirty_logging(backing: Backing, pml: bool) -> None:
    """The log is filled, got and filled again; with PML its buffer overflows across blocks."""
    again = [DirtyLog(Call.LOG_GET), mixed(4 * BLOCK)] * 2
    steps = [mixed(2000), DirtyLog(Call.LOG_ON), mixed(4 * BLOCK), *again, DirtyLog(Call.LOG_OFF), mixed(2000)]
    compare(backing=backing, memory=4 * PMD_BYTES, pml=pml, steps=steps)


@pytest.mark.parametrize("nx", [False, True])
@pytest.mark.parametrize("thp_failure", [0.0, 0.5])
def test_huge_pages_that_are_made_refused_and_split(nx: bool, thp_failure: float) -> None:
    read = mixed(3000, read_first=1.0)
    steps = [read, Touch(access=Access.EXEC, order=Order.RANDOM), mixed(3000), Fork(), mixed(3000), ChildExit(), mixed(3000), mixed(3000)]
    for kernel in ("6.1", "6.12", "7.3"):
        compare(kernel=kernel, backing="anonymous_thp", memory=9 * PMD_BYTES, nx_huge_pages=nx, thp_failure=thp_failure, steps=steps)


def test_all_hits_on_huge_pages_are_counted_without_their_addresses() -> None:
    hits = [mixed(5000), mixed(5000, read_first=0.5), Touch(access=Access.PAIRS, window=7), Touch(access=Access.READ), Touch()]
    run = compare(backing="anonymous_thp", memory=7 * PMD_BYTES, steps=[Touch(every=PMD_BYTES), *hits])
    assert all(step.counters["hits"] == step.counters["touches"] > 0 for step in run.steps[1:])


def test_a_page_again_and_again() -> None:
    """One unit, many visits: accesses of one block depend on each other."""
    for order in (Order.SEQUENTIAL, Order.RANDOM, Order.STRIDED):
        compare(
            memory=PMD_BYTES, steps=[Touch(access=Access.MIXED, write_percent=50.0, order=order, end=1 / 512, repeat=True, touches=3000)]
        )


@thorough
@given(configurations(max_vcpus=1, max_threads=1))
def test_any_life_of_one_vcpu_equals_the_event_loop(configuration: dict[str, Any]) -> None:
    with suppress(BudgetError):  # daemons can make a storm, in either
        compare(**configuration)


def test_the_budget_ends_a_step_in_both() -> None:
    """Of what goes through the phases; an access that is looked up is no event."""
    with pytest.raises(BudgetError):
        compare(memory=PMD_BYTES, steps=[VmmCow(pages=10)], max_events=9)


@entry
def one_by_one(m: Machine, env: Env, found: Int64s) -> int:
    start_actor(m, env, np.int64(0))
    made = 0
    while fetch_access(m, env, np.int64(0)):
        found[made] = m.cpu[0, Cpu.PAGE] << 1 | m.cpu[0, Cpu.WRITE]
        made += 1
    return made


@entry
def in_blocks(m: Machine, env: Env, found: Int64s, units: Int64s, block: Int64s) -> int:
    start_actor(m, env, np.int64(0))
    lo = m.cpu[0, Cpu.LO]
    index, limit, made = m.cpu[0, Cpu.INDEX], m.cpu[0, Cpu.LIMIT], 0
    while index < limit:
        run = next_run(env, index, limit)
        count, used = fill_block(env, run, index, lo, m.cpu[0, Cpu.HI] - lo, m.vm[Vm.SHIFT], units, block)
        for i in range(count):
            found[made + i] = block[i]
        made += count
        index += used
    return made


@thorough
@given(
    st.sampled_from((1, 3, 256, 512, 1000, 4096, 10_000)).flatmap(lambda n: st.tuples(st.just(n), long_touch(n) | long_list(n))),
    st.integers(0, 2**64 - 1),
)
def test_blocks_hold_the_same_accesses(sized: tuple[int, Touch | TouchList], key: int) -> None:
    pages, step = sized
    made = stream_of(step, pages, 1, key)
    m = new_machine(Geometry(pages, 3, 9), 1)
    none: Bytes = np.zeros((1, 1, 2), np.uint8)
    vector = np.zeros(0, np.int64)
    env = Env(vector, vector, vector, none, made.stream, *made.lists)
    assert made.stream[Stream.ACTOR] == Actor.GUEST
    scalar, blocks = np.zeros(100_000, np.int64), np.zeros(100_000, np.int64)
    count = one_by_one(m, env, scalar)
    assert in_blocks(m, env, blocks, np.zeros(BLOCK, np.int64), np.zeros(BLOCK, np.int64)) == count
    assert np.array_equal(scalar[:count], blocks[:count])


def test_an_access_costs_no_more_in_a_larger_guest() -> None:
    """What a step does once per region of the guest stays small: 4 GiB, one touch."""
    run = compare(memory=4 << 30, steps=[Touch(touches=1)])
    assert run.counters["touches"] == 1
    assert len(run.machine.spte_pmd) == (4 << 30) // PMD_BYTES == 4 * PMD_PAGES
