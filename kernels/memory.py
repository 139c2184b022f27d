"""Frames: who holds how much (docs/model.md section 8). The gauges must equal what the page tables say at any time."""

from kernels.jit import jit
from kernels.spec import PAGE_BYTES, PMD_BYTES, Gauge, HostPte, Vm
from kernels.state import Machine


@jit
def take_page(m: Machine) -> None:
    """A fresh anonymous page is mapped."""
    m.gauges[Gauge.HELD_BYTES] += PAGE_BYTES
    m.gauges[Gauge.RSS_BYTES] += PAGE_BYTES


@jit
def take_thp(m: Machine) -> None:
    """A fresh THP is mapped."""
    m.gauges[Gauge.HELD_BYTES] += PMD_BYTES
    m.gauges[Gauge.RSS_BYTES] += PMD_BYTES
    m.gauges[Gauge.ANON_HUGE_BYTES] += PMD_BYTES


@jit
def take_huge(m: Machine, nbytes: int) -> None:
    """A hugetlb page was copied: the old one is only the child's now."""
    m.gauges[Gauge.HELD_BYTES] += nbytes
    m.vm[Vm.CHILD_BYTES] += nbytes


@jit
def drop_frames(m: Machine, nbytes: int, shared: bool) -> None:
    """Frames are no longer ours: freed, or only the child's."""
    if shared and m.vm[Vm.CHILD]:
        m.vm[Vm.CHILD_BYTES] += nbytes
    else:
        m.gauges[Gauge.HELD_BYTES] -= nbytes


@jit
def drop_ksm(m: Machine) -> None:
    """One entry less maps a KSM page; the last one frees them."""
    m.vm[Vm.KSM_SHARERS] -= 1
    if m.vm[Vm.KSM_SHARERS] == 0:
        m.gauges[Gauge.HELD_BYTES] -= m.vm[Vm.KSM_FRAMES] * PAGE_BYTES
        m.vm[Vm.KSM_FRAMES] = 0


@jit
def drop_page(m: Machine, pte: int) -> None:
    """An entry of that kind (HostPte) goes. A page-cache page stays in the cache."""
    if HostPte.ANON_RW <= pte <= HostPte.FILE_RO:
        m.gauges[Gauge.RSS_BYTES] -= PAGE_BYTES
    if pte == HostPte.KSM_RO:
        drop_ksm(m)
    elif HostPte.ANON_RW <= pte <= HostPte.ANON_TSH:
        drop_frames(m, PAGE_BYTES, pte >= HostPte.ANON_SH)
