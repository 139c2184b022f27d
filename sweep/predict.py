"""What a point will take before it runs: seconds of one core, and memory. Predictions only; no result depends on them.

Seconds follow from what a step's accesses will find: pages that nobody touched (faults), pages that were only read
(copy-on-write), or pages that are mapped (hits). The figures were measured on the machine of the README.
"""

import math
from dataclasses import dataclass, field
from enum import Enum

from kernels.policy import Behaviour, behaviours
from kernels.spec import PAGE_BYTES, PMD_PAGES, PUD_PAGES, Prealloc
from kernels.state import state_bytes
from sweep.configs import Workload
from sweep.parameters import Point
from sweep.steps import TouchListStep, TouchStep, VmmCowStep, list_rows, touches_of, traits_of_point

POINT_SECONDS = 2e-5  # rows and their place in files included
STEP_SECONDS = 1e-5
STATE_BYTE_SECONDS = 2e-10
RUN_PAGE_SECONDS = 1e-10  # a lone vCPU, page after page
LONE_SECONDS = 6e-9  # a lone vCPU, an access anywhere; grows with the memory beyond the caches
SKIPPED_SECONDS = 3e-8  # skip_hits: a first read or write
LISTED_SECONDS = 1e-7  # an access of a list: to read it, and to order all by vCPU
HIT_SECONDS = 1.3e-8  # several vCPUs: an access that exits not
EVENT_SECONDS = 1.4e-8, 4.6e-9  # an event of one vCPU; more for each doubling
TARGET_SECONDS = 8e-9  # a shootdown looks at every vCPU
CACHED_BYTES = 4 << 20
LISTED_BYTES = 96  # of an access of a list, while it is ordered


class Found(Enum):
    """What an access finds; the value is (events, shootdowns)."""

    MAPPED = (0, 0)
    NOTHING = (9, 0)
    READ_ONLY = (13, 2)


HOLD_SECONDS = 5e-8  # per vCPU and copy where faults take mmu_lock for writing


def copies_pages(point: Point) -> bool:
    """Pages that were read first are copied one by one when they are written."""
    traits = traits_of_point(point)
    if traits.shared or traits.hugetlb or point.policy == "always_writable" or point.preallocates & Prealloc.POPULATE:
        return False
    whole = not point.use_zero_page or behaviours(point.kernel, point.policy)[Behaviour.HUGE_ZERO_WRITE_THP]
    return not (traits.thp and whole)


def _huge_pages(point: Point) -> int:
    """4K pages that one fault of untouched memory maps."""
    traits = traits_of_point(point)
    return PUD_PAGES if traits.gigantic else PMD_PAGES if traits.hugetlb or traits.thp else 1


@dataclass
class Touched:
    """Parts of memory that earlier steps went through: (start, end, written)."""

    parts: list[tuple[float, float, bool]] = field(default_factory=list)

    def find(self, spec: TouchStep, point: Point) -> Found:
        covering = [written for start, end, written in self.parts if start <= spec.range[0] and spec.range[1] <= end]
        if not covering:
            return Found.NOTHING
        writes = spec.access != "read"
        return Found.READ_ONLY if writes and not any(covering) and copies_pages(point) else Found.MAPPED

    def add(self, spec: TouchStep) -> None:
        self.parts.append((*spec.range, spec.access != "read"))


def _event_seconds(vcpus: int) -> float:
    return EVENT_SECONDS[0] + EVENT_SECONDS[1] * math.log2(vcpus)


def _fault_seconds(found: Found, vcpus: int, tdp: bool = True) -> float:
    events, shootdowns = found.value
    per_vcpu = shootdowns * (TARGET_SECONDS if tdp else TARGET_SECONDS + HOLD_SECONDS)
    return events * _event_seconds(vcpus) + per_vcpu * vcpus


def _touch_seconds(spec: TouchStep, point: Point, found: Found) -> float:
    """Of one touch step."""
    pages = point.memory // PAGE_BYTES
    touches, vcpus = touches_of(spec, pages), min(point.vcpus, spec.vcpus or point.vcpus)
    part = math.ceil((spec.range[1] - spec.range[0]) * pages)
    if spec.skip_hits:
        return min(touches, 2 * part) * SKIPPED_SECONDS
    if vcpus == 1 and not (point.khugepaged or point.ksm):
        if spec.order == "sequential" and spec.every == PAGE_BYTES and spec.access in ("read", "write"):
            return touches * RUN_PAGE_SECONDS
        return touches * LONE_SECONDS * max(1.0, math.log2(part / CACHED_BYTES) / 2 if part else 1.0)
    huge = 1 if found is Found.READ_ONLY else _huge_pages(point)
    faults = min(touches, math.ceil(part / huge)) if found is not Found.MAPPED else 0
    seconds = touches * HIT_SECONDS + faults * _fault_seconds(found, vcpus, point.mmu == "tdp")
    if spec.access == "pairs" and found is Found.NOTHING and copies_pages(point):
        seconds += touches // 2 * _fault_seconds(Found.READ_ONLY, vcpus, point.mmu == "tdp")
    return seconds


def _populate_seconds(point: Point) -> float:
    pages = point.memory // PAGE_BYTES // _huge_pages(point)
    return pages * (5 * RUN_PAGE_SECONDS if point.prealloc_threads == 1 else _fault_seconds(Found.NOTHING, point.prealloc_threads))


def predict_seconds(point: Point, workload: Workload) -> float:
    """Seconds of one core for a point, from its accesses, vCPUs, backing and memory."""
    seconds = POINT_SECONDS + len(workload.specs) * STEP_SECONDS + predict_bytes(point, workload) * STATE_BYTE_SECONDS
    touched = Touched()
    if point.preallocates & Prealloc.POPULATE:
        seconds += _populate_seconds(point)
    for spec in workload.specs:
        if isinstance(spec, TouchStep):
            seconds += _touch_seconds(spec, point, touched.find(spec, point))
            touched.add(spec)
        elif isinstance(spec, TouchListStep):
            rows = list_rows(workload.folder / spec.path)
            seconds += rows * (LISTED_SECONDS + (LONE_SECONDS if point.vcpus == 1 else _fault_seconds(Found.READ_ONLY, point.vcpus)))
        else:
            seconds += touches_of(spec, point.memory // PAGE_BYTES) * (LONE_SECONDS if isinstance(spec, VmmCowStep) else RUN_PAGE_SECONDS)
    return seconds


def predict_bytes(point: Point, workload: Workload) -> int:
    """Memory a worker needs for a point."""
    listed = max((list_rows(workload.folder / spec.path) for spec in workload.specs if isinstance(spec, TouchListStep)), default=0)
    return state_bytes(point.memory, max(point.vcpus, point.prealloc_threads)) + listed * LISTED_BYTES
