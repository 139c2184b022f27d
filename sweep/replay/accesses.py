"""Raw rows into accesses.parquet, a touch list with what else is known of each access, and the counts of what was in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kernels.spec import HIST_BUCKETS, PAGE_SHIFT, PMD_PAGES
from kernels.state import Int64s, bucket_top
from sweep.errors import EnvironmentProblemError, TraceError
from sweep.quantity import format_size
from sweep.replay.decode import Decision
from sweep.replay.fold import Accesses, Counted, Found, Go, Memory, Numbers, Survey, fold, survey
from sweep.replay.parse import BATCH_ROWS, RAW_SCHEMA, Trace, zeros
from sweep.replay.scan import Rows
from sweep.replay.slots import GIB_SHIFT, MAX_GPA_BITS, NOTHING, Slots, derive
from sweep.replay.vcpus import Assignment

BUCKETS = 60  # of time
SORT_MEMORY = "256MB"
SCHEMA = pa.schema(
    [
        pa.field("ns", pa.int64(), nullable=False),
        pa.field("vcpu", pa.int32(), nullable=False),
        pa.field("gfn", pa.int64(), nullable=False),
        pa.field("write", pa.bool_(), nullable=False),
        pa.field("fetch", pa.bool_(), nullable=False),
        pa.field("present", pa.bool_()),
        pa.field("faults", pa.int32(), nullable=False),
        pa.field("kvm_ns", pa.int64()),
    ]
)
STREAMS = ["ns", "vcpu", "gfn", "faults", "kvm_ns"]
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Folded:
    """What became of the rows. `region` and `time`: counts, shape (regions or buckets, len(Counted))."""

    accesses: int
    vcpus: int
    slots: Slots
    region: Int64s
    time: Int64s
    width_ns: int  # of a bucket of time
    mmio: int
    devices: int
    outside: int
    durations: dict[str, int]

    @property
    def totals(self) -> dict[str, int]:
        """Sum of each Counted, by its lower-case name."""
        return {counted.name.lower(): int(self.time[:, counted].sum()) for counted in Counted}


def raw_batches(path: Path) -> Iterator[Rows]:
    """The file of parse.RawFile, at most BATCH_ROWS at a time."""
    with pa.OSFile(str(path)) as file:  # a map would be counted as this process's memory, all of it
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield Rows(*(column.to_numpy() for column in batch.slice(start, BATCH_ROWS).columns))


def in_order(trace: Trace, path: Path) -> Path:
    """The raw rows by time; rows of one time as the trace has them. Beyond some memory the sort goes to disk, beside the file."""
    if not trace.backward:
        return path
    ordered = path.with_name("ordered.arrow")
    settings: dict[str, Any] = {"memory_limit": SORT_MEMORY, "temp_directory": str(path.parent), "threads": 1}
    with duckdb.connect(":memory:", config=settings) as connection, pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        connection.execute("SET enable_progress_bar = false")
        connection.register("raw", pa.RecordBatchReader.from_batches(RAW_SCHEMA, batches))
        try:
            answer: Any = connection.sql("SELECT * FROM raw ORDER BY ns, line").to_arrow_reader(BATCH_ROWS)
            with pa.ipc.new_file(ordered, RAW_SCHEMA) as writer:
                for batch in answer:
                    writer.write_batch(batch.cast(RAW_SCHEMA))
        except duckdb.Error as error:
            raise EnvironmentProblemError(f"{path.parent}: the rows cannot be ordered by time: {str(error).splitlines()[0]}") from None
    return ordered


def surveyed(path: Path, decision: Decision, assignment: Assignment) -> Survey:
    """Where the faults lie."""
    found = Survey(np.zeros(1 << (MAX_GPA_BITS - GIB_SHIFT), np.uint16), assignment.vcpu, zeros(len(Found)))
    for rows in raw_batches(path):
        survey(decision.encoding, len(rows.ns), rows, found)
    return found


def slots_of(trace: Trace, found: Survey, given: Slots | None) -> Slots:
    """Those of --slots, else what the faults show. Raises TraceError."""
    if given is not None:
        return given
    if found.found[Found.OUTSIDE]:
        text = (
            f"the address has more than {MAX_GPA_BITS} bits, and is no guest-physical one ({found.found[Found.OUTSIDE]} such faults): "
            f"with shadow paging kvm_page_fault reports guest-virtual addresses; --slots says which are memory"
        )
        raise TraceError(f"{trace.name}:{found.found[Found.OUTSIDE_LINE]}", text)
    return derive(trace.name, found.tops)


class _Folder:
    """The arrays of fold()."""

    def __init__(self, trace: Trace, found: Survey, slots: Slots) -> None:
        self.trace, self.slots = trace, slots
        self.vcpus, pages = int(found.found[Found.VCPUS]), slots.memory >> PAGE_SHIFT
        self.width = (trace.span[1] - trace.span[0]) // BUCKETS + 1
        self.memory = Memory(
            page=np.zeros(pages, np.uint8),
            vcpu=found.vcpu,
            last_gfn=np.full(self.vcpus, -1, np.int64),
            last_access=zeros(self.vcpus),
            last_row=zeros(self.vcpus),
            region=np.zeros((-(-pages // PMD_PAGES), len(Counted)), np.int64),
            time=np.zeros((BUCKETS, len(Counted)), np.int64),
            hist=zeros(HIST_BUCKETS),
        )
        n = 2 * BATCH_ROWS
        flags = (np.zeros(n, np.uint8), np.zeros(n, np.uint8))
        self.out = Accesses(zeros(n), zeros(n), zeros(n), *flags, zeros(n), zeros(n), zeros(n))
        self.numbers = Numbers(zeros(len(Go)))
        self.numbers.go[Go.EDGE_NS] = trace.span[0] + self.width

    def fold(self, path: Path, decision: Decision, writer: pq.ParquetWriter) -> None:
        go, slot_map = self.numbers.go, self.slots.as_map()
        for rows in raw_batches(path):
            if go[Go.ROWS] + len(rows.ns) > len(self.out.ns):
                self._flush(writer)
            fold(decision.encoding, self.slots.derived, self.width, len(rows.ns), rows, slot_map, self.memory, self.out, self.numbers)
        writer.write_batch(self._batch(int(go[Go.ROWS])))

    def _flush(self, writer: pq.ParquetWriter) -> None:
        """The older half of the window, so that a batch has room."""
        go = self.numbers.go
        count = min(BATCH_ROWS, int(go[Go.ROWS]))
        writer.write_batch(self._batch(count))
        rest = int(go[Go.ROWS]) - count
        for column in self.out:
            column[:rest] = column[count : count + rest]
        go[Go.ROWS] = rest
        go[Go.BASE] += count

    def _batch(self, count: int) -> pa.RecordBatch:
        cut: list[Any] = [column[:count] for column in self.out]
        out = Accesses(*cut)
        columns = [
            pa.array(out.ns),
            pa.array(out.vcpu.astype(np.int32)),
            pa.array(out.gfn),
            pa.array(out.write.view(np.bool_)),
            pa.array(out.fetch.view(np.bool_)),
            pa.array(out.present == 1, mask=out.present < 0),
            pa.array(out.faults.astype(np.int32)),
            pa.array(out.kvm_ns, mask=out.kvm_ns < 0),
        ]
        return pa.record_batch(columns, schema=SCHEMA)


def fold_trace(trace: Trace, raw: Path, decision: Decision, assignment: Assignment, given: Slots | None, out: Path) -> Folded:
    """Write the accesses to `out`, and count. Raises TraceError for faults beyond the slots that --skip-bad does not allow."""
    if not trace.rows:
        raise TraceError(trace.name, _no_faults(trace))
    ordered = in_order(trace, raw)
    found = surveyed(ordered, decision, assignment)
    folder = _Folder(trace, found, slots_of(trace, found, given))
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "use_byte_stream_split": STREAMS}
    with pq.ParquetWriter(out, SCHEMA, write_page_checksum=True, store_schema=False, version="2.6", **options) as writer:
        folder.fold(ordered, decision, writer)
    go, memory = folder.numbers.go, folder.memory
    outside = int(go[Go.OUTSIDE])
    if outside > trace.bad.allowed - trace.bad.count:
        raise TraceError(f"{trace.name}:{go[Go.OUTSIDE_LINE]}", _outside(trace, folder.slots, go))
    accesses = int(go[Go.BASE] + go[Go.ROWS])
    if not accesses:
        raise TraceError(trace.name, NOTHING)
    return Folded(
        accesses=accesses,
        vcpus=folder.vcpus,
        slots=folder.slots,
        region=memory.region,
        time=memory.time,
        width_ns=folder.width,
        mmio=int(go[Go.MMIO]),
        devices=int(go[Go.DEVICES]),
        outside=outside,
        durations=durations_of(memory.hist, go),
    )


def durations_of(hist: Int64s, go: Int64s) -> dict[str, int]:
    """ns from kvm_exit to kvm_entry of the faults that have both; empty: none has."""
    if not go[Go.TIMED]:
        return {}
    cumulative = np.cumsum(hist)
    ranks = {name: max(1, int(np.ceil(part * go[Go.TIMED]))) for name, part in PERCENTILES.items()}
    found = {f"{name}_ns": bucket_top(int(np.searchsorted(cumulative, rank))) for name, rank in ranks.items()}
    totals = {"faults": Go.TIMED, "sum_ns": Go.TIMED_NS, "again_faults": Go.AGAIN_TIMED, "again_sum_ns": Go.AGAIN_NS}
    return {name: int(go[at]) for name, at in totals.items()} | found


def _no_faults(trace: Trace) -> str:
    if trace.faults:
        return f"holds {trace.faults} faults, and none of a thread that --threads names"
    seen = f"{trace.lines} lines, {trace.exits} kvm_exit, {trace.entries} kvm_entry, {trace.others} other events"
    lost = f", {trace.lost.markers} markers of lost events" if trace.lost.markers else ""
    return f"holds no kvm_page_fault ({seen}{lost}); record that event"


def _outside(trace: Trace, slots: Slots, go: Int64s) -> str:
    low, high = int(go[Go.OUTSIDE_LOW]), int(go[Go.OUTSIDE_HIGH])
    return (
        f"the address is in none of the slots {slots}: {go[Go.OUTSIDE]} such faults, from {low:#x} to {high:#x}, of devices or of memory "
        f"that --slots lacks ({format_size(slots.memory)} now); --skip-bad {trace.bad.count + int(go[Go.OUTSIDE])} leaves them out"
    )
