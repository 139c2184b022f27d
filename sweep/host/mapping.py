"""Memory of this process as the cases want it: mapped at a place of our choice, advised, touched byte by byte. Standard library only."""

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass

PAGE = mmap.PAGESIZE
HUGE_2M, HUGE_1G = 2 << 20, 1 << 30
PROT_NONE, PROT_RW = 0, mmap.PROT_READ | mmap.PROT_WRITE
MAP_FIXED, MAP_HUGETLB, MAP_HUGE_SHIFT, MAP_NORESERVE, MAP_POPULATE = 0x10, 0x40000, 26, 0x4000, 0x8000
MADV_NORMAL, MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 0, 4, 14, 15
MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 22, 23, 25
PR_SET_PDEATHSIG = 1
MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.memset.restype = None
_libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.memchr.restype = None

PRIVATE, SHARED = mmap.MAP_PRIVATE, mmap.MAP_SHARED
ANONYMOUS = mmap.MAP_ANONYMOUS


@dataclass(frozen=True)
class Backing:
    """How a kind of memory is mapped; the VMA begins at a multiple of `page`."""

    flags: int
    memfd: bool = False
    advice: int = MADV_NORMAL
    page: int = HUGE_2M


BACKINGS = {
    "anonymous": Backing(PRIVATE | ANONYMOUS | MAP_NORESERVE, advice=MADV_NOHUGEPAGE),
    "anonymous_thp": Backing(PRIVATE | ANONYMOUS | MAP_NORESERVE, advice=MADV_HUGEPAGE),
    "anonymous_default": Backing(PRIVATE | ANONYMOUS | MAP_NORESERVE),
    "anonymous_hugetlb_2mb": Backing(PRIVATE | ANONYMOUS | MAP_HUGETLB | 21 << MAP_HUGE_SHIFT),
    "anonymous_hugetlb_1gb": Backing(PRIVATE | ANONYMOUS | MAP_HUGETLB | 30 << MAP_HUGE_SHIFT, page=HUGE_1G),
    "shared_hugetlb_2mb": Backing(SHARED | ANONYMOUS | MAP_HUGETLB | 21 << MAP_HUGE_SHIFT),
    "shared_hugetlb_1gb": Backing(SHARED | ANONYMOUS | MAP_HUGETLB | 30 << MAP_HUGE_SHIFT, page=HUGE_1G),
    "shmem": Backing(SHARED | MAP_NORESERVE, memfd=True, advice=MADV_NOHUGEPAGE),
    "shmem_thp": Backing(SHARED | MAP_NORESERVE, memfd=True, advice=MADV_HUGEPAGE),
    "private_memfd": Backing(PRIVATE | MAP_NORESERVE, memfd=True, advice=MADV_NOHUGEPAGE),
}


def map_at(address: int | None, size: int, protection: int, flags: int, fd: int = -1) -> int:
    """mmap(2). Raises OSError."""
    found: int = _libc.mmap(address, size, protection, flags, fd, 0)
    if found == MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes: {os.strerror(ctypes.get_errno())}")
    return found


def advise(address: int, size: int, advice: int, may_fail: bool = False) -> None:
    """madvise(2). Raises OSError unless it may fail."""
    if size and _libc.madvise(address, size, advice) and not may_fail:
        raise OSError(ctypes.get_errno(), f"madvise {advice}: {os.strerror(ctypes.get_errno())}")


def shared_memory(size: int) -> int:
    """Address of filled memory that a fork leaves alone."""
    return map_at(None, size, PROT_RW, SHARED | ANONYMOUS | MAP_POPULATE)


@dataclass(frozen=True)
class Vma:
    """A mapping of its own: `data` is the slot inside it."""

    start: int
    size: int
    data: int
    pages: int

    def at(self, page: int) -> int:
        return self.data + page * PAGE


def map_data(backing: str, pages: int, shift: int) -> Vma:
    """The slot's memory, as `litmus.c` maps it: from a multiple of the huge page to the next one behind the slot. Raises OSError."""
    kind = BACKINGS[backing]
    offset = shift * PAGE % kind.page
    size = -(-(offset + pages * PAGE) // kind.page) * kind.page
    reserved = map_at(None, size + 3 * kind.page, PROT_NONE, PRIVATE | ANONYMOUS | MAP_NORESERVE)
    start = (reserved // kind.page + 2) * kind.page
    fd = -1
    if kind.memfd:
        fd = os.memfd_create("litmus")
        os.ftruncate(fd, size)
    map_at(start, size, PROT_RW, kind.flags | MAP_FIXED, fd)
    if kind.advice != MADV_NORMAL:
        advise(start, size, kind.advice)
    return Vma(start, size, start + offset, pages)


def touch(vma: Vma, accesses: Iterable[tuple[int, bool]]) -> None:
    """One byte of each page, loaded or stored."""
    data, load, store = vma.data, _libc.memchr, _libc.memset
    for page, write in accesses:
        if write:
            store(data + page * PAGE, 1, 1)
        else:
            load(data + page * PAGE, 0, 1)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """The kernel sends this process that signal when the one that made it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, int(number))


def drain_batches() -> Callable[[], None]:
    """A call that empties the CPUs' batches of pages, which hold references: MADV_COLLAPSE of 2 MiB that stay empty."""
    memory = map_at(None, 3 * HUGE_2M, PROT_RW, PRIVATE | ANONYMOUS | MAP_NORESERVE)
    _libc.memset(memory + 3 * HUGE_2M - 1, 1, 1)
    empty = -(-memory // HUGE_2M) * HUGE_2M
    return lambda: advise(empty, HUGE_2M, MADV_COLLAPSE, may_fail=True)
