"""Probes of host memory: faults of 4K and 2M pages, clearing, copying, and what takes memory away."""

import mmap
from collections.abc import Mapping
from functools import partial

from kernels.spec import PMD_BYTES
from sweep.measure.figures import Quantity
from sweep.measure.loops import PAGE, advise_each, call_each, clear_each, copy_each
from sweep.measure.machine import free_hugetlb_pages, thp_enabled, vm_counter
from sweep.measure.region import COLLAPSE, HUGETLB, POPULATE_READ, POPULATE_WRITE, SHARED, Region, expect, ns_per_fault, timed
from sweep.measure.sampling import Probe, UnavailableError
from sweep.provenance import thp_state

CALLS = 2000  # of a system call in one run
FAULT_AROUND = 16  # pages that one fault maps from the page cache (fault_around_bytes is 64 KiB)

Found = Mapping[Quantity, float]


def small_pages(size: int) -> Found:
    """Zero page, copy on write of it, dropping, allocation: 4K pages of private memory."""
    pages = size // PAGE
    with Region(size, mmap.MADV_NOHUGEPAGE) as region:
        region.recycle()
        zero = region.ns_per_fault(POPULATE_READ, pages)
        cow = region.ns_per_fault(POPULATE_WRITE, pages)
        zap, empty = region.advise(mmap.MADV_DONTNEED), region.advise(mmap.MADV_DONTNEED)
        anon = region.ns_per_fault(POPULATE_WRITE, pages)
    dropped = (zap.ns - empty.ns) / pages
    return {Quantity.ZERO_FAULT: zero, Quantity.COW_FAULT: cow, Quantity.ZAP: dropped, Quantity.ANON_FAULT: anon}


def user_faults(size: int) -> Found:
    """The least that a program's own access pays for a minor fault."""
    with Region(size, mmap.MADV_NOHUGEPAGE) as region:
        return {Quantity.USER_FAULT: ns_per_fault(region.load(), region.load(), size // PAGE)}


def shared_pages(size: int) -> Found:
    """Shared memory: allocation, and mapping what is in the page cache."""
    with Region(size, mmap.MADV_NOHUGEPAGE, SHARED) as region:
        fresh = region.ns_per_fault(POPULATE_WRITE, size // PAGE)
        region.advise(mmap.MADV_DONTNEED)  # the page cache keeps the pages
        mapped, again = (region.advise_each(POPULATE_READ, 0, FAULT_AROUND * PAGE) for _ in range(2))
    return {Quantity.SHMEM_FAULT: fresh, Quantity.FILE_FAULT: ns_per_fault(mapped, again, size // PAGE // FAULT_AROUND)}


def system_calls(size: int) -> Found:
    """What is in every call: a walk to a page that is there, and a madvise() with nothing to do."""
    with Region(size, mmap.MADV_NOHUGEPAGE) as region:
        bare = timed(call_each, CALLS)
        empty = timed(advise_each, region.address, PAGE, 0, CALLS, mmap.MADV_DONTNEED)
        region.load()
        walk = timed(advise_each, region.address, PAGE, 0, CALLS, POPULATE_READ)
        expect(walk.faults, 0, "minor faults of memory that is there")
    return {Quantity.WALK: (walk.ns - bare.ns) / CALLS, Quantity.EMPTY_ADVICE: empty.ns / CALLS}


def need_thp(zero_page: bool) -> None:
    """Raises UnavailableError where huge pages are off."""
    if thp_enabled() in ("never", ""):
        raise UnavailableError("transparent huge pages are off")
    if zero_page and thp_state().get("use_zero_page") != "1":
        raise UnavailableError("the huge zero page is off (use_zero_page)")


def huge_pages(size: int) -> Found:
    """A THP for a write to nothing."""
    need_thp(zero_page=False)
    with Region(size, mmap.MADV_HUGEPAGE) as region:
        region.recycle()
        fresh = region.ns_per_fault(POPULATE_WRITE, size // PMD_BYTES)
        region.expect_huge(size)
        return {Quantity.THP_FAULT: fresh}


def huge_zero_pages(size: int) -> Found:
    """The huge zero page: mapping it, and splitting it by dropping a page of it."""
    need_thp(zero_page=True)
    regions = size // PMD_BYTES
    with Region(size, mmap.MADV_HUGEPAGE) as region:
        region.recycle()
        mapped = region.ns_per_fault(POPULATE_READ, regions)
        region.expect_huge(0)
        splits = vm_counter("thp_split_pmd")
        split, whole = region.advise_each(mmap.MADV_DONTNEED, 0, PMD_BYTES), region.advise_each(mmap.MADV_DONTNEED, PAGE, PMD_BYTES)
        splits = vm_counter("thp_split_pmd") - splits
        expect(min(splits, regions), regions, "splits of a PMD")  # others may split too
    return {Quantity.HUGE_ZERO_FAULT: mapped, Quantity.SPLIT: (split.ns - whole.ns) / regions}


def huge_zero_writes(size: int) -> Found:
    """A write to the huge zero page, where that gives a THP (6.13 on), beside those to nothing before and after it."""
    need_thp(zero_page=True)
    regions = size // PMD_BYTES
    with Region(size, mmap.MADV_HUGEPAGE) as region:
        region.recycle()
        before = region.ns_per_fault(POPULATE_WRITE, regions)
        region.advise(mmap.MADV_DONTNEED)
        region.advise(POPULATE_READ)
        write = region.ns_per_fault(POPULATE_WRITE, regions)
        region.expect_huge(size)
        region.advise(mmap.MADV_DONTNEED)
        after = region.ns_per_fault(POPULATE_WRITE, regions)
    return {Quantity.HUGE_ZERO_WRITE: write - (before + after) / 2}


def collapses(size: int) -> Found:
    """512 small pages become a THP."""
    with Region(size, mmap.MADV_NOHUGEPAGE) as region:
        region.advise(POPULATE_WRITE)
        region.advise(mmap.MADV_HUGEPAGE)  # MADV_COLLAPSE refuses memory that wants no huge pages
        region.expect_huge(0)
        took = region.advise(COLLAPSE)
        region.expect_huge(size)
        return {Quantity.COLLAPSE: took.ns * PMD_BYTES / size}


def hugetlb_pages(size: int) -> Found:
    """A page of the pool for a write to nothing."""
    size = min(size, free_hugetlb_pages() * PMD_BYTES)
    if not size:
        raise UnavailableError("the pool has no free 2 MiB page (vm.nr_hugepages)")
    with Region(size, None, HUGETLB) as region:
        fresh, again = region.advise(POPULATE_WRITE), region.advise(POPULATE_WRITE)
        expect(region.kilobytes("Private_Hugetlb"), size >> 10, "kB of hugetlb")  # such faults are no minor faults before 6.6
        return {Quantity.HUGETLB_FAULT: (fresh.ns - again.ns) * PMD_BYTES / size}


def clearing_and_copying(size: int) -> Found:
    """By libc, page by page, in memory that has huge pages if it can, as the kernel's own map of it does."""
    advice = mmap.MADV_NOHUGEPAGE if thp_enabled() in ("never", "") else mmap.MADV_HUGEPAGE
    pages = size // PAGE
    with Region(size, advice) as to, Region(size, advice) as source:
        to.advise(POPULATE_WRITE)
        source.advise(POPULATE_WRITE)
        cleared = timed(clear_each, to.address, PAGE, pages)
        copied = timed(copy_each, to.address, source.address, PAGE, pages)
        expect(cleared.faults + copied.faults, 0, "minor faults of memory that is there")
    return {Quantity.CLEAR: cleared.ns / pages, Quantity.COPY: copied.ns / pages}


def memory_probes(size: int) -> list[Probe]:
    """All of them; each maps at most three times `size` bytes (a multiple of 2 MiB)."""
    kinds = {
        small_pages: (Quantity.ZERO_FAULT, Quantity.COW_FAULT, Quantity.ZAP, Quantity.ANON_FAULT),
        user_faults: (Quantity.USER_FAULT,),
        shared_pages: (Quantity.SHMEM_FAULT, Quantity.FILE_FAULT),
        system_calls: (Quantity.WALK, Quantity.EMPTY_ADVICE),
        huge_pages: (Quantity.THP_FAULT,),
        huge_zero_pages: (Quantity.HUGE_ZERO_FAULT, Quantity.SPLIT),
        huge_zero_writes: (Quantity.HUGE_ZERO_WRITE,),
        collapses: (Quantity.COLLAPSE,),
        hugetlb_pages: (Quantity.HUGETLB_FAULT,),
        clearing_and_copying: (Quantity.CLEAR, Quantity.COPY),
    }
    return [Probe(quantities, partial(probe, size)) for probe, quantities in kinds.items()]
