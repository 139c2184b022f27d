"""Figures of the import of recorded faults: lines a second of one core, from the file to accesses.parquet."""

import gzip
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sweep.replay.accesses import fold_trace
from sweep.replay.decode import decide
from sweep.replay.parse import ReadOptions, read_trace
from sweep.replay.render import Fault, Style, csv_of, lines_of
from sweep.replay.scan import READ, WRITE
from sweep.replay.vcpus import assign
from tests.bench.figures import Figure
from tests.bench.guest import medians

FAULTS = 600_000
VCPUS = 8
RUNS = 5
ASKED, AIM = 1e6, 5e6  # lines a second and core


def faults() -> Iterator[Fault]:
    """The list thread's pattern: each vCPU goes through 2 GiB of its own and reads, then writes each page, which takes two faults."""
    for k in range(FAULTS):
        vcpu, step = k // 3 % VCPUS, k // 3 // VCPUS
        access, present = ((READ, False), (WRITE, True), (WRITE, False))[k % 3]
        yield Fault(86 * 10**9 + 400 * k, vcpu, (vcpu << 31) + (step << 12), access, present, 86 * 10**9 + 400 * k + 300)


def text(style: Style) -> Callable[[], str]:
    return lambda: "".join(f"{line}\n" for line in lines_of(faults(), style))


TRACES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "perf script": ("perf.txt", text(Style("perf"))),
    "ftrace, with exits and entries": ("ftrace.txt", text(Style("ftrace", pairs=True))),
    "bpftrace": ("bpftrace.txt", text(Style("bpftrace"))),
    "CSV": ("faults.csv", lambda: csv_of(faults())),
    "perf script, gz": ("perf.txt.gz", text(Style("perf"))),
}


def seconds(path: Path) -> float:
    """CPU seconds of the whole process: reading, scanning, and what comes after it."""
    start = time.process_time()
    raw = path.with_name("raw.arrow")
    trace = read_trace(str(path), ReadOptions(), raw)
    fold_trace(trace, raw, decide(trace, None), assign(trace), None, path.with_name("accesses.parquet"))
    return time.process_time() - start


def imports() -> Iterator[Figure]:
    for name, (file, make) in TRACES.items():
        with tempfile.TemporaryDirectory() as folder:
            path, content = Path(folder) / file, make().encode()
            path.write_bytes(gzip.compress(content, 6) if file.endswith("gz") else content)
            (took,) = medians(lambda path=path: seconds(path), runs=RUNS)  # type: ignore[misc]
        lines = content.count(b"\n")
        ns = took / lines * 1e9
        method = f"{lines:,} lines of {len(content) / lines:.0f} bytes, {FAULTS:,} faults, to accesses.parquet: {ns:.0f} ns a line"
        yield Figure(f"replay, {name}", lines / took, ASKED, AIM, "lines/s", method, more_is_better=True)


GROUPS: tuple[Callable[[], Iterator[Figure]], ...] = (imports,)
