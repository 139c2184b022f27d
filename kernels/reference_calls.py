"""One system call of the VMM while no vCPU runs: fork, the child's end, madvise, dirty logging. Each returns its ns.

mm/memory.c, mm/huge_memory.c, mm/hugetlb.c, mm/madvise.c, mm/khugepaged.c, mm/ksm.c; kvm_mmu_slot_apply_flags().
"""

from collections.abc import Iterator

from kernels.cost import Cost
from kernels.policy import Behaviour
from kernels.reference_host import ABSENT, ANON, EXIT_PMD, FORK_PMD, FORK_PTE, LEAVES, SPLIT_FOLIO, WHOLE
from kernels.reference_kvm import Kvm
from kernels.reference_sptes import WRITABLE
from kernels.spec import PAGE_BYTES, PMD_ORDER, PMD_PAGES, Call, HostPmd, HostPte, SptePmd
from kernels.steps import ChildExit, Collapse, DirtyLog, DontNeed, Fork, KsmMerge

MERGE_SHIFT = 20  # a fraction in 1 / 2**20


def invalidate(vm: Kvm, span: range, changes_pte: bool = False) -> int:
    """One pair over these pages of the VMA, change_pte within if asked for."""
    vm.count["invalidate_range_start"] += 1
    vm.count["invalidate_range_end"] += 1
    vm.count["remote_tlb_flush_requests"] += vm.sptes.zap_leafs(*vm.config.gfns(span))
    vm.seq += 1
    callbacks = 2
    if changes_pte and vm.behaviour[Behaviour.CHANGE_PTE]:
        vm.count["change_pte"] += 1
        callbacks = 3
    vm.count["mmu_lock_write"] += callbacks
    vm.count["mmu_lock_write_hold_ns"] += callbacks * vm.costs[Cost.MMU_LOCK_WRITE_NS]
    return callbacks * (vm.costs[Cost.NOTIFIER_NS] + vm.costs[Cost.MMU_LOCK_WRITE_NS])


def part_of(vm: Kvm, start: float, end: float) -> range:
    """Pages of the VMA behind that part of the slot."""
    return range(int(start * vm.config.pages) + vm.config.shift, int(end * vm.config.pages) + vm.config.shift)


def covers(span: range, part: range) -> bool:
    return span.start <= part.start and part.stop <= span.stop


# ---- fork ------------------------------------------------------------------------------------------------------------


def fork(vm: Kvm) -> int:
    """copy_page_range(), copy_hugetlb_page_range(): vma_needs_copy() asks for an anon_vma."""
    host, ns = vm.host, vm.costs[Cost.FORK_NS]
    host.child = True
    if not host.anon_vma:
        return ns
    ns += invalidate(vm, range(vm.config.shift, vm.config.shift + vm.config.pages))
    for region, pmd in list(host.pmds.items()):
        if pmd == HostPmd.TBL:
            ns += vm.costs[Cost.FORK_PTE_NS] * sum(pte not in ABSENT for pte in host.ptes[region].values())
            host.convert(region, FORK_PTE)
        elif pmd in LEAVES:
            ns += vm.costs[Cost.FORK_PTE_NS]
            host.set_pmd(region, FORK_PMD.get(pmd, pmd))
    return ns


def child_exit(vm: Kvm) -> int:
    """exit_mmap() of the child: no notifier of ours."""
    host = vm.host
    for region, pmd in list(host.pmds.items()):
        if pmd == HostPmd.TBL:
            host.convert(region, {HostPte.ANON_SH: HostPte.ANON_EX, HostPte.ANON_TSH: host.unshared_part})
        elif pmd in EXIT_PMD:
            host.set_pmd(region, EXIT_PMD[pmd])
    host.child = False
    host.held -= host.child_bytes
    host.child_bytes = 0
    return vm.costs[Cost.FORK_NS]


# ---- madvise ---------------------------------------------------------------------------------------------------------


def dontneed(vm: Kvm, step: DontNeed) -> int:
    """MADV_DONTNEED: madvise_dontneed_free(), zap_page_range_single()."""
    return sum(dontneed_call(vm, span) for span in dontneed_spans(vm, step))


def dontneed_spans(vm: Kvm, step: DontNeed) -> Iterator[range]:
    """Pages of each call."""
    part = part_of(vm, step.start, step.end)
    if step.every is None:
        yield from [part] if part else []
        return
    for at in range(step.at, len(part) * PAGE_BYTES, step.every):
        first = part.start + at // PAGE_BYTES
        yield range(first, min(first + step.size // PAGE_BYTES, part.stop))


def dontneed_call(vm: Kvm, span: range) -> int:
    """The call's own pair comes first; up to 6.1 hugetlb has another inside it, which finds nothing."""
    ns = vm.costs[Cost.MADVISE_NS]
    if not span:
        return ns
    twice = vm.config.hugetlb and vm.behaviour[Behaviour.HUGETLB_ZAP_TWICE]
    for _ in range(2 if twice else 1):
        ns += invalidate(vm, span)
    for region in range(vm.host.region(span.start), vm.host.region(span.stop - 1) + 1):
        ns += zap_region(vm, region, span)
    return ns


def zap_region(vm: Kvm, region: int, span: range) -> int:
    """zap_pmd_range(): a leaf goes as a whole, or is split first."""
    host, whole, ns = vm.host, covers(span, vm.host.span(region)), 0
    if host.pmd(region) in LEAVES:
        if whole:
            host.zap_leaf(region)
            return vm.costs[Cost.ZAP_PTE_NS]
        ns += invalidate(vm, host.span(region)) + vm.costs[Cost.SPLIT_PMD_NS]
        host.split_pmd(region)
        vm.count["thp_split_pmd"] += 1
    if host.pmd(region) == HostPmd.TBL:
        ns += host.zap_pages(region, span) * vm.costs[Cost.ZAP_PTE_NS]
        if whole and not host.ptes[region] and vm.behaviour[Behaviour.RECLAIM_PAGE_TABLES]:
            host.set_pmd(region, HostPmd.NONE)  # try_to_free_pte()
    return ns


def collapse(vm: Kvm, step: Collapse) -> int:
    """MADV_COLLAPSE: madvise_collapse(), hpage_collapse_scan_pmd(), collapse_huge_page()."""
    part, ns = part_of(vm, step.start, step.end), vm.costs[Cost.MADVISE_NS]
    for region in range(vm.config.regions):
        if not covers(part, vm.host.span(region)):
            continue
        if not vm.config.anonymous and vm.host.pmd(region) == HostPmd.CACHED:  # collapse_pte_mapped_thp(): the huge page is mapped again
            vm.host.set_pmd(region, HostPmd.SHM_THP)
            ns += vm.costs[Cost.FILE_MAP_NS]
        if vm.config.anonymous and vm.host.pmd(region) == HostPmd.NONE and not vm.behaviour[Behaviour.COLLAPSE_PASSES_EMPTY]:
            break
        if vm.host.pmd(region) != HostPmd.TBL:
            continue
        ns += PMD_PAGES * vm.costs[Cost.SCAN_PTE_NS]
        if not vm.config.anonymous:
            continue
        read_only = bool(vm.behaviour[Behaviour.COLLAPSE_READ_ONLY])
        if vm.host.can_collapse(region, PMD_PAGES, PMD_PAGES, read_only) and not vm.no_huge_page(region):
            vm.count["thp_collapse_alloc"] += 1
            ns += vm.costs[Cost.COLLAPSE_NS] + invalidate(vm, vm.host.span(region)) + copy_into_thp(vm, region)
            vm.host.collapse(region)
    return ns


def copy_into_thp(vm: Kvm, region: int) -> int:
    """__collapse_huge_page_copy(): what was there is copied, the rest cleared."""
    copied = vm.host.to_copy(region)
    return sum(vm.copy(PAGE_BYTES) for _ in range(copied)) + sum(vm.clear(PAGE_BYTES) for _ in range(PMD_PAGES - copied))


# ---- KSM -------------------------------------------------------------------------------------------------------------


def has_twin(gfn: int, fraction: float) -> bool:
    """That fraction of the pages, evenly spread."""
    cut = int(fraction * 2**MERGE_SHIFT)
    return (gfn + 1) * cut >> MERGE_SHIFT > gfn * cut >> MERGE_SHIFT


def can_merge(vm: Kvm, page: int) -> bool:
    """ksm_scan_thread() takes anonymous pages, those of a THP too."""
    return vm.host.pmd(vm.host.region(page)) in SPLIT_FOLIO or vm.host.pte(page) in ANON


def ksm_merge(vm: Kvm, step: KsmMerge) -> int:
    """The daemon's work at one go."""
    ns = vm.costs[Cost.SCAN_PTE_NS] * vm.config.pages
    for gfn in range(vm.config.pages):
        if has_twin(gfn, step.fraction) and can_merge(vm, gfn + vm.config.shift):
            ns += merge_one_page(vm, gfn + vm.config.shift)
    return ns


def merge_one_page(vm: Kvm, page: int) -> int:
    """try_to_merge_one_page(): split_huge_page(), write_protect_page(), replace_page()."""
    host, ns = vm.host, vm.costs[Cost.KSM_MERGE_NS]
    region = host.region(page)
    if host.pmd(region) in SPLIT_FOLIO:
        ns += invalidate(vm, host.span(region)) + invalidate(vm, host.span(region)) + vm.costs[Cost.SPLIT_PMD_NS]
        host.split_folio(region)
        vm.count["thp_split_pmd"] += 1
    elif host.pte(page) not in WHOLE:
        ns += invalidate(vm, host.span(region))
        host.unshare_folio(region)
    for _ in range(1 if host.next_merge_is_first else 2):
        ns += invalidate(vm, range(page, page + 1), changes_pte=True)
    host.merge_page(page)
    return ns


# ---- Dirty logging ---------------------------------------------------------------------------------------------------


def dirty_log(vm: Kvm, step: DirtyLog) -> int:
    """KVM_SET_USER_MEMORY_REGION with or without KVM_MEM_LOG_DIRTY_PAGES, or KVM_GET_DIRTY_LOG."""
    ns = vm.costs[Cost.DIRTY_LOG_NS]
    if step.state == Call.LOG_GET:
        return ns + get_dirty_log(vm)
    if vm.logging == (step.state == Call.LOG_ON):
        return ns
    vm.logging, vm.dirty = not vm.logging, False
    if vm.logging:
        return ns + start_logging(vm)
    return ns + (collapse_tables(vm) if vm.config.tdp else zap_collapsible(vm))


def count_lock(vm: Kvm) -> None:
    """mmu_lock, for reading under TDP; nobody else wants it."""
    vm.count["mmu_lock_read" if vm.config.tdp else "mmu_lock_write"] += 1


def start_logging(vm: Kvm) -> int:
    """kvm_mmu_slot_apply_flags(): eager splitting, then write protection or, with PML, clear Dirty bits; always a flush."""
    ns = 0
    if vm.config.tdp and vm.config.eager_page_split and vm.behaviour[Behaviour.EAGER_SPLIT]:
        count_lock(vm)
        ns += split_all(vm)
    count_lock(vm)
    if vm.config.pml:
        count_lock(vm)
    vm.count["remote_tlb_flush_requests"] += 1
    return ns + protect(vm, vm.config.pml)


def split_all(vm: Kvm) -> int:
    """kvm_mmu_slot_try_split_huge_pages()."""
    splits = 0
    for _ in vm.config.orders[:-1]:  # 1G to 2M, then 2M to 4K
        for order, gfn, _leaf in vm.sptes.all_leaves():
            if order > 0:
                vm.sptes.split(order, gfn, SptePmd.T)
                splits += 1
    return splits * vm.costs[Cost.SPLIT_SPTE_NS]


def protect(vm: Kvm, pml: bool) -> int:
    """kvm_mmu_slot_remove_write_access(), kvm_mmu_slot_leaf_clear_dirty() for 4K leaves with PML."""
    changed = 0
    for order, gfn, leaf in vm.sptes.all_leaves():
        new = SptePmd.RW_CLEAN if pml and order == 0 else SptePmd.WP
        if leaf in WRITABLE and leaf != new:
            vm.sptes.put(order, gfn, new)
            changed += 1
    return changed * vm.costs[Cost.WRITE_PROTECT_NS]


def get_dirty_log(vm: Kvm) -> int:
    """kvm_get_dirty_log_protect(), kvm_arch_mmu_enable_log_dirty_pt_masked()."""
    vm.count["mmu_lock_write"] += 1
    if not vm.dirty:
        return 0
    vm.dirty = False
    vm.count["remote_tlb_flush_requests"] += 1
    return protect(vm, vm.config.pml)


def collapse_tables(vm: Kvm) -> int:
    """kvm_tdp_mmu_zap_collapsible_sptes(); from 6.13 on kvm_tdp_mmu_recover_huge_pages()."""
    count_lock(vm)
    recover, changed = bool(vm.behaviour[Behaviour.RECOVER_HUGE_SPTE]), 0
    for order in vm.config.orders[:-1]:
        for gfn in vm.sptes.all_tables(order):
            if vm.lpage_order(gfn) < order:
                continue
            rights = next(vm.sptes.leaves_below(order, gfn), SptePmd.N) if recover else SptePmd.N
            if recover and rights == SptePmd.N:
                continue
            vm.sptes.drop(order, gfn)
            vm.sptes.put(order, gfn, rights)
            changed += 1
    vm.count["remote_tlb_flush_requests"] += min(changed, 1) if recover else changed
    return changed * vm.costs[Cost.SPLIT_SPTE_NS]


def zap_collapsible(vm: Kvm) -> int:
    """kvm_rmap_zap_collapsible_sptes(): 4K leaves in direct tables that one leaf could replace."""
    count_lock(vm)
    zapped = 0
    for order, gfn, _leaf in vm.sptes.all_leaves() if vm.config.direct else []:
        if order == 0 and vm.lpage_order(gfn) >= PMD_ORDER:
            vm.sptes.put(0, gfn, SptePmd.N)
            zapped += 1
    vm.count["remote_tlb_flush_requests"] += zapped > 0
    return zapped * vm.costs[Cost.WRITE_PROTECT_NS]


# ---- Which -----------------------------------------------------------------------------------------------------------

CallStep = Fork | ChildExit | DontNeed | Collapse | KsmMerge | DirtyLog


def call(vm: Kvm, step: CallStep) -> int:
    """Make it; returns the step's ns."""
    match step:
        case Fork():
            return fork(vm)
        case ChildExit():
            return child_exit(vm)
        case DontNeed():
            return dontneed(vm, step)
        case Collapse():
            return collapse(vm, step)
        case KsmMerge():
            return ksm_merge(vm, step)
    return dirty_log(vm, step)
