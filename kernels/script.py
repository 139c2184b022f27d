"""The steps of a workload, made ready for a machine: their accesses, which loop runs them, how long they may take."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from kernels.checks import MOST_EVENTS, PointError
from kernels.cost import Charges
from kernels.spec import NEVER, Actor, Order, Prealloc, Stream
from kernels.steps import Populate, PreFault, Step, Touch, TouchList, op_of
from kernels.tasks import Loop, Tasks, new_tasks
from kernels.workload import NO_LISTS, Lists, accesses_of, stream_of

KEPT = 1 << 14  # steps that are kept of a script, for different terms
EVENTS_PER_ACCESS = 4096  # a step that needs more has run into a storm that does not end
EVENTS_PER_STEP = 64  # its time, if nothing happens in it
EVENTS_AT_ONCE = 1 << 19
FAULTS_PER_PAGE = 4  # a read, a write, each after a loss of the page
NEVER_YEARS = NEVER // (365 * 86_400 * 10**9)


class Daemons(NamedTuple):
    """What khugepaged and KSM scan; no sleep: the daemon does not run."""

    khuge_pages: int
    khuge_sleep_ns: int
    ksm_pages: int
    ksm_sleep_ns: int

    @property
    def run(self) -> bool:
        return bool(self.khuge_sleep_ns or self.ksm_sleep_ns)


class Terms(NamedTuple):
    """All that a step's preparation depends on, besides the script."""

    prealloc: Prealloc
    prealloc_threads: int
    pages: int
    vcpus: int
    charges: Charges
    daemons: Daemons
    traced: bool
    max_events: int | None


class Part(NamedTuple):
    """Neighbours, from `first` up to `end`, whose accesses need the same lists."""

    lists: Lists
    first: int
    end: int


class Ready(NamedTuple):
    """Steps that can be run with any seed."""

    ops: tuple[str, ...]  # what they do, as in a study file
    accesses: tuple[int, ...]
    tasks: Tasks
    parts: tuple[Part, ...]
    at_once: int  # points that take no more than some milliseconds together, and can be run in one call


class Script:
    """Steps that are run on one machine after another; how they were made ready is kept."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.threads = max((step.threads for step in steps if isinstance(step, Populate)), default=0)
        self._most = 1 if any(isinstance(step, TouchList) for step in steps) else max(1, KEPT // max(1, len(steps)))  # lists are large
        self._kept: dict[Terms, Ready] = {}

    def ready(self, terms: Terms) -> Ready:
        """Raises PointError, WorkloadError."""
        found = self._kept.get(terms)
        if found is None:
            if len(self._kept) >= self._most:
                self._kept.clear()
            todo = all_steps(terms.prealloc, terms.prealloc_threads, self.steps)
            found = self._kept[terms] = _ready(todo, terms)
        return found


def all_steps(prealloc: Prealloc, prealloc_threads: int, steps: Sequence[Step]) -> list[tuple[Step, int]]:
    """What runs: the VMM's preallocation, then the workload, each with its number among the workload's steps."""
    before: list[tuple[Step, int]] = []
    if prealloc & Prealloc.POPULATE:
        before.append((Populate(threads=prealloc_threads), -1))
    if prealloc & Prealloc.PRE_FAULT:
        before.append((PreFault(), -1))
    return before + [(step, i) for i, step in enumerate(steps)]


def _ready(todo: Sequence[tuple[Step, int]], terms: Terms) -> Ready:
    made = [stream_of(step, terms.pages, terms.vcpus, 0) for step, _ in todo]
    accesses, tasks = tuple(map(accesses_of, made)), new_tasks(len(todo))
    tasks.steps[0] = len(todo)
    for row, ((step, number), each) in enumerate(zip(todo, made, strict=True)):
        stream = each.stream.tolist()
        tasks.streams[row] = stream
        tasks.rows[row] = (
            _loop_of(stream, terms),
            number,
            isinstance(step, Touch | TouchList),
            _budget(stream, accesses[row], terms) if terms.max_events is None else terms.max_events,
            min(NEVER, _most_ns(stream, accesses[row], terms)),
        )
    events = [
        EVENTS_PER_STEP + 16 * count + _daemon_events(each.stream.tolist(), count, terms)
        for each, count in zip(made, accesses, strict=True)
    ]
    return Ready(
        ops=tuple([op_of(step) for step, _ in todo]),
        accesses=accesses,
        tasks=tasks,
        parts=_parts([each.lists for each in made]),
        at_once=max(1, EVENTS_AT_ONCE // (1 + sum(events))),
    )


def _parts(lists: Sequence[Lists]) -> tuple[Part, ...]:
    if not lists:
        return (Part(NO_LISTS, 0, 0),)
    cuts = [0, *(i for i in range(1, len(lists)) if lists[i] is not lists[i - 1]), len(lists)]
    return tuple([Part(lists[first], first, end) for first, end in pairwise(cuts)])


def _loop_of(stream: Sequence[int], terms: Terms) -> Loop:
    """The lone actor's loop where there is one actor and nobody beside it or watching. Raises PointError."""
    beside = terms.daemons.run or terms.traced
    if stream[Stream.SKIP_HITS] and beside:
        raise PointError("skip_hits leaves no single touch to trace, or to run beside khugepaged or KSM: leave it out")
    if stream[Stream.ACTOR] == Actor.CALL:
        return Loop.CALL
    return Loop.MANY if beside or stream[Stream.ACTORS] > 1 else Loop.ALONE


def _daemon_events(stream: Sequence[int], accesses: int, terms: Terms) -> int:
    """About how many events the daemons need at most while a step runs."""
    ns = stream[Stream.IDLE_NS] + accesses * (stream[Stream.THINK_NS] + 10 * terms.charges.total_ns)
    daemons, events = terms.daemons, 0
    for pages, sleep in ((daemons.khuge_pages, daemons.khuge_sleep_ns), (daemons.ksm_pages, daemons.ksm_sleep_ns)):
        if sleep:
            events += (1 + ns // sleep) * 16 * (pages + 1)
    return events


def _budget(stream: Sequence[int], accesses: int, terms: Terms) -> int:
    return min(MOST_EVENTS, 65536 + EVENTS_PER_ACCESS * accesses + _daemon_events(stream, accesses, terms))


def _most_ns(stream: Sequence[int], accesses: int, terms: Terms) -> int:
    """Each actor's own accesses, one after the other, and the faults of all."""
    own = accesses if stream[Stream.ORDER] == Order.LIST else -(-accesses // max(1, stream[Stream.ACTORS])) + 1
    faults = min(accesses, FAULTS_PER_PAGE * terms.pages)
    touch_ns = stream[Stream.THINK_NS] + terms.charges.touch_ns
    return own * touch_ns + faults * terms.charges.total_ns + stream[Stream.IDLE_NS]
