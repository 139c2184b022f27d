"""The shortest case that still differs: all cases one cut smaller are run in one batch, the smallest that differs is next."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from kernels.spec import PAGE_BYTES, PMD_PAGES
from sweep.host.case import AccessList, Case, faults_of, listed, units_of
from sweep.host.compare import CaseResult
from sweep.parameters import Point
from sweep.steps import TouchStep

Run = Callable[[Sequence[Case]], list[CaseResult]]
MAX_ROUNDS = 24
MAX_CANDIDATES = 48
LONG_LIST = 64


PLAIN = ("offset", "guest_page", "use_zero_page", "thp_enabled")  # parameters that a case may do without


def size_of(case: Case) -> tuple[int, int, int, int, int]:
    """What makes a case long: steps, those that touch memory as a whole, accesses, pages, parameters not at their default."""
    lists = [step for step in case.steps if isinstance(step, AccessList)]
    special = sum(getattr(case.point, name) != Point.model_fields[name].default for name in PLAIN)
    return len(case.steps), len(case.steps) - len(lists), sum(len(step.accesses) for step in lists), case.pages, special


def _shorter_lists(step: AccessList) -> Iterator[AccessList]:
    """Halves, then without each quarter, then without each access."""
    n = len(step.accesses)
    for parts in (2, 4, 8, n) if n <= LONG_LIST else (2, 4, 8):
        bounds = [n * k // parts for k in range(parts + 1)]
        for low, high in pairwise(bounds):
            if 0 < high - low < n:
                yield AccessList(step.accesses[:low] + step.accesses[high:])


def _simpler_steps(step: object, case: Case) -> Iterator[object]:
    if isinstance(step, AccessList):
        yield from _shorter_lists(step)
    elif isinstance(step, TouchStep) and case.point.vcpus == 1:
        yield listed(step.access, units_of(step, case.pages))


def _in_less_memory(case: Case) -> Case | None:
    """Half the memory, in whole regions, where the lists fit."""
    pages = case.pages // 2 // PMD_PAGES * PMD_PAGES
    lists = [step for step in case.steps if isinstance(step, AccessList)]
    if not pages or any(access.page >= pages for step in lists for access in step.accesses):
        return None
    return Case(case.name, case.point.model_copy(update={"memory": pages * PAGE_BYTES}), case.steps)


def _plainer(point: Point) -> Iterator[Point]:
    """The same with one parameter at its default."""
    for name in PLAIN:
        default = Point.model_fields[name].default
        if getattr(point, name) != default:
            yield point.model_copy(update={name: default})


def smaller(case: Case) -> Iterator[Case]:
    """Every case that is one cut smaller and can still be run, the boldest cuts first."""
    candidates = [Case(case.name, case.point, case.steps[:n] + case.steps[n + 1 :]) for n in range(len(case.steps))]
    candidates += [less] if (less := _in_less_memory(case)) else []
    candidates += [Case(case.name, point, case.steps) for point in _plainer(case.point)]
    for n, step in enumerate(case.steps):
        candidates += [Case(case.name, case.point, (*case.steps[:n], s, *case.steps[n + 1 :])) for s in _simpler_steps(step, case)]
    for candidate in candidates:
        if candidate.steps and not faults_of(candidate):
            yield candidate


def shrink(found: CaseResult, run: Run, rounds: int = MAX_ROUNDS) -> CaseResult:
    """The smallest case that still differs, after so many batches at most. `run` is asked once per batch."""
    best = found
    for _ in range(rounds):
        candidates = list(smaller(best.case))[:MAX_CANDIDATES]
        differing = [result for result in run(candidates) if result.wrong] if candidates else []
        if not differing:
            return best
        best = min(differing, key=lambda result: size_of(result.case))
    return best
