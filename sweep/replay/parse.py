"""A trace into raw rows: a file of Arrow batches, in the order of the trace, and what the trace says beside them.

One pass, and one block, one window of rows and one table of threads in memory, however long the trace is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kernels.program import as_passed
from sweep.errors import TraceError, UsageError
from sweep.replay.formats import Format, Meaning, detect, excerpt, meaning_of, roles_of, why_bad
from sweep.replay.scan import COMM_BYTES, HASH_SLOTS, MAX_LINE, MAX_ODDS, MAX_THREADS, Odd, Odds, Rows, Status, Threads, scan
from sweep.replay.source import BLOCK_BYTES, Blocks, Source
from sweep.replay.text import At, Layout, Numbers, Text, tables

BATCH_ROWS = 1 << 15
MAX_SAMPLES = 20  # of bad lines that are shown
RAW_SCHEMA = pa.schema([(name, pa.int64()) for name in Rows._fields])


@dataclass(frozen=True)
class ReadOptions:
    """How to read: `format` by name (None: as it looks), only those threads (none: all), so many bad lines left out."""

    format: str | None = None
    threads: Sequence[int] = ()
    skip_bad: int = 0
    block_bytes: int = BLOCK_BYTES


@dataclass
class BadLines:
    """Lines that say nothing, counted against what --skip-bad allows."""

    name: str
    allowed: int
    count: int = 0
    samples: list[str] = field(default_factory=list)

    def add(self, line: int, what: str, unit: str = "") -> None:
        """Raises TraceError for one too many."""
        self.count += 1
        where = f"{self.name}:{unit}{line}"
        if self.count > self.allowed:
            before = f" ({self.allowed} were left out before it)" if self.allowed else ""
            raise TraceError(where, f"{what}; --skip-bad N leaves N such lines out{before}")
        if len(self.samples) < MAX_SAMPLES:
            self.samples.append(f"{where}: {what}")


@dataclass
class Lost:
    """Markers of lost events, and how many events they speak of; `unknown`: markers that do not say how many."""

    markers: int = 0
    events: int = 0
    unknown: int = 0

    def add(self, events: int | None) -> None:
        self.markers += 1
        self.events += events or 0
        self.unknown += events is None


@dataclass(frozen=True)
class Thread:
    """A thread of kvm's events."""

    tid: int
    comm: str
    vcpu: int | None  # as its lines say
    faults: int
    wanted: bool


@dataclass(frozen=True)
class Evidence:
    """What the values say of the host: how many error codes of each kind and the first one's line, and exit reasons."""

    ept: int = 0
    ept_line: int = 0
    npt: int = 0
    npt_line: int = 0
    low: int = 0
    low_line: int = 0
    kernel: int = 0
    old: int = 0
    ept_exits: int = 0
    npf_exits: int = 0
    exception_exits: int = 0


@dataclass(frozen=True)
class Trace:
    """What a trace holds beside its rows."""

    name: str
    format: Format
    rows: int
    lines: int
    span: tuple[int, int]  # ns of the first and the last row
    backward: int  # rows that are earlier than the one before
    back_ns: int
    faults: int  # with those of threads that were not wanted
    exits: int
    entries: int
    others: int
    threads: tuple[Thread, ...]
    evidence: Evidence
    lost: Lost
    bad: BadLines
    vendor_line: str = ""
    release: str = ""


class RawFile:
    """The raw rows, written batch by batch; removed by who made its folder."""

    def __init__(self, path: Path) -> None:
        self._writer: Any = pa.ipc.new_file(path, RAW_SCHEMA)

    def __enter__(self) -> "RawFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, columns: Sequence[Any]) -> None:
        """One array per field of Rows, of one length."""
        self._writer.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=RAW_SCHEMA))


def zeros(n: int) -> Any:
    return np.zeros(n, np.int64)


class Reader:
    """One text on its way: the arrays of scan(), and what the lines said that are no events."""

    def __init__(self, source: Source, format: Format, layout: Layout, options: ReadOptions, raw: RawFile) -> None:
        self.name, self.format, self.layout, self.raw = source.name, format, layout, raw
        roles = roles_of(source.name, source.head.split(b"\n", 1)[0]) if layout is Layout.CSV else []
        self.blocks = Blocks(source, options.block_bytes)
        self.text = Text(self.blocks.data, np.array(roles, np.int64), *tables())
        self.rows = Rows(*(zeros(2 * BATCH_ROWS) for _ in Rows._fields))
        wanted = np.array(options.threads, np.int64)
        comm = np.zeros((MAX_THREADS, COMM_BYTES), np.uint8)
        self.threads = Threads(zeros(HASH_SLOTS), wanted, zeros(MAX_THREADS), comm, *(zeros(MAX_THREADS) for _ in range(5)))
        self.odds = Odds(*(zeros(MAX_ODDS) for _ in Odds._fields))
        self.numbers = Numbers(zeros(len(At)))
        arrays = (self.text, self.rows, self.threads, self.odds, self.numbers)
        self._passed = [as_passed(each) for each in arrays]  # once: it takes a microsecond an array
        self.bad, self.lost = BadLines(source.name, options.skip_bad), Lost()
        self.vendor_line = self.release = ""

    @property
    def at(self) -> Any:
        return self.numbers.at

    def read(self) -> None:
        """All of it. Raises TraceError."""
        for end in self.blocks:
            self.at[At.POS] = 0
            if self.layout is Layout.CSV and not self.at[At.LINE]:
                self.at[At.POS], self.at[At.LINE] = 1 + self.blocks.data[:end].tobytes().index(b"\n"), 1
            self._read_block(end)
            self.blocks.lines = int(self.at[At.LINE])
        if self.blocks.cut.strip():
            self.bad.add(self.blocks.lines + 1, f"the last line is cut, it has no newline: {excerpt(self.blocks.cut)}")
        self.raw.add([column[: self.at[At.ROWS]] for column in self.rows])

    def _read_block(self, end: int) -> None:
        status = Status.ROWS_FULL
        while status is not Status.DONE:
            status = Status(scan(self.layout, end, *self._passed))
            for k in range(self.at[At.ODDS]):
                self._read_odd(*(int(column[k]) for column in self.odds))
            self.at[At.ODDS] = 0
            if status is Status.THREADS_FULL:
                text = f"has kvm events of more than {MAX_THREADS} threads; record one VM, or choose its threads with --threads"
                raise TraceError(self.name, text)
            if status is Status.ROWS_FULL:
                self._flush()

    def _flush(self) -> None:
        """The older half of the window."""
        self.raw.add([column[:BATCH_ROWS] for column in self.rows])
        for column in self.rows:
            column[:BATCH_ROWS] = column[BATCH_ROWS:]
        self.at[At.ROWS] -= BATCH_ROWS
        self.at[At.BASE] += BATCH_ROWS

    def _read_odd(self, start: int, end: int, line: int, kind: int) -> None:
        raw = self.blocks.data[start : min(end, start + MAX_LINE)].tobytes()
        said = meaning_of(raw) if kind == Odd.NO_EVENT else None
        if said is None:
            self.bad.add(line, f"{why_bad(Odd(kind), raw, self.layout)}: {excerpt(raw)}")
            return
        meaning, found = said
        if meaning is Meaning.LOST:
            self.lost.add(int(found[1]) if found.re.groups and found[1] else None)
        elif meaning is Meaning.OVERWRITTEN and int(found[2]) > int(found[1]):
            self.lost.add(int(found[2]) - int(found[1]))
        elif meaning is Meaning.VENDOR:
            self.vendor_line = self.vendor_line or found[1].decode()
        elif meaning is Meaning.RELEASE:
            self.release = self.release or found[1].decode("ascii", "replace")

    def trace(self) -> Trace:
        """What was read. Raises TraceError where a thread was two vCPUs."""
        at = self.at
        if at[At.MOVED_LINE]:
            text = "its thread was another vCPU before: thread ids were used again, or two traces stand in one file; cut it in two"
            raise TraceError(f"{self.name}:{at[At.MOVED_LINE]}", text)
        return Trace(
            name=self.name,
            format=self.format,
            rows=int(at[At.BASE] + at[At.ROWS]),
            lines=int(at[At.LINE]),
            span=(int(at[At.FIRST_NS]), int(at[At.END_NS])),
            backward=int(at[At.BACKWARD]),
            back_ns=int(at[At.BACK_NS]),
            faults=int(at[At.FAULTS]),
            exits=int(at[At.EXITS]),
            entries=int(at[At.ENTRIES]),
            others=int(at[At.OTHERS]),
            threads=tuple(self._thread(k) for k in range(at[At.THREADS])),
            evidence=Evidence(**{name: int(at[At[name.upper()]]) for name in Evidence.__dataclass_fields__}),
            lost=self.lost,
            bad=self.bad,
            vendor_line=self.vendor_line,
            release=self.release,
        )

    def _thread(self, k: int) -> Thread:
        t = self.threads
        comm = t.comm[k].tobytes().rstrip(b"\0").decode("utf-8", "backslashreplace")
        vcpu = int(t.vcpu[k])
        return Thread(int(t.tid[k]), comm, None if vcpu < 0 else vcpu, int(t.faults[k]), bool(t.takes[k]))


def read_trace(place: str, options: ReadOptions, raw_path: Path) -> Trace:
    """Read a trace, '-' for standard input, into the raw file. Raises TraceError with file, line and cure."""
    with Source(place) as source:
        format = detect(source.name, source.head, options.format)
        if options.threads and format.layout in (None, Layout.CSV):
            raise UsageError(f"--threads: {source.name} has vCPUs, no threads; leave it out")
        with RawFile(raw_path) as raw:
            if format.layout is None:
                from sweep.replay.columns import read_parquet

                return read_parquet(source, format, options, raw)
            reader = Reader(source, format, format.layout, options, raw)
            reader.read()
        return reader.trace()
