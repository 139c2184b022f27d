"""Makes the traces of this folder: one simulated run of two vCPUs, written as each tool would have recorded it.

python examples/traces/make.py [FOLDER]
"""

import gzip
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kernels import Access, Touch, simulate
from kernels.simulate import Run
from sweep.replay.decode import Vendor
from sweep.replay.render import WORDS, Fault, Style, csv_of, faults_of, text_of

HERE = Path(__file__).resolve().parent
HOST = {"kernel": "6.5", "backing": "anonymous_thp", "memory": 8 << 20, "vcpus": 2}  # of the run
BOOTED_NS = 86_581_928_000  # when it began, on the host's clock
STYLES: Mapping[str, Style] = {
    "perf.txt": Style("perf", Vendor.INTEL, pairs=True),
    "ftrace.txt": Style("ftrace", Vendor.INTEL, pairs=True),
    "ftrace-old.txt": Style("ftrace", Vendor.AMD, old=True, pairs=True),
    "trace-cmd.txt": Style("trace-cmd", Vendor.AMD),
    "bpftrace.txt": Style("bpftrace", Vendor.INTEL, pairs=True),
}


def run() -> Run:
    """Each vCPU reads and writes 24 pages, 128 KiB apart, one after the other, at the beginning of its half: the list thread's pattern."""
    steps = [Touch(access=Access.PAIRS, every=128 << 10, end=0.75)]
    return simulate(**HOST, steps=steps, trace_rows=1 << 20)  # type: ignore[arg-type]


def faults() -> list[Fault]:
    """Its faults, on the host's clock."""
    return [fault._replace(ns=fault.ns + BOOTED_NS, entry_ns=fault.entry_ns + BOOTED_NS) for fault in faults_of(run().trace)]


def write_parquet(path: Path, found: list[Fault]) -> None:
    columns = {
        "ns": pa.array([fault.ns for fault in found], pa.int64()),
        "vcpu": pa.array([fault.vcpu for fault in found], pa.int32()),
        "gpa": pa.array([fault.gpa for fault in found], pa.int64()),
        "access": pa.array([WORDS[fault.access] for fault in found]),
        "present": pa.array([fault.present for fault in found]),
    }
    pq.write_table(pa.table(columns), path, compression="zstd", write_page_checksum=True, store_schema=False)


def write_gz(path: Path, found: list[Fault]) -> None:
    path.write_bytes(gzip.compress(text_of(found, STYLES["ftrace.txt"]).encode(), mtime=0))


OTHERS: Mapping[str, Callable[[Path, list[Fault]], object]] = {
    "ftrace.txt.gz": write_gz,
    "accesses.csv": lambda path, found: path.write_text(csv_of(found)),
    "accesses.parquet": write_parquet,
}


def make(folder: Path) -> list[str]:
    """Write all; their names."""
    found = faults()
    for name, style in STYLES.items():
        (folder / name).write_text(text_of(found, style))
    for name, write in OTHERS.items():
        write(folder / name, found)
    return [*STYLES, *OTHERS]


if __name__ == "__main__":
    print("\n".join(make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)))
