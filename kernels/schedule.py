"""Who is next: a tournament tree over the actors' next events.

Order of events: smaller time first; at the same time an actor in a fault (in flight) before one in the guest; then
the smaller actor number. A leaf holds `time * 2 + (phase is TOUCH)`; an inner node the smaller of its two children,
the left one on a tie, so the winner's leaf is found by walking down from the root.
With time slices an actor's next event may be the end of its slice, which counts as in flight.
"""

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
def event_key(m: Machine, actor: int) -> int:
    """The sort key of the actor's next event; NEVER for one that waits for a lock or is done."""
    phase = m.cpu[actor, Cpu.PHASE]
    time = m.cpu[actor, Cpu.TIME]
    if phase == Phase.DONE or time >= NEVER:
        return NEVER
    if m.vm[Vm.SLICED] and actor < m.vm[Vm.ACTORS] and m.cpu[actor, Cpu.SLICE_END] < time and is_preemptible(phase):
        return m.cpu[actor, Cpu.SLICE_END] * 2
    return time * 2 + (1 if phase == Phase.TOUCH else 0)


@jit
def plan_event(m: Machine, actor: int) -> None:
    """The actor's time or phase changed: bring the tree up to date."""
    node = (len(m.tree) >> 1) + actor
    m.tree[node] = event_key(m, actor)
    node >>= 1
    while node > 0:
        m.tree[node] = min(m.tree[2 * node], m.tree[2 * node + 1])
        node >>= 1


@jit
def plan_all(m: Machine, actors: int) -> None:
    leaves = len(m.tree) >> 1
    for i in range(leaves):
        m.tree[leaves + i] = event_key(m, i) if i < actors else NEVER
    for node in range(leaves - 1, 0, -1):
        m.tree[node] = min(m.tree[2 * node], m.tree[2 * node + 1])


@jit
def next_actor(m: Machine) -> int:
    """The actor whose event comes first, or -1 when none is left."""
    best = m.tree[1]
    if best >= NEVER:  # times of a step stay below NEVER / 2: the step's budget of events sees to it
        return -1
    leaves = len(m.tree) >> 1
    node = 1
    while node < leaves:
        node *= 2
        if m.tree[node] != best:
            node += 1
    return node - leaves
