"""Workload steps as a study file writes them, and their translation into the kernels' steps."""

import math
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, TypeAdapter, model_validator

from kernels import steps as model
from kernels.checks import MAX_IDLE_NS, StepChecks
from kernels.policy import behaviours
from kernels.primary_mmu import Traits, traits_of
from kernels.spec import KVM_MAX_VCPUS, MAX_MEMORY_BYTES, PAGE_BYTES, Access, Backing, Call, Mmu, Order, Spread, ThpEnabled
from kernels.state import geometry_of
from sweep.errors import Fault, StudyError
from sweep.parameters import Point, Size
from sweep.quantity import format_size

MAX_LIST_BYTES = 8 << 30
CSV_ROW_BYTES = 10  # about, of a touch list
LISTED = ("vcpu", "gfn", "write")
MAX_TOUCHES = 1 << 48


STEP_CAME_LATER: Mapping[str, Any] = {"skip_hits": False}


def _span(size: int) -> int:
    if not 0 <= size <= MAX_MEMORY_BYTES:
        raise ValueError(f"{format_size(size)}: 0 to 16TiB is needed")
    return size


def _some(size: int) -> int:
    if size < 1:
        raise ValueError("at least 1 byte is needed")
    return size


Span = Annotated[Size, AfterValidator(_span), PlainSerializer(lambda size: f"{size}B", when_used="json")]
SomeSpan = Annotated[Span, AfterValidator(_some)]
Part = Annotated[float, Field(ge=0, le=1)]
Threads = Annotated[int, Field(strict=True, ge=1, le=KVM_MAX_VCPUS)]


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TouchStep(_Step):
    """Guest accesses; all vCPUs that take part run at once."""

    op: Literal["touch"]
    access: Literal["write", "read", "pairs", "mixed", "exec"] = Field(
        "write", description="pairs: a page is read, then written; mixed: write_percent of them write; exec: instruction fetches"
    )
    write_percent: Annotated[float, Field(ge=0, le=100)] = Field(100.0, description="percent of the accesses that write (mixed)")
    order: Literal["sequential", "random", "strided", "zipf"] = Field("sequential", description="in which units are touched")
    stride: Annotated[int, Field(strict=True, ge=1, le=1 << 32)] = Field(1, description="units from one access to the next (strided)")
    theta: Annotated[float, Field(ge=0, le=8)] = Field(0.99, description="exponent of the Zipf distribution (zipf)")
    range: tuple[Part, Part] = Field((0.0, 1.0), description="part of memory: start and end, 0 ... 1")
    every: SomeSpan = Field(4096, description="bytes of a unit, which is touched once")
    at: Span = Field(0, description="where in the unit: bytes from its start")
    read_first: Part = Field(0.0, description="chance that a unit is read just before it is written")
    touches: Annotated[int, Field(strict=True, ge=0, le=MAX_TOUCHES)] | None = Field(
        None, description="accesses of all vCPUs together; default: one per unit"
    )
    repeat: Annotated[bool, Field(strict=True)] = Field(False, description="units may be drawn again (random, mixed)")
    spread: Literal["slices", "all"] = Field("slices", description="slices: each vCPU has its own part; all: every vCPU has the range")
    vcpus: Threads | None = Field(None, description="how many vCPUs take part; default: all")
    window: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] = Field(1, description="pages read before the same are written (pairs)")
    think_ns: Annotated[int, Field(strict=True, ge=0, le=10**12)] = Field(0, description="virtual ns of other work before each access")
    skip_hits: Annotated[bool, Field(strict=True)] = Field(
        False, description="one vCPU, zipf or repeated random: hits are counted, not made, so that only faults take time to simulate"
    )

    @model_validator(mode="after")
    def _fits(self) -> "TouchStep":
        if self.range[0] > self.range[1]:
            raise ValueError(f"range = {list(self.range)}: its start is behind its end")
        for field, access in (("window", "pairs"), ("write_percent", "mixed")):
            if field in self.model_fields_set and self.access != access:
                raise ValueError(f"{field} needs access = {access!r}")
        for field, order in (("stride", "strided"), ("theta", "zipf")):
            if field in self.model_fields_set and self.order != order:
                raise ValueError(f"{field} needs order = {order!r}")
        if self.at >= self.every and "at" in self.model_fields_set:
            raise ValueError(f"at = {format_size(self.at)} lies outside every = {format_size(self.every)}")
        return self


class TouchListStep(_Step):
    """Exactly the accesses of a file, in its order for each vCPU."""

    op: Literal["touch_list"]
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Parquet or CSV file with the columns vcpu, gfn (page of the slot), write; relative to this file"
    )


class PopulateStep(_Step):
    """The VMM populates the slot: MADV_POPULATE_WRITE or MADV_POPULATE_READ."""

    op: Literal["populate"]
    access: Literal["write", "read"] = Field("write", description="which of the two")
    threads: Threads = Field(1, description="VMM threads that share the work")


class PreFaultStep(_Step):
    """KVM_PRE_FAULT_MEMORY over the slot."""

    op: Literal["pre_fault"]


class VmmCowStep(_Step):
    """The VMM writes copy-on-write pages of its own, in no memslot."""

    op: Literal["vmm_cow"]
    pages: Annotated[int, Field(strict=True, ge=0, le=1 << 32)] = Field(1, description="how many pages of 4 KiB")


class _PartStep(_Step):
    """A step over a part of memory."""

    range: tuple[Part, Part] = Field((0.0, 1.0), description="part of memory: start and end, 0 ... 1")

    @model_validator(mode="after")
    def _ordered(self) -> "_PartStep":
        if self.range[0] > self.range[1]:
            raise ValueError(f"range = {list(self.range)}: its start is behind its end")
        return self


class HostTouchStep(_PartStep):
    """The VMM touches the memory itself."""

    op: Literal["host_touch"]
    access: Literal["write", "read"] = Field("write", description="what it does")
    every: SomeSpan = Field(4096, description="bytes from one access to the next")


class ForkStep(_Step):
    """The VMM forks; the child touches nothing. One child at a time."""

    op: Literal["fork"]


class ChildExitStep(_Step):
    """The child of the fork before ends."""

    op: Literal["child_exit"]


class DirtyLogStep(_Step):
    """Dirty logging of the slot."""

    op: Literal["dirty_log"]
    state: Literal["on", "off", "get"] = Field("on", description="get: harvest the log, while it is on")


class DontNeedStep(_PartStep):
    """MADV_DONTNEED: one call over the part, or with `every` one call of `size` bytes in each so many bytes of it."""

    op: Literal["dontneed"]
    every: SomeSpan | None = Field(None, description="bytes from one call to the next")
    at: Span = Field(0, description="where in them a call begins, in bytes")
    size: SomeSpan = Field(4096, description="bytes of a call")

    @model_validator(mode="after")
    def _needs_every(self) -> "DontNeedStep":
        if self.every is None and self.model_fields_set & {"at", "size"}:
            raise ValueError("at and size need every: bytes from one call to the next")
        return self


class CollapseStep(_PartStep):
    """MADV_COLLAPSE over the part."""

    op: Literal["collapse"]


class KsmMergeStep(_Step):
    """Pages become KSM pages."""

    op: Literal["ksm_merge"]
    fraction: Part = Field(1.0, description="fraction of the slot's pages, evenly spread")


class IdleStep(_Step):
    """Nothing is done for a while; daemons go on."""

    op: Literal["idle"]
    ns: Annotated[int, Field(strict=True, ge=0, le=MAX_IDLE_NS)] = Field(0, description="virtual ns")


STEP_CLASSES: dict[str, type[_Step]] = {
    "touch": TouchStep,
    "touch_list": TouchListStep,
    "populate": PopulateStep,
    "pre_fault": PreFaultStep,
    "host_touch": HostTouchStep,
    "fork": ForkStep,
    "child_exit": ChildExitStep,
    "dirty_log": DirtyLogStep,
    "dontneed": DontNeedStep,
    "collapse": CollapseStep,
    "ksm_merge": KsmMergeStep,
    "vmm_cow": VmmCowStep,
    "idle": IdleStep,
}
StepSpec = Annotated[
    TouchStep
    | TouchListStep
    | PopulateStep
    | PreFaultStep
    | HostTouchStep
    | ForkStep
    | ChildExitStep
    | DirtyLogStep
    | DontNeedStep
    | CollapseStep
    | KsmMergeStep
    | VmmCowStep
    | IdleStep,
    Field(discriminator="op"),
]
STEP: TypeAdapter[Any] = TypeAdapter(StepSpec)


def _touch(spec: TouchStep, _folder: Path) -> model.Step:
    return model.Touch(
        access=Access[spec.access.upper()],
        order=Order[spec.order.upper()],
        start=spec.range[0],
        end=spec.range[1],
        every=spec.every,
        at=spec.at,
        stride=spec.stride,
        theta=spec.theta,
        write_percent=spec.write_percent,
        read_first=spec.read_first,
        touches=spec.touches,
        repeat=spec.repeat,
        spread=Spread[spec.spread.upper()],
        vcpus=spec.vcpus,
        window=spec.window,
        think_ns=spec.think_ns,
        skip_hits=spec.skip_hits,
    )


def _touch_list(spec: TouchListStep, folder: Path) -> model.Step:
    return read_touch_list(folder / spec.path)


_BUILD: dict[type[_Step], Callable[[Any, Path], model.Step]] = {
    TouchStep: _touch,
    TouchListStep: _touch_list,
    PopulateStep: lambda spec, _folder: model.Populate(access=Access[spec.access.upper()], threads=spec.threads),
    PreFaultStep: lambda _spec, _folder: model.PreFault(),
    VmmCowStep: lambda spec, _folder: model.VmmCow(pages=spec.pages),
    HostTouchStep: lambda spec, _folder: model.HostTouch(Access[spec.access.upper()], spec.range[0], spec.range[1], spec.every),
    ForkStep: lambda _spec, _folder: model.Fork(),
    ChildExitStep: lambda _spec, _folder: model.ChildExit(),
    DirtyLogStep: lambda spec, _folder: model.DirtyLog(Call[f"LOG_{spec.state.upper()}"]),
    DontNeedStep: lambda spec, _folder: model.DontNeed(spec.range[0], spec.range[1], spec.every, spec.at, spec.size),
    CollapseStep: lambda spec, _folder: model.Collapse(spec.range[0], spec.range[1]),
    KsmMergeStep: lambda spec, _folder: model.KsmMerge(spec.fraction),
    IdleStep: lambda spec, _folder: model.Idle(spec.ns),
}


def build_step(spec: Any, folder: Path) -> model.Step:
    """The kernels' step of a checked specification; a touch_list's file is read relative to `folder`. Raises StudyError."""
    return _BUILD[type(spec)](spec, folder)


def read_touch_list(path: Path) -> model.TouchList:
    """vcpu, gfn, write from Parquet or CSV. Raises StudyError that names path, column and cure."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StudyError([Fault(str(path), "", "cannot be read as a touch list: it is no regular file")])
        if path.stat().st_size > MAX_LIST_BYTES:
            raise StudyError([Fault(str(path), "", f"is larger than {MAX_LIST_BYTES} bytes; split the list")])
        table = pa.csv.read_csv(path) if path.suffix == ".csv" else _listed(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StudyError([Fault(str(path), "", f"cannot be read as a touch list: {str(error).splitlines()[0]}")]) from None
    missing = set(LISTED) - set(table.column_names)
    if missing:
        raise StudyError([Fault(str(path), "", f"lacks the columns {', '.join(sorted(missing))}; vcpu, gfn and write are needed")])
    columns = {name: _column(path, table, name) for name in LISTED}
    return model.TouchList(columns["vcpu"], columns["gfn"], columns["write"].astype(np.bool_))


def _listed(path: Path) -> pa.Table:
    """Those columns of a Parquet file that a touch list needs, as far as it has them."""
    with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read([name for name in LISTED if name in file.schema_arrow.names])


def list_rows(path: Path) -> int:
    """About how many accesses a touch list has, without reading it; 0: it cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return 0
        return path.stat().st_size // CSV_ROW_BYTES if path.suffix == ".csv" else int(pa.parquet.read_metadata(path).num_rows)
    except (OSError, ValueError, pa.ArrowException):
        return 0


def _column(path: Path, table: pa.Table, name: str) -> Any:
    column = table.column(name)
    if column.null_count:
        raise StudyError([Fault(str(path), name, f"has {column.null_count} empty values; every row needs one")])
    try:
        return column.cast(pa.int64()).to_numpy()
    except pa.ArrowException:
        raise StudyError([Fault(str(path), name, f"{name} is of type {column.type}; whole numbers are needed (write: 0 or 1)")]) from None


def check_steps(specs: Sequence[Any], folder: Path, point: Point) -> list[tuple[int, str]]:
    """(number of the step, what is wrong with it on that point) for each step that cannot be where it stands."""
    traits = traits_of_point(point)
    geometry = geometry_of(point.memory, point.offset, traits.gigantic)
    checks = StepChecks(behaviours(point.kernel, point.policy), Mmu[point.mmu.upper()], point.kernel, traits, geometry)
    found = []
    for number, spec in enumerate(specs):
        text = _check_accesses(spec, folder, point) or ("" if isinstance(spec, TouchListStep) else checks.fault(build_step(spec, folder)))
        if text:
            found.append((number, f"{spec.op}: {text}" if not text.startswith(("touch_list", "touches")) else text))
    return found


def _check_accesses(spec: Any, folder: Path, point: Point) -> str:
    pages = point.memory // PAGE_BYTES
    if isinstance(spec, TouchListStep):
        return _check_list(folder / spec.path, pages, point.vcpus)
    if isinstance(spec, TouchStep) and spec.skip_hits:
        return _check_skip(spec, point)
    if isinstance(spec, TouchStep) and spec.touches is not None and not spec.repeat and spec.order != "zipf":
        size = (int(spec.range[1] * pages) - int(spec.range[0] * pages)) * PAGE_BYTES
        units = max(0, -(-(size - spec.at) // spec.every)) * (min(point.vcpus, spec.vcpus or point.vcpus) if spec.spread == "all" else 1)
        if spec.touches > units:
            return f"touches = {spec.touches} is more than the {units} pages of the range; add repeat = true or lower it"
    return ""


def _check_skip(spec: TouchStep, point: Point) -> str:
    actors = min(point.vcpus, spec.vcpus or point.vcpus)
    if actors > 1:
        return f"skip_hits needs a step of one vCPU, not {actors}: say vcpus = 1"
    if point.khugepaged or point.ksm:
        return "skip_hits leaves no single touch to run beside khugepaged or KSM: leave it out"
    return ""


def _check_list(path: Path, pages: int, vcpus: int) -> str:
    try:
        if _fits(path, pages, vcpus):
            return ""
        listed = read_touch_list(path)
    except StudyError as error:
        return "touch_list: " + "; ".join(f"{fault.where} {fault.text}" for fault in error.faults)
    for name, column, limit in (("vcpu", listed.vcpu, vcpus), ("gfn", listed.gfn, pages)):
        bad = np.flatnonzero((column < 0) | (column >= limit))
        if len(bad):
            return f"touch_list: {path}: row {bad[0]}: {name} = {column[bad[0]]} is outside 0 ... {limit - 1}"
    return ""


def _fits(path: Path, pages: int, vcpus: int) -> bool:
    """Every access lies within so many pages and vCPUs. Raises StudyError."""
    try:
        stamp = path.stat()
    except (OSError, ValueError):
        return False  # which read_touch_list() explains
    lowest, most_vcpus, most_pages = _reach(path, stamp.st_mtime_ns, stamp.st_size)
    return lowest >= 0 and most_vcpus < vcpus and most_pages < pages


@lru_cache(maxsize=64)
def _reach(path: Path, _mtime_ns: int, _size: int) -> tuple[int, int, int]:
    """(lowest number, highest vCPU, highest gfn) of a list: it is read once for all the points that it is checked against."""
    listed = read_touch_list(path)
    if not len(listed.gfn):
        return 0, -1, -1
    return int(min(listed.vcpu.min(), listed.gfn.min())), int(listed.vcpu.max()), int(listed.gfn.max())


def traits_of_point(point: Point) -> Traits:
    """What the point's backing is to a host fault."""
    return traits_of(Backing[point.backing.upper()], ThpEnabled[point.thp_enabled.upper()])


def touches_of(spec: Any, pages: int) -> int:
    """About how many accesses a step makes: for predictions only."""
    if isinstance(spec, TouchStep):
        units = math.ceil((spec.range[1] - spec.range[0]) * pages * 4096 / spec.every)
        return (spec.touches if spec.touches is not None else units) * (2 if spec.access == "pairs" else 1)
    if isinstance(spec, VmmCowStep):
        return spec.pages
    return 0 if isinstance(spec, ChildExitStep | IdleStep) else pages
