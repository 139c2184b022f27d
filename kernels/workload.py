"""Accesses of one step: a counter-based generator, so that any access of any vCPU can be made without the ones before.

`stream_of()` turns a step (steps.py) into the vector that jitted code reads; the random numbers are those of draws.py.
"""

from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kernels.draws import SALT_ORDER, SALT_READ_FIRST, SALT_WRITE, actor_key, below, cut, draw, drawn_below, permute, signed
from kernels.jit import jit
from kernels.spec import (
    PAGE_BYTES,
    PAGE_SHIFT,
    Access,
    Actor,
    Call,
    Cpu,
    Order,
    Phase,
    Spread,
    Stream,
    Vm,
)
from kernels.state import Bytes, Env, Int64s, Machine
from kernels.steps import (
    ChildExit,
    Collapse,
    DirtyLog,
    DontNeed,
    Fork,
    HostTouch,
    Idle,
    KsmMerge,
    Populate,
    PreFault,
    Step,
    Touch,
    TouchList,
    VmmCow,
    WorkloadError,
)

FRACTION_BITS = 20
ZIPF_BITS = 62
ZIPF_EXACT_RANKS = 64
ZIPF_BINS_PER_OCTAVE = 16


@lru_cache(maxsize=64)
def zipf_bins(ranks: int, theta: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zipf over ranks 0 ... ranks - 1 as bins of equal weight per rank: first ranks (bins + 1), cumulative cuts (bins).

    The first 64 ranks stand alone, then 16 bins an octave; a bin's weight is the integral of x**-theta over it, in
    30-digit decimal arithmetic."""
    edges = list(range(min(ranks, ZIPF_EXACT_RANKS) + 1))
    while edges[-1] < ranks:
        edges.append(min(ranks, edges[-1] + max(1, edges[-1] // ZIPF_BINS_PER_OCTAVE)))
    with localcontext() as context:
        context.prec = 30
        power = Decimal(repr(theta))
        weights = [_bin_weight(a, b, power) for a, b in pairwise(edges)]
        total, running, cuts = sum(weights), Decimal(0), []
        for weight in weights:
            running += weight
            cuts.append(int(running / total * (1 << ZIPF_BITS)))
    cuts[-1] = 1 << ZIPF_BITS
    return tuple(edges), tuple(cuts)


def _bin_weight(first: int, end: int, power: Decimal) -> Decimal:
    if end == first + 1:
        return Decimal(end) ** -power
    lo, hi = Decimal(first) + Decimal("0.5"), Decimal(end) + Decimal("0.5")
    if power == 1:
        return hi.ln() - lo.ln()
    return (hi ** (1 - power) - lo ** (1 - power)) / (1 - power)


class Lists(NamedTuple):
    """What a step's accesses need besides the vector of Stream: a touch list, or zipf bins. As the fields of Env."""

    list_lo: Int64s
    list_gfn: Int64s
    list_write: Bytes
    zipf_lo: Int64s
    zipf_cut: Int64s


NO_LISTS = Lists(
    list_lo=np.zeros(1, np.int64),
    list_gfn=np.zeros(0, np.int64),
    list_write=np.zeros(0, np.uint8),
    zipf_lo=np.zeros(2, np.int64),
    zipf_cut=np.full(1, 1 << ZIPF_BITS, np.int64),
)


class Accesses:
    """One step, compiled: the vector of Stream and its lists."""

    def __init__(self, stream: Int64s) -> None:
        self.stream = stream
        self.lists = NO_LISTS


def stream_of(step: Step, pages: int, vcpus: int, key: int) -> Accesses:
    """Compile a step for a slot of `pages` and `vcpus`. Raises WorkloadError."""
    stream = np.zeros(len(Stream), np.int64)
    stream[Stream.KEY] = signed(key)
    stream[Stream.END_PAGE] = pages
    stream[Stream.ACTORS] = 1
    made = Accesses(stream)
    match step:
        case Touch():
            _compile_touch(made, step, pages, vcpus)
        case TouchList():
            _compile_list(made, step, pages, vcpus)
        case Populate():
            stream[Stream.ACTOR] = Actor.VMM
            stream[Stream.ACCESS] = step.access
            stream[Stream.ACTORS] = min(step.threads, pages)
        case PreFault():
            stream[Stream.ACTOR] = Actor.PREFAULT
        case VmmCow():
            if step.pages < 0:
                raise WorkloadError(f"pages = {step.pages}: 0 or more are needed")
            stream[Stream.ACTOR] = Actor.OUTSIDE
            stream[Stream.END_PAGE] = step.pages
        case HostTouch():
            _compile_touch(made, Touch(access=step.access, start=step.start, end=step.end, every=step.every), pages, 1)
            stream[Stream.ACTOR] = Actor.HOST
        case Idle():
            stream[Stream.ACTOR] = Actor.IDLE
            stream[Stream.IDLE_NS] = step.ns
            stream[Stream.END_PAGE] = 1
        case _:
            _compile_call(stream, step, pages)
    return made


def _compile_call(stream: Int64s, step: Step, pages: int) -> None:
    """One system call of the VMM; what it needs of its fields."""
    stream[Stream.ACTOR] = Actor.CALL
    match step:
        case Fork():
            stream[Stream.CALL] = Call.FORK
        case ChildExit():
            stream[Stream.CALL] = Call.CHILD_EXIT
        case DirtyLog():
            stream[Stream.CALL] = step.state
        case Collapse():
            stream[Stream.CALL] = Call.COLLAPSE
            stream[Stream.START_PAGE], stream[Stream.END_PAGE] = int(step.start * pages), int(step.end * pages)
        case KsmMerge():
            stream[Stream.CALL] = Call.KSM_MERGE
            stream[Stream.FRACTION_CUT] = fraction_cut(step.fraction)
        case DontNeed():
            stream[Stream.CALL] = Call.DONTNEED
            first, end = int(step.start * pages), int(step.end * pages)
            stream[Stream.START_PAGE] = first + (step.at // PAGE_BYTES if step.every is not None else 0)
            stream[Stream.END_PAGE] = end
            stream[Stream.EVERY_PAGES] = max(1, end - first) if step.every is None else step.every // PAGE_BYTES
            stream[Stream.SIZE_PAGES] = max(1, end - first) if step.every is None else step.size // PAGE_BYTES


def fraction_cut(fraction: float) -> int:
    """Page i is taken if (i + 1) * cut >> 20 moves on from i * cut >> 20: that fraction of the pages, evenly."""
    return int(fraction * (1 << FRACTION_BITS))


def _compile_touch(made: Accesses, step: Touch, pages: int, vcpus: int) -> None:
    first, end = int(step.start * pages), int(step.end * pages)
    actors = min(vcpus, step.vcpus or vcpus)
    units = max(0, -(-((end - first) * PAGE_BYTES - step.at) // step.every))
    repeat = step.repeat or step.order == Order.ZIPF
    part = _parts(units, actors, step.spread)
    touches = -1 if step.touches is None else step.touches
    if not repeat and touches > sum(part):
        raise WorkloadError(f"touches = {touches} is more than the {sum(part)} pages of the range; add repeat = true or lower it")
    s = made.stream
    s[Stream.ACTOR] = Actor.GUEST
    s[Stream.ACTORS] = actors
    s[Stream.ACCESS] = step.access
    s[Stream.ORDER] = step.order
    s[Stream.SPREAD] = step.spread
    s[Stream.START_BYTES] = first * PAGE_BYTES + step.at
    s[Stream.EVERY_BYTES] = step.every
    s[Stream.UNITS] = units
    s[Stream.TOUCHES] = touches if units else 0
    s[Stream.REPEAT] = repeat
    s[Stream.STRIDE] = step.stride
    s[Stream.WINDOW] = step.window
    s[Stream.WRITE_CUT] = cut(step.write_percent / 100.0)
    s[Stream.READ_FIRST_CUT] = cut(step.read_first)
    s[Stream.THINK_NS] = step.think_ns
    s[Stream.SKIP_HITS] = step.skip_hits
    if step.skip_hits and actors > 1:
        raise WorkloadError(f"skip_hits needs a step of one vCPU, not {actors}: their hits are not independent; say vcpus = 1")
    if step.order == Order.ZIPF and units:
        lo, cuts = zipf_bins(max(1, *part), step.theta)
        made.lists = NO_LISTS._replace(zipf_lo=np.array(lo, np.int64), zipf_cut=np.array(cuts, np.int64))


def _parts(units: int, actors: int, spread: Spread) -> list[int]:
    """How many units each actor's part has."""
    if spread == Spread.ALL:
        return [units] * actors
    return [units * (v + 1) // actors - units * v // actors for v in range(actors)]


def _compile_list(made: Accesses, step: TouchList, pages: int, vcpus: int) -> None:
    if not len(step.vcpu) == len(step.gfn) == len(step.write):
        raise WorkloadError(f"touch_list: columns of {len(step.vcpu)}, {len(step.gfn)} and {len(step.write)} rows; they must agree")
    for name, column, limit in (("vcpu", step.vcpu, vcpus), ("gfn", step.gfn, pages)):
        if len(column) and column.dtype.kind not in "iu":
            raise WorkloadError(f"touch_list: {name}: whole numbers are needed, not {column.dtype}")
        bad = np.flatnonzero((column < 0) | (column >= limit))
        if len(bad):
            raise WorkloadError(f"touch_list: row {bad[0]}: {name} = {column[bad[0]]} is outside 0 ... {limit - 1}")
    order = np.argsort(step.vcpu, kind="stable")
    made.lists = NO_LISTS._replace(
        list_lo=np.searchsorted(step.vcpu[order], np.arange(vcpus + 1)).astype(np.int64),
        list_gfn=step.gfn[order].astype(np.int64),
        list_write=step.write[order].astype(np.uint8),
    )
    made.stream[Stream.ACTOR] = Actor.GUEST
    made.stream[Stream.ACTORS] = vcpus
    made.stream[Stream.ORDER] = Order.LIST


def accesses_of(made: Accesses) -> int:
    """How many accesses (or pages, for VMM steps) the step has; pairs count twice, read_first once."""
    s = made.stream
    if s[Stream.ACTOR] != Actor.GUEST and s[Stream.ACTOR] != Actor.HOST:
        return int(s[Stream.END_PAGE])
    if s[Stream.ORDER] == Order.LIST:
        return len(made.lists.list_gfn)
    parts = _parts(int(s[Stream.UNITS]), int(s[Stream.ACTORS]), Spread(int(s[Stream.SPREAD])))
    visits = int(s[Stream.TOUCHES]) if s[Stream.TOUCHES] >= 0 else sum(parts)
    return visits * (2 if s[Stream.ACCESS] == Access.PAIRS else 1)


@jit
def zipf_rank(env: Env, bits: np.uint64, again: np.uint64) -> int:
    """Rank drawn from the bins: which bin, then evenly inside it."""
    target = np.int64(bits >> np.uint64(2))
    lo, hi = 0, len(env.zipf_cut) - 1
    while lo < hi:
        mid = (lo + hi) >> 1
        if target < env.zipf_cut[mid]:
            hi = mid
        else:
            lo = mid + 1
    return env.zipf_lo[lo] + below(again, env.zipf_lo[lo + 1] - env.zipf_lo[lo])


@jit
def strided(j: int, n: int, stride: int) -> int:
    """Unit of visit j: 0, s, 2s, ... then 1, s + 1, ..."""
    full, rest = n // stride, n % stride
    if j < rest * (full + 1):
        return (j % (full + 1)) * stride + j // (full + 1)
    j -= rest * (full + 1)
    return (j % full) * stride + rest + j // full


@jit
def unit_of(env: Env, key: int, visit: int, n: int) -> int:
    """Which unit of an actor's part (n units) its visit goes to."""
    s = env.stream
    order = s[Stream.ORDER]
    if order == Order.RANDOM:
        if s[Stream.REPEAT]:
            return below(draw(key, SALT_ORDER, visit), n)
        return permute(key, visit, n)
    j = visit % n if s[Stream.REPEAT] else visit
    if order == Order.STRIDED:
        return strided(j, n, s[Stream.STRIDE])
    if order == Order.ZIPF:
        rank = zipf_rank(env, draw(key, SALT_ORDER, 2 * visit), draw(key, SALT_ORDER, 2 * visit + 1))
        return permute(key, min(rank, n - 1), n)
    return j


@jit
def start_actor(m: Machine, env: Env, actor: int) -> None:
    """Set an actor's row for the step; one that has nothing to do is done."""
    set_part(m, env, actor)
    if m.cpu[actor, Cpu.INDEX] >= m.cpu[actor, Cpu.LIMIT]:
        m.cpu[actor, Cpu.PHASE] = Phase.DONE


@jit
def set_part(m: Machine, env: Env, actor: int) -> None:
    """An actor's part and how much it does."""
    c = m.cpu[actor]
    s = env.stream
    c[:] = 0
    c[Cpu.WAIT_PAGE] = -1
    c[Cpu.KIND] = s[Stream.ACTOR]
    c[Cpu.EXEC] = s[Stream.ACTOR] == Actor.GUEST and s[Stream.ACCESS] == Access.EXEC
    actors = s[Stream.ACTORS]
    if s[Stream.ACTOR] != Actor.GUEST and s[Stream.ACTOR] != Actor.HOST:
        pages = s[Stream.END_PAGE] - s[Stream.START_PAGE]
        c[Cpu.INDEX] = s[Stream.START_PAGE] + pages * actor // actors
        c[Cpu.LIMIT] = s[Stream.START_PAGE] + pages * (actor + 1) // actors
        return
    if s[Stream.ORDER] == Order.LIST:
        c[Cpu.INDEX] = env.list_lo[actor]
        c[Cpu.LIMIT] = env.list_lo[actor + 1]
        return
    units = s[Stream.UNITS]
    every = s[Stream.SPREAD] == Spread.ALL
    c[Cpu.LO] = 0 if every else units * actor // actors
    c[Cpu.HI] = units if every else units * (actor + 1) // actors
    visits = c[Cpu.HI] - c[Cpu.LO]
    touches = s[Stream.TOUCHES]
    if touches >= 0 and visits > 0:
        visits = touches * (actor + 1) // actors - touches * actor // actors
        if not s[Stream.REPEAT]:
            visits = min(visits, c[Cpu.HI] - c[Cpu.LO])
    c[Cpu.LIMIT] = visits * (2 if s[Stream.ACCESS] == Access.PAIRS else 1)


@jit
def fetch_pair(env: Env, index: int, limit: int) -> tuple[int, int]:
    """(visit, write) of access `index` of windows of pages that are read, then written."""
    window = env.stream[Stream.WINDOW]
    first = index // (2 * window) * window
    size = min(window, limit // 2 - first)
    k = index - 2 * first
    return (first + k, 0) if k < size else (first + k - size, 1)


@jit
def fetch_access(m: Machine, env: Env, actor: int) -> bool:
    """Put the actor's next access into its row; False: there is none."""
    c = m.cpu[actor]
    s = env.stream
    index = c[Cpu.INDEX]
    if index >= c[Cpu.LIMIT]:
        return False
    access = s[Stream.ACCESS]
    shift = m.vm[Vm.SHIFT]
    if s[Stream.ACTOR] != Actor.GUEST and s[Stream.ACTOR] != Actor.HOST:  # a cursor, which the end of the page's work moves on
        c[Cpu.PAGE] = shift + index
        c[Cpu.WRITE] = s[Stream.ACTOR] == Actor.VMM and access == Access.WRITE
        return True
    if s[Stream.ORDER] == Order.LIST:
        c[Cpu.PAGE] = shift + env.list_gfn[index]
        c[Cpu.WRITE] = env.list_write[index]
        c[Cpu.INDEX] = index + 1
        return True
    key = actor_key(s[Stream.KEY], actor)
    visit = index
    write = np.int64(access == Access.WRITE)
    if access == Access.PAIRS:
        visit, write = fetch_pair(env, index, c[Cpu.LIMIT])
    elif access == Access.MIXED:
        write = np.int64(drawn_below(draw(key, SALT_WRITE, visit), s[Stream.WRITE_CUT]))
    if write and access != Access.PAIRS and s[Stream.READ_FIRST_CUT] > 0 and not c[Cpu.PENDING]:
        if drawn_below(draw(key, SALT_READ_FIRST, visit), s[Stream.READ_FIRST_CUT]):
            write = 0
            c[Cpu.PENDING] = 1
            c[Cpu.INDEX] = index - 1  # the same visit comes again, for its write
    else:
        c[Cpu.PENDING] = 0
    unit = c[Cpu.LO] + unit_of(env, key, visit, c[Cpu.HI] - c[Cpu.LO])
    c[Cpu.PAGE] = shift + ((s[Stream.START_BYTES] + unit * s[Stream.EVERY_BYTES]) >> PAGE_SHIFT)
    c[Cpu.WRITE] = write
    c[Cpu.INDEX] += 1
    return True
