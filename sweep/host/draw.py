"""Random cases: access lists and host operations drawn from a seed. Only what the model claims and the litmus program can do."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from kernels.policy import Behaviour, behaviours
from kernels.spec import PAGE_BYTES, PMD_PAGES
from sweep.host.case import Access, AccessList, Case, faults_of
from sweep.parameters import Point
from sweep.steps import STEP, DontNeedStep

MAX_STEPS = 8
MAX_ACCESSES = 80
MAX_REGIONS = 3
TRIES = 200
BACKINGS = (
    *("anonymous",) * 3,
    *("anonymous_thp",) * 4,
    "anonymous_default",
    "anonymous_hugetlb_2mb",
    "shared_hugetlb_2mb",
    "shmem",
    "shmem_thp",
    "private_memfd",
)
OFFSETS = ("0", "0", "0", "4KiB", "28KiB", "1MiB", "2044KiB")
Draw = random.Random


def _size(pages: int) -> str:
    return f"{pages * PAGE_BYTES >> 10}KiB"


def _part(draw: Draw) -> list[float]:
    """A part of memory in sixteenths, mostly all of it."""
    if draw.random() < 0.6:
        return [0.0, 1.0]
    first, last = sorted(draw.sample(range(17), 2))
    return [first / 16, last / 16]


def _list(draw: Draw, pages: int) -> AccessList:
    """Accesses around a few places, so that they meet; mostly few."""
    centres = [draw.randrange(pages) for _ in range(draw.randint(1, 4))]
    count = draw.choice((1, 2, 5, 20, MAX_ACCESSES))
    writes = draw.choice((0.0, 0.3, 0.7, 1.0))
    found = []
    for _ in range(count):
        near = draw.choice(centres) + draw.choice((0, 0, 1, -1, 7, -8, draw.randint(-PMD_PAGES, PMD_PAGES)))
        found.append(Access(0, min(max(near, 0), pages - 1), draw.random() < writes))
    return AccessList(tuple(found))


def _touch(draw: Draw, _pages: int) -> Any:
    every = draw.choice((1, 1, 1, 2, 8, 64, PMD_PAGES))
    at = draw.randrange(every)
    access = draw.choice(("read", "write", "write", "pairs"))
    return {"op": "touch", "access": access, "range": _part(draw), "every": _size(every), "at": _size(at)}


def _host(draw: Draw, _pages: int) -> Any:
    return {
        "op": "host_touch",
        "access": draw.choice(("read", "write")),
        "range": _part(draw),
        "every": _size(draw.choice((1, 1, 3, PMD_PAGES))),
    }


def _dontneed(draw: Draw, pages: int) -> Any:
    if draw.random() < 0.4:
        return {"op": "dontneed", "range": _part(draw)}
    every = draw.choice((PMD_PAGES, PMD_PAGES, PMD_PAGES // 2, 64))
    at = draw.randrange(every)
    size = draw.randint(1, every - at)
    return {"op": "dontneed", "every": _size(every), "at": _size(at), "size": _size(min(size, pages))}


def _one(op: str, **choices: Sequence[Any]) -> Callable[[Draw, int], Any]:
    return lambda draw, _pages: {"op": op} | {name: draw.choice(values) for name, values in choices.items()}


HOST_STEPS: Mapping[str, Callable[[Draw, int], Any]] = {
    "host_touch": _host,
    "populate": _one("populate", access=("read", "write")),
    "fork": _one("fork"),
    "child_exit": _one("child_exit"),
    "dontneed": _dontneed,
    "collapse": lambda draw, _pages: {"op": "collapse", "range": _part(draw)},
}
GUEST_STEPS: Mapping[str, Callable[[Draw, int], Any]] = {
    "touch": _touch,
    "touch_again": _touch,
    "pre_fault": _one("pre_fault"),
    "dirty_log": _one("dirty_log", state=("on", "off", "get")),
    **HOST_STEPS,
}


def _step(draw: Draw, pages: int, with_guest: bool) -> Any:
    if with_guest and draw.random() < 0.35:
        return _list(draw, pages)
    makers = GUEST_STEPS if with_guest else HOST_STEPS
    return STEP.validate_python(makers[draw.choice(tuple(makers))](draw, pages))


def _can_run(case: Case) -> bool:
    """Without a fault, without what the model leaves out, and nothing that the litmus program would have to do in unequal calls."""
    last, point = case.steps[-1], case.point
    if last.op == "collapse" and point.backing == "shmem_thp":
        return False  # of what is not in the page cache, the model says nothing
    if last.op == "pre_fault" and point.mmu == "legacy" and not behaviours(point.kernel)[Behaviour.DUPLICATE_IS_SPURIOUS]:
        return False  # it clears Accessed bits, which the model does not have, and flushes for each
    if isinstance(last, DontNeedStep) and last.every is not None:
        end = case.pages - last.at // PAGE_BYTES
        if 0 < end % (last.every // PAGE_BYTES) < last.size // PAGE_BYTES:
            return False
    return not faults_of(case)


def _point(draw: Draw, kernel: str, mmu: str, with_guest: bool) -> Point | None:
    backing = draw.choice(BACKINGS)
    pages = draw.randint(1, MAX_REGIONS) * PMD_PAGES - (draw.choice((0, 0, 1, 100, 511)) if "hugetlb" not in backing else 0)
    wanted = {
        "kernel": kernel,
        "mmu": mmu,
        "backing": backing,
        "memory": _size(pages),
        "offset": draw.choice(OFFSETS) if "hugetlb" not in backing else "0",
        "use_zero_page": draw.random() < 0.8,
        "guest_page": draw.choice(("2MiB", "2MiB", "4KiB")) if with_guest else "2MiB",
    }
    if backing == "anonymous_default":
        wanted["thp_enabled"] = draw.choice(("madvise", "always"))
    try:
        return Point.model_validate(wanted)
    except ValidationError:
        return None


def random_case(seed: int, number: int, kernel: str, mmu: str, with_guest: bool = True) -> Case:
    """Case `number` of a seed for a kernel: the same on every machine."""
    key = f"{seed}/{number}/{kernel}/{mmu}/{with_guest}"
    draw = Draw(hashlib.sha256(key.encode()).digest())
    point = None
    while point is None:
        point = _point(draw, kernel, mmu, with_guest)
    case = Case(f"random/{seed}/{number}", point, ())
    wanted = draw.randint(1, MAX_STEPS)
    for _ in range(TRIES):
        if len(case.steps) == wanted:
            break
        longer = Case(case.name, point, (*case.steps, _step(draw, case.pages, with_guest)))
        case = longer if _can_run(longer) else case
    return case


def random_cases(count: int, seed: int, kernel: str, mmu: str, with_guest: bool = True) -> Iterator[Case]:
    """The first so many cases of a seed."""
    for number in range(count):
        yield random_case(seed, number, kernel, mmu, with_guest)
