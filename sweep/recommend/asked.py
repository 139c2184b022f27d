"""What is asked, and the study that answers it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kernels.spec import KVM_MAX_VCPUS, MAX_MEMORY_BYTES, PMD_BYTES
from sweep.configs import shared_workloads
from sweep.errors import StudyError, UsageError
from sweep.files import nearest, toml_value
from sweep.parameters import COLUMN_OF, Point
from sweep.plan import Plan
from sweep.quantity import parse_size
from sweep.report.roles import setting_label, word
from sweep.runner import RunOptions
from sweep.study import CURE, Study, load_study
from sweep.study_text import block, listed_workload, pair, proposals_of

NAME = "recommend"
FILE = "recommend.toml"
QUESTION = "the question"  # where a fault is that no file of the user's has
REPLICATES = 3
KERNELS = ("5.15", "6.1", "6.6", "6.12", "6.18")  # that are asked about beside the host's
FAILURES = (0.1, 0.5, 1.0)  # of 2M allocations
BACKINGS = ("anonymous", "anonymous_thp", "anonymous_hugetlb_2mb", "anonymous_hugetlb_1gb", "shmem", "shmem_thp")
Conditions = Mapping[str, Any]
Axes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class RecommendOptions:
    """What is asked: a guest, what it does (a workload or a recorded trace), and how much memory the host may hold for it."""

    memory: str | None = None
    vcpus: int | None = None
    kernel: str | None = None
    workload: str | None = None
    trace: str | None = None
    study: Path | None = None
    budget: str | None = None
    proposals: bool = False
    what_if: bool = True
    overrides: Sequence[str] = ()
    out: str | None = None
    run: RunOptions = field(default_factory=lambda: RunOptions(executor="local"))


@dataclass(frozen=True)
class Asked:
    """A question whose guest is known. `accesses`: file with the accesses of a trace. `own`: a study file of the user's with parameters and
    workloads; files that it or an override names are relative to its folder, without it to the working directory."""

    conditions: Conditions
    accesses: str = ""
    own: Path | None = None
    proposals: bool = False
    what_if: bool = True
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class LeftOut:
    """What the study cannot have, and why. `place`: the other conditions, '' for those that were asked about; `setting`: '' for all."""

    place: str
    setting: str
    why: str


@dataclass(frozen=True)
class Posed:
    """The study that answers a question, and what is not in it."""

    study: Study
    left_out: Sequence[LeftOut]


def check(options: RecommendOptions) -> None:
    """Refuse at once what cannot be. Raises UsageError."""
    if (options.workload is None) == (options.trace is None):
        raise UsageError("--workload NAME or --trace FILE is needed, one of the two: what the guest does")
    if options.trace is not None and (options.study is not None or options.memory is not None or options.vcpus is not None):
        raise UsageError("--trace says memory and vCPUs itself; leave out --memory, --vcpus and --study")
    if options.workload is not None and options.study is None and options.workload not in (known := shared_workloads()):
        raise UsageError(f"--workload {options.workload[:80]!r} is unknown; {nearest(options.workload, known)}")
    budget_of(options)
    asked_point(options)


def budget_of(options: RecommendOptions) -> int | None:
    """Bytes that the host may hold for the guest; None: as much as it takes. Raises UsageError."""
    try:
        return parse_size(options.budget) if options.budget is not None else None
    except ValueError as error:
        raise UsageError(f"--budget: {error}") from None


def asked_point(options: RecommendOptions) -> Conditions:
    """The conditions that were given, checked. Raises UsageError that names the option."""
    given = {"memory": options.memory, "vcpus": options.vcpus, "kernel": options.kernel, "workload": options.workload}
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        point = Point(**found)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{'.'.join(map(str, first['loc'][:1]))}: {first['msg'].removeprefix('Value error, ')}") from None
    return {name: getattr(point, name) for name in found}


def pose(asked: Asked, folder: Path) -> Posed:
    """Write the study into a folder and read it as any other. Settings and other conditions that the study cannot have (a step that the
    backing or the kernel lacks, ...) are left out. Raises StudyError."""
    path = folder / FILE
    point = next(iter(Plan(_read(path, asked, [block({"backing": ["anonymous_thp"]})])))).point
    here, left = _possible(path, asked, point, {})
    chosen = here or _blocks(settings_of(point, asked.proposals), {})  # if none can be, the reader says why
    never = {each.setting for each in left}
    for place in _others(point, asked):
        there, lacks = _possible(path, asked, point, place)
        chosen += there
        left += (lack for lack in lacks if lack.setting not in never)
    return Posed(_read(path, asked, chosen), tuple(left))


def _possible(path: Path, asked: Asked, point: Point, place: Conditions) -> tuple[list[str], list[LeftOut]]:
    """The blocks of a place without the settings that its points cannot have; and these, or the place as a whole."""
    axes = list(settings_of(point.model_copy(update=dict(place)), asked.proposals))
    whole = _blocks(axes, place)
    if not _why_not(path, asked, whole):
        return whole, []
    found: list[str] = []
    left: list[LeftOut] = []
    where = ", ".join(word(COLUMN_OF.get(name, name), value) for name, value in place.items())
    for values in (dict(zip(each, chosen, strict=True)) for each in axes for chosen in product(*each.values())):
        one = _blocks([{name: [value] for name, value in values.items()}], place)
        if why := _why_not(path, asked, one):
            left.append(LeftOut(where, setting_label(values), why))
        else:
            found += one
    return found, left if found else [replace(left[0], setting="")]


def _why_not(path: Path, asked: Asked, blocks: Sequence[str]) -> str:
    """Why there is no study of these blocks; '' if there is one."""
    try:
        _read(path, asked, blocks)
    except StudyError as error:
        return error.faults[0].text.removesuffix(CURE)
    return ""


def _read(path: Path, asked: Asked, blocks: Sequence[str]) -> Study:
    path.write_text(study_text(asked, blocks))
    try:
        return load_study(path, asked.overrides, asked.own.parent if asked.own else Path())
    except StudyError as error:  # nobody but us has seen the file
        ours = str(path)
        raise StudyError([replace(fault, where=QUESTION) if fault.where.startswith(ours) else fault for fault in error.faults]) from None


def study_text(asked: Asked, blocks: Sequence[str]) -> str:
    """The study with these blocks."""
    workload = asked.conditions["workload"]
    lines = [
        f"# Question: which settings take the least time for {workload}?",
        *([f"include = [{toml_value(str(asked.own.resolve()))}]"] if asked.own else []),
        "[study]",
        f'name = "{NAME}"',
        f"title = {toml_value(f'Settings for {workload}')}",
        f"replicates = {REPLICATES}",
        "[point]",
        *(pair(name, value) for name, value in asked.conditions.items()),
        *blocks,
    ]
    if asked.accesses:
        lines.append(listed_workload(workload, asked.accesses))
    return "\n".join(lines) + "\n"


def _blocks(axes: Iterable[Axes], place: Conditions) -> list[str]:
    """Settings under conditions that replace the guest's own."""
    return [block(each, place) for each in axes]


def settings_of(point: Point, proposals: bool) -> Iterator[Axes]:
    """The axes of what can be chosen for a guest, and of the list thread's patches where they are asked for and can be."""
    yield {"backing": BACKINGS, "prealloc": ["none", "populate"]}
    if not point.policy.startswith("huge_zero"):  # which say what that page does
        yield {"backing": ["anonymous_thp"], "use_zero_page": [False]}
    if proposals and (policies := proposals_of(point.kernel, point.mmu)):
        yield {"backing": ["anonymous", "anonymous_thp"], "policy": policies}


def _others(point: Point, asked: Asked) -> Iterator[Conditions]:
    """Conditions that differ in one from the point's: what may change the choice. Those that --set fixes stay."""
    kept = {override.partition("=")[0].strip().removeprefix("point.") for override in asked.overrides}
    values: dict[str, Sequence[Any]] = {
        "kernel": [kernel for kernel in KERNELS if kernel != point.kernel],
        "thp_failure": [chance for chance in FAILURES if chance != point.thp_failure],
        "cores": [(point.vcpus + 1) // 2] if point.vcpus > 1 and point.cores is None else [],
    }
    if not asked.accesses:  # a trace has its vCPUs and addresses
        values["vcpus"] = sorted({1, min(2 * point.vcpus, KVM_MAX_VCPUS)} - {point.vcpus})
        values["memory"] = [size for size in (point.memory // 2, point.memory * 2) if PMD_BYTES <= size <= MAX_MEMORY_BYTES]
    if asked.what_if:
        yield from ({name: value} for name in values if name not in kept for value in values[name])
