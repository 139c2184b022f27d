"""Trace text into rows: every layout, lines that mean harm, blocks cut anywhere."""

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels.spec import KVM_MAX_VCPUS
from sweep.errors import TraceError, UsageError
from sweep.replay.accesses import raw_batches
from sweep.replay.compiled import sources_digest
from sweep.replay.decode import Vendor
from sweep.replay.formats import FORMATS, detect
from sweep.replay.parse import BATCH_ROWS, ReadOptions, Trace, read_trace
from sweep.replay.render import FIRST_TID, LINES, Fault, Style, code_of, csv_of, text_of
from sweep.replay.scan import MAX_LINE, MAX_THREADS, READ, WRITE, Rows, scan

NEW = "vcpu 5 rip 0x7f08a4602116 address 0x0000000113600002 error_code 0x181"
FTRACE = f"       CPU 5/KVM-4145    [002] .....    86.581928: kvm_page_fault: {NEW}"
PERF = f"       CPU 5/KVM    4145 [002]    86.581928000:  kvm:kvm_page_fault: {NEW}"
PLAIN = f"86581928000 4145 kvm_page_fault: {NEW}"
ROW = (86_581_928_000, 5, 0x113600002, 0x181)


def read(folder: Path, text: str | bytes, name: str = "trace.txt", **options: Any) -> tuple[Trace, Rows]:
    """What a trace of that text gives."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    trace = read_trace(str(path), ReadOptions(**options), folder / "raw.arrow")
    batches = list(raw_batches(folder / "raw.arrow"))
    return trace, Rows(*(np.concatenate([b[i] for b in batches] or [np.zeros(0, np.int64)]) for i in range(len(Rows._fields))))


def rows_of(rows: Rows) -> list[tuple[int, ...]]:
    return [tuple(int(c[k]) for c in (rows.ns, rows.who, rows.address, rows.code)) for k in range(len(rows.ns))]


def refused(folder: Path, text: str | bytes, *words: str, name: str = "trace.txt", **options: Any) -> None:
    with pytest.raises(TraceError) as caught:
        read(folder, text, name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    for word in words:
        assert word in message, message


# --- layouts


@pytest.mark.parametrize(
    "line",
    [
        FTRACE,
        PERF,
        PLAIN,
        FTRACE.replace(".....", "d..1."),
        FTRACE.replace(".....", "...."),
        FTRACE.replace("[002] .....", "[002]"),  # trace-cmd report
        FTRACE.replace(" [002]", " (   4100) [002]"),  # record-tgid
        FTRACE.replace(" [002]", " (-------) [002]"),
        FTRACE.replace("86.581928", "86.581928000"),
        FTRACE.replace("kvm_page_fault: ", "kvm_page_fault:       "),
        FTRACE.strip(),
        "instance:  " + FTRACE,
        FTRACE.replace("CPU 5/KVM", "    <...>"),
        FTRACE.replace(NEW, "vcpu 5 rip 0x0 address 0x113600002 error_code 0x181"),
        FTRACE.replace(NEW, "[FAILED TO PARSE] vcpu_id=5 guest_rip=0x7f08 fault_address=4620025858 error_code=385"),
        FTRACE.replace(NEW, "[FAILED TO PARSE] vcpu_id=5 guest_rip=0x7f08 fault_address=0x113600002 error_code=0x181"),
        PERF.replace("4145", "4100/4145"),
        PERF.replace("86.581928000", "86.581928"),
        PERF.strip(),
        PERF.replace("CPU 5/KVM", "    :4145"),
        PLAIN.replace("rip 0x7f08a4602116 ", ""),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "  \n"])
def test_a_line_is_read_however_it_is_laid_out(tmp_path: Path, line: str, ending: str) -> None:
    trace, rows = read(tmp_path, line + ending)
    assert rows_of(rows) == [ROW]
    assert [(thread.tid, thread.vcpu) for thread in trace.threads] == [(4145, 5)]
    assert trace.bad.count == 0


@pytest.mark.parametrize("line", ["address 113600002 error_code 181", "address 0x113600002 error_code 0x181"])
def test_an_old_event_has_no_vcpu_and_bare_hexadecimal(tmp_path: Path, line: str) -> None:
    trace, rows = read(tmp_path, FTRACE.replace(NEW, line) + "\n")
    assert rows_of(rows) == [(ROW[0], -1, *ROW[2:])]
    assert trace.evidence.old == 1
    assert trace.threads[0].comm == "CPU 5/KVM"


@pytest.mark.parametrize("style", [FTRACE, PERF])
@pytest.mark.parametrize(
    "comm",
    ["kvm_page_fault:", "x 1 [000] 1.0: y", "a-1 [0] 1.0: k:", "x 1 [0] 1.0: y:", "-1", "ä ö ü", "[001]", "12-34 [9] 5.6:", "\x00\x01"],
)
def test_comm_may_hold_anything(tmp_path: Path, style: str, comm: str) -> None:
    line = style.replace(f"{'CPU 5/KVM':>16}", f"{comm:>16}")
    trace, rows = read(tmp_path, line + "\n", format="ftrace" if style is FTRACE else "perf")
    assert rows_of(rows) == [ROW]
    assert trace.threads[0].tid == 4145


def test_other_events_and_call_chains_are_passed_over(tmp_path: Path) -> None:
    chain = "\n\tffffffffc0a1b2c3 kvm_mmu_page_fault+0x80 ([kvm])\n\t    7f0a ioctl+0xb (/usr/lib/libc.so.6)\n\n"
    other = PERF.replace("kvm:kvm_page_fault", "sched:sched_switch").replace(
        NEW, "prev_comm=a [120] ==> kvm_page_fault: address 1 error_code 2"
    )
    trace, rows = read(tmp_path, PERF + chain + other + "\n" + PERF + "\n")
    assert len(rows.ns) == 2
    assert trace.others == 1


def test_exits_and_entries_give_durations_and_say_which_vcpu_an_old_thread_is(tmp_path: Path) -> None:
    def event(ns: int, name: str, fields: str) -> str:
        return f"           <...>-35788 [037] ....  2825.{ns:09d}: {name}: {fields}\n"

    text = event(100, "kvm_exit", "reason npf rip 0xfd11d info 100000014 fd000") + event(
        150, "kvm_page_fault", "address fd000 error_code 14"
    )
    text += (
        event(1200, "kvm_entry", "vcpu 3")
        + event(2000, "kvm_page_fault", "address fe000 error_code 14")
        + event(2100, "kvm_entry", "vcpu 3")
    )
    trace, rows = read(tmp_path, text)
    assert rows.taken.tolist() == [1100, -1]
    assert (trace.exits, trace.entries, trace.evidence.npf_exits) == (1, 2, 1)
    assert trace.threads[0].vcpu == 3


def test_a_bom_and_blank_lines_are_no_matter(tmp_path: Path) -> None:
    _, rows = read(tmp_path, b"\xef\xbb\xbf" + f"\n  \n{PERF}\n\r\n".encode())
    assert rows_of(rows) == [ROW]


# --- what a trace says of itself


@pytest.mark.parametrize(
    ("marker", "events", "unknown"),
    [
        ("CPU:2 [LOST 1234 EVENTS]", 1234, 0),
        ("CPU:2 [LOST EVENTS]", 0, 1),
        ("CPU:7 [204600 EVENTS DROPPED]", 204600, 0),
        ("CPU:7 [EVENTS DROPPED]", 0, 1),
        ("##### CPU 2 buffer started ####", 0, 1),
        ("# entries-in-buffer/entries-written: 205062/25088512   #P:8", 25088512 - 205062, 0),
    ],
)
def test_lost_events_are_told(tmp_path: Path, marker: str, events: int, unknown: int) -> None:
    trace, rows = read(tmp_path, f"# tracer: nop\n{marker}\n{FTRACE}\n")
    assert len(rows.ns) == 1
    assert (trace.lost.markers, trace.lost.events, trace.lost.unknown) == (1, events, unknown)


def test_lost_events_of_perf_and_bpftrace_are_told(tmp_path: Path) -> None:
    lost = "       CPU 5/KVM    4145 [002]    86.581930000: PERF_RECORD_LOST lost 42\n"
    other = "       CPU 5/KVM    4145 [002]    86.581930000: PERF_RECORD_COMM: CPU 5/KVM:4145/4145\n"
    trace, _ = read(tmp_path, f"{PERF}\n{lost}{other}Processed 12 events and lost 3 chunks!\n")
    assert (trace.lost.markers, trace.lost.events) == (2, 45)
    trace, _ = read(tmp_path, f"Attaching 1 probe...\n{PLAIN}\nLost 7 events\n")
    assert (trace.lost.markers, trace.lost.events) == (1, 7)


def test_a_buffer_that_lost_nothing_says_nothing(tmp_path: Path) -> None:
    trace, _ = read(tmp_path, f"# entries-in-buffer/entries-written: 1/1   #P:1\n{FTRACE}\n")
    assert trace.lost.markers == 0


@pytest.mark.parametrize("line", ["# cpuid : GenuineIntel,6,143,8", "vendor_id\t: GenuineIntel", "# vendor_id : GenuineIntel"])
def test_the_vendor_line_and_the_release_are_read(tmp_path: Path, line: str) -> None:
    trace, _ = read(tmp_path, f"{line}\n# os release : 6.1.0-18-amd64\n{PERF}\n")
    assert (trace.vendor_line, trace.release) == ("GenuineIntel", "6.1.0-18-amd64")


# --- lines that say nothing

BAD_LINES = [
    (FTRACE[:-17], "lacks a field"),  # cut before its code
    (FTRACE[:-6], "number"),
    (FTRACE.replace("0x181", "0x"), "number"),
    (FTRACE.replace("0x181", "0x181g"), "number"),
    (FTRACE.replace("0x181", "-1"), "number"),
    (FTRACE.replace("0x181", "0x" + "f" * 17), "too large"),
    (FTRACE.replace("0x181", "0x18\x001"), "number"),
    (FTRACE.replace("vcpu 5", "vcpu -1"), "number"),
    (FTRACE.replace("vcpu 5", "vcpu 4096"), "4095"),
    (FTRACE.replace("vcpu 5", "vcpu 99999999999999999999999"), "4095"),
    (FTRACE.replace("address", "adress"), "lacks a field"),
    (FTRACE.replace(NEW, ""), "lacks a field"),
    (FTRACE.replace("86.581928", "86"), "without a point"),
    (FTRACE.replace("86.581928", "99999999999.1"), "no event"),
    (FTRACE.replace("86.581928", "-86.581928"), "no event"),
    (FTRACE.replace("[002]", "(002)"), "no event"),
    (FTRACE.replace("4145", "99999999999"), "no event"),
    (PERF, "line of perf"),
    (PLAIN, "line of bpftrace"),
    ("garbage", "no event"),
    ("\x00" * 50, "no event"),
    ("x" * (MAX_LINE + 1), "longer than 8192"),
    (FTRACE + " " * MAX_LINE, "longer than 8192"),
    (FTRACE.replace("kvm_page_fault", "kvm_entry") + " " * MAX_LINE, "longer than 8192"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_a_bad_line_is_named_with_its_number_or_left_out_with_its_count(tmp_path: Path, line: str, why: str) -> None:
    text = f"# tracer: nop\n{FTRACE}\n{line}\n{FTRACE}\n"
    refused(tmp_path, text, "trace.txt:3: ", why, "--skip-bad")
    refused(tmp_path, text + line + "\n", "trace.txt:5: ", why, "1 were left out", skip_bad=1)
    trace, rows = read(tmp_path, text, skip_bad=1)
    assert rows_of(rows) == [ROW, ROW]
    assert trace.bad.count == 1
    assert trace.bad.samples[0].startswith(f"{tmp_path}/trace.txt:3: ")


def test_a_last_line_without_newline_is_cut(tmp_path: Path) -> None:
    refused(tmp_path, f"{FTRACE}\n{FTRACE[:-1]}", "trace.txt:2", "newline")
    trace, rows = read(tmp_path, f"{FTRACE}\n{FTRACE[:-1]}", skip_bad=1)
    assert (len(rows.ns), trace.bad.count) == (1, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"\n\n# only\n# comments\n", ["no event"]),
        (b"CPU:2 [LOST 1234 EVENTS]\n", ["no event", "lost"]),
        (b"PERFILE2" + bytes(100), ["perf script -i"]),
        (b"\x17\x08\x44tracing" + bytes(100), ["trace-cmd report"]),
        (b"\x28\xb5\x2f\xfd" + bytes(100), ["zstd"]),
        (b"\xfd7zXZ\0" + bytes(100), ["xz"]),
        (b"BZh9" + bytes(100), ["bzip2"]),
        (FTRACE.encode("utf-16"), ["UTF-16"]),
        (b"hello\nworld\n", ["no format", "hello"]),
        (bytes(5000), ["no format"]),
        (b"PAR1" + bytes(50), ["Parquet"]),
    ],
)
def test_a_file_that_is_no_trace_is_told_from_one(tmp_path: Path, content: bytes, words: list[str]) -> None:
    refused(tmp_path, content, *words)


def test_a_trace_whose_first_event_comes_late_needs_its_format(tmp_path: Path) -> None:
    text = "# x\n" * 20_000 + FTRACE + "\n"
    refused(tmp_path, text, "no event")
    assert len(read(tmp_path, text, format="ftrace")[1].ns) == 1


@pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b"])
def test_a_path_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match=r"regular file|cannot be read"):
        read_trace(str(tmp_path / name), ReadOptions(), tmp_path / "raw.arrow")


def test_a_fifo_is_no_trace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TraceError, match="regular file"):
        read_trace(str(tmp_path / "fifo"), ReadOptions(), tmp_path / "raw.arrow")


def test_a_thread_that_was_two_vcpus_is_told(tmp_path: Path) -> None:
    refused(tmp_path, f"{FTRACE}\n{FTRACE.replace('vcpu 5', 'vcpu 6')}\n", "trace.txt:2", "another vCPU")


def test_more_threads_than_there_is_room_for(tmp_path: Path) -> None:
    text = "".join(f"1 {tid} kvm_exit:\n" for tid in range(MAX_THREADS + 1))
    refused(tmp_path, f"{PLAIN}\n{text}", "threads")


def test_only_the_threads_that_are_asked_for(tmp_path: Path) -> None:
    trace, rows = read(tmp_path, f"{FTRACE}\n{FTRACE.replace('4145', '4146')}\n", threads=[4146])
    assert (len(rows.ns), trace.rows, trace.faults) == (1, 1, 2)


# --- gz


def test_gz_is_read_as_what_it_holds(tmp_path: Path) -> None:
    assert rows_of(read(tmp_path, gzip.compress(f"{FTRACE}\n".encode()), "trace.gz")[1]) == [ROW]
    members = gzip.compress(f"{FTRACE}\n".encode()) + gzip.compress(f"{FTRACE}\n".encode())
    assert rows_of(read(tmp_path, members, "trace.gz")[1]) == [ROW, ROW]


@pytest.mark.parametrize("keep", [3, 11, 30, -20, -9, -1])
def test_a_gz_file_that_is_cut_short_is_told(tmp_path: Path, keep: int) -> None:
    whole = gzip.compress((FTRACE + "\n").encode() * 50_000)
    refused(tmp_path, whole[:keep], "cut short", "whole lines", name="trace.gz")


def test_a_damaged_gz_file_is_told(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress((FTRACE + "\n").encode() * 50_000))
    whole[len(whole) // 2] ^= 0xFF
    refused(tmp_path, bytes(whole), "damaged", name="trace.gz")
    refused(tmp_path, gzip.compress(FTRACE.encode() + b"\n") + b"rubbish", "damaged", name="trace.gz")


# --- blocks


def sample(lines: int = 40) -> str:
    faults = [Fault(1000 * i, i % 3, i << 12, (READ, WRITE)[i % 2], i % 5 == 0, 1000 * i + 500) for i in range(lines)]
    return text_of(faults, Style("ftrace", pairs=True)) + "CPU:1 [LOST 5 EVENTS]\n\n" + "y" * (MAX_LINE + 9) + "\r\nbad\n" + FTRACE


def facts(trace: Trace, rows: Rows) -> tuple[Any, ...]:
    return (
        [column.tolist() for column in rows],
        trace.threads,
        trace.evidence,
        trace.lost,
        trace.bad,
        (trace.lines, trace.exits, trace.entries, trace.others, trace.span),
    )


def test_blocks_of_any_size_give_the_same(tmp_path: Path) -> None:
    text = sample()
    whole = facts(*read(tmp_path, text, skip_bad=9))
    assert whole[4].count == 3
    for size in (1, 2, 3, 7, 64, 997, 4096, MAX_LINE, MAX_LINE + 1, MAX_LINE + 2, len(text) - 1, len(text)):
        assert facts(*read(tmp_path, text, skip_bad=9, block_bytes=size)) == whole, size


def test_a_text_split_at_every_byte_gives_the_same(tmp_path: Path) -> None:
    """Every place is the end of a block once: of blocks of n bytes, for n up to the length of some lines."""
    text = text_of([Fault(1000 * i, 0, i << 12, WRITE, False, 0) for i in range(3)], Style("perf")) + FTRACE
    whole = facts(*read(tmp_path, text, skip_bad=9))
    for size in range(1, len(text)):
        assert facts(*read(tmp_path, text, skip_bad=9, block_bytes=size)) == whole, size


def test_rows_beyond_a_window_are_all_there(tmp_path: Path) -> None:
    """With durations that end in another window, too."""
    n = 5 * BATCH_ROWS + 17
    lines = [
        f"{i} {i % 7} kvm_exit:\n{i} {i % 7} kvm_page_fault: vcpu {i % 7} address 0x{i % 1000}000 error_code 0x182\n" for i in range(n)
    ]
    lines[3:] = [line if i % 7 else f"{line}{i + 9} 0 kvm_entry:\n" for i, line in enumerate(lines)][3:]
    trace, rows = read(tmp_path, "".join(lines))
    assert trace.rows == n
    assert rows.ns.tolist() == list(range(n))
    assert all(taken == (9 if i % 7 == 0 and i >= 3 else -1) for i, taken in enumerate(rows.taken.tolist()))


# --- Hypothesis

LARGE = st.integers(0, (1 << 52) - 1)
FAULTS = st.lists(
    st.builds(
        Fault, st.integers(0, 10**18), st.integers(0, KVM_MAX_VCPUS - 1), LARGE, st.sampled_from((0, 1, 2)), st.booleans(), st.just(0)
    ),
    min_size=1,
    max_size=20,
)
COMMS = st.text(st.characters(codec="utf-8", exclude_characters="\n{}", exclude_categories=("Cs",)), max_size=15).filter(
    lambda text: len(text.encode()) <= 15
)


@settings(
    max_examples=int(os.environ.get("FAULTSWEEP_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    faults=FAULTS,
    comm=COMMS,
    format=st.sampled_from(sorted(LINES)),
    vendor=st.sampled_from([v for v in Vendor if v != "none"]),
    old=st.booleans(),
)
@example(faults=[Fault(0, 0, 0, 0, False, 0)], comm="kvm_page_fault:", format="perf", vendor=Vendor.INTEL, old=False)
def test_what_is_written_is_read(tmp_path: Path, faults: list[Fault], comm: str, format: str, vendor: Vendor, old: bool) -> None:
    old = old and format != "bpftrace"
    padded = " " * (16 - len(comm.encode())) + comm  # printf pads by bytes
    text = text_of(faults, Style(format, vendor, old=old, comm=padded))
    trace, rows = read(tmp_path, text, format={"trace-cmd": "ftrace"}.get(format, format))
    scale = 1000 if format == "ftrace" else 1
    mask = 0xFFFFFFFF if old else -1
    written = sorted(faults, key=lambda f: f.ns)
    order = {vcpu: k for k, vcpu in enumerate(dict.fromkeys(f.vcpu for f in written))}  # of the threads' appearance
    assert rows_of(rows) == [
        (f.ns // scale * scale, -1 - order[f.vcpu] if old else f.vcpu, f.gpa, code_of(f, vendor) & mask) for f in written
    ]
    assert {thread.tid for thread in trace.threads} == {FIRST_TID + f.vcpu for f in faults}
    assert trace.bad.count == 0


@settings(
    max_examples=int(os.environ.get("FAULTSWEEP_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lines=st.lists(
        st.one_of(st.binary(max_size=80), st.sampled_from([line.encode() for line, _ in BAD_LINES if len(line) < 500])), max_size=30
    )
)
def test_no_bytes_break_the_reader(tmp_path: Path, lines: list[bytes]) -> None:
    """Whatever stands between two good lines, both are read, and every line is one."""
    text = b"\n".join([FTRACE.encode(), *lines, FTRACE.encode(), b""])
    trace, rows = read(tmp_path, text, skip_bad=10_000)
    assert trace.lines == text.count(b"\n")
    assert rows_of(rows)[0] == rows_of(rows)[-1] == ROW


# --- compiled or not

CHECKED = """
import sys
from pathlib import Path
import numpy as np
from sweep.replay import parse
from tests.test_replay_text import BAD_LINES, FTRACE, PERF, PLAIN, facts, read, sample

class Checked(np.ndarray):
    def __getitem__(self, index):
        assert all(isinstance(each, slice) or each >= 0 for each in (index if isinstance(index, tuple) else (index,))), index
        return super().__getitem__(index)

def with_checks(given):
    passed = as_passed(given)
    return passed._replace(given=type(given)(*(array.view(Checked) for array in given)))

as_passed, folder = parse.as_passed, Path(sys.argv[1])
if sys.argv[2] == "checked":
    parse.as_passed = with_checks
bad = [line for line, _ in BAD_LINES]
hostile = "\\n".join(["[0] 1.0: x", *bad, FTRACE, PERF, PLAIN, "-1 [0] 1.0: a:", "[", "0x", *bad])
for text in (sample(), hostile, "ns,vcpu,gpa,access\\n0x,,,\\n1,1,1,w\\n,"):
    for format in ("ftrace", "perf", "bpftrace", "csv"):
        if (format == "csv") == text.startswith("ns,"):
            print(facts(*read(folder, text, skip_bad=1000, format=format)))
"""


def test_the_loop_reads_nothing_before_its_block_and_gives_the_same_uncompiled(tmp_path: Path) -> None:
    def said(how: str, **environment: str) -> str:
        command = [sys.executable, "-c", CHECKED, str(tmp_path), how]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent, env=os.environ | environment
        ).stdout

    assert said("checked", NUMBA_DISABLE_JIT="1") == said("as it is")


def test_machine_code_is_kept_under_the_sources_it_is_made_of() -> None:
    assert scan.symbol == f"sweep.replay.scan.scan.{sources_digest()[:16]}"


# --- tables

TABLE = "ns,vcpu,gpa,access\n"


@pytest.mark.parametrize(
    "text",
    [
        TABLE + "10,3,0x2000,write\n",
        TABLE + "10,3,8192,w\r\n",
        TABLE + " 10 , 3 , 0x2000 , 1 \n",
        "access,comm,gpa,vcpu,ns\nwrite,CPU 3/KVM,0x2000,3,10\n",
        '"ns","vcpu","gpa","access"\n10,3,0x2000,write\n',
        "NS,VCPU,GPA,ACCESS,present\n10,3,0x2000,write,\n",
    ],
)
def test_a_csv_table_is_read(tmp_path: Path, text: str) -> None:
    assert rows_of(read(tmp_path, text, "a.csv")[1]) == [(10, 3, 0x2000, WRITE)]


def test_a_csv_table_may_say_what_was_present(tmp_path: Path) -> None:
    text = "ns,vcpu,gpa,access,present\n1,0,0,read,false\n2,0,0,write,1\n3,0,0,x,\n"
    assert read(tmp_path, text, "a.csv")[1].code.tolist() == [READ | 8, WRITE | 4, 2]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("10,3,0x2000", "lacks a field"),
        ("10,3,0x2000,write,5", "lacks a field"),
        ("10,3,0x2000,erase", "read, write, fetch"),
        ("10,3,2fff,write", "number"),
        ("-10,3,0x2000,write", "number"),
        ("1.5,3,0x2000,write", "number"),
        (",3,0x2000,write", "number"),
        ("10,4096,0x2000,write", "4095"),
        ("9" * 30 + ",3,0x2000,write", "too large"),
        ('"10",3,0x2000,write', "number"),
    ],
)
def test_a_bad_row_of_a_table_is_named(tmp_path: Path, row: str, why: str) -> None:
    text = f"{TABLE}1,0,0,read\n{row}\n2,0,0,read\n"
    refused(tmp_path, text, "a.csv:3: ", why, name="a.csv")
    trace, rows = read(tmp_path, text, "a.csv", skip_bad=1)
    assert (len(rows.ns), trace.bad.count) == (2, 1)


@pytest.mark.parametrize(("header", "why"), [("ns,vcpu,gpa,acces", "access"), ("ns,vcpu,gpa,access,ns", "ns twice")])
def test_a_table_with_other_columns_is_refused(tmp_path: Path, header: str, why: str) -> None:
    refused(tmp_path, header + "\n1,0,0,read\n", why, name="a.csv")


def parquet(folder: Path, **columns: Any) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def of_parquet(folder: Path, skip_bad: int = 0, **columns: Any) -> tuple[Trace, list[tuple[int, ...]]]:
    trace = read_trace(str(parquet(folder, **columns)), ReadOptions(skip_bad=skip_bad), folder / "raw.arrow")
    return trace, [row for batch in raw_batches(folder / "raw.arrow") for row in rows_of(batch)]


@pytest.mark.parametrize(
    "access",
    [
        ["read", "write"],
        ["R", "W"],
        [0, 1],
        [False, True],
        pa.array(["read", "write"]).dictionary_encode(),
        pa.array(["read", "write"], pa.large_string()),
    ],
)
def test_a_parquet_table_is_read(tmp_path: Path, access: Any) -> None:
    ns = pa.array([5, 6], pa.timestamp("ns"))
    trace, rows = of_parquet(tmp_path, ns=ns, vcpu=pa.array([0, 1], pa.uint8()), gpa=pa.array([0, 1 << 40], pa.uint64()), access=access)
    assert rows == [(5, 0, 0, READ), (6, 1, 1 << 40, WRITE)]
    assert (trace.rows, trace.span, trace.backward) == (2, (5, 6), 0)


@pytest.mark.parametrize(
    ("column", "value"),
    [("ns", None), ("ns", -1), ("vcpu", None), ("vcpu", 4096), ("gpa", None), ("gpa", -4096), ("access", None), ("access", "erase")],
)
def test_a_bad_row_of_a_parquet_table_is_named(tmp_path: Path, column: str, value: Any) -> None:
    columns: dict[str, list[Any]] = {"ns": [1, 2, 3], "vcpu": [0, 0, 0], "gpa": [0, 0, 0], "access": ["read"] * 3}
    columns[column][1] = value
    with pytest.raises(TraceError, match=r"a\.parquet:row 2: "):
        of_parquet(tmp_path, **columns)
    trace, rows = of_parquet(tmp_path, skip_bad=1, **columns)
    assert (len(rows), trace.bad.count) == (2, 1)


@pytest.mark.parametrize(("column", "values"), [("ns", [1.5]), ("vcpu", ["0"]), ("gpa", [0.0]), ("access", [1.0]), ("present", [1])])
def test_a_parquet_column_of_another_type_is_refused(tmp_path: Path, column: str, values: list[Any]) -> None:
    columns = {"ns": [1], "vcpu": [0], "gpa": [0], "access": ["read"]} | {column: values}
    with pytest.raises(TraceError, match=f"column {column} is of type"):
        of_parquet(tmp_path, **columns)


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    path = parquet(tmp_path, ns=[1], vcpu=[0], gpa=[0], access=["read"])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TraceError, match="Parquet"):
        read_trace(str(path), ReadOptions(), tmp_path / "raw.arrow")


def test_parquet_is_read_from_a_file_of_its_own(tmp_path: Path) -> None:
    path = parquet(tmp_path, ns=[1], vcpu=[0], gpa=[0], access=["read"])
    refused(tmp_path, gzip.compress(path.read_bytes()), "its own path", name="a.gz")


def test_tables_have_no_threads_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no threads"):
        read(tmp_path, TABLE + "1,0,0,read\n", "a.csv", threads=[5])


def test_csv_and_the_same_faults_as_text_agree(tmp_path: Path) -> None:
    faults = [Fault(1000 * i, i % 3, i << 12, i % 3, False, 0) for i in range(100)]
    _, rows = read(tmp_path, csv_of(faults), "a.csv")
    assert rows_of(rows) == [(f.ns, f.vcpu, f.gpa, f.access) for f in faults]


def test_every_format_is_found_by_its_lines() -> None:
    for format, line in (("perf", PERF), ("ftrace", FTRACE), ("bpftrace", PLAIN), ("csv", TABLE.strip())):
        assert detect("t", f"{line}\n".encode(), None).name == format
    assert {format.name for format in FORMATS} == {"perf", "ftrace", "bpftrace", "csv", "parquet"}


# --- streaming

MEASURE = """
import resource, sys, tempfile
from pathlib import Path
from sweep.replay import accesses
from sweep.replay.decode import decide
from sweep.replay.parse import ReadOptions, read_trace
from sweep.replay.vcpus import assign

accesses.SORT_MEMORY = "64MB"
backward = sys.argv[1] == "backward"

def peak(lines):
    with tempfile.TemporaryDirectory() as folder:
        path, raw = Path(folder) / "t", Path(folder) / "raw"
        with path.open("w") as file:
            for i in range(lines):
                ns = i ^ 7 if backward else i
                file.write(f"{ns} {i % 4} kvm_page_fault: vcpu {i % 4} address 0x{i % 4096:x}000 error_code 0x18{1 + i % 2}\\n")
        trace = read_trace(str(path), ReadOptions(), raw)
        folded = accesses.fold_trace(trace, raw, decide(trace, None), assign(trace), None, Path(folder) / "out")
        assert folded.totals["faults"] == lines and bool(trace.backward) == backward
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

peak(20_000)
small = peak(200_000)
print(small, peak(2_000_000))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("order", "limit_kib"), [("forward", 20_000), ("backward", 100_000)])
def test_memory_does_not_grow_with_the_trace(order: str, limit_kib: int) -> None:
    """Ten times the lines, of which the raw rows alone take 100 MB more; those that are out of order are sorted in 64 MB."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, order], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    small, large = map(int, ran.stdout.split())
    assert large - small < limit_kib, ran.stdout
