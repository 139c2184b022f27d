"""What a step does: fields as in a study file, sizes in bytes. Pure data, shared by the kernels and the reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.spec import PAGE_BYTES, Access, Call, Order, Spread

MAX_SKIPPED_NS = 1 << 60


class WorkloadError(ValueError):
    """A step that cannot be: named field, value, and what would do."""


@dataclass(frozen=True)
class Touch:
    """Guest accesses. `start` and `end` are the part of memory (0 ... 1); `touches` counts all vCPUs together."""

    access: Access = Access.WRITE
    order: Order = Order.SEQUENTIAL
    start: float = 0.0
    end: float = 1.0
    every: int = PAGE_BYTES
    at: int = 0
    stride: int = 1
    theta: float = 0.99
    write_percent: float = 100.0
    read_first: float = 0.0
    touches: int | None = None
    repeat: bool = False
    spread: Spread = Spread.SLICES
    vcpus: int | None = None  # only the first so many take part
    window: int = 1  # pairs: so many pages are read, then the same are written
    think_ns: int = 0
    skip_hits: bool = False  # draw which page is touched first when, and count the rest: for repeated random or zipf touches


@dataclass(frozen=True)
class TouchList:
    """Exactly these accesses, in order per vCPU; three arrays of one length."""

    vcpu: NDArray[np.int64]
    gfn: NDArray[np.int64]
    write: NDArray[np.bool_]


@dataclass(frozen=True)
class Populate:
    """MADV_POPULATE_WRITE or _READ by the VMM over the whole slot."""

    access: Access = Access.WRITE
    threads: int = 1


@dataclass(frozen=True)
class PreFault:
    """KVM_PRE_FAULT_MEMORY over the slot (6.11 and newer)."""


@dataclass(frozen=True)
class VmmCow:
    """The VMM writes so many copy-on-write pages of its own, in no memslot."""

    pages: int = 1


@dataclass(frozen=True)
class HostTouch:
    """The VMM accesses its memory itself, page by page: one access per `every` bytes of the part."""

    access: Access = Access.WRITE
    start: float = 0.0
    end: float = 1.0
    every: int = PAGE_BYTES


@dataclass(frozen=True)
class Idle:
    """Nothing happens for `ns`; daemons go on."""

    ns: int = 0


@dataclass(frozen=True)
class Fork:
    """The VMM forks; the child keeps what it got and touches nothing."""


@dataclass(frozen=True)
class ChildExit:
    """The child ends."""


@dataclass(frozen=True)
class DirtyLog:
    """Dirty logging of the slot: Call.LOG_ON, LOG_GET or LOG_OFF."""

    state: Call = Call.LOG_ON


@dataclass(frozen=True)
class DontNeed:
    """MADV_DONTNEED: one call over the part, or one of `size` bytes at `at` in every `every` bytes of it."""

    start: float = 0.0
    end: float = 1.0
    every: int | None = None
    at: int = 0
    size: int = PAGE_BYTES


@dataclass(frozen=True)
class Collapse:
    """MADV_COLLAPSE over the part (6.1 and newer)."""

    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class KsmMerge:
    """That fraction of the slot's anonymous pages becomes KSM pages."""

    fraction: float = 1.0


@dataclass(frozen=True)
class Khugepaged:
    """The daemon's settings, names and defaults as under /sys/kernel/mm/transparent_hugepage/khugepaged."""

    pages_to_scan: int = 4096
    scan_sleep_ms: int = 10_000
    max_ptes_none: int = 511


@dataclass(frozen=True)
class Ksm:
    """The daemon's settings as under /sys/kernel/mm/ksm, and which fraction of the pages has a twin."""

    pages_to_scan: int = 100
    sleep_ms: int = 20
    fraction: float = 1.0


Step = Touch | TouchList | Populate | PreFault | VmmCow | HostTouch | Idle | Fork | ChildExit | DirtyLog | DontNeed | Collapse | KsmMerge


def op_of(step: Step) -> str:
    """The op of a study file: TouchList -> touch_list, DontNeed -> dontneed."""
    name = type(step).__name__.replace("DontNeed", "Dontneed")
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


def _skip_rules(step: Touch) -> Sequence[tuple[bool, str]]:
    """What skip_hits needs: touches of which only the first read and the first write of a page can fault."""
    if not step.skip_hits:
        return ()
    repeats = step.order == Order.ZIPF or (step.order == Order.RANDOM and step.repeat)
    plain = step.access in (Access.WRITE, Access.READ, Access.MIXED) and step.read_first == 0
    return (
        (repeats, "skip_hits needs order = 'zipf', or order = 'random' with repeat = true"),
        (plain, "skip_hits needs access = 'write', 'read' or 'mixed', without read_first"),
        (step.every % PAGE_BYTES == 0, f"every = {step.every}: skip_hits needs a multiple of {PAGE_BYTES}, one unit per page"),
        ((step.touches or 0) * (step.think_ns + 1) < MAX_SKIPPED_NS, "skip_hits: touches * think_ns is more than 36 years"),
    )


def check_touch(step: Touch) -> Sequence[str]:
    """What is wrong with a touch step's numbers, one line each; empty if nothing is."""
    rules = (
        (0.0 <= step.start <= step.end <= 1.0, f"range = [{step.start}, {step.end}]: 0 <= start <= end <= 1 is needed"),
        (step.every >= 1, f"every = {step.every}: at least 1 byte is needed"),
        (step.at >= 0, f"at = {step.at}: 0 or more is needed"),
        (step.stride >= 1, f"stride = {step.stride}: at least 1 is needed"),
        (step.window >= 1, f"window = {step.window}: at least 1 is needed"),
        (0.0 <= step.theta <= 8.0, f"theta = {step.theta}: 0 ... 8 is needed"),
        (0.0 <= step.write_percent <= 100.0, f"write_percent = {step.write_percent}: 0 ... 100 is needed"),
        (0.0 <= step.read_first <= 1.0, f"read_first = {step.read_first}: 0 ... 1 is needed"),
        (step.touches is None or step.touches >= 0, f"touches = {step.touches}: 0 or more is needed"),
        (step.vcpus is None or step.vcpus >= 1, f"vcpus = {step.vcpus}: at least 1 is needed"),
        (0 <= step.think_ns <= 10**12, f"think_ns = {step.think_ns}: 0 ... 1e12 ns is needed"),
        *_skip_rules(step),
    )
    return [text for good, text in rules if not good]
