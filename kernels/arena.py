"""Arrays that are used for one point after another, so that their addresses are looked up once."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels.alone import Scratch, new_scratch
from kernels.cost import Cost
from kernels.loops import bind_loop
from kernels.policy import Behaviour
from kernels.results import new_results
from kernels.spec import HostPmd, HostPte, Setup, Stream
from kernels.state import Env, Geometry, Machine, new_machine
from kernels.workload import NO_LISTS, Lists

MOST_BYTES = 1 << 20  # of a machine that is kept: a larger one is made anew, since most of its pages are never touched
KEPT_BYTES = 32 << 20  # of all that are kept


class Place(NamedTuple):
    """A machine, and what runs a step on it (loops.bind_loop())."""

    machine: Machine
    scratch: Scratch
    run: Callable[[int, int, int], int]
    used: bool  # it holds an earlier point


class Arena:
    """An environment, results, and machines by their size. What is in a machine counts until the next point."""

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
        self.results = new_results(0, 0)
        self._hists = hists
        self._places: dict[tuple[Geometry, int], Place] = {}
        self._bytes = 0
        self._shared: tuple[Machine, Scratch] | None = None  # whose arrays of one size for all are used by all

    def place(self, geometry: Geometry, actors: int, trace_rows: int) -> Place:
        """A machine with nothing mapped, or (`used`) one that has to be cleared."""
        size = geometry, actors
        if trace_rows or size not in self._places:
            machine, scratch = self._made(geometry, actors, trace_rows)
            place = Place(machine, scratch, bind_loop(machine, self.env, scratch, self.results), used=False)
            if not trace_rows:
                self._keep(size, place)
            return place
        return self._places[size]

    def run_with(self, place: Place, lists: Lists) -> Callable[[int, int, int], int]:
        """What runs a step whose accesses need this besides the vector of Stream."""
        if lists is NO_LISTS:
            return place.run
        return bind_loop(place.machine, self.env._replace(**lists._asdict()), place.scratch, self.results)

    def make_room(self, steps: int, points: int) -> None:
        """For so many rows in all."""
        old = self.results
        if steps > len(old.steps) or points > len(old.points):
            self.results = new_results(max(steps, 2 * len(old.steps)), max(points, 2 * len(old.points)), self._hists)
            for mine, theirs in zip(self.results, old, strict=True):
                mine[: len(theirs)] = theirs
            self._forget()

    def _made(self, geometry: Geometry, actors: int, trace_rows: int) -> tuple[Machine, Scratch]:
        machine = new_machine(geometry, actors, trace_rows)
        scratch = new_scratch(machine)
        if self._shared is None:
            self._shared = machine, scratch
        return machine._replace(hist=self._shared[0].hist), self._shared[1]._replace(modes=scratch.modes)

    def _keep(self, size: tuple[Geometry, int], place: Place) -> None:
        nbytes = sum(array.nbytes for array in place.machine)
        if nbytes > MOST_BYTES:
            return
        if self._bytes + nbytes > KEPT_BYTES:
            self._forget()
        self._places[size] = place._replace(used=True)
        self._bytes += nbytes

    def _forget(self) -> None:
        self._places.clear()
        self._bytes = 0
