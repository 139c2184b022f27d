"""Every column of every table, once: name, Arrow type, group, meaning. Checks, files and documents follow from here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kernels.results import PERCENTILES
from kernels.spec import Counter, Gauge
from sweep.parameters import COLUMN_OF, PARAMETERS, Point

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Column:
    name: str
    type: pa.DataType
    group: str
    doc: str


_TIME = frozenset(counter for counter in Counter if counter.name.endswith("_NS"))
_KVM_END = Counter.GUP_SLOW
_COUNTERS: Mapping[Counter, str] = {
    Counter.TOUCHES: "guest accesses",
    Counter.READS: "accesses that read",
    Counter.WRITES: "accesses that write",
    Counter.HITS: "accesses that caused no exit",
    Counter.PF_TAKEN: "vCPU stat: TDP fault exits handled",
    Counter.PF_FIXED: "vCPU stat: RET_PF_FIXED",
    Counter.PF_SPURIOUS: "vCPU stat: RET_PF_SPURIOUS",
    Counter.PF_FAST: "vCPU stat: resolved in fast_page_fault(), counted in pf_fixed or pf_spurious as well",
    Counter.PF_RETRY: "pf_taken - pf_fixed - pf_spurious",
    Counter.EXITS: "pf_taken, the exits of vCPUs kicked by a TLB flush, and full page-modification logs",
    Counter.REMOTE_TLB_FLUSH_REQUESTS: "VM stat: flushes that KVM asked for",
    Counter.REMOTE_TLB_FLUSH: "VM stat: those that kicked at least one vCPU",
    Counter.TLB_IPIS: "threads interrupted by KVM's flushes and by those of the VMM's own page table",
    Counter.INVALIDATE_RANGE_START: "mmu_invalidate_range_start callbacks (tracepoint kvm_unmap_hva_range)",
    Counter.INVALIDATE_RANGE_END: "mmu_invalidate_range_end callbacks",
    Counter.CHANGE_PTE: "change_pte callbacks (tracepoint kvm_set_spte_hva), up to 6.9",
    Counter.SPTE_PREFETCH: "SPTEs that patch 2 of the thread made in change_pte",
    Counter.MMU_LOCK_READ: "acquisitions of mmu_lock for reading",
    Counter.MMU_LOCK_WRITE: "acquisitions of mmu_lock for writing",
    Counter.GUP_FAST: "faults whose first GUP-fast succeeded",
    Counter.GUP_SLOW: "slow GUP calls",
    Counter.PGFAULT: "handle_mm_fault() calls by vCPU threads",
    Counter.VMM_PGFAULT: "handle_mm_fault() calls by VMM threads",
    Counter.THP_FAULT_ALLOC: "vmstat: THPs mapped by a fault",
    Counter.THP_FAULT_FALLBACK: "vmstat: THP faults that fell back to 4K",
    Counter.THP_SPLIT_PMD: "vmstat: PMD splits, huge zero page included",
    Counter.THP_COLLAPSE_ALLOC: "vmstat: THPs allocated by khugepaged or MADV_COLLAPSE",
    Counter.ZERO_PAGE_MAPS: "4K zero-page entries made by read faults (a split's 512 are not counted)",
    Counter.HUGE_ZERO_MAPS: "huge-zero-page entries made by read faults",
    Counter.COW_4K: "4K pages replaced by copy-on-write: of the zero page, shared, KSM and page-cache pages",
    Counter.COW_HUGE: "hugetlb pages copied",
    Counter.COW_KSM: "vmstat: of cow_4k, copies of KSM pages",
    Counter.COW_REUSE: "write faults that made an exclusive page writable",
    Counter.BYTES_CLEARED: "bytes cleared",
    Counter.BYTES_COPIED: "bytes copied",
    Counter.BYTES_CLEARED_WASTED: "of the bytes cleared, those of pages thrown away after a lost race",
    Counter.FAULT_NS: "from exit to re-entry, summed over all faults of all vCPUs",
    Counter.MMU_LOCK_WAIT_NS: "waiting for mmu_lock, summed",
    Counter.MMU_LOCK_WRITE_HOLD_NS: "mmu_lock held for writing, from grant to release, summed",
    Counter.MMAP_LOCK_WAIT_NS: "waiting for mmap_lock, summed; khugepaged takes it for writing",
    Counter.CLEAR_NS: "clearing memory, summed: what that takes a CPU which has its core and the memory to itself",
    Counter.FLUSH_NS: "waiting for TLB shootdowns, summed",
    Counter.CACHE_LINE_WAIT_NS: "waiting for the cache lines of mmu_lock and mmap_lock, summed",
    Counter.ZONE_LOCK_WAIT_NS: "waiting for zone->lock, summed",
    Counter.PAGE_TABLE_LOCK_WAIT_NS: "waiting for the lock of a table of PMDs to split one, summed",
    Counter.BANDWIDTH_WAIT_NS: "of clearing and copying, what the host's memory bandwidth adds, summed",
    Counter.CORE_WAIT_NS: "vCPUs waiting for a CPU, summed",
}
_GAUGES: Mapping[Gauge, str] = {  # apart from the counters: members of the two that are the same number are the same key
    Gauge.PAGES_4K: "VM stat: 4K leaf SPTEs at the end",
    Gauge.PAGES_2M: "VM stat: 2M leaf SPTEs at the end",
    Gauge.PAGES_1G: "VM stat: 1G leaf SPTEs at the end",
    Gauge.RSS_BYTES: "memory of a private mapping at the end, as smaps counts it: no hugetlb, no shmem",
    Gauge.ANON_HUGE_BYTES: "of it, in THPs",
    Gauge.HELD_BYTES: "all memory that the host holds for the slot at the end: anonymous, hugetlb, page cache, KSM, a child's",
}
_LATENCY_DOC = "of single faults, exit to re-entry, from a log-linear histogram (error below 0.8 %)"
_PARAMETER_TYPES: Mapping[str, pa.DataType] = {
    "vcpus": pa.int32(),
    "memory_bytes": pa.int64(),
    "offset_bytes": pa.int64(),
    "guest_page_bytes": pa.int64(),
    "use_zero_page": pa.bool_(),
    "thp_failure": pa.float64(),
    "nx_huge_pages": pa.bool_(),
    "eager_page_split": pa.bool_(),
    "prealloc_threads": pa.int32(),
    "cores": pa.int32(),
    "smt": pa.int32(),
    "pml": pa.bool_(),
}


def _group(counter: Counter | Gauge) -> str:
    if counter in _TIME:
        return "time"
    if isinstance(counter, Gauge):
        return "KVM" if counter <= Gauge.PAGES_1G else "host mm"
    if counter <= Counter.HITS:
        return "accesses"
    return "KVM" if counter <= _KVM_END else "host mm"


def _parameter_column(name: str) -> Column:
    column = COLUMN_OF.get(name, name)
    return Column(column, _PARAMETER_TYPES.get(column, pa.string()), "parameters", str(Point.model_fields[name].description))


_IDENTITY = (
    Column("point_id", pa.string(), "identity", "32 hex digits, from the canonical parameters, the workload's content, seed and replicate"),
    Column("study", pa.string(), "identity", "name of the study"),
    Column("replicate", pa.int32(), "identity", "number of the replicate"),
    Column("seed", pa.uint64(), "identity", "seed of the study"),
)
_STEP_IDENTITY = (
    Column("step", pa.int32(), "identity", "number of the step, preallocation included"),
    Column("op", pa.string(), "identity", "what the step does"),
)
_MEASURED = (
    *(Column(counter.name.lower(), pa.int64(), _group(counter), _COUNTERS[counter]) for counter in Counter),
    *(Column(gauge.name.lower(), pa.int64(), _group(gauge), _GAUGES[gauge]) for gauge in Gauge),
)
_LATENCY = tuple(Column(name, pa.int64(), "time", f"{name[6:-3]} {_LATENCY_DOC}") for name in (*PERCENTILES, "fault_max_ns"))
_POINT_TIMES = (
    Column("guest_ns", pa.int64(), "time", "start of the first guest step to the end of the last vCPU, guest steps only"),
    Column("total_ns", pa.int64(), "time", "the same with the VMM's steps"),
    Column("pages_per_s_per_vcpu", pa.float64(), "time", "guest accesses per vCPU and second of guest_ns; 0 without guest time"),
)

POINTS: tuple[Column, ...] = (
    *_IDENTITY,
    *(_parameter_column(name) for name in PARAMETERS),
    Column("costs_digest", pa.string(), "parameters", "SHA-256 of the values of the cost file, as in study.json"),
    *_MEASURED,
    *_POINT_TIMES,
    *_LATENCY,
)
STEPS: tuple[Column, ...] = (
    *_IDENTITY,
    *_STEP_IDENTITY,
    *_MEASURED,
    Column("step_ns", pa.int64(), "time", "from the step's start to the end of its last actor"),
    *_LATENCY,
)
ERRORS: tuple[Column, ...] = (
    _IDENTITY[0],
    Column("parameters", pa.string(), "parameters", "canonical parameters, JSON"),
    Column("kind", pa.string(), "error", "class of the error"),
    Column("message", pa.string(), "error", "its text"),
)
TABLES: Mapping[str, tuple[Column, ...]] = {"points": POINTS, "steps": STEPS, "errors": ERRORS}
KEYS: Mapping[str, tuple[str, ...]] = {"points": ("point_id",), "steps": ("point_id", "step"), "errors": ("point_id",)}


def arrow_schema(table: str) -> pa.Schema:
    """Schema of 'points', 'steps' or 'errors', its version in the metadata."""
    fields = [pa.field(c.name, c.type, nullable=False) for c in TABLES[table]]
    return pa.schema(fields, metadata={"faultsweep_schema": str(SCHEMA_VERSION), "faultsweep_table": table})


def numbers(values: NDArray[Any]) -> pa.Array:
    """An array as it lies in memory. pa.array() would import pandas, to see whether it is one of its own."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def as_numpy(column: pa.Array) -> NDArray[Any]:
    """Numbers (truth values: as 0 and 1) as they lie in memory; none may be missing."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    whole: NDArray[Any] = np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype())
    return whole[column.offset : column.offset + len(column)]


def texts(values: Sequence[str]) -> pa.Array:
    """The same of text."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])


def column_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Plain values as a column."""
    if pa.types.is_string(kind):
        return texts(values)
    return numbers(np.array(values, np.uint8 if pa.types.is_boolean(kind) else kind.to_pandas_dtype())).cast(kind)


def to_table(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of a table as Arrow; every column must be there."""
    schema = arrow_schema(table)
    return pa.Table.from_arrays([column_of([row[field.name] for row in rows], field.type) for field in schema], schema=schema)


def columns_page() -> str:
    """docs/columns.md: generated, compared by a test."""
    lines = ["# Columns", "", "Generated from `sweep/schema.py`. Units are in the name: `_ns`, `_bytes`; all else is a count.", ""]
    for table, columns in TABLES.items():
        lines += [f"## `{table}`", "", "| column | type | group | meaning |", "|---|---|---|---|"]
        lines += [f"| `{c.name}` | {c.type} | {c.group} | {c.doc} |" for c in columns]
        lines.append("")
    return "\n".join(lines)
