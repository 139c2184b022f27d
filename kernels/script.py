"""The steps of a workload, made ready for a machine: their accesses, which loop runs them, how long they may take."""

from collections.abc import Sequence
from typing import NamedTuple

from kernels.checks import PointError
from kernels.cost import Charges
from kernels.loops import Loop
from kernels.results import BEGINS, ENDS, GUEST, NOTED
from kernels.spec import NEVER, Actor, Order, Prealloc, Stream
from kernels.steps import Populate, PreFault, Step, Touch, TouchList, op_of
from kernels.workload import Accesses, accesses_of, stream_of

KEPT = 4096  # combinations for which a script's steps are kept
EVENTS_PER_ACCESS = 4096  # a step that needs more has run into a storm that does not end
MOST_EVENTS = 1 << 62
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


class Ready(NamedTuple):
    """A step that can be run with any key."""

    op: str
    guest: bool
    number: int  # among the workload's steps; -1: preallocation
    made: Accesses  # with key 0
    loop: Loop
    marks: int  # results.py: what it is to its point
    budget: int  # events
    most_ns: int  # it ends before that


class Readied(NamedTuple):
    """All steps."""

    steps: tuple[Ready, ...]
    ops: tuple[str, ...]


class Script:
    """Steps that are run on one machine after another; how they were made ready is kept."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.threads = max((step.threads for step in steps if isinstance(step, Populate)), default=0)
        self._most = 1 if any(isinstance(step, TouchList) for step in steps) else KEPT  # lists are large
        self._kept: dict[Terms, Readied] = {}

    def ready(self, terms: Terms) -> Readied:
        """Raises PointError, WorkloadError."""
        found = self._kept.get(terms)
        if found is None:
            if len(self._kept) >= self._most:
                self._kept.clear()
            todo = all_steps(terms.prealloc, terms.prealloc_threads, self.steps)
            steps = _marked([_ready(step, number, terms) for step, number in todo])
            found = self._kept[terms] = Readied(steps, tuple([step.op for step in steps]))
        return found


def all_steps(prealloc: Prealloc, prealloc_threads: int, steps: Sequence[Step]) -> list[tuple[Step, int]]:
    """What runs: the VMM's preallocation, then the workload, each with its number among the workload's steps."""
    before: list[tuple[Step, int]] = []
    if prealloc & Prealloc.POPULATE:
        before.append((Populate(threads=prealloc_threads), -1))
    if prealloc & Prealloc.PRE_FAULT:
        before.append((PreFault(), -1))
    return before + [(step, i) for i, step in enumerate(steps)]


def _ready(step: Step, number: int, terms: Terms) -> Ready:
    made = stream_of(step, terms.pages, terms.vcpus, 0)
    accesses = accesses_of(made)
    budget = _budget(made, accesses, terms) if terms.max_events is None else terms.max_events
    return Ready(
        op=op_of(step),
        guest=isinstance(step, Touch | TouchList),
        number=number,
        made=made,
        loop=_loop_of(made, terms),
        marks=int(NOTED),
        budget=budget,
        most_ns=_most_ns(made, accesses, terms),
    )


def _marked(steps: Sequence[Ready]) -> tuple[Ready, ...]:
    """With what each is to the point."""
    last = len(steps) - 1
    marks = [NOTED | (BEGINS if i == 0 else 0) | (ENDS if i == last else 0) | (GUEST if step.guest else 0) for i, step in enumerate(steps)]
    return tuple([step._replace(marks=int(each)) for step, each in zip(steps, marks, strict=True)])


def _loop_of(made: Accesses, terms: Terms) -> Loop:
    """The lone actor's loop where there is one actor and nobody beside it or watching. Raises PointError."""
    if made.stream[Stream.SKIP_HITS] and (terms.daemons.run or terms.traced):
        raise PointError("skip_hits leaves no single touch to trace, or to run beside khugepaged or KSM: leave it out")
    if made.stream[Stream.ACTOR] == Actor.CALL:
        return Loop.CALL
    return Loop.MANY if terms.daemons.run or made.stream[Stream.ACTORS] > 1 or terms.traced else Loop.ALONE


def _daemon_events(made: Accesses, accesses: int, terms: Terms) -> int:
    """About how many events the daemons need at most while a step runs."""
    ns = int(made.stream[Stream.IDLE_NS]) + accesses * (int(made.stream[Stream.THINK_NS]) + 10 * terms.charges.total_ns)
    daemons, events = terms.daemons, 0
    for pages, sleep in ((daemons.khuge_pages, daemons.khuge_sleep_ns), (daemons.ksm_pages, daemons.ksm_sleep_ns)):
        if sleep:
            events += (1 + ns // sleep) * 16 * (pages + 1)
    return events


def _budget(made: Accesses, accesses: int, terms: Terms) -> int:
    return min(MOST_EVENTS, 65536 + EVENTS_PER_ACCESS * accesses + _daemon_events(made, accesses, terms))


def _most_ns(made: Accesses, accesses: int, terms: Terms) -> int:
    """Each actor's own accesses, one after the other, and the faults of all."""
    actors = max(1, int(made.stream[Stream.ACTORS]))
    own = accesses if made.stream[Stream.ORDER] == Order.LIST else -(-accesses // actors) + 1
    faults = min(accesses, FAULTS_PER_PAGE * terms.pages)
    touch_ns = int(made.stream[Stream.THINK_NS]) + terms.charges.touch_ns
    return own * touch_ns + faults * terms.charges.total_ns + int(made.stream[Stream.IDLE_NS])


def check_time(ready: Ready, clock: int) -> None:
    """Refuse a step that may end after NEVER. Raises PointError."""
    if clock + ready.most_ns >= NEVER:
        raise PointError(
            f"{accesses_of(ready.made)} accesses may take more than {NEVER} ns of virtual time, {NEVER_YEARS} years: "
            f"lower touches, think_ns or costs"
        )
