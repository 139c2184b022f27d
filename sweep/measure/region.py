"""Fresh memory, and work on it timed with a count of its minor faults."""

import errno
import mmap
import resource
import time
from collections.abc import Callable
from ctypes import addressof, c_char
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from kernels.spec import PMD_BYTES
from sweep.measure.loops import PAGE, advise_each, load_each
from sweep.measure.machine import read_text, thp_enabled
from sweep.measure.sampling import DiscardedRunError, UnavailableError

POPULATE_READ, POPULATE_WRITE, COLLAPSE = 22, 23, 25  # linux/mman.h; Python's mmap has no names for them
MAP_HUGETLB = 0x40000
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
HUGETLB = ANONYMOUS | MAP_HUGETLB
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
PASSING = {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM}  # errors that the next run may not meet
SMAPS = Path("/proc/self/smaps")


class Timing(NamedTuple):
    """CPU time of the thread in ns, and its minor faults meanwhile."""

    ns: int
    faults: int


def timed(work: Callable[..., Any], *arguments: Any) -> Timing:
    """Do the work. Raises UnavailableError or DiscardedRunError for what the kernel refuses, for good or for now."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    start = time.thread_time_ns()
    try:
        wrong = work(*arguments)
    except OSError as error:
        passing = error.errno in PASSING
        raise (DiscardedRunError if passing else UnavailableError)(f"the kernel refuses it: {error.strerror}") from None
    ns = time.thread_time_ns() - start
    if wrong:
        raise UnavailableError("the kernel refuses it")
    return Timing(ns, resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)


def expect(found: int, wanted: int, what: str) -> None:
    """Raises DiscardedRunError unless the count is what the run was meant to do."""
    if found != wanted:
        raise DiscardedRunError(f"{found} {what} where {wanted} were meant")


def ns_per_fault(fresh: Timing, again: Timing, faults: int) -> float:
    """The difference per fault. Raises DiscardedRunError unless there were so many at first, and then none."""
    expect(fresh.faults, faults, "minor faults")
    expect(again.faults, 0, "minor faults of memory that is there")
    return (fresh.ns - again.ns) / faults


class Region:
    """`size` bytes of fresh memory from a 2 MiB boundary on; `advice` is given to all of it at once."""

    def __init__(self, size: int, advice: int | None = None, flags: int = ANONYMOUS) -> None:
        slack = 0 if flags & MAP_HUGETLB else PMD_BYTES
        try:
            self._map = mmap.mmap(-1, size + slack, flags=flags)
        except OSError as error:
            raise UnavailableError(f"no {size} bytes can be mapped: {error.strerror}") from None
        base = addressof(c_char.from_buffer(self._map))
        self.size, self._start = size, -base % PMD_BYTES
        self.address = base + self._start
        if advice is not None and thp_enabled():  # without THP in the kernel, there is nothing to say about them
            timed(self._map.madvise, advice)

    def __enter__(self) -> "Region":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._map.close()

    def advise(self, advice: int) -> Timing:
        """madvise() of all of it."""
        return timed(self._map.madvise, advice, self._start, self.size)

    def advise_each(self, advice: int, first: int, stride: int) -> Timing:
        """madvise() of one page every `stride` bytes, from byte `first` on."""
        return timed(advise_each, self.address + first, PAGE, stride, self.size // stride, advice)

    def load(self) -> Timing:
        """A load from each 4K page."""
        return timed(load_each, self.address, PAGE, self.size // PAGE)

    def recycle(self) -> None:
        """Have memory and give it back: what comes next gets pages that the host of a virtual machine has backed already."""
        self.advise(POPULATE_WRITE)
        self.advise(mmap.MADV_DONTNEED)

    def ns_per_fault(self, advice: int, faults: int) -> float:
        """What populating costs a fault, the walk over what is there then taken off. Raises DiscardedRunError unless there are so many."""
        return ns_per_fault(self.advise(advice), self.advise(advice), faults)

    def expect_huge(self, size: int) -> None:
        """Raises DiscardedRunError unless at least `size` bytes, or none for 0, are THPs."""
        found = self.kilobytes("AnonHugePages") << 10
        expect(min(found, size) if size else found, size, "bytes of THPs")

    def kilobytes(self, key: str) -> int:
        """A figure of /proc/self/smaps of the mapping that the region lies in (neighbours may have joined it)."""
        inside = False
        for line in read_text(SMAPS).splitlines():
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                low, _, high = name.partition("-")
                inside = int(low, 16) <= self.address < int(high, 16)
            elif inside and name[:-1] == key:
                return int(rest.split()[0])
        return 0
