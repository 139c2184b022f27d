"""What a live kernel counts for this process: faults of a thread, its mappings, huge pages, tracepoints. Standard library only."""

import ctypes
import fcntl
import os
import re
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

from sweep.host.mapping import Vma

VMSTAT = ("thp_fault_alloc", "thp_fault_fallback", "thp_split_pmd", "thp_collapse_alloc")
SMAPS = {"Rss": "rss", "AnonHugePages": "anon_huge", "Private_Hugetlb": "private_hugetlb", "Shared_Hugetlb": "shared_hugetlb"}
PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
PAGE_IS_PRESENT, PAGE_IS_PFNZERO, PAGE_IS_HUGE = 1 << 3, 1 << 5, 1 << 6
SCAN_REGIONS = 512
PERF_TYPE_TRACEPOINT, PERF_ATTR_BYTES, PERF_INHERIT, PERF_FLAG_FD_CLOEXEC = 2, 64, 1 << 1, 8
PERF_EVENT_IOC_SET_FILTER = 0x40082406
SYS_PERF_EVENT_OPEN = 298
EVENTS = {"invalidate_range_start": "kvm_unmap_hva_range", "change_pte": "kvm_set_spte_hva"}
TRACING = Path("/sys/kernel/tracing/events/kvm")


def minor_faults() -> int:
    """Minor faults of the calling thread."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def vmstat() -> dict[str, int]:
    """The machine's THP counters: other processes count there, too."""
    rows = (row.split() for row in Path("/proc/vmstat").read_text().splitlines())
    return {name: int(value) for name, value in rows if name in VMSTAT}


def smaps(vma: Vma) -> dict[str, int]:
    """Bytes of the mapping by kind."""
    found = dict.fromkeys(SMAPS.values(), 0)
    ours = False
    for row in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", row)
        if bounds:
            ours = int(bounds[1], 16) < vma.start + vma.size and int(bounds[2], 16) > vma.start
            continue
        key, _, value = row.partition(":")
        if ours and key in SMAPS:
            found[SMAPS[key]] += int(value.split()[0]) << 10
    return found


def scan(vma: Vma) -> dict[str, int]:
    """Bytes of the mapping that are present and no zero page, and those of them under a huge entry, by PAGEMAP_SCAN (6.7)."""
    regions = bytearray(24 * SCAN_REGIONS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(regions))
    start, end = vma.start, vma.start + vma.size
    found = {"pagemap_rss_bytes": 0, "pagemap_huge_bytes": 0}
    wanted = PAGE_IS_PRESENT | PAGE_IS_PFNZERO | PAGE_IS_HUGE
    with Path("/proc/self/pagemap").open("rb") as file:
        while start < end:
            argument = bytearray(struct.pack("12Q", 96, 0, start, end, 0, address, SCAN_REGIONS, 0, 0, PAGE_IS_PRESENT, 0, wanted))
            try:
                count = fcntl.ioctl(file, PAGEMAP_SCAN, argument)
            except OSError:
                return {}
            for first, last, categories in struct.iter_unpack("3Q", memoryview(regions)[: 24 * count]):
                size = 0 if categories & PAGE_IS_PFNZERO else last - first
                found["pagemap_rss_bytes"] += size
                found["pagemap_huge_bytes"] += size if categories & PAGE_IS_HUGE else 0
            start = struct.unpack_from("Q", argument, 32)[0]
    return found


def open_tracepoints(vma: Vma) -> dict[str, int]:
    """Counter -> descriptor of KVM's notifier tracepoints over the slot; empty where tracefs or rights are missing."""
    low, high = vma.data, vma.at(vma.pages)
    filters = {"invalidate_range_start": f"start < {high} && end > {low}", "change_pte": f"hva < {high} && hva >= {low}"}
    found = {}
    for name, event in EVENTS.items():
        try:
            number = int((TRACING / event / "id").read_text())
        except (OSError, ValueError):
            continue
        attributes = struct.pack("IIQQQQQ", PERF_TYPE_TRACEPOINT, PERF_ATTR_BYTES, number, 0, 0, 0, PERF_INHERIT).ljust(
            PERF_ATTR_BYTES, b"\0"
        )
        fd = ctypes.CDLL(None).syscall(SYS_PERF_EVENT_OPEN, attributes, 0, -1, -1, PERF_FLAG_FD_CLOEXEC)
        if fd < 0:
            continue
        fcntl.ioctl(fd, PERF_EVENT_IOC_SET_FILTER, filters[name].encode() + b"\0")
        found[name] = fd
    return found


def read_tracepoints(opened: dict[str, int]) -> Iterator[tuple[str, int]]:
    """(counter, value) of each."""
    for name, fd in opened.items():
        yield name, struct.unpack("Q", os.read(fd, 8))[0]
