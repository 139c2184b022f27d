"""What the lone vCPU's loop is measured against: the least that any loop over the same accesses does, and the loop in C."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from kernels.blocks import BLOCK, fill_block, next_run
from kernels.jit import entry
from kernels.learned import CLASSES, LANES
from kernels.loops import lab
from kernels.spec import PAGE_SHIFT, Stream, Vm
from kernels.state import Bytes, Env, Int64s
from tests.bench.guest import Guest, cpu_seconds

U1 = np.uint64(1)


@entry
def generate_and_gather(env: Env, pages: Bytes, shift: int, units: Int64s, block: Int64s) -> int:
    """Make all accesses of a step and read, change and write a byte at each: no model at all."""
    index, limit, n = np.int64(0), env.stream[Stream.TOUCHES], env.stream[Stream.UNITS]
    while index < limit:
        count, used = fill_block(env, next_run(env, index, limit), index, np.int64(0), n, shift, units, block)
        for i in range(count):
            access = np.uint64(block[i])
            pages[access >> U1] ^= np.uint8(access & U1)
        index += used
    return index


def gather_seconds(guest: Guest) -> float:
    """CPU seconds over the guest's own array of pages (which is not what it was afterwards)."""
    units, block = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    return cpu_seconds(lambda: generate_and_gather(guest.env, guest.machine.pte, np.int64(guest.machine.vm[Vm.SHIFT]), units, block))


class LoopInC:
    """tests/bench/loop.c, compiled where the host has gcc."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "loop.so"
            source = Path(__file__).with_name("loop.c")
            subprocess.run(["gcc", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
            self.run_loop = ctypes.CDLL(str(library)).run_loop
        self.seen = np.zeros((LANES, 256), np.int64)
        self.after = np.full(256, 255, np.uint8)

    def learn(self) -> None:
        """Take over what the kernel's last step learned."""
        self.after[: CLASSES - 4] = lab()[1].after[: CLASSES - 4]

    @staticmethod
    def possible() -> bool:
        return shutil.which("gcc") is not None

    def seconds(self, guest: Guest) -> float:
        """The guest's last step, uniform and mixed over 4K pages whose regions have tables; self.seen says what happened."""
        s = guest.stream
        self.seen[:] = 0
        first = int(guest.machine.vm[Vm.SHIFT] + (s[Stream.START_BYTES] >> PAGE_SHIFT))
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (guest.machine.pte, self.after, self.seen)]
        numbers = [ctypes.c_int64(int(v)) for v in (s[Stream.KEY], first, s[Stream.UNITS], s[Stream.TOUCHES], s[Stream.WRITE_CUT])]
        return cpu_seconds(lambda: self.run_loop(*pointers, *numbers))

    def agrees(self) -> bool:
        """It met the same classes as often as the kernel did in the step before."""
        kernel = lab()[1].seen.reshape(LANES, CLASSES).sum(axis=0)
        return bool(np.array_equal(kernel[: CLASSES - 4], self.seen.sum(axis=0)[: CLASSES - 4]))
