"""What any guest through /dev/kvm takes, with the standard library alone: ioctls, a VM, a vCPU in long mode at CPL 3, statistics."""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

KVM = Path("/dev/kvm")


def _io(number: int) -> int:
    return 0xAE << 8 | number


def ioc(direction: int, number: int, size: int) -> int:
    """The number of an ioctl of KVM that passes `size` bytes (linux/kvm.h)."""
    return direction << 30 | size << 16 | _io(number)


READ, WRITE = 2, 1
KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_SET_TSS_ADDR, KVM_RUN = _io(1), _io(4), _io(0x41), _io(0x47), _io(0x80)
KVM_GET_STATS_FD = _io(0xCE)
KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2 = ioc(READ | WRITE, 5, 8), ioc(WRITE, 0x90, 8)
KVM_SET_USER_MEMORY_REGION = ioc(WRITE, 0x46, 32)
REGISTERS = struct.Struct("18Q")  # rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 ... r15, rip, rflags
SREGS_BYTES = 312
KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = ioc(WRITE, 0x82, REGISTERS.size), ioc(READ, 0x83, SREGS_BYTES), ioc(WRITE, 0x84, SREGS_BYTES)
KVM_EXIT_MMIO = 6
CPUID_ENTRIES, CPUID_ENTRY_BYTES = 256, 40
EXIT_REASON_AT, MMIO_ADDRESS_AT = 8, 32  # offsets in struct kvm_run
SEGMENT, CONTROL_AT = struct.Struct("QIH10B"), 224  # of struct kvm_sregs; the control registers' place in it
CR0, CR4, EFER = 0x80050033, 0x20, 0x500  # paging, PAE, long mode
PRESENT_RW_US_A, DIRTY, LEAF = 0x27, 0x40, 0x80  # of the guest's page tables

TSS_AT, NOWHERE = 0x3FF00000, 0xD0000000  # guest-physical: Intel's TSS; no memslot, a store there ends a run
STATS_HEADER, STATS_DESCRIPTOR = struct.Struct("6I"), struct.Struct("I h H I I")


class Stats:
    """The binary statistics of a VM or vCPU (KVM_GET_STATS_FD): values by name; those that this kernel does not have are missing."""

    def __init__(self, owner: int, names: Sequence[str]) -> None:
        self.fd = fcntl.ioctl(owner, KVM_GET_STATS_FD)
        _, name_size, count, _, at, data_at = STATS_HEADER.unpack(os.pread(self.fd, STATS_HEADER.size, 0))
        size = STATS_DESCRIPTOR.size + name_size
        raw = os.pread(self.fd, size * count, at)
        self.at: dict[str, int] = {}
        for start in range(0, len(raw), size):
            _, _, _, offset, _ = STATS_DESCRIPTOR.unpack_from(raw, start)
            name = raw[start + STATS_DESCRIPTOR.size : start + size].split(b"\0")[0].decode()
            if name in names:
                self.at[name] = data_at + offset

    def read(self) -> dict[str, int]:
        return {name: struct.unpack("Q", os.pread(self.fd, 8, at))[0] for name, at in self.at.items()}


def create_vm(kvm: int) -> int:
    """A VM's descriptor. Raises OSError."""
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    try:
        fcntl.ioctl(vm, KVM_SET_TSS_ADDR, TSS_AT)  # Intel wants it
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENXIO, errno.ENOTTY):
            raise
    return vm


def set_slot(vm: int, slot: int, gpa: int, address: int, size: int, flags: int = 0) -> None:
    """A memslot: `size` bytes of the host from `address` on are the guest's from `gpa` on. Raises OSError."""
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("IIQQQ", slot, flags, gpa, size, address))


def create_vcpu(kvm: int, vm: int, number: int, tables: int) -> tuple[int, mmap.mmap]:
    """(descriptor, struct kvm_run) of a vCPU in long mode at CPL 3; `tables`: guest-physical address of its PML4. Raises OSError."""
    fd = fcntl.ioctl(vm, KVM_CREATE_VCPU, number)
    run = mmap.mmap(fd, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))
    cpuid = bytearray(struct.pack("II", CPUID_ENTRIES, 0) + bytes(CPUID_ENTRIES * CPUID_ENTRY_BYTES))
    fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
    fcntl.ioctl(fd, KVM_SET_CPUID2, cpuid)
    sregs = bytearray(SREGS_BYTES)
    fcntl.ioctl(fd, KVM_GET_SREGS, sregs)
    sregs[: 6 * SEGMENT.size] = _segment(0x1B, 11, 1) + 5 * _segment(0x23, 3, 0)  # cs, ds, es, fs, gs, ss
    struct.pack_into("6Q", sregs, CONTROL_AT, CR0, 0, tables, CR4, 0, EFER)  # cr0, cr2, cr3, cr4, cr8, efer
    fcntl.ioctl(fd, KVM_SET_SREGS, sregs)
    return fd, run


def _segment(selector: int, kind: int, long: int) -> bytes:
    """struct kvm_segment: flat, present, CPL 3."""
    return SEGMENT.pack(0, 0xFFFFFFFF, selector, kind, 1, 3, 1 - long, 1, long, 1, 0, 0, 0)


def runs(fd: int) -> bool:
    """KVM_RUN once; False if a signal came in between. Raises OSError."""
    try:
        fcntl.ioctl(fd, KVM_RUN, 0)
    except InterruptedError:
        return False
    return True


def exit_fault(run: mmap.mmap) -> str:
    """'' if the guest left by the store that ends a run; else what it did instead."""
    reason, address = struct.unpack_from("I", run, EXIT_REASON_AT)[0], struct.unpack_from("Q", run, MMIO_ADDRESS_AT)[0]
    return "" if (reason, address) == (KVM_EXIT_MMIO, NOWHERE) else f"the guest left with reason {reason}"
