"""Workload steps as a study file writes them, and their translation into the kernels' steps."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from kernels import steps as model
from kernels.spec import KVM_MAX_VCPUS, Access, Order, Spread
from sweep.errors import Fault, StudyError
from sweep.parameters import Size

MAX_LIST_BYTES = 8 << 30
Part = Annotated[float, Field(ge=0, le=1)]


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TouchStep(_Step):
    """Guest accesses. `vcpus` and `window` are ours: how many vCPUs take part; pages read before they are written (pairs)."""

    op: Literal["touch"]
    access: Literal["write", "read", "pairs", "mixed"] = "write"
    write_percent: Annotated[float, Field(ge=0, le=100)] = 100.0
    order: Literal["sequential", "random", "strided", "zipf"] = "sequential"
    stride: Annotated[int, Field(strict=True, ge=1)] = 1
    theta: Annotated[float, Field(ge=0, le=8)] = 0.99
    range: tuple[Part, Part] = (0.0, 1.0)
    every: Size = 4096
    at: Size = 0
    read_first: Part = 0.0
    touches: Annotated[int, Field(strict=True, ge=0)] | None = None
    repeat: Annotated[bool, Field(strict=True)] = False
    spread: Literal["slices", "all"] = "slices"
    vcpus: Annotated[int, Field(strict=True, ge=1, le=KVM_MAX_VCPUS)] | None = None
    window: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] = 1
    think_ns: Annotated[int, Field(strict=True, ge=0, le=10**12)] = 0

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


StepSpec = Annotated[TouchStep | TouchListStep | PopulateStep | PreFaultStep | VmmCowStep, Field(discriminator="op")]
STEP: TypeAdapter[Any] = TypeAdapter(StepSpec)
STEP_CLASSES: dict[str, type[_Step]] = {
    "touch": TouchStep,
    "touch_list": TouchListStep,
    "populate": PopulateStep,
    "pre_fault": PreFaultStep,
    "vmm_cow": VmmCowStep,
}


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
    )


def _touch_list(spec: TouchListStep, folder: Path) -> model.Step:
    return read_touch_list(folder / spec.path)


_BUILD: dict[type[_Step], Callable[[Any, Path], model.Step]] = {
    TouchStep: _touch,
    TouchListStep: _touch_list,
    PopulateStep: lambda spec, _folder: model.Populate(access=Access[spec.access.upper()], threads=spec.threads),
    PreFaultStep: lambda _spec, _folder: model.PreFault(),
    VmmCowStep: lambda spec, _folder: model.VmmCow(pages=spec.pages),
}


def build_step(spec: Any, folder: Path) -> model.Step:
    """The kernels' step of a checked specification; a touch_list's file is read relative to `folder`. Raises StudyError."""
    return _BUILD[type(spec)](spec, folder)


def read_touch_list(path: Path) -> model.TouchList:
    """vcpu, gfn, write from Parquet or CSV. Raises StudyError that names path, column and cure."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise StudyError([Fault(str(path), "", f"is larger than {MAX_LIST_BYTES} bytes; split the list")])
        table = pa.csv.read_csv(path) if path.suffix == ".csv" else pa.parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StudyError([Fault(str(path), "", f"cannot be read as a touch list: {str(error).splitlines()[0]}")]) from None
    missing = {"vcpu", "gfn", "write"} - set(table.column_names)
    if missing:
        raise StudyError([Fault(str(path), "", f"lacks the columns {', '.join(sorted(missing))}; vcpu, gfn and write are needed")])
    columns = {name: _column(path, table, name) for name in ("vcpu", "gfn", "write")}
    return model.TouchList(columns["vcpu"], columns["gfn"], columns["write"].astype(np.bool_))


def _column(path: Path, table: pa.Table, name: str) -> Any:
    column = table.column(name)
    if column.null_count:
        raise StudyError([Fault(str(path), name, f"has {column.null_count} empty values; every row needs one")])
    try:
        return column.cast(pa.int64()).to_numpy()
    except pa.ArrowException:
        raise StudyError([Fault(str(path), name, f"is of type {column.type}; whole numbers are needed (write: 0 or 1)")]) from None


def touches_of(spec: Any, pages: int) -> int:
    """About how many accesses a step makes: for predictions only."""
    if isinstance(spec, TouchStep):
        units = math.ceil((spec.range[1] - spec.range[0]) * pages * 4096 / spec.every)
        return (spec.touches if spec.touches is not None else units) * (2 if spec.access == "pairs" else 1)
    if isinstance(spec, VmmCowStep):
        return spec.pages
    return pages
