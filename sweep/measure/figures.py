"""Figures with their spread, and what is timed."""

import math
import statistics
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple


class Quantity(Enum):
    """What is timed, in ns of the measuring thread's CPU time; the value says how, for the method of a cost."""

    ZERO_FAULT = "MADV_POPULATE_READ of fresh 4K memory, less the same again, per page"
    ANON_FAULT = "MADV_POPULATE_WRITE of fresh 4K memory, less the same again, per page"
    COW_FAULT = "MADV_POPULATE_WRITE of 4K memory that maps the zero page, less the same again, per page"
    USER_FAULT = "loads from fresh 4K memory, less the same again, per page"
    SHMEM_FAULT = "MADV_POPULATE_WRITE of fresh shared memory, less the same again, per page"
    FILE_FAULT = "MADV_POPULATE_READ of each 16th page of shared memory that is in the page cache, less the same again, per page"
    REUSE_FAULT = "MADV_POPULATE_WRITE of 4K memory after a fork whose child has ended, less the same again, per page"
    COPY_FAULT = "MADV_POPULATE_WRITE of 4K memory that a forked child shares, less the same again, per page"
    THP_FAULT = "MADV_POPULATE_WRITE of fresh THP memory, less the same again, per 2 MiB"
    HUGE_ZERO_FAULT = "MADV_POPULATE_READ of fresh THP memory, less the same again, per 2 MiB"
    HUGE_ZERO_WRITE = "MADV_POPULATE_WRITE of THP memory that maps the huge zero page, less that of fresh THP memory, per 2 MiB"
    HUGETLB_FAULT = "MADV_POPULATE_WRITE of fresh hugetlb memory, less the same again, per 2 MiB"
    SPLIT = "MADV_DONTNEED of the first page of each huge zero page, less that of the second page"
    COLLAPSE = "MADV_COLLAPSE of 512 written 4K pages, per 2 MiB"
    CLEAR = "memset() of 4 KiB of memory that was not used lately"
    COPY = "memcpy() of 4 KiB of memory that was not used lately"
    WALK = "MADV_POPULATE_READ of one page that is there, less an empty system call"
    EMPTY_ADVICE = "MADV_DONTNEED of one page that is not there"
    ZAP = "MADV_DONTNEED of written 4K memory, per page"
    FORK = "fork() of a small process, less what its own entries cost"
    FORK_ENTRY = "fork() with written 4K memory, less fork() without, per page"
    FIRST_TARGET = "MADV_DONTNEED and a load of one page with one other thread running, less that with none"
    MORE_TARGETS = "MADV_DONTNEED and a load of one page with all CPUs running other threads, less that with one, per thread"
    LINE_OF_TWO = "MADV_POPULATE_READ of one page by each of two threads at once, less that by one, or its half where they wait in turn"
    LINE_GROWTH = "how much longer that takes if a thread of each CPU does it, per thread beyond two"
    GUEST_EXIT = "CPUID in a guest"
    GUEST_FAULT = "loads of a guest from memory that the host has mapped, every 32 KiB, less the same again, per fault"
    GUEST_TOUCH = "loads of a guest from memory that it has mapped, every 32 KiB"


class Figure(NamedTuple):
    """ns: a median, and the quartiles around it or what they make of a sum."""

    value: float
    low: float
    high: float


def figure_of(runs: Sequence[float]) -> Figure:
    """Median and quartiles of at least two runs."""
    low, middle, high = statistics.quantiles(runs, n=4, method="inclusive")
    return Figure(middle, low, high)


def combined(terms: Iterable[tuple[float, Figure]]) -> Figure:
    """The sum of weight * figure. Spreads add as independent errors do, downward and upward apart; a negative weight swaps them."""
    value = down = up = 0.0
    for weight, figure in terms:
        ends = weight * (figure.low - figure.value), weight * (figure.high - figure.value)
        value += weight * figure.value
        down += min(ends) ** 2
        up += max(ends) ** 2
    return Figure(value, value - math.sqrt(down), value + math.sqrt(up))
