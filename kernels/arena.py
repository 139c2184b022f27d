"""Arrays that are used for one point after another, so that compiled code is told of them once."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.alone import Scratch, new_scratch
from kernels.cost import Cost
from kernels.loops import bind_run
from kernels.policy import Behaviour
from kernels.results import new_results
from kernels.spec import HostPmd, HostPte, Setup, Stream
from kernels.state import Env, Geometry, Int64s, Machine, new_machine
from kernels.tasks import Chances, new_chances, new_tasks
from kernels.workload import NO_LISTS, Lists

MOST_BYTES = 1 << 20  # of a machine that is used again: a larger one is made anew, since most of its pages are never touched
KEPT_BYTES = 32 << 20  # of all that are kept
Runs = Callable[[int, int, int, int, int], int]  # see loops.bind_run()


class Place(NamedTuple):
    """A machine, and what runs points on it."""

    machine: Machine
    scratch: Scratch
    run: Runs
    used: bool  # it holds an earlier point
    small: bool  # clearing it costs less than another one


class Arena:
    """An environment; room for tasks, chances and results; machines by their size. What is in a machine counts until the next point."""

    def __init__(self, hists: bool = False) -> None:
        """`hists`: the latencies of each step are kept."""
        self.env = Env(
            policy=np.zeros(len(Behaviour), np.int64),
            costs=np.zeros(len(Cost), np.int64),
            setup=np.zeros(len(Setup), np.int64),
            actions=np.zeros((len(HostPmd), len(HostPte), 2), np.uint8),
            stream=np.zeros(len(Stream), np.int64),
            **NO_LISTS._asdict(),
        )
        self.tasks, self.chances, self.results, self._hists = new_tasks(1), new_chances(1), new_results(1, 1, hists), hists
        self._places: dict[tuple[Geometry, int], Place] = {}
        self._bytes = 0
        self._shared: tuple[Machine, Scratch] | None = None  # whose arrays of one size for all are used by all

    def place(self, geometry: Geometry, actors: int, trace_rows: int) -> Place:
        """A machine with nothing mapped, or (`used`) one that has to be cleared."""
        size = geometry, actors
        if trace_rows or size not in self._places:
            return self._made(geometry, actors, trace_rows)
        return self._places[size]

    def run_with(self, place: Place, lists: Lists) -> Runs:
        """What runs steps whose accesses need these lists."""
        return place.run if lists is NO_LISTS else self._bound(place.machine, place.scratch, self.env._replace(**lists._asdict()))

    def make_room(self, tasks: int = 0, chances: int = 0, steps: int = 0, points: int = 0) -> None:
        """For so many tasks and chances, and for so many rows of steps and points. What is there stays."""
        t, c, r = self.tasks, self.chances, self.results
        if tasks <= len(t.rows) and chances <= len(c.rows) and steps <= len(r.steps) and points <= len(r.points):
            return
        self.tasks = t._replace(rows=_grown(t.rows, tasks), streams=_grown(t.streams, tasks))
        self.chances = Chances(_grown(c.rows, chances))
        hists = _grown(r.hists, steps) if self._hists else r.hists
        self.results = r._replace(steps=_grown(r.steps, steps), points=_grown(r.points, points), hists=hists)
        self._forget()

    def _bound(self, machine: Machine, scratch: Scratch, env: Env) -> Runs:
        return bind_run(machine, scratch, env, self.tasks, self.chances, self.results)

    def _made(self, geometry: Geometry, actors: int, trace_rows: int) -> Place:
        machine = new_machine(geometry, actors, trace_rows)
        scratch = new_scratch(machine)
        if self._shared is None:
            self._shared = machine, scratch
        machine = machine._replace(hist=self._shared[0].hist)
        scratch = self._shared[1]._replace(modes=scratch.modes)
        nbytes = sum(array.nbytes for array in machine) - machine.hist.nbytes
        place = Place(machine, scratch, self._bound(machine, scratch, self.env), used=False, small=nbytes <= MOST_BYTES)
        if place.small and not trace_rows:
            if self._bytes + nbytes > KEPT_BYTES:
                self._forget()
            self._places[geometry, actors] = place._replace(used=True)
            self._bytes += nbytes
        return place

    def _forget(self) -> None:
        self._places.clear()
        self._bytes = 0


def _grown(array: Int64s, rows: int) -> Int64s:
    if rows <= len(array):
        return array
    found = np.zeros((max(rows, 2 * len(array)), *array.shape[1:]), np.int64)
    found[: len(array)] = array
    return found
