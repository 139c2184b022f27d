"""khugepaged and KSM beside the actors of a step: mm/khugepaged.c and mm/ksm.c as endless generators.

A Rest is the time until the daemon's next look; everything else is the middle of an operation, which a step waits for.
"""

from collections.abc import Iterator
from functools import partial
from itertools import cycle

from kernels.cost import Cost
from kernels.policy import Behaviour
from kernels.reference_calls import can_merge, copy_into_thp, has_twin
from kernels.reference_host import PARTS, SPLIT_FOLIO, WHOLE
from kernels.reference_kvm import Kvm
from kernels.reference_tasks import Kernel, Path, Rest, Take, Task, Wait
from kernels.spec import MAX_PTES_SHARED, PAGE_BYTES, PMD_BYTES, PMD_PAGES, Actor, HostPmd, HostPte
from kernels.steps import Khugepaged, Ksm

NS_PER_MS = 1_000_000


def start_daemons(vm: Kvm, khuge: Khugepaged | None, ksm: Ksm | None) -> None:
    """Those that find anything to do in this VMA; the first look is one sleep after the start of the run."""
    if khuge is not None and vm.config.thp:
        vm.start_daemon(Actor.KHUGEPAGED, partial(khugepaged, vm, khuge), khuge.scan_sleep_ms * NS_PER_MS)
    if ksm is not None and vm.config.anonymous:
        vm.start_daemon(Actor.KSMD, partial(ksmd, vm, ksm), ksm.sleep_ms * NS_PER_MS)


# ---- khugepaged ------------------------------------------------------------------------------------------------------


def khugepaged(vm: Kvm, settings: Khugepaged, task: Task) -> Iterator[Wait]:
    """khugepaged_do_scan(), khugepaged_scan_mm_slot(): the VMA from where the last pass ended, its start once per pass."""
    region = 0
    while True:
        budget, heads, going = settings.pages_to_scan, int(region == 0), True
        while going:
            look, region = region, region + 1
            budget -= PMD_PAGES
            if region == vm.config.regions:
                region = 0
                heads += 1
            going = budget > 0 and heads < 2
            sleep_ns = 0 if going else settings.scan_sleep_ms * NS_PER_MS
            scan_ns = vm.costs[Cost.SCAN_PTE_NS] * (PMD_PAGES if vm.host.pmd(look) == HostPmd.TBL else 1)
            if can_collapse(vm, settings, look) and not vm.no_huge_page(look):
                vm.count["thp_collapse_alloc"] += 1
                yield Kernel(scan_ns + vm.costs[Cost.COLLAPSE_NS])
                yield from collapse_huge_page(vm, settings, task, look)
                scan_ns = 0
            yield Rest(scan_ns + sleep_ns)


def can_collapse(vm: Kvm, settings: Khugepaged, region: int) -> bool:
    """hpage_collapse_scan_pmd() with the limits of sysfs."""
    read_only = bool(vm.behaviour[Behaviour.COLLAPSE_READ_ONLY])
    return vm.host.can_collapse(region, settings.max_ptes_none, MAX_PTES_SHARED, read_only)


def collapse_huge_page(vm: Kvm, settings: Khugepaged, task: Task, region: int) -> Path[None]:
    """collapse_huge_page(), its THP allocated: the copy comes after the pair, under mmap_lock."""
    notifier, span = vm.costs[Cost.NOTIFIER_NS], vm.host.span(region)
    yield Take(vm.mmap_lock, write=True)
    if can_collapse(vm, settings, region):  # hugepage_vma_revalidate() and the scan once more
        yield Kernel(notifier)
        yield from vm.invalidate_range_start(task, span)
        vm.host.set_pmd(region, HostPmd.COLLAPSING)  # pmdp_collapse_flush()
        yield Kernel(notifier, vm.flush_tlb_mm(task))
        yield from vm.invalidate_range_end(task)
        copied = vm.host.to_copy(region) * PAGE_BYTES
        copy_ns = copy_into_thp(vm, region)
        yield Kernel(copy_ns, vm.move(task, PMD_BYTES + copied, copy_ns))  # copied bytes are read and written, the rest is cleared
        vm.host.collapse(region)
    vm.unlock(task, vm.mmap_lock)


# ---- KSM -------------------------------------------------------------------------------------------------------------


def ksmd(vm: Kvm, settings: Ksm, task: Task) -> Iterator[Wait]:
    """ksm_scan_thread(), ksm_do_scan()."""
    gfns = cycle(range(vm.config.pages))
    while True:
        for left in reversed(range(settings.pages_to_scan)):
            gfn = next(gfns)
            page = gfn + vm.config.shift
            scan_ns = vm.costs[Cost.SCAN_PTE_NS]
            sleep_ns = settings.sleep_ms * NS_PER_MS if left == 0 else 0
            if has_twin(gfn, settings.fraction) and can_merge(vm, page):
                yield Kernel(scan_ns + vm.costs[Cost.KSM_MERGE_NS])
                yield from merge_one_page(vm, task, page)
                scan_ns = 0
            yield Rest(scan_ns + sleep_ns)


def merge_one_page(vm: Kvm, task: Task, page: int) -> Path[None]:
    """try_to_merge_one_page(): pair by pair, each begun by what the one before left."""
    region = vm.host.region(page)
    if vm.host.pmd(region) in SPLIT_FOLIO:
        yield from split_folio(vm, task, region)
        yield Kernel(0)
        yield from remap_page(vm, task, region)
        yield Kernel(0)
    elif vm.host.pte(page) in PARTS:
        yield from unshare_folio(vm, task, region)
        yield Kernel(0)
    found = vm.host.pte(page)
    if found not in WHOLE:
        return
    left = yield from write_protect_page(vm, task, page, found)
    if left in WHOLE:
        yield Kernel(0)
        yield from replace_page(vm, task, page, left)


def split_folio(vm: Kvm, task: Task, region: int) -> Path[None]:
    """split_huge_page(): unmap_folio() splits the PMD."""
    notifier, flush_ns = vm.costs[Cost.NOTIFIER_NS], 0
    yield Kernel(notifier)
    yield from vm.invalidate_range_start(task, vm.host.span(region))
    if vm.host.pmd(region) in SPLIT_FOLIO:
        vm.host.split_folio(region)
        vm.count["thp_split_pmd"] += 1
        flush_ns = vm.flush_tlb_mm(task)
    yield Kernel(vm.costs[Cost.SPLIT_PMD_NS] + notifier, flush_ns)
    yield from vm.invalidate_range_end(task)


def remap_page(vm: Kvm, task: Task, region: int) -> Path[None]:
    """split_huge_page(): a second pair over the region, in which nothing changes any more."""
    yield Kernel(vm.costs[Cost.NOTIFIER_NS])
    yield from vm.invalidate_range_start(task, vm.host.span(region))
    yield Kernel(vm.costs[Cost.NOTIFIER_NS])
    yield from vm.invalidate_range_end(task)


def unshare_folio(vm: Kvm, task: Task, region: int) -> Path[None]:
    """split_huge_page() of a THP whose PMD was split before."""
    yield Kernel(vm.costs[Cost.NOTIFIER_NS])
    yield from vm.invalidate_range_start(task, vm.host.span(region))
    if vm.host.pmd(region) == HostPmd.TBL:
        vm.host.unshare_folio(region)
    yield Kernel(vm.costs[Cost.NOTIFIER_NS])
    yield from vm.invalidate_range_end(task)


def write_protect_page(vm: Kvm, task: Task, page: int, found: HostPte) -> Path[HostPte]:
    """write_protect_page(). What it left: NONE if the page changed meanwhile, KSM_RO if the page became the KSM page."""
    left = HostPte.NONE
    yield Kernel(vm.costs[Cost.NOTIFIER_NS])
    yield from vm.invalidate_range_start(task, range(page, page + 1))
    if vm.host.pte(page) == found:
        if vm.host.next_merge_is_first:
            vm.host.merge_page(page)
        elif found == HostPte.ANON_RW:
            vm.host.set_pte(page, HostPte.ANON_EX)
        left = vm.host.pte(page)
        yield from vm.set_pte_at_notify(task, page)
    else:
        yield Kernel(vm.costs[Cost.NOTIFIER_NS])
    yield from vm.invalidate_range_end(task)
    return left


def replace_page(vm: Kvm, task: Task, page: int, left: HostPte) -> Path[None]:
    """replace_page(): the KSM page for ours, unless ours was written to since it was write-protected."""
    yield Kernel(vm.costs[Cost.NOTIFIER_NS])
    yield from vm.invalidate_range_start(task, range(page, page + 1))
    if vm.host.pte(page) == left:
        vm.host.merge_page(page)
        yield from vm.set_pte_at_notify(task, page)
    else:
        yield Kernel(vm.costs[Cost.NOTIFIER_NS])
    yield from vm.invalidate_range_end(task)
