"""Faults as trace text, as the tools write it: what the examples are made with, and what the parser is tested against."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kernels.spec import PAGE_SHIFT, Phase, Spte, SptePmd, Trace
from kernels.state import Int64s
from sweep.replay.decode import Vendor
from sweep.replay.scan import FETCH, READ, WRITE

RIP = 0x7F08A4602116
FIRST_TID = 4145
ENTRIES_RIGHTS = 0x28  # readable, executable: what an exit qualification says of a read-only entry
WORDS: Mapping[int, str] = {READ: "read", WRITE: "write", FETCH: "fetch"}


class Fault(NamedTuple):
    """One kvm_page_fault, with its exit and entry."""

    ns: int
    vcpu: int
    gpa: int
    access: int  # scan.READ, WRITE, FETCH
    present: bool
    entry_ns: int  # of the kvm_entry behind it


@dataclass(frozen=True)
class Style:
    """How a trace is written. `old`: the older event, without vCPU, in bare hexadecimal, codes cut to 32 bits."""

    format: str  # a name of LINES
    vendor: Vendor = Vendor.INTEL
    old: bool = False
    pairs: bool = False  # kvm_exit and kvm_entry around each fault
    comm: str = "CPU {vcpu}/KVM"


def faults_of(trace: Int64s) -> list[Fault]:
    """The faults of a run that kept its events (Run.trace) and had guest steps only, in order of time."""
    entries: dict[int, int] = {}
    found: list[Fault] = []
    for row in reversed(trace.tolist()):
        time, actor = row[Trace.TIME], row[Trace.ACTOR]
        if row[Trace.PHASE] in (Phase.TOUCH, Phase.DONE):
            entries[actor] = time
        elif row[Trace.PHASE] == Phase.FAULT:
            leaf = SptePmd.N < row[Trace.SPTE_PMD] < SptePmd.T or row[Trace.SPTE] > Spte.N
            access = (READ, WRITE, FETCH)[row[Trace.WRITE]]
            found.append(Fault(time, actor, row[Trace.GFN] << PAGE_SHIFT, access, leaf, entries.get(actor, time)))
    return found[::-1]


def code_of(fault: Fault, vendor: Vendor) -> int:
    """The error code that such a fault has on such a host."""
    if vendor is Vendor.INTEL:
        return 0x180 | (1, 2, 4)[fault.access] | (ENTRIES_RIGHTS if fault.present else 0)
    code = fault.present | (0, 2, 16)[fault.access]
    return code | 4 | 1 << 32 if vendor is Vendor.AMD else code


def page_fault(fault: Fault, style: Style) -> str:
    """The event's fields, as TP_printk() of arch/x86/kvm/trace.h has them."""
    code = code_of(fault, style.vendor)
    if style.old:
        return f"address {fault.gpa:x} error_code {code & 0xFFFFFFFF:x}"
    if style.format == "bpftrace":
        return f"vcpu {fault.vcpu} address {fault.gpa:#x} error_code {code:#x}"
    return f"vcpu {fault.vcpu} rip {RIP:#x} address 0x{fault.gpa:016x} error_code {code:#x}"


def exit_fields(fault: Fault, style: Style) -> str:
    if style.format == "bpftrace":
        return f"vcpu {fault.vcpu}"
    reason = {Vendor.INTEL: "EPT_VIOLATION", Vendor.AMD: "npf"}.get(style.vendor, "EXCEPTION_NMI")
    if style.old:
        return f"reason {reason} rip {RIP:#x} info {code_of(fault, style.vendor):x} 0"
    info = f"info1 0x{code_of(fault, style.vendor):016x} info2 0x{0:016x} intr_info 0x{0:08x} error_code 0x{0:08x}"
    return f"vcpu {fault.vcpu} reason {reason} rip {RIP:#x} {info}"


def entry_fields(fault: Fault, style: Style) -> str:
    return f"vcpu {fault.vcpu}" if style.old or style.format == "bpftrace" else f"vcpu {fault.vcpu}, rip {RIP:#x}"


def seconds(ns: int, digits: int) -> str:
    """'86.581928' with so many digits behind the point, cut."""
    return f"{ns // 10**9:>5}.{ns % 10**9 // 10 ** (9 - digits):0{digits}d}"


def perf_line(ns: int, fault: Fault, event: str, fields: str, style: Style) -> str:
    name = f"{style.comm.format(vcpu=fault.vcpu):>16} {FIRST_TID + fault.vcpu:>7}"
    return f"{name} [{fault.vcpu % 1000:03d}] {seconds(ns, 9)}: {'kvm:' + event:>20}: {fields}"


def ftrace_line(ns: int, fault: Fault, event: str, fields: str, style: Style) -> str:
    name = f"{style.comm.format(vcpu=fault.vcpu):>16}-{FIRST_TID + fault.vcpu:<7}"
    return f"{name} [{fault.vcpu % 1000:03d}] {'....' if style.old else '.....'} {seconds(ns, 6)}: {event}: {fields}"


def trace_cmd_line(ns: int, fault: Fault, event: str, fields: str, style: Style) -> str:
    name = f"{style.comm.format(vcpu=fault.vcpu):>16}-{FIRST_TID + fault.vcpu:<5}"
    return f"{name} [{fault.vcpu % 1000:03d}] {seconds(ns, 9)}: {event + ':':<20} {fields}"


def bpftrace_line(ns: int, fault: Fault, event: str, fields: str, _style: Style) -> str:
    return f"{ns} {FIRST_TID + fault.vcpu} {event}: {fields}"


Line = Callable[[int, Fault, str, str, Style], str]
LINES: Mapping[str, Line] = {"perf": perf_line, "ftrace": ftrace_line, "trace-cmd": trace_cmd_line, "bpftrace": bpftrace_line}
HEADS: Mapping[str, str] = {
    "perf": "# ========\n# os release : 6.5.0\n# cpuid : {cpuid},6,143,8\n# ========\n#\n",
    "ftrace": "# tracer: nop\n#\n# entries-in-buffer/entries-written: {lines}/{lines}   #P:8\n#\n",
    "trace-cmd": "cpus=8\n",
    "bpftrace": "Attaching 3 probes...\n",
}
CPUIDS: Mapping[Vendor, str] = {Vendor.INTEL: "GenuineIntel", Vendor.AMD: "AuthenticAMD", Vendor.SHADOW: "GenuineIntel"}


def lines_of(faults: Iterable[Fault], style: Style) -> Iterator[str]:
    """The events in order of time, one line each."""
    line, events = LINES[style.format], []
    for fault in faults:
        if style.pairs:
            events.append((fault.ns, line(fault.ns, fault, "kvm_exit", exit_fields(fault, style), style)))
        events.append((fault.ns, line(fault.ns, fault, "kvm_page_fault", page_fault(fault, style), style)))
        if style.pairs:
            events.append((fault.entry_ns, line(fault.entry_ns, fault, "kvm_entry", entry_fields(fault, style), style)))
    return (text for _, text in sorted(events, key=lambda event: event[0]))


def text_of(faults: Iterable[Fault], style: Style) -> str:
    """A whole trace."""
    lines = list(lines_of(faults, style))
    head = HEADS[style.format].format(lines=len(lines), cpuid=CPUIDS[style.vendor])
    return head + "".join(f"{line}\n" for line in lines)


def csv_of(faults: Iterable[Fault]) -> str:
    """The same as a table, without what an entry allowed."""
    return "ns,vcpu,gpa,access\n" + "".join(f"{f.ns},{f.vcpu},{f.gpa:#x},{WORDS[f.access]}\n" for f in faults)
