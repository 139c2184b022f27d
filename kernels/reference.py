"""The executable specification: the same meaning as simulate.simulate(), in plain Python, to be read next to the kernel.

Each actor (a vCPU, a VMM thread in MADV_POPULATE_*, a KVM_PRE_FAULT_MEMORY loop) is a generator that follows the path
of the kernel functions it names; reference_tasks.py says what its yields mean and whose turn it is. Nothing of the
compiled implementation is imported: tests/test_differential.py compares the two, figure by figure.

Rules: mm/memory.c, mm/huge_memory.c, mm/hugetlb.c, virt/kvm/kvm_main.c and arch/x86/kvm/mmu/ of 6.1 and 6.12.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kernels.cost import DEFAULT_COSTS, Cost
from kernels.policy import Behaviour, behaviours
from kernels.reference_tasks import Guest, Kernel, Path, Scheduler, SleepOnPage, TakeMmuLock, Task, Wait
from kernels.reference_workload import Accesses, list_accesses, step_key, touch_accesses
from kernels.spec import (
    PAGE_BYTES,
    PMD_BYTES,
    PMD_PAGES,
    Access,
    Actor,
    Backing,
    Gauge,
    HostPmd,
    HostPte,
    Outcome,
    Prealloc,
    Spte,
    SptePmd,
    ThpEnabled,
)
from kernels.steps import Populate, PreFault, Step, Touch, TouchList, VmmCow

MAX_EVENTS = 10_000_000
OPS = {Touch: "touch", TouchList: "touch_list", Populate: "populate", PreFault: "pre_fault", VmmCow: "vmm_cow"}
HOST_LEAVES = (HostPmd.HZ_RO, HostPmd.THP_RW, HostPmd.HUGE_RO, HostPmd.HUGE_RW)
HOST_WRITABLE_LEAVES = (HostPmd.THP_RW, HostPmd.HUGE_RW)


class Vm(Scheduler):
    """One VM with one memslot of `pages`, the memory behind it, and who runs in the present step."""

    def __init__(self, pages: int, behaviour: Mapping[Behaviour, int], costs: Mapping[Cost, int]) -> None:
        super().__init__()
        self.pages = pages
        self.behaviour = behaviour
        self.costs = costs
        self.thp = self.hugetlb = self.shmem = self.use_zero_page = False
        self.host_pmd: dict[int, HostPmd] = {}  # by region; missing: NONE
        self.host_pte: dict[int, HostPte] = {}  # by page; missing: NONE
        self.leaf_2m: dict[int, bool] = {}  # KVM's leaf entries, by region: writable
        self.leaf_4k: dict[int, bool] = {}  # by page: writable
        self.clean: set[tuple[str, int]] = set()  # writable leaves with the Dirty bit clear: (gauge, place)
        self.tables: set[int] = set()  # regions in which KVM has a table of 4K entries
        self.seq = 0  # mmu_invalidate_seq
        self.in_progress = 0  # mmu_invalidate_in_progress
        self.range = (0, 0)  # of the invalidations in progress, [start, end)
        self.gauge = {g.name.lower(): 0 for g in Gauge}
        self.latencies: list[int] = []

    # ---- vCPU: exits -------------------------------------------------------------------------------------------------

    def allows(self, gfn: int, write: bool) -> bool:
        """The guest's access needs no exit."""
        writable = self.leaf_2m.get(gfn // PMD_PAGES, self.leaf_4k.get(gfn))
        return writable is not None and (writable or not write)

    def vcpu(self, task: Task, accesses: Accesses, think_ns: int) -> Iterator[Wait]:
        """Guest code: every access is executed again until its SPTE allows it."""
        for gfn, write in accesses:
            self.count["touches"] += 1
            self.count["writes" if write else "reads"] += 1
            self.count["hits"] += self.allows(gfn, write)
            while not self.allows(gfn, write):
                yield from self.handle_exit(task, gfn, write)
            if write:  # the processor sets the Dirty bit
                self.clean -= {("pages_2m", gfn // PMD_PAGES), ("pages_4k", gfn)}
            yield Guest(self.costs[Cost.TOUCH_NS] + think_ns)

    def handle_exit(self, task: Task, gfn: int, write: bool) -> Path[None]:
        """handle_ept_violation() / npf_interception(), kvm_mmu_page_fault(): RETRY goes back into the guest as well."""
        exit_ns, fault_ns = self.costs[Cost.VM_EXIT_NS], self.costs[Cost.KVM_FAULT_NS]
        self.count["exits"] += 1
        self.count["pf_taken"] += 1
        present = self.allows(gfn, False)  # PFERR_PRESENT_MASK: a leaf is there
        exited = task.time
        yield Kernel(exit_ns // 2 + fault_ns // 2)
        if present and write and self.allows(gfn, True):
            # fast_page_fault(): "some other CPU has already fixed the PTE after the current CPU took the fault"
            self.count["pf_fast"] += 1
            outcome = Outcome.SPURIOUS
        else:
            outcome = yield from self.tdp_page_fault(task, gfn, write, prefetch=False)
        self.count["pf_" + outcome.name.lower()] += 1
        back_ns = exit_ns - exit_ns // 2 + fault_ns - fault_ns // 2
        self.count["fault_ns"] += task.time + back_ns - exited
        self.latencies.append(task.time + back_ns - exited)
        yield Guest(back_ns)

    # ---- KVM: arch/x86/kvm/mmu ---------------------------------------------------------------------------------------

    def in_range(self, gfn: int) -> bool:
        """The gfn lies in the union of the ranges being invalidated."""
        return self.in_progress > 0 and self.range[0] <= gfn < self.range[1]

    def is_stale(self, gfn: int, seq: int) -> bool:
        """mmu_invalidate_retry_gfn() [6.12], mmu_invalidate_retry_hva() [6.1]: the address counts only while in progress."""
        return self.in_range(gfn) or self.seq != seq

    def tdp_page_fault(self, task: Task, gfn: int, write: bool, prefetch: bool) -> Path[Outcome]:
        """kvm_tdp_mmu_page_fault() [6.12], direct_page_fault() [6.1], fast_page_fault() left out."""
        precheck = self.behaviour[Behaviour.STALE_PRECHECK]
        seq = self.seq  # before GUP: an invalidation during GUP must be seen, this fault's own too
        if precheck and self.in_range(gfn):
            return Outcome.RETRY
        map_writable = yield from self.hva_to_pfn(task, gfn, write)
        if precheck and self.is_stale(gfn, seq):
            return Outcome.RETRY
        yield TakeMmuLock(write=False)
        outcome = Outcome.RETRY
        if not self.is_stale(gfn, seq):
            outcome = self.tdp_mmu_map(gfn, write, map_writable, prefetch)
        yield Kernel(self.costs[Cost.MMU_LOCK_READ_NS])
        self.unlock(task)
        return outcome

    def hva_to_pfn(self, task: Task, gfn: int, write: bool) -> Path[bool]:
        """virt/kvm/kvm_main.c hva_to_pfn(): fast for write, slow, and a read once more fast for write. Returns map_writable."""
        foll_write = write or bool(self.behaviour[Behaviour.ALWAYS_WRITABLE])
        gup_fast = self.costs[Cost.GUP_FAST_NS]
        if self.host_allows(gfn, write=True):  # get_user_page_fast_only(FOLL_WRITE), for reads too: the slot is writable
            self.count["gup_fast"] += 1
            yield Kernel(gup_fast)
            return True
        self.count["gup_slow"] += 1
        yield Kernel(gup_fast + self.costs[Cost.GUP_SLOW_NS])
        yield from self.get_user_pages(task, gfn, foll_write)
        map_writable = self.host_allows(gfn, write=True)
        yield Kernel(0 if foll_write else gup_fast)
        return map_writable

    def tdp_mmu_map(self, gfn: int, write: bool, map_writable: bool, prefetch: bool) -> Outcome:
        """kvm_mmu_hugepage_adjust(), kvm_tdp_mmu_map(), tdp_mmu_map_handle_target_level()."""
        region = gfn // PMD_PAGES
        # host_pfn_mapping_level() asks nothing but the level; lpage_info bars the short last region of the slot.
        huge = self.host(region) in HOST_LEAVES and (region + 1) * PMD_PAGES <= self.pages
        if not huge:
            self.tables.add(region)  # never turned back into a leaf: there is no khugepaged here
        leaves, place, gauge = (self.leaf_2m, region, "pages_2m") if huge else (self.leaf_4k, gfn, "pages_4k")
        old = leaves.get(place)
        if self.behaviour[Behaviour.DUPLICATE_IS_SPURIOUS]:
            # 6.13: "if (is_shadow_present_pte(old) && (fault->prefetch || is_access_allowed(fault, old)))"
            if old is not None and (prefetch or old or not write):
                return Outcome.SPURIOUS
        # Before, the entry is written anew: equal is spurious. make_spte() over a writable one leaves the Dirty bit out.
        clean = bool(old and map_writable and self.behaviour[Behaviour.REWRITE_DROPS_DIRTY])
        if old is map_writable and clean is ((gauge, place) in self.clean):
            return Outcome.SPURIOUS
        self.gauge[gauge] += old is None
        leaves[place] = map_writable
        self.clean -= {(gauge, place)}
        self.clean |= {(gauge, place)} if clean else set()
        return Outcome.FIXED

    def zap_leafs(self, start: int, end: int) -> bool:
        """tdp_mmu_zap_leafs(): tables stay. True if a leaf was there, so that a flush is due."""
        small = [gfn for gfn in range(start, end) if gfn in self.leaf_4k]
        large = [r for r in range(start // PMD_PAGES, (end - 1) // PMD_PAGES + 1) if r in self.leaf_2m]
        for gfn in small:
            del self.leaf_4k[gfn]
        for region in large:
            del self.leaf_2m[region]
        self.clean -= {("pages_4k", gfn) for gfn in small} | {("pages_2m", region) for region in large}
        self.gauge["pages_4k"] -= len(small)
        self.gauge["pages_2m"] -= len(large)
        return bool(small or large)

    # ---- Flushes -----------------------------------------------------------------------------------------------------

    def shootdown(self, targets: list[Task]) -> int:
        """A synchronous IPI to each target: those in the guest exit and lose time. Returns the sender's ns."""
        for target in targets:
            if self.who == Actor.GUEST and target.in_guest:
                self.count["exits"] += 1
                target.time += self.costs[Cost.TLB_VICTIM_NS]
        if not targets:
            return 0
        ns = self.costs[Cost.TLB_FLUSH_NS] + (len(targets) - 1) * self.costs[Cost.TLB_FLUSH_TARGET_NS]
        self.count["tlb_ipis"] += len(targets)
        self.count["flush_ns"] += ns
        return ns

    def flush_remote_tlbs(self, task: Task) -> int:
        """kvm_flush_remote_tlbs(): every other vCPU in the guest."""
        targets = [a for a in self.tasks if a is not task and a.in_guest] if self.who == Actor.GUEST else []
        self.count["remote_tlb_flush_requests"] += 1
        self.count["remote_tlb_flush"] += bool(targets)
        return self.shootdown(targets)

    def flush_tlb_mm(self, task: Task) -> int:
        """flush_tlb_mm_range() of the VMM's own page table: every other running thread of it, in the guest or not."""
        return self.shootdown([a for a in self.tasks if a is not task and not a.done])

    # ---- MMU notifiers: virt/kvm/kvm_main.c --------------------------------------------------------------------------

    def hold_mmu_lock(self, task: Task, flush_ns: int) -> Path[None]:
        """The rest of a callback under mmu_lock, its flush included; then the unlock."""
        ns = self.costs[Cost.MMU_LOCK_WRITE_NS] + flush_ns
        self.count["mmu_lock_write_hold_ns"] += ns
        yield Kernel(ns)
        self.unlock(task)

    def invalidate_range_start(self, task: Task, start: int, end: int) -> Path[None]:
        """kvm_mmu_notifier_invalidate_range_start(): the range is a union until nothing is in progress any more."""
        self.count["invalidate_range_start"] += 1
        yield TakeMmuLock(write=True)
        self.range = (min(start, self.range[0]), max(end, self.range[1])) if self.in_progress else (start, end)
        self.in_progress += 1
        zapped = self.zap_leafs(start, end)
        yield from self.hold_mmu_lock(task, self.flush_remote_tlbs(task) if zapped else 0)

    def change_pte(self, task: Task, gfn: int) -> Path[None]:
        """kvm_mmu_notifier_change_pte(): finds no SPTE, start zapped it. Patch 2 makes one where a 4K table is."""
        self.count["change_pte"] += 1
        yield TakeMmuLock(write=True)
        vcpu_running = self.who != Actor.VMM  # kvm_get_running_vcpu()
        if self.behaviour[Behaviour.CHANGE_PTE_PREFETCH] and vcpu_running and gfn // PMD_PAGES in self.tables:
            self.gauge["pages_4k"] += gfn not in self.leaf_4k
            self.leaf_4k[gfn] = True
            self.count["spte_prefetch"] += 1
        yield from self.hold_mmu_lock(task, 0)

    def invalidate_range_end(self, task: Task) -> Path[None]:
        """kvm_mmu_notifier_invalidate_range_end(): here the sequence moves, not at the start."""
        self.count["invalidate_range_end"] += 1
        yield TakeMmuLock(write=True)
        self.seq += 1
        self.in_progress -= 1
        yield from self.hold_mmu_lock(task, 0)

    # ---- Primary MMU: mm/ --------------------------------------------------------------------------------------------

    def host(self, region: int) -> HostPmd:
        return self.host_pmd.get(region, HostPmd.NONE)

    def pte(self, page: int) -> HostPte:
        return self.host_pte.get(page, HostPte.NONE)

    def host_allows(self, page: int, write: bool) -> bool:
        """follow_page_mask() finds the page present with those rights."""
        pmd = self.host(page // PMD_PAGES)
        if pmd == HostPmd.TBL:
            return self.pte(page) in (HostPte.ANON_RW, HostPte.SHM_RW) or (self.pte(page) == HostPte.Z_RO and not write)
        return pmd in HOST_WRITABLE_LEAVES or (pmd in HOST_LEAVES and not write)

    def get_user_pages(self, task: Task, page: int, write: bool) -> Path[None]:
        """__get_user_pages(): follow_page_mask() and faultin_page() until the page is there with the rights asked for."""
        while not self.host_allows(page, write):
            # Up to 6.5 follow_hugetlb_page() calls hugetlb_fault() past handle_mm_fault(), which counts.
            if not self.hugetlb or self.behaviour[Behaviour.HUGETLB_PGFAULT]:
                self.count["pgfault" if self.who == Actor.GUEST else "vmm_pgfault"] += 1
            if self.hugetlb:
                yield from self.hugetlb_fault(task, page, write)
            elif self.shmem:
                yield from self.shmem_fault(task, page)
            else:
                yield from self.handle_mm_fault(task, page, write)

    def clear(self, nbytes: int) -> int:
        """clear_page() / clear_huge_page() of fresh memory; returns ns."""
        ns = self.costs[Cost.CLEAR_2M_NS if nbytes == PMD_BYTES else Cost.CLEAR_4K_NS]
        self.count["bytes_cleared"] += nbytes
        self.count["clear_ns"] += ns
        return ns

    def hold(self, nbytes: int) -> None:
        """Memory of the host is in use; anonymous memory is the process's RSS as well."""
        self.gauge["held_bytes"] += nbytes
        if not self.hugetlb and not self.shmem:
            self.gauge["rss_bytes"] += nbytes

    def hugetlb_fault(self, task: Task, page: int, write: bool) -> Path[None]:
        """hugetlb_fault() of a private mapping: hugetlb_no_page() leaves a read's page read-only, hugetlb_wp() reuses it."""
        region = page // PMD_PAGES
        while self.host(region) == HostPmd.HUGE_BUSY:
            yield SleepOnPage(region * PMD_PAGES)
        if self.host(region) == HostPmd.NONE:
            self.host_pmd[region] = HostPmd.HUGE_BUSY  # under hugetlb_fault_mutex
            yield Kernel(self.costs[Cost.HUGETLB_FAULT_NS] + self.clear(PMD_BYTES))
            self.host_pmd[region] = HostPmd.HUGE_RW if write else HostPmd.HUGE_RO
            self.hold(PMD_BYTES)
            self.unlock_page(task, region * PMD_PAGES)
        elif not self.host_allows(page, write):
            yield Kernel(self.costs[Cost.REUSE_NS])
            self.count["cow_reuse"] += self.host(region) == HostPmd.HUGE_RO
            self.host_pmd[region] = HostPmd.HUGE_RW

    def shmem_fault(self, task: Task, page: int) -> Path[None]:
        """shmem_fault(): the new folio is locked while it is cleared. A read's page is writable, too."""
        self.host_pmd[page // PMD_PAGES] = HostPmd.TBL
        if self.pte(page) == HostPte.SHM_BUSY:
            yield SleepOnPage(page)
            return
        self.host_pte[page] = HostPte.SHM_BUSY
        yield Kernel(self.costs[Cost.SHMEM_FAULT_NS] + self.clear(PAGE_BYTES))
        self.host_pte[page] = HostPte.SHM_RW
        self.hold(PAGE_BYTES)
        self.unlock_page(task, page)

    def handle_mm_fault(self, task: Task, page: int, write: bool) -> Path[None]:
        """__handle_mm_fault() and handle_pte_fault() of anonymous memory."""
        region = page // PMD_PAGES
        if self.host(region) == HostPmd.NONE and self.thp:
            yield from self.do_huge_pmd_anonymous_page(region, write)
            return
        if self.host(region) == HostPmd.HZ_RO:
            if self.behaviour[Behaviour.HUGE_ZERO_WRITE_THP]:
                yield from self.do_huge_zero_wp_pmd(task, region)
                return
            yield from self.split_huge_pmd(task, region)  # VM_FAULT_FALLBACK: on to the page, in the same fault
        if self.host(region) == HostPmd.NONE:
            self.host_pmd[region] = HostPmd.TBL  # __pte_alloc()
        if self.pte(page) == HostPte.NONE:
            yield from self.do_anonymous_page(page, write)
        elif self.pte(page) == HostPte.Z_RO and write:
            yield from self.wp_page_copy(task, page)

    def do_anonymous_page(self, page: int, write: bool) -> Path[None]:
        """A read maps the zero page whatever use_zero_page says. The PTE is checked again under its lock."""
        if not write:
            yield Kernel(self.costs[Cost.ZERO_MAP_NS])
            if self.pte(page) == HostPte.NONE:
                self.host_pte[page] = HostPte.Z_RO
                self.count["zero_page_maps"] += 1
            return
        yield Kernel(self.costs[Cost.ANON_FAULT_NS] + self.clear(PAGE_BYTES))
        if self.pte(page) != HostPte.NONE:
            self.count["bytes_cleared_wasted"] += PAGE_BYTES
            return
        self.host_pte[page] = HostPte.ANON_RW
        self.hold(PAGE_BYTES)

    def do_huge_pmd_anonymous_page(self, region: int, write: bool) -> Path[None]:
        """The huge zero page for a read if allowed, else a THP, cleared before the PMD is checked again under its lock."""
        if not write and self.use_zero_page:
            yield Kernel(self.costs[Cost.HUGE_ZERO_MAP_NS])
            if self.host(region) == HostPmd.NONE:
                self.host_pmd[region] = HostPmd.HZ_RO
                self.count["huge_zero_maps"] += 1
            return
        yield Kernel(self.costs[Cost.THP_FAULT_NS] + self.clear(PMD_BYTES))
        self.map_thp(region, over=HostPmd.NONE)

    def map_thp(self, region: int, over: HostPmd) -> bool:
        """map_anon_folio_pmd(), if the PMD is still as it was; else the folio was cleared in vain."""
        if self.host(region) != over:
            self.count["bytes_cleared_wasted"] += PMD_BYTES
            return False
        self.host_pmd[region] = HostPmd.THP_RW
        self.count["thp_fault_alloc"] += 1
        self.gauge["anon_huge_bytes"] += PMD_BYTES
        self.hold(PMD_BYTES)
        return True

    def region_range(self, region: int) -> tuple[int, int]:
        """The region's gfns, [start, end); the last region may be short."""
        return region * PMD_PAGES, min((region + 1) * PMD_PAGES, self.pages)

    def do_huge_zero_wp_pmd(self, task: Task, region: int) -> Path[None]:
        """6.13: clears a THP first, then invalidates 2 MiB even if another task was faster."""
        notifier = self.costs[Cost.NOTIFIER_NS]
        yield Kernel(notifier + self.costs[Cost.HUGE_ZERO_THP_NS] + self.clear(PMD_BYTES))
        yield from self.invalidate_range_start(task, *self.region_range(region))
        mapped = self.map_thp(region, over=HostPmd.HZ_RO)
        yield Kernel(notifier + (self.flush_tlb_mm(task) if mapped else 0))
        yield from self.invalidate_range_end(task)

    def split_huge_pmd(self, task: Task, region: int) -> Path[None]:
        """__split_huge_pmd() of the huge zero page: invalidates before the PMD is looked at again; all PTEs become zero pages."""
        notifier, flush_ns = self.costs[Cost.NOTIFIER_NS], 0
        yield Kernel(notifier)
        yield from self.invalidate_range_start(task, *self.region_range(region))
        if self.host(region) == HostPmd.HZ_RO:  # __split_huge_zero_page_pmd()
            self.host_pmd[region] = HostPmd.TBL
            self.host_pte |= dict.fromkeys(range(*self.region_range(region)), HostPte.Z_RO)
            self.count["thp_split_pmd"] += 1
            flush_ns = self.flush_tlb_mm(task)
        yield Kernel(flush_ns + self.costs[Cost.SPLIT_PMD_NS] + notifier)
        yield from self.invalidate_range_end(task)

    def wp_page_copy(self, task: Task, page: int) -> Path[None]:
        """CoW of the zero page: the copy is made first; pte_same() decides inside the invalidation."""
        notifier = self.costs[Cost.NOTIFIER_NS]
        yield Kernel(notifier + self.costs[Cost.COW_4K_NS] + self.clear(PAGE_BYTES))
        yield from self.invalidate_range_start(task, page, page + 1)
        if self.pte(page) == HostPte.Z_RO:
            self.host_pte[page] = HostPte.ANON_RW
            self.count["cow_4k"] += 1
            self.hold(PAGE_BYTES)
            yield Kernel(self.flush_tlb_mm(task) + notifier)  # ptep_clear_flush()
            if self.behaviour[Behaviour.CHANGE_PTE]:  # set_pte_at_notify()
                yield from self.change_pte(task, page)
                yield Kernel(notifier)
        else:
            self.count["bytes_cleared_wasted"] += PAGE_BYTES
            yield Kernel(notifier)
        yield from self.invalidate_range_end(task)

    # ---- The VMM's own loops -----------------------------------------------------------------------------------------

    def populate(self, task: Task, page: int, end: int, write: bool) -> Iterator[Wait]:
        """madvise_populate(): faults [page, end) in, from mapping to mapping; KVM's page table stays as it is."""
        while page < end:
            yield Kernel(self.costs[Cost.GUP_SLOW_NS])
            yield from self.get_user_pages(task, page, write)
            page = page + 1 if self.host(page // PMD_PAGES) == HostPmd.TBL else (page // PMD_PAGES + 1) * PMD_PAGES
            yield Guest(0)

    def pre_fault_memory(self, task: Task) -> Iterator[Wait]:
        """kvm_arch_vcpu_pre_fault_memory(): read faults with prefetch = true, RETRY loops in kvm_tdp_map_page()."""
        gfn = 0
        while gfn < self.pages:
            outcome = Outcome.RETRY
            while outcome == Outcome.RETRY:
                yield Kernel(self.costs[Cost.KVM_FAULT_NS])
                outcome = yield from self.tdp_page_fault(task, gfn, write=False, prefetch=True)
            gfn = (gfn // PMD_PAGES + 1) * PMD_PAGES if gfn // PMD_PAGES in self.leaf_2m else gfn + 1
            yield Guest(0)

    def cow_outside(self, _task: Task, pages: int) -> Iterator[Wait]:
        """wp_page_copy() of the VMM's own pages: the notifiers find no memslot, so no mmu_lock and no sequence."""
        notifier = self.costs[Cost.NOTIFIER_NS]
        for _ in range(pages):
            self.count["vmm_pgfault"] += 1
            self.count["bytes_copied"] += PAGE_BYTES
            yield Kernel(self.costs[Cost.COW_4K_NS] + self.costs[Cost.COPY_4K_NS] + notifier)
            self.count["invalidate_range_start"] += 1
            self.count["cow_4k"] += 1
            yield Kernel(notifier)
            if self.behaviour[Behaviour.CHANGE_PTE]:
                self.count["change_pte"] += 1
                yield Kernel(notifier)
            self.count["invalidate_range_end"] += 1
            yield Guest(0)

    # ---- A step ------------------------------------------------------------------------------------------------------

    def paths_of(self, step: Step, vcpus: int, key: int) -> tuple[Actor, list[Callable[[Task], Iterator[Wait]]]]:
        """Who runs in the step, and one path per actor."""
        match step:
            case Populate():
                n, write = min(step.threads, self.pages), step.access == Access.WRITE
                bounds = [self.pages * i // n for i in range(n + 1)]
                return Actor.VMM, [partial(self.populate, page=bounds[i], end=bounds[i + 1], write=write) for i in range(n)]
            case PreFault():
                return Actor.PREFAULT, [self.pre_fault_memory]
            case VmmCow():
                return Actor.OUTSIDE, [partial(self.cow_outside, pages=step.pages)]
            case TouchList():
                made = list_accesses(step, vcpus)
                return Actor.GUEST, [partial(self.vcpu, accesses=own, think_ns=0) for own in made]
        made = touch_accesses(step, self.pages, vcpus, key)
        return Actor.GUEST, [partial(self.vcpu, accesses=own, think_ns=step.think_ns) for own in made]


# ---- The public call --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One step: counters by their lower-case name, gauges as they stand after it, all fault latencies, sorted."""

    op: str
    ns: int
    counters: dict[str, int]
    gauges: dict[str, int]
    latencies: list[int]


@dataclass(frozen=True)
class Reference:
    """The steps, their sum, and the page tables at the end."""

    steps: list[Result]
    counters: dict[str, int]
    gauges: dict[str, int]
    host_pmd: list[HostPmd]  # per region
    spte_pmd: list[SptePmd]
    host_pte: list[HostPte | None]  # per page; None where the region has no table
    spte: list[Spte | None]
    seq: int


def end_state(vm: Vm, results: list[Result]) -> Reference:
    regions, pages = range(-(-vm.pages // PMD_PAGES)), range(vm.pages)

    def leaf(gauge: str, place: int, writable: bool | None) -> Spte:
        if writable and (gauge, place) in vm.clean:
            return Spte.RW_CLEAN
        return {None: Spte.N, False: Spte.RO, True: Spte.RW}[writable]

    large = {region: SptePmd(leaf("pages_2m", region, writable)) for region, writable in vm.leaf_2m.items()}
    return Reference(
        steps=results,
        counters={name: sum(r.counters[name] for r in results) for name in vm.count},
        gauges=dict(vm.gauge),
        host_pmd=[vm.host(region) for region in regions],
        spte_pmd=[SptePmd.T if region in vm.tables else large.get(region, SptePmd.N) for region in regions],
        host_pte=[vm.pte(page) if vm.host(page // PMD_PAGES) == HostPmd.TBL else None for page in pages],
        spte=[leaf("pages_4k", page, vm.leaf_4k.get(page)) if page // PMD_PAGES in vm.tables else None for page in pages],
        seq=vm.seq,
    )


def simulate(
    *,
    steps: Sequence[Step],
    kernel: str = "6.12",
    policy: str = "mainline",
    backing: Backing | str = Backing.ANONYMOUS,
    memory: int = 1 << 30,
    vcpus: int = 1,
    thp_enabled: ThpEnabled | str = ThpEnabled.MADVISE,
    use_zero_page: bool = True,
    prealloc: Prealloc | str = Prealloc.NONE,
    prealloc_threads: int = 1,
    costs: Mapping[Cost, int] = DEFAULT_COSTS,
    seed: int = 0,
    replicate: int = 0,
    max_events: int | None = None,
) -> Reference:
    """As simulate.simulate(), slowly. Raises ValueError for what cannot be, RuntimeError after `max_events` in one step."""
    kind = backing if isinstance(backing, Backing) else Backing[backing.upper()]
    thp = thp_enabled if isinstance(thp_enabled, ThpEnabled) else ThpEnabled[thp_enabled.upper()]
    before = prealloc if isinstance(prealloc, Prealloc) else Prealloc[prealloc.upper().replace("+", "_")]
    vm = Vm(memory // PAGE_BYTES, behaviours(kernel, policy), costs)
    vm.thp = kind == Backing.ANONYMOUS_THP and thp != ThpEnabled.NEVER  # MADV_HUGEPAGE; `anonymous` is MADV_NOHUGEPAGE
    vm.hugetlb, vm.shmem = kind == Backing.ANONYMOUS_HUGETLB_2MB, kind == Backing.SHMEM
    vm.use_zero_page = use_zero_page
    todo = list(enumerate(steps))
    if before & Prealloc.PRE_FAULT:
        todo.insert(0, (-1, PreFault()))
    if before & Prealloc.POPULATE:
        todo.insert(0, (-1, Populate(threads=prealloc_threads)))
    results = []
    for number, step in todo:
        if isinstance(step, PreFault) and not vm.behaviour[Behaviour.PRE_FAULT_MEMORY]:
            raise ValueError(f"kernel {kernel} has no KVM_PRE_FAULT_MEMORY")
        vm.count, vm.latencies = dict.fromkeys(vm.count, 0), []
        who, paths = vm.paths_of(step, vcpus, step_key(seed, replicate, number))
        ns = vm.run(paths, who, MAX_EVENTS if max_events is None else max_events)
        results.append(Result(OPS[type(step)], ns, vm.count, dict(vm.gauge), sorted(vm.latencies)))
    return end_state(vm, results)
