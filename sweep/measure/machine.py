"""The machine that is measured: its CPUs, settings and counters, read and never changed."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sweep.provenance import THP, cpu_model, thp_state

CPUS = Path("/sys/devices/system/cpu")
MODULES = Path("/sys/module")
HUGETLB = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def read_text(path: Path) -> str:
    """The file's text, '' where it cannot be read."""
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def chosen(path: Path) -> str:
    """The word in brackets of a setting like 'always [madvise] never'; '' if there is none."""
    return read_text(path).partition("[")[2].partition("]")[0]


def thp_enabled() -> str:
    return chosen(THP / "enabled")


def free_hugetlb_pages() -> int:
    """2 MiB pages of the pool that nobody has or was promised."""
    free, reserved = (read_text(HUGETLB / name) or "0" for name in ("free_hugepages", "resv_hugepages"))
    return max(int(free) - int(reserved), 0)


def vm_counter(name: str) -> int:
    """A counter of /proc/vmstat, of the whole machine; 0 if the kernel has none of that name."""
    for line in read_text(Path("/proc/vmstat")).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def shootdowns() -> int | None:
    """TLB shootdown interrupts so far, all CPUs together; None where they are not told."""
    for line in read_text(Path("/proc/interrupts")).splitlines():
        words = line.split()
        if words[:1] == ["TLB:"]:
            return sum(int(word) for word in words[1:] if word.isdigit())
    return None


def cpus() -> list[int]:
    """CPUs that this process may use: one of each core first, from the last one down, since the first takes most interrupts."""
    allowed = sorted(os.sched_getaffinity(0), reverse=True)
    seen: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for cpu in allowed:
        core = read_text(CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)
        (second if core in seen else first).append(cpu)
        seen.add(core)
    return first + second


@contextmanager
def pinned(cpu: int) -> Iterator[bool]:
    """The calling thread on one CPU, for a while; yields whether that was allowed."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)


def is_virtual() -> bool:
    """The CPU says that a hypervisor runs it."""
    flags = next((line for line in read_text(Path("/proc/cpuinfo")).splitlines() if line.startswith(("flags", "Features"))), "")
    return "hypervisor" in flags.split()


def kvm_mmu() -> str:
    """How KVM maps guests here, by the parameters of its modules: a fault of a guest costs accordingly."""
    if not Path("/dev/kvm").exists():
        return "no KVM"
    nested = {"EPT": MODULES / "kvm_intel/parameters/ept", "NPT": MODULES / "kvm_amd/parameters/npt"}
    return f"KVM with {next((name for name, path in nested.items() if read_text(path) in ('Y', '1')), 'shadow paging')}"


def description() -> str:
    """CPU, kernel, KVM, settings of huge pages, virtual or not; no name of the machine."""
    kind = "virtual machine" if is_virtual() else "no virtual machine"
    settings = [f"THP {name} {chosen(THP / name) or value}" for name, value in thp_state().items()]
    count = len(os.sched_getaffinity(0))
    return ", ".join([cpu_model() or platform.machine(), f"{count} CPUs", f"Linux {platform.release()}", kind, kvm_mmu(), *settings])
