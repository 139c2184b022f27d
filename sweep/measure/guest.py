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

PAGE, PMD_BYTES = 4096, 2 << 20
EVERY = 8 * PAGE  # between loads: shadow paging maps up to eight neighbours with a page
EXITS = 500
MAX_SIGNALS = 1000
POPULATE_WRITE = 23  # linux/mman.h

# linux/kvm.h
CREATE_VM, GET_VCPU_MMAP_SIZE, CREATE_VCPU, SET_TSS_ADDR, RUN, GET_STATS_FD = 0xAE01, 0xAE04, 0xAE41, 0xAE47, 0xAE80, 0xAECE
GET_SUPPORTED_CPUID, SET_CPUID2 = 0xC008AE05, 0x4008AE90
SET_USER_MEMORY_REGION, SET_REGS, GET_SREGS, SET_SREGS = 0x4020AE46, 0x4090AE82, 0x8138AE83, 0x4138AE84
EXIT_MMIO = 6
EXIT_REASON_AT, MMIO_ADDRESS_AT = 8, 32  # in struct kvm_run
CPUID_ENTRIES, CPUID_ENTRY_BYTES = 256, 40
SEGMENT, CONTROL_AT = struct.Struct("<QIH10B"), 224  # of struct kvm_sregs; the control registers' place in it

# Guest-physical addresses; the guest's tables map them one to one.
LOW, LOW_BYTES, TSS, DATA, NOWHERE = 0, 7 * PAGE, 0x3FF0_0000, 0x4000_0000, 0xD000_0000
PML4_AT, PDPT_AT, PD_AT = PAGE, 2 * PAGE, 3 * PAGE
TABLE, LEAF = 0x27, 0xE7  # present, writable, user, accessed; and dirty, 2 MiB

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
    struct.pack_into("<Q", low, PML4_AT, PDPT_AT | TABLE)
    struct.pack_into("<4Q", low, PDPT_AT, *(PD_AT + i * PAGE | TABLE for i in range(4)))
    struct.pack_into("<2048Q", low, PD_AT, *(i * PMD_BYTES | LEAF for i in range(2048)))
    return bytes(low)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def run_until_exit(vcpu: int) -> None:
    """KVM_RUN, again after a signal."""
    for _ in range(MAX_SIGNALS):
        with suppress(InterruptedError):
            fcntl.ioctl(vcpu, RUN, 0)
            return
    raise GuestError(f"the guest was interrupted {MAX_SIGNALS} times")


class Guest:
    """One VM with a vCPU, `size` bytes of 4K memory that the host has mapped, and KVM's counters."""

    def __init__(self, size: int) -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR)
        self._vm = fcntl.ioctl(kvm, CREATE_VM, 0)
        self._low, self._data = mmap.mmap(-1, LOW_BYTES), mmap.mmap(-1, size)
        self._low.write(own_tables())
        with suppress(OSError):  # a kernel without THP
            self._data.madvise(mmap.MADV_NOHUGEPAGE)
        self._data.madvise(POPULATE_WRITE)
        with suppress(OSError):  # only Intel knows it
            fcntl.ioctl(self._vm, SET_TSS_ADDR, TSS)
        self._slot(0, LOW, self._low)
        self._slot(1, DATA, self._data)
        self._vcpu = fcntl.ioctl(self._vm, CREATE_VCPU, 0)
        self._run = mmap.mmap(self._vcpu, fcntl.ioctl(kvm, GET_VCPU_MMAP_SIZE, 0))
        cpuid = bytearray(struct.pack("<II", CPUID_ENTRIES, 0) + bytes(CPUID_ENTRIES * CPUID_ENTRY_BYTES))
        fcntl.ioctl(kvm, GET_SUPPORTED_CPUID, cpuid)
        fcntl.ioctl(self._vcpu, SET_CPUID2, cpuid)
        self._set_mode()
        self._stats = fcntl.ioctl(self._vcpu, GET_STATS_FD, 0)
        self._places = self._counter_places()

    def _slot(self, number: int, address: int, memory: mmap.mmap) -> None:
        region = struct.pack("<IIQQQ", number, 0, address, len(memory), address_of(memory))
        fcntl.ioctl(self._vm, SET_USER_MEMORY_REGION, region)

    def _set_mode(self) -> None:
        """Long mode, CPL 3, paging on."""
        state = bytearray(312)
        fcntl.ioctl(self._vcpu, GET_SREGS, state)
        # base, limit, selector; type, present, dpl, db, s, l, g, avl, unusable, padding
        code = SEGMENT.pack(0, 0xFFFF_FFFF, 0x1B, 11, 1, 3, 0, 1, 1, 1, 0, 0, 0)
        data = SEGMENT.pack(0, 0xFFFF_FFFF, 0x23, 3, 1, 3, 1, 1, 0, 1, 0, 0, 0)
        state[: 6 * SEGMENT.size] = code + 5 * data
        struct.pack_into("<QQQQQQ", state, CONTROL_AT, 0x8005_0033, 0, PML4_AT, 0x20, 0, 0x500)  # cr0, cr2, cr3, cr4, cr8, efer
        fcntl.ioctl(self._vcpu, SET_SREGS, bytes(state))

    def _counter_places(self) -> dict[str, int]:
        """Where in the statistics file each counter lies (KVM_GET_STATS_FD)."""
        _, name_bytes, count, _, first, data = struct.unpack("<6I", os.pread(self._stats, 24, 0))
        places = {}
        for i in range(count):
            entry = os.pread(self._stats, 16 + name_bytes, first + i * (16 + name_bytes))
            places[entry[16:].split(b"\0")[0].decode()] = data + struct.unpack_from("<I", entry, 8)[0]
        return places

    def _count(self, name: str) -> int:
        return int(struct.unpack("<Q", os.pread(self._stats, 8, self._places[name]))[0]) if name in self._places else 0

    def run(self, code: int, times: int) -> dict[str, int]:
        """One loop of the guest: ns of CPU time, exits and faults, those of the way out included."""
        before = {name: self._count(name) for name in ("exits", "pf_taken")}
        registers = [0] * 18  # rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 ... r15, rip, rflags
        registers[3:6] = EVERY, DATA, NOWHERE
        registers[8], registers[16], registers[17] = times, code, 2
        fcntl.ioctl(self._vcpu, SET_REGS, struct.pack("<18Q", *registers))
        start = time.thread_time_ns()
        run_until_exit(self._vcpu)
        ns = time.thread_time_ns() - start
        reason = struct.unpack_from("<I", self._run, EXIT_REASON_AT)[0]
        address = struct.unpack_from("<Q", self._run, MMIO_ADDRESS_AT)[0]
        if (reason, address) != (EXIT_MMIO, NOWHERE):
            raise GuestError(f"the guest ended with exit reason {reason}")
        return {"ns": ns, **{name: self._count(name) - old for name, old in before.items()}}


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


if __name__ == "__main__":
    try:
        print(json.dumps(measure(int(sys.argv[1]))))
    except (OSError, GuestError) as error:
        print(json.dumps({"unavailable": f"no guest through /dev/kvm: {getattr(error, 'strerror', None) or error}"}))
