"""Observed rates: a CSV file of what others measured, each row as the point that the model runs for it.

Every meaning of a cell stands in a table here: which workload, lock, host and metric a word stands for. A word that no table
has is a fault with its line, never a guess.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from kernels.spec import KVM_MAX_VCPUS, MAX_MEMORY_BYTES, MAX_SMT
from sweep.configs import config_root
from sweep.errors import Fault, StudyError
from sweep.files import nearest, read_bytes, short
from sweep.parameters import ALLOWED_VALUES, NAME_PATTERN, PARAMETERS, Point
from sweep.quantity import format_size

REQUIRED = (
    "case",
    "source",
    "arch",
    "host_cpus",
    "vcpus",
    "memory_per_vcpu_mib",
    "backing",
    "workload",
    "lock",
    "metric",
    "value",
    "unit",
    "note",
)
OPTIONAL = ("kernel", "preallocated")  # empty: the default kernel; nothing is preallocated
MAX_ROWS = 10_000
MAX_CELL = 1000
MIB = 1 << 20


@dataclass(frozen=True)
class Metric:
    """How an observed figure is read from a row of table `points`: column * scale."""

    unit: str
    column: str
    scale: float
    per_time: int  # power of time in the figure: 1 for a duration, -1 for a rate
    extensive: bool  # grows with the memory that is touched


METRICS: Mapping[str, Metric] = {
    "pages_per_s_per_vcpu": Metric("1/s", "pages_per_s_per_vcpu", 1.0, -1, False),
    "total_s": Metric("s", "total_ns", 1e-9, 1, True),
}


@dataclass(frozen=True)
class Observation:
    """One row: who saw which figure, and the point that is that machine. `value` is in the metric's unit."""

    case: str
    source: str
    arch: str
    host: str
    note: str
    metric: str
    value: float
    point: Point

    def of(self, columns: Mapping[str, Any]) -> float:
        """The model's figure, from a row of table `points` (or its means)."""
        metric = METRICS[self.metric]
        return float(columns[metric.column]) * metric.scale

    def record(self) -> dict[str, Any]:
        """As JSON, whole enough for from_record()."""
        return {**self.__dict__, "point": self.point.model_dump()}


def from_record(record: Mapping[str, Any]) -> Observation:
    """The observation of Observation.record(). Raises TypeError, ValueError, KeyError for anything else."""
    if record["metric"] not in METRICS:
        raise ValueError(f"metric {record['metric']!r} is unknown")
    values = record["point"]
    if not isinstance(values, dict) or set(values) - set(PARAMETERS):
        raise ValueError(f"observation {record['case']!r} has no point of this version")
    return Observation(**{**record, "point": Point.model_construct(**values)})


# A row's workload and preallocated, as workload and prealloc of a point. The selftest fills memory through another mapping of it, so
# KVM's faults find the page in the page cache and map it (docs/calibrate.md).
GUEST_WORKLOADS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("demand_paging", ""): ("demand_paging", "none"),
    ("demand_paging", "mapped"): ("demand_paging", "populate"),
    ("demand_paging", "page_cache"): ("demand_paging_cached", "none"),
    ("populate", ""): ("first_touch", "none"),
    ("populate", "mapped"): ("first_touch", "populate"),
}
VMM_WORKLOAD = re.compile(r"vmm_populate_([0-9]{1,4})_threads?")
LOCKS: Mapping[str, str] = {"read": "tdp", "write": "legacy"}  # a fault takes mmu_lock for reading: TDP MMU; for writing: legacy MMU
PREALLOCATED = ("", *sorted({second for _, second in GUEST_WORKLOADS} - {""}))
WORKLOAD_WORDS = (*dict.fromkeys(first for first, _ in GUEST_WORKLOADS), "vmm_populate_N_threads")


class Host(NamedTuple):
    """CPUs of a host: cores, hardware threads of each, and whether it may have more (the source says 'at least')."""

    cores: int
    smt: int
    at_least: bool


HOSTS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Host | None]], ...] = (
    (re.compile(r"([0-9]{1,4}) cores?, ([0-9]{1,5}) threads?"), lambda m: _threads(int(m[1]), int(m[2]))),
    (re.compile(r">= ?([0-9]{1,4})"), lambda m: _plain(int(m[1]), True)),
    (re.compile(r"([0-9]{1,4})"), lambda m: _plain(int(m[1]), False)),
)


def _threads(cores: int, threads: int) -> Host | None:
    smt, rest = divmod(threads, max(1, cores))
    return Host(cores, smt, False) if not rest and 1 <= smt <= MAX_SMT and 1 <= cores <= KVM_MAX_VCPUS else None


def _plain(cores: int, at_least: bool) -> Host | None:
    return Host(cores, 1, at_least) if 1 <= cores <= KVM_MAX_VCPUS else None


def load_observations(text: str, folder: Path) -> tuple[Observation, ...]:
    """'published-rates' of configs/observations, or the path of a .csv file, relative to `folder`. Raises StudyError."""
    if text.endswith(".csv"):
        return read_observations(folder / text)  # an absolute path stays what it is
    if not re.fullmatch(NAME_PATTERN, text):
        raise StudyError([Fault("", "observations", f"{text!r} is neither the name of an observations file nor the path of a .csv file")])
    path = config_root() / "observations" / f"{text}.csv"
    if not path.is_file():
        known = [p.stem for p in (config_root() / "observations").glob("*.csv")]
        raise StudyError([Fault("", "observations", f"{text!r} is unknown; {nearest(text, known)}")])
    return read_observations(path)


def read_observations(path: Path) -> tuple[Observation, ...]:
    """Read and check a file of observed rates. Raises StudyError with every fault: file:line, column, what, cure."""
    rows = list(_rows(path))
    faults: list[Fault] = []
    found: list[Observation] = []
    source, cases = "", dict[str, int]()
    for line, cells in rows:
        row = _Row(f"{path}:{line}", cells, faults)
        source = row.source(source)
        case = row.word("case")
        if case in cases:
            row.fault("case", f"{case!r} is on line {cases[case]} already; give each row a name of its own")
        cases[case] = line
        observation = row.observation(case, source)
        if observation is not None:
            found.append(observation)
    if not rows:
        faults.append(Fault(str(path), "", "has no rows; give at least one observed figure below the line of column names"))
    if faults:
        raise StudyError(faults)
    return tuple(found)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line on which it begins, cells by column) of every row. Raises StudyError for what is no such table at all."""
    raw = read_bytes(path, what="CSV file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError([Fault(str(path), "", f"byte {error.start} is no UTF-8; save the file as UTF-8")]) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise StudyError([Fault(f"{path}:{line}", "", "holds a NUL byte; save the table as plain text (CSV)")])
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    begin, count = 1, 0
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if columns is None:
                columns = _columns(f"{path}:{line}", cells)
                continue
            count += 1
            if len(cells) != len(columns):
                raise StudyError(
                    [Fault(f"{path}:{line}", "", f"has {len(cells)} cells, the first line {len(columns)}; quote text with commas")]
                )
            if count > MAX_ROWS:
                raise StudyError([Fault(f"{path}:{line}", "", f"more than {MAX_ROWS} rows; split the file")])
            yield line, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise StudyError([Fault(f"{path}:{begin}", "", f"is no CSV: {error}; close its quotes")]) from None
    if columns is None:
        raise StudyError([Fault(str(path), "", f"is empty; the first line must name the columns: {','.join(REQUIRED)}")])


def _columns(where: str, cells: Sequence[str]) -> list[str]:
    """The header, checked. Raises StudyError."""
    names = [cell.strip() for cell in cells]
    known = (*REQUIRED, *OPTIONAL)
    faults = [Fault(where, short(name), f"unknown column; {nearest(name, known)}") for name in names if name not in known]
    faults += [Fault(where, name, "is a column twice; keep one") for name in dict.fromkeys(names) if names.count(name) > 1]
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        faults.append(Fault(where, "", f"the columns {', '.join(missing)} are missing; the first line must name them"))
    if faults:
        raise StudyError(faults)
    return names


class _Row:
    """The cells of one row, read one by one; what is wrong is added to `faults`."""

    def __init__(self, where: str, cells: Mapping[str, str], faults: list[Fault]) -> None:
        self.where, self.cells, self.faults = where, cells, faults
        self.begin = len(faults)
        for name, cell in cells.items():
            if len(cell) > MAX_CELL or not cell.isprintable():
                self.fault(name, f"{short(cell)}: must be text of one line, at most {MAX_CELL} characters, without control characters")

    def fault(self, column: str, text: str) -> None:
        self.faults.append(Fault(self.where, column, text))

    def cell(self, column: str) -> str:
        return self.cells.get(column, "").strip()

    def word(self, column: str) -> str:
        """A cell that must not be empty."""
        if not self.cell(column):
            self.fault(column, "is empty; fill it in")
        return self.cell(column)

    def source(self, above: str) -> str:
        """'same' is the source of the row above."""
        text = self.word("source")
        if text == "same" and not above:
            self.fault("source", "'same' on the first row; say where the figure comes from")
        return above if text == "same" else text

    def one_of(self, column: str, known: Sequence[str]) -> str:
        """A cell that has one of some words; the first of them after a fault."""
        text = self.cell(column)
        if text not in known:
            self.fault(column, f"{short(text)} is unknown; {nearest(text, known)}")
            return known[0]
        return text

    def whole(self, column: str, low: int, high: int) -> int:
        text = self.cell(column)
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            self.fault(column, f"{short(text)}: a whole number from {low} to {high} is needed")
            return low
        return int(text)

    def figure(self) -> float:
        """The observed value: finite and above 0."""
        text = self.cell("value")
        well = re.fullmatch(r"[0-9]{1,30}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", text)
        value = float(text) if well else math.nan
        if not math.isfinite(value) or value <= 0:
            self.fault("value", f"{short(text)}: a finite number above 0 is needed, like 306845 or 0.19")
            return 1.0
        return value

    def host(self) -> Host:
        text = self.word("host_cpus")
        for pattern, made in HOSTS:
            match = pattern.fullmatch(text)
            host = made(match) if match else None
            if host is not None:
                return host
        if text:
            self.fault("host_cpus", f"{short(text)}: '64', '>= 48' or '48 cores, 96 threads' is needed, with 1 or 2 threads a core")
        return Host(1, 1, True)

    def parameters(self) -> dict[str, Any]:
        """Parameters of the point that is this row."""
        host = self.host()
        vmm = VMM_WORKLOAD.fullmatch(self.cell("workload"))
        vcpus = self.whole("vcpus", 0 if vmm else 1, KVM_MAX_VCPUS)
        mib = self.whole("memory_per_vcpu_mib", 1, MAX_MEMORY_BYTES // MIB)
        found: dict[str, Any] = {
            "backing": self.one_of("backing", sorted(ALLOWED_VALUES["backing"])),
            "vcpus": max(1, vcpus),
            "memory": format_size(max(1, vcpus) * mib * MIB),
            "cores": max(host.cores, vcpus) if host.at_least else host.cores,
            "smt": host.smt,
        }
        if self.cell("kernel"):
            found["kernel"] = self.cell("kernel")
        return found | (self._populate(int(vmm[1])) if vmm else self._guest())

    def _guest(self) -> dict[str, Any]:
        """The guest's vCPUs touch the memory."""
        word = self.cell("workload")
        if word not in WORKLOAD_WORDS or word == WORKLOAD_WORDS[-1]:
            self.fault("workload", f"{short(word)} is unknown; {nearest(word, WORKLOAD_WORDS)}")
            return {}
        how = self.one_of("preallocated", PREALLOCATED)
        if (word, how) not in GUEST_WORKLOADS:
            self.fault("preallocated", f"{how!r} does not go with workload {word!r}; leave it empty")
            return {}
        workload, prealloc = GUEST_WORKLOADS[word, how]
        return {"workload": workload, "prealloc": prealloc, "mmu": LOCKS[self.one_of("lock", tuple(LOCKS))]}

    def _populate(self, threads: int) -> dict[str, Any]:
        """Threads of the VMM touch the memory before the guest starts."""
        self.one_of("lock", ("none",))
        self.one_of("preallocated", ("",))
        if not 1 <= threads <= KVM_MAX_VCPUS:
            self.fault("workload", f"{threads} threads: 1 ... {KVM_MAX_VCPUS} are needed")
            return {}
        return {"workload": "nothing", "prealloc": "populate", "prealloc_threads": threads}

    def observation(self, case: str, source: str) -> Observation | None:
        """The row as understood; None after a fault."""
        metric = self.one_of("metric", tuple(METRICS))
        self.one_of("unit", (METRICS[metric].unit,))
        value, parameters = self.figure(), self.parameters()
        if parameters.get("workload") == "nothing" and metric != "total_s":
            self.fault("metric", f"{metric!r}: no guest runs in a populate by the VMM; total_s is its metric")
        if len(self.faults) > self.begin:
            return None
        try:
            point = Point(**parameters)
        except ValidationError as error:
            for detail in error.errors():
                column = str(detail["loc"][0]) if detail["loc"] else ""
                self.fault(column, f"{detail['msg'].removeprefix('Value error, ')}; change the row")
            return None
        return Observation(case, source, self.word("arch"), self.cell("host_cpus"), self.cell("note"), metric, value, point)
