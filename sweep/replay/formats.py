"""The formats of recorded faults: what makes each, what its lines look like, and the lines beside them that say something."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sweep.errors import TraceError
from sweep.replay.scan import Odd, Role
from sweep.replay.text import Layout

HEAD_BYTES = 1 << 16  # in which the first event must stand
_TIME = rb"\d{1,10}\.\d{1,9}: +"


@dataclass(frozen=True)
class Format:
    """`signature` matches a line of it; None: the file says so otherwise."""

    name: str
    layout: Layout | None
    signature: "re.Pattern[bytes] | None"
    made_by: str


FORMATS: Sequence[Format] = (
    Format(
        "perf",
        Layout.PERF,
        re.compile(rb"^.{0,40}[ /]-?\d{1,10} +\[\d+\] +" + _TIME + rb"\w+:\w+:"),
        "perf script -F comm,tid,cpu,time,event,trace --ns --header --show-lost-events",
    ),
    Format(
        "ftrace",
        Layout.FTRACE,
        re.compile(rb"^(# tracer: |version = \d|cpus=\d|.{0,60}-\d{1,10} +(\([ \d-]+\) +)?\[\d+\] +([^ \d]\S* +)?" + _TIME + rb"\w+:)"),
        "cat /sys/kernel/tracing/trace, or trace-cmd report -t",
    ),
    Format(
        "bpftrace",
        Layout.PLAIN,
        re.compile(rb"^\d{1,18} \d{1,10} kvm_(page_fault|exit|entry):"),
        "bpftrace, with the program of docs/replay.md",
    ),
    Format("csv", Layout.CSV, re.compile(rb'^\s*"?\w+"?\s*(,\s*"?\w+"?\s*){3,63}\r?$'), "columns ns, vcpu, gpa, access"),
    Format("parquet", None, None, "columns ns, vcpu, gpa, access"),
)
BY_NAME: Mapping[str, Format] = {format.name: format for format in FORMATS}
PARQUET_MAGIC = b"PAR1"
GZ_MAGIC = b"\x1f\x8b"
REFUSED: Mapping[bytes, str] = {
    b"PERFILE2": "is perf's own file; write it out as text: perf script -i FILE -F comm,tid,cpu,time,event,trace --ns",
    b"\x17\x08Dtracing": "is trace-cmd's own file; write it out as text: trace-cmd report -t -i FILE",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; only gz is read: zstd -dc FILE | faultsweep replay -",
    b"\xfd7zXZ": "is compressed with xz; only gz is read: xz -dc FILE | faultsweep replay -",
    b"BZh": "is compressed with bzip2; only gz is read: bzip2 -dc FILE | faultsweep replay -",
    b"PK\x03\x04": "is a zip archive; take the trace out of it",
    b"ARROW1": "is an Arrow file; write it as Parquet",
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
}
COLUMNS: Mapping[bytes, Role] = {
    b"ns": Role.NS,
    b"vcpu": Role.VCPU,
    b"gpa": Role.GPA,
    b"access": Role.ACCESS,
    b"present": Role.PRESENT,
}
WHY: Mapping[Odd, str] = {
    Odd.NO_EVENT: "is no event of this format",
    Odd.FIELD_MISSING: "lacks a field: it was cut, or is of another format",
    Odd.NO_NUMBER: "holds something else where a number belongs",
    Odd.TOO_LARGE: "holds a number that is too large",
    Odd.NO_VCPU: "names a vCPU above 4095, which KVM does not have",
    Odd.NO_ACCESS: "says an access that is none of read, write, fetch",
    Odd.TOO_LONG: "is longer than 8192 bytes",
}


class Meaning(Enum):
    """What a line that is no event says."""

    LOST = 0  # events are missing; group 1: how many, if it says so
    OVERWRITTEN = 1  # groups: entries in the buffer, entries written
    VENDOR = 2
    RELEASE = 3
    NOTICE = 4  # nothing that counts


MARKERS: Sequence[tuple["re.Pattern[bytes]", Meaning]] = (
    (re.compile(rb"^CPU:\d+ \[LOST (?:(\d{1,18}) )?EVENTS\]"), Meaning.LOST),  # kernel/trace/trace.c, print_trace_line()
    (re.compile(rb"^CPU:\d+ \[(?:(\d{1,18}) )?EVENTS DROPPED\]"), Meaning.LOST),  # trace-cmd report
    (re.compile(rb"^#{5} CPU \d+ buffer started #{4}"), Meaning.LOST),  # test_cpu_buff_start(): what was before is overwritten
    (re.compile(rb"^# entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})"), Meaning.OVERWRITTEN),
    (re.compile(rb"\bPERF_RECORD_LOST(?:_SAMPLES)? +lost (\d{1,18})"), Meaning.LOST),  # perf script --show-lost-events
    (re.compile(rb"^Processed \d+ events and lost (\d{1,18}) chunks!"), Meaning.LOST),
    (re.compile(rb"^(?:WARNING: )?Lost (\d{1,18}) events"), Meaning.LOST),  # bpftrace
    (re.compile(rb"^#?\s*(?:cpuid|vendor_id)\s*: *(\w+)"), Meaning.VENDOR),  # perf script --header; /proc/cpuinfo
    (re.compile(rb"^# os release : (\S{1,64})"), Meaning.RELEASE),
    (re.compile(rb"^#"), Meaning.NOTICE),
    (re.compile(rb"^(version = \d+|cpus=\d+)\s*$"), Meaning.NOTICE),  # trace-cmd report
    (re.compile(rb"\bPERF_RECORD_[A-Z]"), Meaning.NOTICE),
    (re.compile(rb"^(Attaching \d+ probes?\.\.\.|Warning:|Check IO/CPU overload!|\[ perf record:)"), Meaning.NOTICE),
)
_TICKS = re.compile(rb"\[\d+\] +([^ \d]\S* +)?\d+: ")


def meaning_of(line: bytes) -> "tuple[Meaning, re.Match[bytes]] | None":
    """What a line that is no event says; None: it is a bad one."""
    for pattern, meaning in MARKERS:
        found = pattern.search(line)
        if found is not None:
            return meaning, found
    return None


def why_bad(kind: Odd, line: bytes, layout: Layout) -> str:
    """What is wrong with a line that says nothing."""
    if kind is not Odd.NO_EVENT or layout is Layout.CSV:
        return WHY[kind]
    if _TICKS.search(line):
        return "has a time without a point, a counter's: record with trace_clock mono, global or local"
    others = [f.name for f in FORMATS if f.layout not in (None, Layout.CSV, layout) and f.signature and f.signature.search(line)]
    return f"is a line of {others[0]}, in a trace of another format" if others else WHY[kind]


def detect(name: str, head: bytes, asked: str | None) -> Format:
    """The format of a file that begins so. Raises TraceError for what is none."""
    for magic, text in REFUSED.items():
        if head.startswith(magic):
            raise TraceError(name, text)
    if head.startswith(PARQUET_MAGIC):
        return BY_NAME["parquet"]
    if asked is not None:
        return BY_NAME[asked]
    lines = head.split(b"\n")
    for line in lines:
        for format in FORMATS:
            if format.signature is not None and format.signature.search(line[:400]):
                return format
    first = next((line for line in lines if line.strip() and meaning_of(line) is None), b"")
    if not first:
        raise TraceError(name, "holds no event: nothing but comments, markers of lost events, or blank lines")
    known = ", ".join(BY_NAME)
    raise TraceError(name, f"is of no format that is known ({known}: see docs/replay.md): {excerpt(first)}; --format NAME chooses one")


def roles_of(name: str, header: bytes) -> list[Role]:
    """What each column of a CSV file is. Raises TraceError for columns that are missing or stand twice."""
    names = [part.strip().strip(b'"').lower() for part in header.strip().split(b",")]
    check_columns(f"{name}:1", [part.decode("ascii", "replace") for part in names])
    return [COLUMNS.get(part, Role.IGNORED) for part in names]


def check_columns(where: str, names: Sequence[str]) -> None:
    """Raises TraceError for columns that are missing or stand twice."""
    needed = [column.decode() for column in COLUMNS if column != b"present"]
    missing = [column for column in needed if column not in names]
    twice = [column for column in (*needed, "present") if names.count(column) > 1]
    if missing or twice:
        what = f"lacks the columns {', '.join(missing)}" if missing else f"has the column {twice[0]} twice"
        raise TraceError(where, f"{what}; ns, vcpu, gpa and access are needed, present may be there")


def excerpt(line: Any) -> str:
    """The beginning of a line for a message."""
    text = bytes(line[:180]).decode("utf-8", "backslashreplace").strip()
    return repr(text if len(line) <= 180 else text + "...")
