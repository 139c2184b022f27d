"""A guest through /dev/kvm with the standard library alone: ioctls, shared memory, a loop at CPL 3 over its own page tables.

The guest is that of `litmus.c`: it takes entries of a list (a guest address, bit 0 set for a store), accesses them, and ends
with a store to an address without a memslot."""

import ctypes
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sweep.host.counters import minor_faults
from sweep.host.mapping import HUGE_2M, PAGE, Vma, shared_memory
from sweep.kvm import (
    DIRTY,
    KVM,
    KVM_SET_REGS,
    LEAF,
    NOWHERE,
    PRESENT_RW_US_A,
    READ,
    REGISTERS,
    WRITE,
    Stats,
    create_vcpu,
    create_vm,
    exit_fault,
    ioc,
    runs,
    set_slot,
)

KVM_GET_DIRTY_LOG = ioc(WRITE, 0x42, 16)
KVM_PRE_FAULT_MEMORY = ioc(READ | WRITE, 0xD5, 64)
KVM_MEM_LOG_DIRTY_PAGES = 1
IMMEDIATE_EXIT_AT = 1  # in struct kvm_run

GPA_LOW, GPA_LISTS, GPA_DATA = 0, 0x20000000, 0x40000000
SLOT_LOW, SLOT_LISTS, SLOT_DATA = range(3)
PML4_AT, PDPT_AT, PD_AT, LOW_PAGES = 8, 9, 10, 16  # page 0: code, out of reach of a prefetch of 8 neighbours
CODE = bytes.fromhex(
    "4885c9 7412"  # 00: test rcx, rcx; jz 17
    "48ad a801 7504"  # 05: lodsq; test al, 1; jnz 0f
    "8a18 eb03"  # 0b: mov bl, [rax]; jmp 12
    "8858ff"  # 0f: mov [rax - 1], bl
    "48ffc9 ebe9"  # 12: dec rcx; jmp 00
    "881f ebfc"  # 17: mov [rdi], bl; jmp 17
)
VCPU_STATS = ("pf_taken", "pf_fixed", "pf_spurious", "pf_fast", "pf_emulate", "exits")
VM_STATS = ("remote_tlb_flush", "remote_tlb_flush_requests", "pages_4k", "pages_2m", "pages_1g")
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
        self.vm = create_vm(self.kvm)
        tables = -(-self.vma.pages // 512) if self.small_guest_pages else 0
        self.low_bytes = (LOW_PAGES + tables) * PAGE
        self.capacity = (2 * self.vma.pages + 4096) // 512 * 512
        self.lists_bytes = self.vcpus * self.capacity * 8
        self.low, self.lists = shared_memory(self.low_bytes), shared_memory(self.lists_bytes)
        self._build_tables()
        set_slot(self.vm, SLOT_LOW, GPA_LOW, self.low, self.low_bytes)
        set_slot(self.vm, SLOT_LISTS, GPA_LISTS, self.lists, self.lists_bytes)
        set_slot(self.vm, SLOT_DATA, GPA_DATA, self.vma.data, self.vma.pages * PAGE)
        self.stats = Stats(self.vm, VM_STATS)
        self.begin, self.end = threading.Barrier(self.vcpus + 1), threading.Barrier(self.vcpus + 1)
        self.threads = [self._make_vcpu(number) for number in range(self.vcpus)]
        self.warm_up()
        self.warm_up()

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
        fd, run = create_vcpu(self.kvm, self.vm, number, PML4_AT * PAGE)
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
        registers = [0] * 18
        registers[2], registers[4], registers[5] = vcpu.entries, vcpu.list_gpa, NOWHERE  # rcx, rsi, rdi
        registers[16:] = GPA_LOW, 2
        fcntl.ioctl(vcpu.fd, KVM_SET_REGS, REGISTERS.pack(*registers))
        before = minor_faults()
        while not runs(vcpu.fd):
            pass
        vcpu.faults = minor_faults() - before
        if fault := exit_fault(vcpu.run):
            raise RuntimeError(fault)
        vcpu.run[IMMEDIATE_EXIT_AT] = 1  # completes the store
        runs(vcpu.fd)
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
        set_slot(self.vm, SLOT_DATA, GPA_DATA, self.vma.data, self.vma.pages * PAGE, KVM_MEM_LOG_DIRTY_PAGES if on else 0)

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
