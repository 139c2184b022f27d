"""Loops over system calls and memory, compiled: of Python's own time nothing is in what they take, and they hold no GIL."""

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
_libc = ctypes.CDLL(None, use_errno=True)

madvise = _libc.madvise
madvise.argtypes, madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
memset = _libc.memset
memset.argtypes, memset.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
memcpy = _libc.memcpy
memcpy.argtypes, memcpy.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
strnlen = _libc.strnlen
strnlen.argtypes, strnlen.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_size_t
getppid = _libc.getppid
getppid.argtypes, getppid.restype = [], ctypes.c_int
sched_getcpu = _libc.sched_getcpu
sched_getcpu.argtypes, sched_getcpu.restype = [], ctypes.c_int

PAGE = 4096
STOP, COUNT = 0, 1  # words of what a thread in the background shares with its owner


def _compiled(function: F) -> F:
    """For the process that measures, once: nothing is cached, since the addresses of libc's functions are in the code."""
    return cast(F, numba.njit(nogil=True)(function))


@_compiled
def advise_each(address: int, size: int, stride: int, count: int, advice: int) -> int:
    """madvise() of `size` bytes at `count` places; 0 if all went well."""
    wrong = 0
    for i in range(count):
        wrong |= madvise(address + i * stride, size, advice)
    return wrong


@_compiled
def clear_each(address: int, size: int, count: int) -> None:
    """memset() of `count` pieces, one after the other."""
    for i in range(count):
        memset(address + i * size, 0, size)


@_compiled
def copy_each(to: int, source: int, size: int, count: int) -> None:
    """memcpy() of `count` pieces, one after the other."""
    for i in range(count):
        memcpy(to + i * size, source + i * size, size)


@_compiled
def load_each(address: int, stride: int, count: int) -> int:
    """A load from `count` places; 0 if zeros were found."""
    found = 0
    for i in range(count):
        found += strnlen(address + i * stride, 1)
    return found


@_compiled
def call_each(count: int) -> None:
    """A system call that does nothing, so many times."""
    for _ in range(count):
        getppid()


@_compiled
def load_and_drop(address: int, count: int, advice: int) -> int:
    """Map a page by a load and drop it by `advice`, so many times: one TLB flush each; 0 if all went well."""
    wrong = 0
    for _ in range(count):
        wrong |= strnlen(address, 1) | madvise(address, PAGE, advice)
    return wrong


@_compiled
def run_until_stopped(shared: NDArray[np.int64]) -> None:
    """Keep a CPU busy in user space (the call reads a register) until the owner says stop, counting."""
    while shared[STOP] == 0:
        shared[COUNT] += 1
        sched_getcpu()


@_compiled
def advise_until_stopped(shared: NDArray[np.int64], address: int, advice: int) -> None:
    """madvise() of one page until the owner says stop, counting."""
    while shared[STOP] == 0:
        shared[COUNT] += 1
        madvise(address, PAGE, advice)


def compile_loops() -> None:
    """Compile all of it now, outside of what is timed."""
    stopped = np.array([1, 0])
    advise_each(0, 0, 0, 0, 0)
    clear_each(0, 0, 0)
    copy_each(0, 0, 0, 0)
    load_each(0, 0, 0)
    call_each(0)
    load_and_drop(0, 0, 0)
    run_until_stopped(stopped)
    advise_until_stopped(stopped, 0, 0)
