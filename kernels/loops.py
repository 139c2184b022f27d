"""The one compiled function that runs a step: all loops are in it, since most of each is what they share, and is compiled once."""

from enum import IntEnum
from functools import lru_cache

from kernels.alone import Scratch, new_scratch, run_alone
from kernels.engine import run_call, run_many
from kernels.learned import PageTable, new_page_table
from kernels.program import Passed, Program, as_passed
from kernels.skip import Skip, new_skip
from kernels.spec import PMD_ORDER, PMD_PAGES
from kernels.state import Env, Geometry, Machine, new_machine


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
def _always_passed() -> tuple[Passed, Passed, Passed, Passed]:
    """The lab, its table, where skip_hits keeps its place during a step, and a scratch for loops that have no use for one."""
    machine, table = lab()
    return as_passed(machine), as_passed(table), as_passed(new_skip()), as_passed(new_scratch(machine))


@Program
def _run(loop: int, m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, skip: Skip, scratch: Scratch) -> int:
    if loop == Loop.CALL:
        return run_call(m, env)
    if loop == Loop.MANY:
        return run_many(m, env, budget)
    return run_alone(m, env, budget, lab, table, skip, scratch)


def run_loop(loop: Loop, m: Machine, env: Env, budget: int) -> int:
    """One step. Returns its ns, or why there is none: alone.NO_END when the budget of events ran out, alone.SPLIT."""
    machine, table, skip, no_scratch = _always_passed()
    return _run(int(loop), m, env, budget, machine, table, skip, new_scratch(m) if loop == Loop.ALONE else no_scratch)
