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
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, TypeAdapter, field_validator, model_validator

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


Span = Annotated[Size, AfterValidator(_span), PlainSerializer(lambda size: f"{size}B", when_used="json")]
Part = Annotated[float, Field(ge=0, le=1)]


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TouchStep(_Step):
    """Guest accesses. `vcpus` and `window` are ours: how many vCPUs take part; pages read before they are written (pairs)."""

    op: Literal["touch"]
    access: Literal["write", "read", "pairs", "mixed", "exec"] = "write"
    write_percent: Annotated[float, Field(ge=0, le=100)] = 100.0
    order: Literal["sequential", "random", "strided", "zipf"] = "sequential"
    stride: Annotated[int, Field(strict=True, ge=1, le=1 << 32)] = 1
    theta: Annotated[float, Field(ge=0, le=8)] = 0.99
    range: tuple[Part, Part] = (0.0, 1.0)
    every: Span = 4096
    at: Span = 0
    read_first: Part = 0.0
    touches: Annotated[int, Field(strict=True, ge=0, le=MAX_TOUCHES)] | None = None
    repeat: Annotated[bool, Field(strict=True)] = False
    spread: Literal["slices", "all"] = "slices"
    vcpus: Annotated[int, Field(strict=True, ge=1, le=KVM_MAX_VCPUS)] | None = None
    window: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] = 1
    think_ns: Annotated[int, Field(strict=True, ge=0, le=10**12)] = 0
    skip_hits: Annotated[bool, Field(strict=True)] = False

    @field_validator("every")
    @classmethod
    def _every(cls, value: int) -> int:
        if value < 1:
            raise ValueError("at least 1 byte is needed")
        return value

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
    """Exactly the accesses of a Parquet or CSV file with columns vcpu, gfn, write."""

    op: Literal["touch_list"]
    path: Annotated[str, Field(min_length=1, max_length=4096)]


class PopulateStep(_Step):
    op: Literal["populate"]
    access: Literal["write", "read"] = "write"
    threads: Annotated[int, Field(strict=True, ge=1, le=KVM_MAX_VCPUS)] = 1


class PreFaultStep(_Step):
    op: Literal["pre_fault"]


class VmmCowStep(_Step):
    """The VMM writes copy-on-write pages of its own, in no memslot."""

    op: Literal["vmm_cow"]
    pages: Annotated[int, Field(strict=True, ge=0, le=1 << 32)] = 1


class _PartStep(_Step):
    """A step over a part of memory."""

    range: tuple[Part, Part] = (0.0, 1.0)

    @model_validator(mode="after")
    def _ordered(self) -> "_PartStep":
        if self.range[0] > self.range[1]:
            raise ValueError(f"range = {list(self.range)}: its start is behind its end")
        return self


class HostTouchStep(_PartStep):
    """The VMM touches the memory itself."""

    op: Literal["host_touch"]
    access: Literal["write", "read"] = "write"
    every: Annotated[Span, Field(ge=1)] = 4096


class ForkStep(_Step):
    op: Literal["fork"]


class ChildExitStep(_Step):
    op: Literal["child_exit"]


class DirtyLogStep(_Step):
    op: Literal["dirty_log"]
    state: Literal["on", "off", "get"] = "on"


class DontNeedStep(_PartStep):
    """MADV_DONTNEED over the part, or `size` bytes at `at` in every `every` bytes of it. `at` is ours."""

    op: Literal["dontneed"]
    every: Annotated[Span, Field(ge=1)] | None = None
    at: Span = 0
    size: Annotated[Span, Field(ge=1)] = 4096

    @model_validator(mode="after")
    def _needs_every(self) -> "DontNeedStep":
        if self.every is None and self.model_fields_set & {"at", "size"}:
            raise ValueError("at and size need every: bytes from one call to the next")
        return self


class CollapseStep(_PartStep):
    op: Literal["collapse"]


class KsmMergeStep(_Step):
    op: Literal["ksm_merge"]
    fraction: Part = 1.0


class IdleStep(_Step):
    op: Literal["idle"]
    ns: Annotated[int, Field(strict=True, ge=0, le=MAX_IDLE_NS)] = 0


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
