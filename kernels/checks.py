"""What simulate() refuses: parameters and steps that cannot be, named with their value and what would do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from typing import get_args

from kernels.policy import Behaviour
from kernels.primary_mmu import Traits
from kernels.spec import KVM_MAX_VCPUS, MAX_MEMORY_BYTES, MAX_SMT, PAGE_BYTES, PMD_BYTES, PUD_BYTES, Access, Call, Mmu
from kernels.state import Geometry
from kernels.steps import (
    ChildExit,
    Collapse,
    DirtyLog,
    DontNeed,
    Fork,
    HostTouch,
    Idle,
    Khugepaged,
    Ksm,
    KsmMerge,
    Populate,
    PreFault,
    Step,
    Touch,
    WorkloadError,
    check_touch,
    op_of,
)

MAX_IDLE_NS = 10**15
MAX_WHOLE = 1 << 50  # of any whole number of a step: a product with as many vCPUs as there can be is a 64-bit number
MOST_EVENTS = 1 << 62
MOST_TRACE_ROWS = 1 << 32


class PointError(ValueError):
    """A parameter that the model cannot take: named, with its value and what would do."""


def host_page_bytes(traits: Traits) -> int:
    """The page that memory and host calls must be multiples of."""
    if not traits.hugetlb:
        return PAGE_BYTES
    return PUD_BYTES if traits.gigantic else PMD_BYTES


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


# The fields of each step, and of each daemon's settings, that hold a whole number; True: or None.
WHOLE: Mapping[type, Mapping[str, bool]] = {
    kind: {field.name: field.type == int | None for field in fields(kind) if field.type in (int, int | None)}
    for kind in (*get_args(Step), Khugepaged, Ksm)
}


def whole_faults(numbers: Step | Khugepaged | Ksm) -> list[str]:
    """Which fields of a step or a daemon should hold a whole number, and do not."""
    given = [(name, getattr(numbers, name), may_lack) for name, may_lack in WHOLE[type(numbers)].items()]
    wrong = [(name, value) for name, value, may_lack in given if not (is_whole(value) or (value is None and may_lack))]
    return [f"{name} = {value!r}: a whole number is needed" for name, value in wrong]


def large_faults(step: Step) -> list[str]:
    """Which whole numbers of a step are beyond what the model counts with."""
    given = [(name, getattr(step, name)) for name in WHOLE[type(step)]]
    return [f"{name} = {value}: at most 2**50 is possible" for name, value in given if value is not None and value > MAX_WHOLE]


def check_count(name: str, value: int, limit: int, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= limit:
        raise PointError(f"{name} = {value!r}: an integer from {low} to {limit} is needed")


def check_counts(vcpus: int, prealloc_threads: int, cores: int | None, smt: int, trace_rows: int, max_events: int | None) -> None:
    """Raises PointError."""
    check_count("vcpus", vcpus, KVM_MAX_VCPUS)
    check_count("prealloc_threads", prealloc_threads, KVM_MAX_VCPUS)
    if cores is not None:
        check_count("cores", cores, KVM_MAX_VCPUS)
    check_count("smt", smt, MAX_SMT)
    if fault := smt_fault(cores, smt):
        raise PointError(fault)
    check_count("trace_rows", trace_rows, MOST_TRACE_ROWS, low=0)
    if max_events is not None:
        check_count("max_events", max_events, MOST_EVENTS)


def smt_fault(cores: int | None, smt: int) -> str:
    """What is wrong with hardware threads of these cores, '' if nothing is."""
    return f"smt = {smt}: without cores every vCPU has a core of its own; give cores" if smt > 1 and cores is None else ""


def check_point(memory: int, offset: int, guest_page: int, traits: Traits, khugepaged: Khugepaged | None, ksm: Ksm | None) -> None:
    """Raises PointError."""
    for name, value in (("memory", memory), ("offset", offset), ("guest_page", guest_page)):
        if not is_whole(value):
            raise PointError(f"{name} = {value!r}: a whole number of bytes is needed")
    if not PAGE_BYTES <= memory <= MAX_MEMORY_BYTES or memory % PAGE_BYTES:
        below = max(PAGE_BYTES, memory // PAGE_BYTES * PAGE_BYTES)
        raise PointError(
            f"memory = {memory} bytes: a multiple of {PAGE_BYTES} from {PAGE_BYTES} to {MAX_MEMORY_BYTES} is needed; "
            f"nearest: {below} and {below + PAGE_BYTES}"
        )
    if memory % host_page_bytes(traits) and not offset:
        raise PointError(f"memory = {memory} bytes: not a multiple of the huge page, {host_page_bytes(traits)} bytes")
    rules = (
        (0 <= offset <= MAX_MEMORY_BYTES and offset % PAGE_BYTES == 0, f"offset = {offset} bytes: a multiple of {PAGE_BYTES} is needed"),
        (guest_page in (PAGE_BYTES, PMD_BYTES), f"guest_page = {guest_page} bytes: {PAGE_BYTES} or {PMD_BYTES} is needed"),
    )
    faults = [text for good, text in rules if not good]
    faults += [f"khugepaged: {text}" for text in daemon_faults(khugepaged)] + [f"ksm: {text}" for text in daemon_faults(ksm)]
    if faults:
        raise PointError("; ".join(faults))


def daemon_faults(daemon: Khugepaged | Ksm | None) -> list[str]:
    """What is wrong with a daemon's settings."""
    if daemon is None:
        return []
    if faults := whole_faults(daemon):
        return faults
    sleep = daemon.scan_sleep_ms if isinstance(daemon, Khugepaged) else daemon.sleep_ms
    if not 1 <= daemon.pages_to_scan <= 1 << 32:
        faults.append(f"pages_to_scan = {daemon.pages_to_scan}: 1 ... 2**32 is needed")
    if not 1 <= sleep <= 1 << 32:
        faults.append(f"sleep = {sleep} ms: 1 ... 2**32 is needed")
    if isinstance(daemon, Khugepaged) and not 0 <= daemon.max_ptes_none <= 511:
        faults.append(f"max_ptes_none = {daemon.max_ptes_none}: 0 ... 511 is needed")
    if isinstance(daemon, Ksm) and not 0.0 <= daemon.fraction <= 1.0:
        faults.append(f"fraction = {daemon.fraction}: 0 ... 1 is needed")
    return faults


def part_fault(start: float, end: float) -> str:
    return "" if 0.0 <= start <= end <= 1.0 else f"range = [{start}, {end}]: 0 <= start <= end <= 1 is needed"


class StepChecks:
    """Walks the steps of one point and knows what is on."""

    def __init__(self, behaviour: Mapping[Behaviour, int], mmu: Mmu, kernel: str, traits: Traits, geometry: Geometry) -> None:
        self.behaviour = behaviour
        self.mmu = mmu
        self.kernel = kernel
        self.traits = traits
        self.geometry = geometry
        self.child = False
        self.logging = False

    def fault(self, step: Step) -> str:
        """What is wrong with the step where it stands; '' if nothing is."""
        if type(step) not in WHOLE:
            return f"{step!r} is no step"
        if faults := whole_faults(step) or large_faults(step):
            return "; ".join(faults)
        checks: Mapping[type, Callable[..., str]] = {
            Touch: lambda s: "; ".join(check_touch(s)),
            Populate: lambda s: "" if 1 <= s.threads <= KVM_MAX_VCPUS else f"threads = {s.threads}: 1 ... {KVM_MAX_VCPUS} is needed",
            PreFault: self.pre_fault,
            HostTouch: self.host_touch,
            Idle: lambda s: "" if 0 <= s.ns <= MAX_IDLE_NS else f"ns = {s.ns}: 0 ... {MAX_IDLE_NS} is needed",
            Fork: self.fork,
            ChildExit: self.child_exit,
            DirtyLog: self.dirty_log,
            DontNeed: self.dontneed,
            Collapse: self.collapse,
            KsmMerge: self.ksm_merge,
        }
        check = checks.get(type(step))
        return check(step) if check else ""

    def pre_fault(self, _step: PreFault) -> str:
        if not self.behaviour[Behaviour.PRE_FAULT_MEMORY]:
            return f"kernel {self.kernel} has no KVM_PRE_FAULT_MEMORY; 6.11 is the first that has it"
        return "KVM_PRE_FAULT_MEMORY needs EPT or NPT: mmu = 'shadow' has no use for it" if self.mmu == Mmu.SHADOW else ""

    def host_touch(self, step: HostTouch) -> str:
        if step.access not in (Access.READ, Access.WRITE):
            return f"access = {step.access.name.lower()}: read or write is needed"
        return part_fault(step.start, step.end) or ("" if step.every >= 1 else f"every = {step.every}: at least 1 byte is needed")

    def fork(self, _step: Fork) -> str:
        if self.child:
            return "the child of the fork before still lives; put child_exit in between"
        self.child = True
        return ""

    def child_exit(self, _step: ChildExit) -> str:
        if not self.child:
            return "there is no child; put fork before it"
        self.child = False
        return ""

    def dirty_log(self, step: DirtyLog) -> str:
        if step.state == Call.LOG_GET and not self.logging:
            return "state = 'get': dirty logging is off; put state = 'on' before it"
        self.logging = {Call.LOG_ON: True, Call.LOG_OFF: False}.get(step.state, self.logging)
        return ""

    def dontneed(self, step: DontNeed) -> str:
        if fault := part_fault(step.start, step.end):
            return fault
        sizes = {"every": step.every, "at": step.at, "size": step.size} if step.every is not None else {}
        for name, value in sizes.items():
            if value is None or value < 0 or value % PAGE_BYTES or (value == 0 and name != "at"):
                return f"{name} = {value} bytes: a multiple of {PAGE_BYTES} is needed"
        if step.every is not None and step.size > step.every:
            return f"size = {step.size} is more than every = {step.every}"
        return self.hugetlb_dontneed(step) if self.traits.hugetlb else ""

    def hugetlb_dontneed(self, step: DontNeed) -> str:
        if not self.behaviour[Behaviour.HUGETLB_DONTNEED]:
            return f"kernel {self.kernel} has no MADV_DONTNEED of hugetlb; 5.18 is the first that has it"
        page, shift, pages = host_page_bytes(self.traits), self.geometry.shift, self.geometry.pages
        first = (shift + int(step.start * pages)) * PAGE_BYTES
        last = (shift + int(step.end * pages)) * PAGE_BYTES
        parts = (first, last) if step.every is None else (first, last, step.every, step.at, step.size)
        if any(value % page for value in parts):
            return f"MADV_DONTNEED of hugetlb needs whole pages of {page} bytes"
        return ""

    def collapse(self, step: Collapse) -> str:
        if not self.behaviour[Behaviour.COLLAPSE]:
            return f"kernel {self.kernel} has no MADV_COLLAPSE; 6.1 is the first that has it"
        if not self.traits.collapsible:
            return "MADV_COLLAPSE needs a mapping that may hold THPs: backing anonymous_thp, anonymous_default or shmem_thp"
        return part_fault(step.start, step.end)

    def ksm_merge(self, step: KsmMerge) -> str:
        if self.traits.hugetlb or self.traits.shared or self.traits.file:
            return "KSM merges private anonymous memory only"
        return "" if 0.0 <= step.fraction <= 1.0 else f"fraction = {step.fraction}: 0 ... 1 is needed"


def step_faults(
    steps: Sequence[Step], behaviour: Mapping[Behaviour, int], mmu: Mmu, kernel: str, traits: Traits, geometry: Geometry
) -> list[tuple[int, str]]:
    """(number of the step, what is wrong with it) for every step that cannot be where it stands."""
    checks = StepChecks(behaviour, mmu, kernel, traits, geometry)
    found = [(number, checks.fault(step)) for number, step in enumerate(steps)]
    return [(number, text) for number, text in found if text]


def check_steps(
    steps: Sequence[Step], behaviour: Mapping[Behaviour, int], mmu: Mmu, kernel: str, traits: Traits, geometry: Geometry
) -> None:
    """Raises WorkloadError."""
    faults = step_faults(steps, behaviour, mmu, kernel, traits, geometry)
    if faults:
        named = (f"{op_of(steps[number])} (step {number}): {text}" for number, text in faults)
        raise WorkloadError("; ".join(named))
