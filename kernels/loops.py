"""The one compiled function that runs a step: all loops are in it, since most of each is what they share, and is compiled once."""

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache

from kernels.alone import Scratch, new_scratch, run_alone
from kernels.engine import run_call, run_many
from kernels.jit import jit
from kernels.learned import PageTable, new_page_table
from kernels.program import Passed, Program, as_passed
from kernels.results import BEGINS, CLEARS, NOTED, Results, begin_row, new_results, write_row
from kernels.skip import Skip, new_skip
from kernels.spec import PMD_ORDER, PMD_PAGES, Setup, Vm
from kernels.state import Env, Geometry, Machine, clear_machine, new_machine


class Loop(IntEnum):
    """How a step is run."""

    MANY = 0  # event by event
    ALONE = 1  # a lone actor
    CALL = 2  # a system call of the VMM


@lru_cache(maxsize=1)
def lab() -> tuple[Machine, PageTable]:
    """Where the loop of a lone actor learns what an access does, and what it learned in its last step."""
    return new_machine(Geometry(PMD_PAGES, 0, PMD_ORDER), 1), new_page_table()


@lru_cache(maxsize=1)
def _always_passed() -> tuple[Passed, Passed, Passed]:
    """The lab, its table, where skip_hits keeps its place during a step."""
    machine, table = lab()
    return as_passed(machine), as_passed(table), as_passed(new_skip())


@lru_cache(maxsize=1)
def _not_used() -> tuple[Passed, Passed]:
    """A scratch for loops that need none, results for steps whose are not written down."""
    return as_passed(new_scratch(lab()[0])), as_passed(new_results(0, 0))


@jit
def begin_point(m: Machine, env: Env, results: Results, marks: int) -> None:
    if marks & CLEARS:
        clear_machine(m)
    m.vm[Vm.KHUGE_TIME], m.vm[Vm.KSM_TIME] = env.setup[Setup.KHUGE_SLEEP_NS], env.setup[Setup.KSM_SLEEP_NS]
    begin_row(results)


@jit
def run_as(loop: int, m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, skip: Skip, scratch: Scratch) -> int:
    if loop == Loop.CALL:
        return run_call(m, env)
    if loop == Loop.MANY:
        return run_many(m, env, budget)
    return run_alone(m, env, budget, lab, table, skip, scratch)


@Program
def _run(
    loop: int,
    marks: int,
    m: Machine,
    env: Env,
    budget: int,
    lab: Machine,
    table: PageTable,
    skip: Skip,
    scratch: Scratch,
    results: Results,
) -> int:
    if marks & BEGINS:
        begin_point(m, env, results, marks)
    ns = run_as(loop, m, env, budget, lab, table, skip, scratch)
    if ns >= 0 and marks & NOTED:
        write_row(m, results, ns, marks)
        m.vm[Vm.CLOCK] += ns
    return ns


def bind_loop(m: Machine, env: Env, scratch: Scratch | None = None, results: Results | None = None) -> Callable[[int, int, int], int]:
    """What runs one step on these arrays, given its Loop, what it is to its point (the marks of results.py), and its budget of events.

    It returns the step's ns, or why there is none: alone.NO_END when the budget ran out, alone.SPLIT. Without a scratch (that
    of the machine: alone.new_scratch()) only loops that need none may run."""
    no_scratch, no_results = _not_used()
    return _run.bind(None, None, m, env, None, *_always_passed(), scratch or no_scratch, results or no_results)


def run_loop(loop: Loop, m: Machine, env: Env, budget: int) -> int:
    """One step whose results are not written down. Returns as bind_loop() says."""
    return bind_loop(m, env, new_scratch(m) if loop == Loop.ALONE else None)(loop, 0, budget)
