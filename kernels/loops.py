"""The one compiled function that runs a step: all loops are in it, since most of each is what they share, and is compiled once."""

from collections.abc import Callable
from functools import lru_cache

from kernels.alone import Scratch, run_alone
from kernels.draws import step_key_of
from kernels.engine import run_call, run_many
from kernels.jit import jit
from kernels.learned import PageTable, new_page_table
from kernels.program import Passed, Program, as_passed
from kernels.results import TOO_LONG, Results, begin_row, end_row, give_up, write_row
from kernels.skip import Skip, new_skip
from kernels.spec import NEVER, PMD_ORDER, PMD_PAGES, Setup, Stream, Vm
from kernels.state import Env, Geometry, Machine, clear_machine, new_machine
from kernels.tasks import Chance, Chances, Loop, Task, Tasks


@lru_cache(maxsize=1)
def lab() -> tuple[Machine, PageTable]:
    """Where the loop of a lone actor learns what an access does, and what it learned in its last step."""
    return new_machine(Geometry(PMD_PAGES, 0, PMD_ORDER), 1), new_page_table()


@lru_cache(maxsize=1)
def _always_passed() -> tuple[Passed, Passed, Passed]:
    """The lab, its table, where skip_hits keeps its place during a step."""
    machine, table = lab()
    return as_passed(machine), as_passed(table), as_passed(new_skip())


@jit
def run_as(loop: int, m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, skip: Skip, scratch: Scratch) -> int:
    if loop == Loop.CALL:
        return run_call(m, env)
    if loop == Loop.MANY:
        return run_many(m, env, budget)
    return run_alone(m, env, budget, lab, table, skip, scratch)


@jit
def begin_point(m: Machine, env: Env, chances: Chances, point: int, clear: int, results: Results) -> None:
    if clear:
        clear_machine(m)
    env.setup[Setup.THP_FAILURE_CUT] = chances.rows[point, Chance.THP_FAILURE_CUT]
    m.vm[Vm.KHUGE_TIME], m.vm[Vm.KSM_TIME] = env.setup[Setup.KHUGE_SLEEP_NS], env.setup[Setup.KSM_SLEEP_NS]
    begin_row(results)


@jit
def set_stream(env: Env, tasks: Tasks, chances: Chances, point: int, step: int) -> None:
    for i in range(len(env.stream)):
        env.stream[i] = tasks.streams[step, i]
    seed, replicate = chances.rows[point, Chance.SEED], chances.rows[point, Chance.REPLICATE]
    env.stream[Stream.KEY] = step_key_of(seed, replicate, tasks.rows[step, Task.NUMBER])


@Program
def _run(
    point: int,
    end_point: int,
    first_step: int,
    end_step: int,
    clear: int,
    m: Machine,
    env: Env,
    tasks: Tasks,
    chances: Chances,
    lab: Machine,
    table: PageTable,
    skip: Skip,
    scratch: Scratch,
    results: Results,
) -> int:
    while point < end_point:
        if first_step == 0:
            begin_point(m, env, chances, point, clear, results)
        for step in range(first_step, end_step):
            if m.vm[Vm.CLOCK] + tasks.rows[step, Task.MOST_NS] >= NEVER:
                give_up(results, step, TOO_LONG)
                return point
            set_stream(env, tasks, chances, point, step)
            ns = run_as(tasks.rows[step, Task.LOOP], m, env, tasks.rows[step, Task.BUDGET], lab, table, skip, scratch)
            if ns < 0:
                give_up(results, step, ns)
                return point
            write_row(m, results, ns, ns if tasks.rows[step, Task.GUEST] else 0)
            m.vm[Vm.CLOCK] += ns
        if end_step == tasks.steps[0]:
            end_row(results)
        clear = 1
        point += 1
    return point


def bind_run(
    m: Machine, scratch: Scratch, env: Env, tasks: Tasks, chances: Chances, results: Results
) -> Callable[[int, int, int, int, int], int]:
    """What runs points on these arrays, one after the other: points [from, to) of the chances, steps [from, to) of the tasks of each
    (a part of a single point's steps goes on where the part before stopped), and whether the machine has to be cleared at first.

    It returns the point after the last, or the one that came to no end, whose results are given up: Results.at says why."""
    return _run.bind(None, None, None, None, None, m, env, tasks, chances, *_always_passed(), scratch, results)
