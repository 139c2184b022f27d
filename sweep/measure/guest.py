"""A guest of one vCPU that loads from memory and exits: a script for a small process of its own, on Python's standard library alone.

The guest runs at CPL 3 in long mode over page tables of its own, with A and D set, so that nothing but data faults and the exits it asks
for happens; a store to an address without memslot ends each run. Prints JSON: ns, and what KVM counted, for `sweep.measure.processes`.
"""

import ctypes
import fcntl
import json
import mmap
import os
import struct
import sys
import time
from contextlib import suppress

from sweep.kvm import (
    DIRTY,
    KVM,
    KVM_SET_REGS,
    LEAF,
    NOWHERE,
    PRESENT_RW_US_A,
    REGISTERS,
    Stats,
    create_vcpu,
    create_vm,
    exit_fault,
    runs,
    set_slot,
)

PAGE, PMD_BYTES = 4096, 2 << 20
EVERY = 8 * PAGE  # between loads: shadow paging maps up to eight neighbours with a page
EXITS = 500
MAX_SIGNALS = 1000
POPULATE_WRITE = 23  # linux/mman.h
COUNTED = ("exits", "pf_taken")

# Guest-physical addresses; the guest's tables map them one to one.
LOW, LOW_BYTES, DATA = 0, 7 * PAGE, 0x4000_0000
PML4_AT, PDPT_AT, PD_AT = PAGE, 2 * PAGE, 3 * PAGE

LOADS_AT, CPUIDS_AT = 0, 0x100
LOADS = bytes.fromhex(
    "4d85c0"  # 00: test r8, r8
    "740a"  # jz 0f
    "8a06"  # mov al, [rsi]
    "4801d6"  # add rsi, rdx
    "49ffc8"  # dec r8
    "ebf1"  # jmp 00
    "8807"  # 0f: mov [rdi], al
    "ebfc"  # jmp 0f
)
CPUIDS = bytes.fromhex(
    "4d85c0"  # 00: test r8, r8
    "740b"  # jz 10
    "31c0"  # xor eax, eax
    "31c9"  # xor ecx, ecx
    "0fa2"  # cpuid
    "49ffc8"  # dec r8
    "ebf0"  # jmp 00
    "8807"  # 10: mov [rdi], al
    "ebfc"  # jmp 10
)


class GuestError(Exception):
    """The guest did something else than it was made for."""


def own_tables() -> bytes:
    """The low memslot: code, and tables that map 4 GiB one to one in 2 MiB pages."""
    low = bytearray(LOW_BYTES)
    low[LOADS_AT : LOADS_AT + len(LOADS)] = LOADS
    low[CPUIDS_AT : CPUIDS_AT + len(CPUIDS)] = CPUIDS
    struct.pack_into("<Q", low, PML4_AT, PDPT_AT | PRESENT_RW_US_A)
    struct.pack_into("<4Q", low, PDPT_AT, *(PD_AT + i * PAGE | PRESENT_RW_US_A for i in range(4)))
    struct.pack_into("<2048Q", low, PD_AT, *(i * PMD_BYTES | PRESENT_RW_US_A | DIRTY | LEAF for i in range(2048)))
    return bytes(low)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def run_until_exit(vcpu: int) -> None:
    """KVM_RUN, again after a signal."""
    for _ in range(MAX_SIGNALS):
        if runs(vcpu):
            return
    raise GuestError(f"the guest was interrupted {MAX_SIGNALS} times")


class Guest:
    """One VM with a vCPU, `size` bytes of 4K memory that the host has mapped, and KVM's counters."""

    def __init__(self, size: int) -> None:
        kvm = os.open(KVM, os.O_RDWR)
        vm = create_vm(kvm)
        self._low, self._data = mmap.mmap(-1, LOW_BYTES), mmap.mmap(-1, size)
        self._low.write(own_tables())
        with suppress(OSError):  # a kernel without THP
            self._data.madvise(mmap.MADV_NOHUGEPAGE)
        self._data.madvise(POPULATE_WRITE)
        for slot, gpa, memory in ((0, LOW, self._low), (1, DATA, self._data)):
            set_slot(vm, slot, gpa, address_of(memory), len(memory))
        self._vcpu, self._run = create_vcpu(kvm, vm, 0, PML4_AT)
        self._stats = Stats(self._vcpu, COUNTED)

    def _count(self) -> dict[str, int]:
        return dict.fromkeys(COUNTED, 0) | self._stats.read()

    def run(self, code: int, times: int) -> dict[str, int]:
        """One loop of the guest: ns of CPU time, exits and faults, those of the way out included."""
        before = self._count()
        registers = [0] * 18  # rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 ... r15, rip, rflags
        registers[3:6] = EVERY, DATA, NOWHERE
        registers[8], registers[16], registers[17] = times, code, 2
        fcntl.ioctl(self._vcpu, KVM_SET_REGS, REGISTERS.pack(*registers))
        start = time.thread_time_ns()
        run_until_exit(self._vcpu)
        ns = time.thread_time_ns() - start
        if fault := exit_fault(self._run):
            raise GuestError(fault)
        after = self._count()
        return {"ns": ns, **{name: after[name] - before[name] for name in COUNTED}}


def measure(size: int) -> dict[str, float]:
    """ns per exit, fault and touch; counts beyond those of a run that does nothing."""
    guest = Guest(size)
    for code in (LOADS_AT, CPUIDS_AT, LOADS_AT):  # the guest's own tables and code get mapped
        guest.run(code, 1)
    nothing = guest.run(LOADS_AT, 0)
    loads = size // EVERY - 1  # the first one was made already
    fresh, again = guest.run(LOADS_AT, loads + 1), guest.run(LOADS_AT, loads + 1)
    exits = guest.run(CPUIDS_AT, EXITS)
    return {
        "loads": loads,
        "faults": fresh["pf_taken"] - nothing["pf_taken"],
        "faults_again": again["pf_taken"] - nothing["pf_taken"],
        "fault_ns": (fresh["ns"] - again["ns"]) / loads,
        "touch_ns": (again["ns"] - nothing["ns"]) / loads,
        "exits_meant": EXITS,
        "exits": exits["exits"] - nothing["exits"],
        "exit_ns": (exits["ns"] - nothing["ns"]) / EXITS,
    }


def main() -> None:
    try:
        print(json.dumps(measure(int(sys.argv[1]))))
    except (OSError, GuestError) as error:
        print(json.dumps({"unavailable": f"no guest through /dev/kvm: {getattr(error, 'strerror', None) or error}"}))
