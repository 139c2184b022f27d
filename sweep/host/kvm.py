"""A guest through /dev/kvm with the standard library alone: ioctls, shared memory, a loop at CPL 3 over its own page tables.

The guest is that of `litmus.c`: it takes entries of a list (a guest address, bit 0 set for a store), accesses them, and ends
with a store to an address without a memslot."""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sweep.host.counters import minor_faults
from sweep.host.mapping import HUGE_2M, PAGE, Vma, shared_memory

KVM = Path("/dev/kvm")


def _io(number: int) -> int:
    return 0xAE << 8 | number


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _io(number)


READ, WRITE = 2, 1
KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_SET_TSS_ADDR, KVM_RUN = _io(1), _io(4), _io(0x41), _io(0x47), _io(0x80)
KVM_GET_STATS_FD = _io(0xCE)
KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2 = _ioc(READ | WRITE, 5, 8), _ioc(WRITE, 0x90, 8)
KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG = _ioc(WRITE, 0x46, 32), _ioc(WRITE, 0x42, 16)
REGS_BYTES, SREGS_BYTES = 144, 312
KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = _ioc(WRITE, 0x82, REGS_BYTES), _ioc(READ, 0x83, SREGS_BYTES), _ioc(WRITE, 0x84, SREGS_BYTES)
KVM_PRE_FAULT_MEMORY = _ioc(READ | WRITE, 0xD5, 64)
KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_EXIT_MMIO = 6
CPUID_ENTRIES, CPUID_ENTRY_BYTES = 256, 40
IMMEDIATE_EXIT_AT, EXIT_REASON_AT, MMIO_ADDRESS_AT = 1, 8, 32  # offsets in struct kvm_run

GPA_LOW, GPA_LISTS, GPA_TSS, GPA_DATA, GPA_NOWHERE = 0, 0x20000000, 0x3FF00000, 0x40000000, 0xD0000000
SLOT_LOW, SLOT_LISTS, SLOT_DATA = range(3)
PML4_AT, PDPT_AT, PD_AT, LOW_PAGES = 8, 9, 10, 16  # page 0: code, out of reach of a prefetch of 8 neighbours
PRESENT_RW_US_A, DIRTY, LEAF = 0x27, 0x40, 0x80
CODE = bytes.fromhex(
    "4885c9 7412"  # 00: test rcx, rcx; jz 17
    "48ad a801 7504"  # 05: lodsq; test al, 1; jnz 0f
    "8a18 eb03"  # 0b: mov bl, [rax]; jmp 12
    "8858ff"  # 0f: mov [rax - 1], bl
    "48ffc9 ebe9"  # 12: dec rcx; jmp 00
    "881f ebfc"  # 17: mov [rdi], bl; jmp 17
)
CR0, CR4, EFER = 0x80050033, 0x20, 0x500
VCPU_STATS = ("pf_taken", "pf_fixed", "pf_spurious", "pf_fast", "pf_emulate", "exits")
VM_STATS = ("remote_tlb_flush", "remote_tlb_flush_requests", "pages_4k", "pages_2m", "pages_1g")
STATS_HEADER, STATS_DESCRIPTOR = struct.Struct("6I"), struct.Struct("I h H I I")
BARRIER_SECONDS = 60


def mmu_of(parameters: Path = Path("/sys/module")) -> str:
    """tdp, legacy or shadow, by the parameters of KVM's modules."""

    def is_on(name: str) -> bool:
        try:
            return (parameters / name).read_text().strip() in ("Y", "1")
        except OSError:
            return False

    if not (is_on("kvm_intel/parameters/ept") or is_on("kvm_amd/parameters/npt")):
        return "shadow"
    return "tdp" if is_on("kvm/parameters/tdp_mmu") else "legacy"


class Stats:
    """The binary statistics of a VM or vCPU (KVM_GET_STATS_FD): values by name."""

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


def _segment(selector: int, kind: int, long: int) -> bytes:
    """struct kvm_segment: flat, present, CPL 3."""
    return struct.pack("QIH10B", 0, 0xFFFFFFFF, selector, kind, 1, 3, 1 - long, 1, long, 1, 0, 0, 0)


@dataclass
class Vcpu:
    """A vCPU and the thread that runs it."""

    fd: int
    run: mmap.mmap
    stats: Stats
    list_gpa: int
    entries: int = 0
    faults: int = 0
    error: str = ""
    thread: threading.Thread | None = None


@dataclass
class Guest:
    """A VM over a mapping: lists in, runs, statistics out. Raises OSError, RuntimeError."""

    vma: Vma
    vcpus: int
    small_guest_pages: bool
    tables_too: bool  # nested paging: the tables themselves are mapped before anything is counted
    threads: list[Vcpu] = field(default_factory=list)
    logging: bool = False

    def __post_init__(self) -> None:
        self.kvm = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
        self.vm = fcntl.ioctl(self.kvm, KVM_CREATE_VM, 0)
        try:
            fcntl.ioctl(self.vm, KVM_SET_TSS_ADDR, GPA_TSS)  # Intel wants it
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENXIO, errno.ENOTTY):
                raise
        tables = -(-self.vma.pages // 512) if self.small_guest_pages else 0
        self.low_bytes = (LOW_PAGES + tables) * PAGE
        self.capacity = (2 * self.vma.pages + 4096) // 512 * 512
        self.lists_bytes = self.vcpus * self.capacity * 8
        self.low, self.lists = shared_memory(self.low_bytes), shared_memory(self.lists_bytes)
        self._build_tables()
        self._set_slot(SLOT_LOW, GPA_LOW, self.low, self.low_bytes)
        self._set_slot(SLOT_LISTS, GPA_LISTS, self.lists, self.lists_bytes)
        self._set_slot(SLOT_DATA, GPA_DATA, self.vma.data, self.vma.pages * PAGE)
        self.stats = Stats(self.vm, VM_STATS)
        self.begin, self.end = threading.Barrier(self.vcpus + 1), threading.Barrier(self.vcpus + 1)
        self.threads = [self._make_vcpu(number) for number in range(self.vcpus)]
        self.warm_up()
        self.warm_up()

    def _set_slot(self, slot: int, gpa: int, address: int, size: int, flags: int = 0) -> None:
        fcntl.ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, struct.pack("IIQQQ", slot, flags, gpa, size, address))

    def _build_tables(self) -> None:
        ctypes.memmove(self.low, CODE, len(CODE))
        self._entry(PML4_AT, 0, PDPT_AT * PAGE + PRESENT_RW_US_A)
        for i in range(4 * 512):
            self._entry(PDPT_AT, i // 512, (PD_AT + i // 512) * PAGE + PRESENT_RW_US_A)
            self._entry(PD_AT + i // 512, i % 512, i * HUGE_2M + PRESENT_RW_US_A + DIRTY + LEAF)
        for part in range(self.low_bytes // PAGE - LOW_PAGES):
            at = GPA_DATA // HUGE_2M + part
            self._entry(PD_AT + at // 512, at % 512, (LOW_PAGES + part) * PAGE + PRESENT_RW_US_A)
            for entry in range(512):
                self._entry(LOW_PAGES + part, entry, GPA_DATA + part * HUGE_2M + entry * PAGE + PRESENT_RW_US_A + DIRTY)

    def _entry(self, page: int, index: int, value: int) -> None:
        ctypes.c_uint64.from_address(self.low + page * PAGE + index * 8).value = value

    def _make_vcpu(self, number: int) -> Vcpu:
        fd = fcntl.ioctl(self.vm, KVM_CREATE_VCPU, number)
        run = mmap.mmap(fd, fcntl.ioctl(self.kvm, KVM_GET_VCPU_MMAP_SIZE))
        cpuid = bytearray(struct.pack("II", CPUID_ENTRIES, 0) + bytes(CPUID_ENTRIES * CPUID_ENTRY_BYTES))
        fcntl.ioctl(self.kvm, KVM_GET_SUPPORTED_CPUID, cpuid)
        fcntl.ioctl(fd, KVM_SET_CPUID2, cpuid)
        sregs = bytearray(SREGS_BYTES)
        fcntl.ioctl(fd, KVM_GET_SREGS, sregs)
        sregs[0 : 6 * 24] = _segment(0x1B, 11, 1) + 5 * _segment(0x23, 3, 0)  # cs, ds, es, fs, gs, ss
        struct.pack_into("5Q", sregs, 8 * 24 + 2 * 16, CR0, 0, PML4_AT * PAGE, CR4, 0)
        struct.pack_into("Q", sregs, 8 * 24 + 2 * 16 + 5 * 8, EFER)
        fcntl.ioctl(fd, KVM_SET_SREGS, sregs)
        vcpu = Vcpu(fd, run, Stats(fd, VCPU_STATS), GPA_LISTS + number * self.capacity * 8)
        vcpu.thread = threading.Thread(target=self._serve, args=(vcpu,), daemon=True)
        vcpu.thread.start()
        return vcpu

    def _serve(self, vcpu: Vcpu) -> None:
        while True:
            self.begin.wait()
            try:
                self._run(vcpu)
            except (OSError, RuntimeError) as error:
                vcpu.error = str(error)
            self.end.wait()

    def _run(self, vcpu: Vcpu) -> None:
        registers = bytearray(REGS_BYTES)  # rax rbx rcx rdx rsi rdi rsp rbp r8 ... r15 rip rflags
        struct.pack_into("6Q", registers, 0, 0, 0, vcpu.entries, 0, vcpu.list_gpa, GPA_NOWHERE)
        struct.pack_into("2Q", registers, 16 * 8, GPA_LOW, 2)
        fcntl.ioctl(vcpu.fd, KVM_SET_REGS, registers)
        before = minor_faults()
        while not _ran(vcpu.fd):
            pass
        vcpu.faults = minor_faults() - before
        reason, address = struct.unpack_from("I", vcpu.run, EXIT_REASON_AT)[0], struct.unpack_from("Q", vcpu.run, MMIO_ADDRESS_AT)[0]
        if (reason, address) != (KVM_EXIT_MMIO, GPA_NOWHERE):
            raise RuntimeError(f"the guest left with reason {reason}")
        vcpu.run[IMMEDIATE_EXIT_AT] = 1  # completes the store
        _ran(vcpu.fd)
        vcpu.run[IMMEDIATE_EXIT_AT] = 0

    def run(self) -> None:
        """All vCPUs at once, each its list. Raises RuntimeError."""
        self.begin.wait(BARRIER_SECONDS)
        self.end.wait(BARRIER_SECONDS)
        wrong = next((vcpu.error for vcpu in self.threads if vcpu.error), "")
        if wrong:
            raise RuntimeError(wrong)

    def load(self, lists: Mapping[int, Iterable[tuple[int, bool]]]) -> None:
        """Write the vCPUs' lists of (page, write). Raises RuntimeError for one that is too long."""
        for number, vcpu in enumerate(self.threads):
            self._write_list(number, vcpu, (GPA_DATA + page * PAGE + write for page, write in lists.get(number, ())))

    def _write_list(self, number: int, vcpu: Vcpu, entries: Iterable[int]) -> None:
        packed = b"".join(struct.pack("Q", entry) for entry in entries)
        if len(packed) > self.capacity * 8:
            raise RuntimeError(f"a list of more than {self.capacity} accesses")
        ctypes.memmove(self.lists + number * self.capacity * 8, packed, len(packed))
        vcpu.entries = len(packed) // 8

    def warm_up(self) -> None:
        """Code, tables and lists are mapped again, threads' memory is their own again; nothing of the data is touched."""
        low = self.low_bytes if self.tables_too else PAGE
        pages = [*range(GPA_LOW, GPA_LOW + low, PAGE), *range(GPA_LISTS, GPA_LISTS + self.lists_bytes, PAGE)]
        for number, vcpu in enumerate(self.threads):
            self._write_list(number, vcpu, pages)
        self.run()
        self.load({})
        self.run()

    def counts(self) -> dict[str, int]:
        """Statistics of the VM, and the sums of the vCPUs'."""
        found = self.stats.read()
        for vcpu in self.threads:
            for name, value in vcpu.stats.read().items():
                found[name] = found.get(name, 0) + value
        return found

    def set_logging(self, on: bool) -> None:
        self._set_slot(SLOT_DATA, GPA_DATA, self.vma.data, self.vma.pages * PAGE, KVM_MEM_LOG_DIRTY_PAGES if on else 0)

    def dirty_log(self) -> Callable[[], object]:
        """A call that does KVM_GET_DIRTY_LOG; its buffer is there before."""
        bitmap = ctypes.create_string_buffer(-(-self.vma.pages // 64) * 8)
        request = struct.pack("IIQ", SLOT_DATA, 0, ctypes.addressof(bitmap))
        return lambda: (fcntl.ioctl(self.vm, KVM_GET_DIRTY_LOG, request), bitmap)

    def pre_fault(self) -> None:
        """KVM_PRE_FAULT_MEMORY over the slot."""
        request = bytearray(struct.pack("8Q", GPA_DATA, self.vma.pages * PAGE, 0, 0, 0, 0, 0, 0))
        while struct.unpack_from("Q", request, 8)[0]:
            fcntl.ioctl(self.threads[0].fd, KVM_PRE_FAULT_MEMORY, request)


def _ran(fd: int) -> bool:
    """KVM_RUN once; False if a signal came in between."""
    try:
        fcntl.ioctl(fd, KVM_RUN, 0)
    except InterruptedError:
        return False
    return True
