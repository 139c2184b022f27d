"""Who is next: two tournament trees over the actors' next events, of those in flight and of those in the guest.

Order of events: smaller time first; at the same time an actor in a fault (in flight) before one in the guest; then
the smaller actor number. A leaf holds the event's time, NEVER if the actor is in the other tree, asleep or done; an inner
node the smaller of its two children, so the winner's leaf is found by walking down from the root, left on a tie.
With time slices an actor's next event may be the end of its slice, which counts as in flight.
"""

import numpy as np
from numpy.typing import NDArray

from kernels.jit import jit
from kernels.spec import NEVER, Cpu, Phase, Vm
from kernels.state import Machine

# No spinlock is held, and none waited for: what Cpu.PHASE, the actor's next event, may be then.
PREEMPTIBLE = sum(
    1 << phase for phase in (Phase.TOUCH, Phase.FAULT, Phase.WALK, Phase.COMMIT, Phase.START, Phase.CHANGE, Phase.END, Phase.MAP)
)


@jit
def is_preemptible(phase: int) -> bool:
    return (PREEMPTIBLE >> phase) & 1 == 1


@jit
def takes_turns(m: Machine, actor: int) -> bool:
    """A vCPU of a step with fewer CPUs than vCPUs."""
    return m.vm[Vm.SLICED] and actor < m.vm[Vm.ACTORS]


@jit
def ends_slice(m: Machine, actor: int) -> bool:
    """The actor's next event is the end of its slice."""
    c = m.cpu[actor]
    return takes_turns(m, actor) and c[Cpu.SLICE_END] < c[Cpu.TIME] and is_preemptible(c[Cpu.PHASE])


@jit
def next_events(m: Machine, actor: int) -> tuple[int, int]:
    """(leaf in the tree of those in flight, leaf in the tree of those in the guest)."""
    phase = m.cpu[actor, Cpu.PHASE]
    time = m.cpu[actor, Cpu.TIME]
    never = np.int64(NEVER)
    if phase == Phase.DONE or time >= NEVER:
        return never, never
    if ends_slice(m, actor):
        return m.cpu[actor, Cpu.SLICE_END], never
    return (never, time) if phase == Phase.TOUCH else (time, never)


@jit
def play(tree: NDArray[np.int64], actor: int, time: int) -> None:
    """Set an actor's leaf, and the inner nodes above it as far as they change."""
    node = (len(tree) >> 1) + actor
    if tree[node] == time:
        return
    tree[node] = time
    node >>= 1
    while node > 0:
        winner = min(tree[2 * node], tree[2 * node + 1])
        if tree[node] == winner:
            return
        tree[node] = winner
        node >>= 1


@jit
def plan_event(m: Machine, actor: int) -> None:
    """The actor's time or phase changed: bring the trees up to date."""
    flight, touch = next_events(m, actor)
    play(m.flight, actor, flight)
    play(m.touch, actor, touch)


@jit
def plan_all(m: Machine, actors: int) -> None:
    m.flight[:] = NEVER
    m.touch[:] = NEVER
    for actor in range(actors):
        plan_event(m, actor)


@jit
def winner_of(tree: NDArray[np.int64]) -> int:
    best = tree[1]
    leaves = len(tree) >> 1
    node = 1
    while node < leaves:
        node = 2 * node + np.int64(tree[2 * node] != best)  # no branch: it could not be predicted
    return node - leaves


@jit
def next_actor(m: Machine) -> int:
    """The actor whose event comes first, or -1 when none is left."""
    if m.flight[1] <= m.touch[1]:
        return winner_of(m.flight) if m.flight[1] < NEVER else -1
    return winner_of(m.touch)


@jit
def next_other(tree: NDArray[np.int64], actor: int) -> int:
    """Time of the first event of anybody but the actor."""
    first = np.int64(NEVER)
    node = (len(tree) >> 1) + actor
    while node > 1:
        first = min(first, tree[node ^ 1])
        node >>= 1
    return first
