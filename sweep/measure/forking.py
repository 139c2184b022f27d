"""What fork() costs, and faults after it: a script for a small process of its own, on Python's standard library alone.

Prints JSON: ns of each quantity, and the minor faults that were counted, for `sweep.measure.processes` to check.
"""

import json
import mmap
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

PAGE = 4096
POPULATE_WRITE = 23  # linux/mman.h


class Child:
    """A forked process that waits for its end; `ns` is the CPU time of the fork."""

    def __init__(self) -> None:
        wait, self._release = os.pipe()
        start = time.thread_time_ns()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._release)
            os.read(wait, 1)
            os._exit(0)
        self.ns = time.thread_time_ns() - start
        os.close(wait)

    def end(self) -> None:
        os.close(self._release)
        os.waitpid(self._pid, 0)


def populated(memory: mmap.mmap) -> tuple[int, int]:
    """MADV_POPULATE_WRITE of all of it: (ns less those of doing it again, minor faults)."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    start = time.thread_time_ns()
    memory.madvise(POPULATE_WRITE)
    fresh = time.thread_time_ns() - start
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    start = time.thread_time_ns()
    memory.madvise(POPULATE_WRITE)
    return fresh - (time.thread_time_ns() - start), faults


def anonymous_pages() -> int:
    """Pages of this process that a fork copies the entries of."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024 // PAGE
    return 0


def measure(size: int) -> dict[str, float]:
    """Times in ns, and counts of minor faults."""
    pages = size // PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without THP
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    spare = mmap.mmap(-1, PAGE)
    own = anonymous_pages()
    bare = Child()
    bare.end()
    populated(memory)
    sharing = Child()
    populated(spare)  # the interpreter's own pages are copied here, not where it is timed
    copy_ns, copies = populated(memory)
    sharing.end()
    Child().end()
    populated(spare)
    reuse_ns, reuses = populated(memory)
    entry_ns = (sharing.ns - bare.ns) / pages
    return {
        "fork_entry_ns": entry_ns,
        "fork_ns": bare.ns - own * entry_ns,
        "copy_ns": copy_ns / pages,
        "copies": copies,
        "reuse_ns": reuse_ns / pages,
        "reuses": reuses,
    }


def main() -> None:
    try:
        print(json.dumps(measure(int(sys.argv[1]))))
    except OSError as error:
        print(json.dumps({"unavailable": f"the kernel refuses it: {error.strerror}"}))
