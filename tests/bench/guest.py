"""A guest whose steps can be run again and again on the same arrays, and timed without what simulate() does around them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels import Access, Order, Run, Touch, arena, simulate
from kernels.loops import bind_run
from kernels.results import Results
from kernels.spec import Vm
from kernels.state import Env, Int64s, Machine
from kernels.tasks import Loop, Task, Tasks

GIB, TIB = 1 << 30, 1 << 40
LARGE = 1 << 20  # arrays up to this size are copied back, larger ones hold nothing at first
RUNS = 7


def mixed(touches: int, write_percent: float = 50.0) -> Touch:
    return Touch(access=Access.MIXED, write_percent=write_percent, order=Order.RANDOM, repeat=True, touches=touches)


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


class Guest:
    """One call of simulate(), its steps kept."""

    def __init__(self, **parameters: Any) -> None:
        self.calls: list[tuple[arena.Runs, int]] = []  # what runs each step, and the step's number
        self.first: list[Any] = []
        self.env: Env
        self.stream: Int64s  # of the last step
        self.tasks: Tasks
        arena.bind_run = self._recording  # type: ignore[assignment]
        try:
            self.run: Run = simulate(**parameters)
        finally:
            arena.bind_run = bind_run
        self.machine: Machine = self.run.machine

    def _recording(self, m: Machine, scratch: Any, env: Env, tasks: Tasks, chances: Any, results: Results) -> arena.Runs:
        """bind_run(), which notes what it is asked for."""
        run = bind_run(m, scratch, env, tasks, chances, results)

        def runs(point: int, end: int, first_step: int, end_step: int, clear: int) -> int:
            if not self.calls:
                self.first = [array.copy() if array.nbytes <= LARGE else None for array in m]
            self.calls += [(run, step) for step in range(first_step, end_step)]
            self.env, self.tasks, self.results = env, tasks, results
            done = run(point, end, first_step, end_step, clear)
            self.stream = env.stream.copy()
            return done

        return runs

    def reset(self) -> None:
        """As before the first step."""
        for array, was in zip(self.machine, self.first, strict=True):
            array[...] = 0 if was is None else was

    def step(self, number: int) -> float:
        """CPU seconds of one step, from the state that is there."""
        run, step = self.calls[number]
        self.results.at[:] = 0
        return cpu_seconds(lambda: run(0, 1, step, step + 1, 0))

    def step_as_many(self, number: int) -> float:
        """The same in the event loop, also with one vCPU."""
        row, as_it_was = self.tasks.rows[self.calls[number][1]], self.tasks.rows.copy()
        row[Task.LOOP] = Loop.MANY
        seconds = self.step(number)
        self.tasks.rows[:] = as_it_was
        return seconds

    def fresh(self, event_loop: bool = False) -> float:
        """CPU seconds of the last step, after all others from the start."""
        self.reset()
        for number in range(len(self.calls) - 1):
            self.step(number)
        last = len(self.calls) - 1
        return self.step_as_many(last) if event_loop else self.step(last)

    @property
    def touches(self) -> int:
        """Of the last step."""
        return self.run.steps[-1].counters["touches"]

    @property
    def events(self) -> int:
        """Of the last step that ran in the event loop."""
        return int(self.machine.vm[Vm.EVENTS])

    def faulting(self) -> float:
        """Part of the last step's touches that fault."""
        return 1 - self.run.steps[-1].counters["hits"] / self.touches


def medians(*measures: Callable[[], float], runs: int = RUNS) -> list[float]:
    """The median of each, run in turns; the first turn does not count."""
    found = [[measure() for measure in measures] for _ in range(runs + 1)][1:]
    return [statistics.median(column) for column in np.array(found).T.tolist()]
