"""handle_mm_fault() in virtual time: mm/memory.c, mm/huge_memory.c, mm/hugetlb.c, mm/shmem.c of 6.1 and 6.12."""

from kernels.cost import Cost
from kernels.policy import Behaviour
from kernels.reference_config import Config
from kernels.reference_notifier import MmuNotifier
from kernels.reference_tasks import Kernel, Path, SleepOnPage, Take, Task
from kernels.reference_workload import FOR_THP, THP_FAILURE, happens
from kernels.spec import PAGE_BYTES, PMD_BYTES, Actor, Backing, HostPmd, HostPte

COPIED = (HostPte.Z_RO, HostPte.ANON_SH, HostPte.ANON_TSH, HostPte.KSM_RO, HostPte.FILE_RO)  # on a write, inside a pair
REUSED = {HostPmd.THP_EX: HostPmd.THP_RW, HostPmd.HUGE_RO: HostPmd.HUGE_RW}
BUSY = (HostPmd.HUGE_BUSY, HostPmd.HUGE_SH_BUSY)


class PrimaryMmu(MmuNotifier):
    """The VMM's page table, and what its page faults do. `key` is the present step's, for what is left to chance."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.key = 0

    # ---- GUP ---------------------------------------------------------------------------------------------------------

    def get_user_pages(self, task: Task, page: int, write: bool) -> Path[None]:
        """__get_user_pages(): follow_page_mask() and faultin_page() until the page is there with the rights asked for."""
        yield Take(self.mmap_lock, write=False)
        counted = False
        while not self.host.allows(page, write):
            if not counted:
                self.count_fault()
            counted = yield from self.handle_mm_fault(task, page, write)
        self.unlock(task, self.mmap_lock)

    def count_fault(self) -> None:
        """Up to 6.5 follow_hugetlb_page() calls hugetlb_fault() past handle_mm_fault(), which counts."""
        if not self.config.hugetlb or self.behaviour[Behaviour.HUGETLB_PGFAULT] or self.who == Actor.HOST:
            self.count["pgfault" if self.who == Actor.GUEST else "vmm_pgfault"] += 1

    # ---- Work and memory ---------------------------------------------------------------------------------------------

    def clear(self, nbytes: int) -> int:
        """clear_page() / clear_huge_page() of fresh memory; returns ns."""
        huge = nbytes >= PMD_BYTES
        ns = nbytes // PMD_BYTES * self.costs[Cost.CLEAR_2M_NS] if huge else self.costs[Cost.CLEAR_4K_NS]
        self.count["bytes_cleared"] += nbytes
        self.count["clear_ns"] += ns
        return ns

    def copy(self, nbytes: int) -> int:
        """copy_user_highpage() / copy_user_large_folio(); returns ns."""
        self.count["bytes_copied"] += nbytes
        return nbytes // PMD_BYTES * self.costs[Cost.COPY_2M_NS] if nbytes >= PMD_BYTES else self.costs[Cost.COPY_4K_NS]

    def fault_work(self, task: Task, ns: int, *, allocates: int = 0, clears: int = 0, copies: int = 0) -> Kernel:
        """What a fault does before it sets the entry: a page of so many bytes from the buddy allocator, bytes to clear and to copy."""
        memory_ns = (self.clear(clears) if clears else 0) + (self.copy(copies) if copies else 0)
        delay = self.refill(task, allocates) if allocates else 0
        return Kernel(ns + memory_ns, delay + self.move(task, clears + 2 * copies, memory_ns))

    def no_huge_page(self, region: int) -> bool:
        """The allocation of a huge page for that region fails, all through the step."""
        return happens(self.key ^ THP_FAILURE, FOR_THP, region, self.config.thp_failure)

    def sleep_on(self, page: int) -> Path[bool]:
        """Somebody else holds the page's lock; the walk that follows belongs to the same handle_mm_fault()."""
        yield SleepOnPage(page)
        return True

    # ---- Dispatch ----------------------------------------------------------------------------------------------------

    def handle_mm_fault(self, task: Task, page: int, write: bool) -> Path[bool]:
        """handle_mm_fault(). True if it slept for a page's lock and goes on in the next walk."""
        region = self.host.region(page)
        pmd = self.host.pmd(region)
        if pmd in BUSY:
            return (yield from self.sleep_on(self.host.span(region).start))
        if pmd == HostPmd.CACHED:
            yield from self.map_cached_huge(region)
        elif pmd in REUSED:
            yield from self.reuse_huge(region)
        elif self.config.hugetlb:
            yield from self.hugetlb_fault(task, region, write)
        elif pmd == HostPmd.NONE and (yield from self.create_huge_pmd(task, region, write)):
            return False
        elif pmd in (HostPmd.HZ_RO, HostPmd.THP_SH):
            yield from self.wp_huge_pmd(task, page)
        else:
            return (yield from self.handle_pte_fault(task, page, write))
        return False

    def handle_pte_fault(self, task: Task, page: int, write: bool) -> Path[bool]:
        """handle_pte_fault(), below a page table that is allocated first."""
        self.host.set_pmd(self.host.region(page), HostPmd.TBL)  # __pte_alloc()
        reused = self.host.reused_as(page)
        match self.host.pte(page):
            case HostPte.SHM_BUSY:
                return (yield from self.sleep_on(page))
            case HostPte.NONE if self.config.anonymous:
                yield from self.do_anonymous_page(task, page, write)
            case HostPte.NONE | HostPte.CACHED:
                yield from self.do_fault(task, page, write)
            case _ if reused is not None:
                yield from self.wp_page_reuse(page, reused)
            case _:
                yield from self.wp_page_copy(task, page)
        return False

    # ---- 4K pages ----------------------------------------------------------------------------------------------------

    def do_anonymous_page(self, task: Task, page: int, write: bool) -> Path[None]:
        """A read maps the zero page whatever use_zero_page says. The PTE is checked again under its lock."""
        if not write:
            yield Kernel(self.costs[Cost.ZERO_MAP_NS])
            if self.host.pte(page) == HostPte.NONE:
                self.host.set_pte(page, HostPte.Z_RO)
                self.count["zero_page_maps"] += 1
            return
        self.host.anon_vma = True
        yield self.fault_work(task, self.costs[Cost.ANON_FAULT_NS], allocates=PAGE_BYTES, clears=PAGE_BYTES)
        if self.host.pte(page) == HostPte.NONE:
            self.host.new_page(page)
        else:
            self.count["bytes_cleared_wasted"] += PAGE_BYTES

    def do_fault(self, task: Task, page: int, write: bool) -> Path[None]:
        """do_read_fault(), do_shared_fault(); do_cow_fault() of a private file. A new page-cache page is locked meanwhile."""
        found = self.host.pte(page)
        cow = write and not self.config.shared
        ns = self.costs[Cost.ANON_FAULT_NS] if cow else 0
        self.host.anon_vma |= cow
        if found == HostPte.NONE:  # shmem_get_folio()
            ns += self.costs[Cost.SHMEM_FAULT_NS]
            self.host.set_pte(page, HostPte.SHM_BUSY)
        elif not cow:
            ns += self.costs[Cost.FILE_MAP_NS]
        new = found == HostPte.NONE
        allocates = PAGE_BYTES if new or cow else 0
        yield self.fault_work(task, ns, allocates=allocates, clears=PAGE_BYTES if new else 0, copies=PAGE_BYTES if cow else 0)
        if found == HostPte.NONE:
            self.host.held += PAGE_BYTES
            self.host.set_pte(page, HostPte.CACHED)
            self.unlock_page(task, page)
        if self.host.pte(page) == HostPte.CACHED:
            self.finish_fault(page, cow)
        if not write:
            self.host.map_around(page)

    def finish_fault(self, page: int, cow: bool) -> None:
        """What is in the page cache gets mapped, or a copy of it."""
        if cow:
            self.host.new_page(page)
        else:
            self.host.set_pte(page, HostPte.SHM_RW if self.config.shared else HostPte.FILE_RO)

    def wp_page_reuse(self, page: int, new: HostPte) -> Path[None]:
        """The page is ours alone."""
        old = self.host.pte(page)
        yield Kernel(self.costs[Cost.REUSE_NS])
        if self.host.pte(page) == old:
            self.host.set_pte(page, new)
            self.count["cow_reuse"] += 1

    def wp_page_copy(self, task: Task, page: int) -> Path[None]:
        """The copy is made first; pte_same() decides inside the invalidation."""
        old = self.host.pte(page)
        self.host.anon_vma = True
        notifier = self.costs[Cost.NOTIFIER_NS]
        clears, copies = (PAGE_BYTES, 0) if old == HostPte.Z_RO else (0, PAGE_BYTES)
        yield self.fault_work(task, notifier + self.costs[Cost.COW_4K_NS], allocates=PAGE_BYTES, clears=clears, copies=copies)
        yield from self.invalidate_range_start(task, range(page, page + 1))
        if self.host.pte(page) == old:
            self.host.new_page(page)
            self.count["cow_4k"] += 1
            self.count["cow_ksm"] += old == HostPte.KSM_RO
            yield from self.set_pte_at_notify(task, page)
        else:
            self.count["bytes_cleared_wasted"] += PAGE_BYTES * (old == HostPte.Z_RO)
            yield Kernel(notifier)
        yield from self.invalidate_range_end(task)

    # ---- THP ---------------------------------------------------------------------------------------------------------

    def create_huge_pmd(self, task: Task, region: int, write: bool) -> Path[bool]:
        """create_huge_pmd() of an empty entry. False: no huge page, the same fault goes on with a page table."""
        if self.config.backing == Backing.SHMEM_THP:
            if self.no_huge_page(region):
                return False
            yield from self.fill_huge(task, region, self.costs[Cost.THP_FAULT_NS], HostPmd.SHM_THP)
            return True
        if not self.config.thp:
            return False
        self.host.anon_vma = True
        if not write and self.config.use_zero_page:
            yield from self.set_huge_zero_folio(region)
            return True
        if self.thp_falls_back(region):
            return False
        yield self.fault_work(task, self.costs[Cost.THP_FAULT_NS], allocates=PMD_BYTES, clears=PMD_BYTES)
        self.map_thp(region, over=HostPmd.NONE)
        return True

    def thp_falls_back(self, region: int) -> bool:
        """vma_alloc_folio() of a THP fails."""
        fails = self.no_huge_page(region)
        self.count["thp_fault_fallback"] += fails
        return fails

    def set_huge_zero_folio(self, region: int) -> Path[None]:
        yield Kernel(self.costs[Cost.HUGE_ZERO_MAP_NS])
        if self.host.pmd(region) == HostPmd.NONE:
            self.host.set_pmd(region, HostPmd.HZ_RO)
            self.count["huge_zero_maps"] += 1

    def map_thp(self, region: int, over: HostPmd) -> bool:
        """map_anon_folio_pmd(), if the PMD is still as it was; else the folio was cleared in vain."""
        if self.host.pmd(region) != over:
            self.count["bytes_cleared_wasted"] += PMD_BYTES
            return False
        self.host.set_pmd(region, HostPmd.THP_RW)
        self.host.held += PMD_BYTES
        self.count["thp_fault_alloc"] += 1
        return True

    def wp_huge_pmd(self, task: Task, page: int) -> Path[None]:
        """do_huge_pmd_wp_page(): a THP for the huge zero page, or VM_FAULT_FALLBACK: split, and on to the page itself."""
        region = self.host.region(page)
        huge_zero = self.host.pmd(region) == HostPmd.HZ_RO
        if huge_zero and self.behaviour[Behaviour.HUGE_ZERO_WRITE_THP] and not self.thp_falls_back(region):
            yield from self.do_huge_zero_wp_pmd(task, region)
            return
        yield from self.split_huge_pmd(task, region)
        if self.host.pte(page) in COPIED:
            yield from self.wp_page_copy(task, page)

    def do_huge_zero_wp_pmd(self, task: Task, region: int) -> Path[None]:
        """6.13: clears a THP first, then invalidates 2 MiB even if another task was faster."""
        notifier = self.costs[Cost.NOTIFIER_NS]
        yield self.fault_work(task, notifier + self.costs[Cost.HUGE_ZERO_THP_NS], allocates=PMD_BYTES, clears=PMD_BYTES)
        yield from self.invalidate_range_start(task, self.host.span(region))
        mapped = self.map_thp(region, over=HostPmd.HZ_RO)
        yield Kernel(notifier, self.flush_tlb_mm(task) if mapped else 0)
        yield from self.invalidate_range_end(task)

    def split_huge_pmd(self, task: Task, region: int) -> Path[None]:
        """__split_huge_pmd(): invalidates before the PMD is looked at again."""
        old, notifier, flush_ns = self.host.pmd(region), self.costs[Cost.NOTIFIER_NS], 0
        yield Kernel(notifier)
        yield from self.invalidate_range_start(task, self.host.span(region))
        if self.host.pmd(region) == old:
            self.host.split_pmd(region)
            self.count["thp_split_pmd"] += 1
            flush_ns = self.flush_tlb_mm(task)
        wait = self.lock_page_table(task, self.host.span(region).start)
        yield Kernel(self.costs[Cost.SPLIT_PMD_NS] + notifier, flush_ns + wait)
        yield from self.invalidate_range_end(task)

    # ---- Huge pages of any kind --------------------------------------------------------------------------------------

    def fill_huge(self, task: Task, region: int, fault_ns: int, leaf: HostPmd) -> Path[None]:
        """shmem_get_folio(), hugetlb_no_page(): cleared under the folio's lock or hugetlb_fault_mutex. Hugetlb has its own pool."""
        self.host.set_pmd(region, HostPmd.HUGE_BUSY)
        allocates = 0 if self.config.hugetlb else PMD_BYTES
        yield self.fault_work(task, fault_ns, allocates=allocates, clears=self.config.huge_bytes)
        self.host.set_pmd(region, leaf)
        self.host.held += self.config.huge_bytes
        self.unlock_page(task, self.host.span(region).start)

    def map_cached_huge(self, region: int) -> Path[None]:
        """It is in the page cache."""
        yield Kernel(self.costs[Cost.FILE_MAP_NS])
        if self.host.pmd(region) == HostPmd.CACHED:
            self.host.set_pmd(region, HostPmd.HUGE_RW if self.config.hugetlb else HostPmd.SHM_THP)

    def reuse_huge(self, region: int) -> Path[None]:
        """do_huge_pmd_wp_page(), hugetlb_wp() of a page that nobody shares."""
        old = self.host.pmd(region)
        yield Kernel(self.costs[Cost.REUSE_NS])
        if self.host.pmd(region) == old:
            self.host.set_pmd(region, REUSED[old])
            self.count["cow_reuse"] += 1

    def hugetlb_fault(self, task: Task, region: int, write: bool) -> Path[None]:
        """hugetlb_no_page() leaves a private read's page read-only; hugetlb_wp() copies what a child shares."""
        self.host.anon_vma |= not self.config.shared
        if self.host.pmd(region) == HostPmd.NONE:
            leaf = HostPmd.HUGE_RW if write or self.config.shared else HostPmd.HUGE_RO
            yield from self.fill_huge(task, region, self.costs[Cost.HUGETLB_FAULT_NS], leaf)
        else:
            yield from self.hugetlb_wp(task, region)

    def hugetlb_wp(self, task: Task, region: int) -> Path[None]:
        """Under hugetlb_fault_mutex, so nobody else can be faster."""
        notifier, span = self.costs[Cost.NOTIFIER_NS], self.host.span(region)
        self.host.set_pmd(region, HostPmd.HUGE_SH_BUSY)
        yield self.fault_work(task, notifier + self.costs[Cost.HUGETLB_FAULT_NS], copies=self.config.huge_bytes)
        yield from self.invalidate_range_start(task, span)
        self.host.free_leaf(HostPmd.HUGE_SH)
        self.host.held += self.config.huge_bytes
        self.host.set_pmd(region, HostPmd.HUGE_RW)
        self.count["cow_huge"] += 1
        yield Kernel(notifier, self.flush_tlb_mm(task))
        yield from self.invalidate_range_end(task)
        self.unlock_page(task, span.start)
