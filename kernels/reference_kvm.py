"""KVM's fault path and the actors that walk it: arch/x86/kvm/mmu/ and virt/kvm/kvm_main.c of 6.1 and 6.12.

Each actor (a vCPU, a VMM thread in MADV_POPULATE_*, a KVM_PRE_FAULT_MEMORY loop) is a generator that follows the path of
the kernel functions it names; reference_tasks.py says what its yields mean and whose turn it is.
"""

from collections.abc import Iterator

from kernels.cost import Cost
from kernels.policy import Behaviour
from kernels.reference_config import Config
from kernels.reference_mm import PrimaryMmu
from kernels.reference_skip import SkippedHits, skip_hits
from kernels.reference_sptes import TABLES, WRITABLE, is_leaf
from kernels.reference_tasks import Entry, Guest, Kernel, Path, Task, Wait
from kernels.reference_workload import Accesses
from kernels.spec import PAGE_BYTES, PMD_ORDER, PML_ENTRIES, PREFETCH_PAGES, Access, Outcome, SptePmd
from kernels.steps import Touch

SHORTEST_RETRY_NS = 1  # while something is being invalidated, or that would never end


class Kvm(PrimaryMmu):
    """The VM: faults of its vCPUs, and the VMM's loops over its memory."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.latencies: list[int] = []

    # ---- vCPU: exits -------------------------------------------------------------------------------------------------

    def vcpu(self, task: Task, accesses: Accesses, think_ns: int) -> Iterator[Wait]:
        """Guest code: every access is executed again until its SPTE allows it."""
        for gfn, access in accesses:
            self.count["touches"] += 1
            self.count["writes" if access == Access.WRITE else "reads"] += 1
            self.count["hits"] += self.sptes.allows(gfn, access)
            while not self.sptes.allows(gfn, access):
                yield from self.handle_exit(task, gfn, access)
            log_ns = self.log_write(task, gfn) if access == Access.WRITE else 0
            yield Guest(self.costs[Cost.TOUCH_NS] + think_ns + log_ns)

    def skipping_vcpu(self, task: Task, step: Touch, start: int, n: int, touches: int, key: int) -> Iterator[Wait]:
        """A vcpu() whose hits, but for the first reads and writes of its n units, are counted at the end."""
        hits = SkippedHits()
        firsts = skip_hits(step, key, n, touches, hits) if n else iter(())
        yield from self.vcpu(task, (((start + unit * step.every) // PAGE_BYTES, access) for unit, access in firsts), step.think_ns)
        writes = hits.writes(key)
        for name, number in (("touches", hits.count), ("hits", hits.count), ("writes", writes), ("reads", hits.count - writes)):
            self.count[name] += number
        yield Guest(hits.count * (self.costs[Cost.TOUCH_NS] + step.think_ns))

    def log_write(self, task: Task, gfn: int) -> int:
        """The processor sets the Dirty bit; with PML it logs that, and exits when the log is full. Returns that exit's ns."""
        if not self.sptes.set_dirty(gfn) or not (self.logging and self.config.pml):
            return 0
        self.dirty = True
        task.pml += 1
        if task.pml < PML_ENTRIES:
            return 0
        self.count["exits"] += 1
        task.pml = 0
        return self.costs[Cost.VM_EXIT_NS] + self.costs[Cost.PML_FULL_NS]

    def handle_exit(self, task: Task, gfn: int, access: Access) -> Path[None]:
        """handle_ept_violation() / npf_interception(), kvm_mmu_page_fault(): RETRY goes back into the guest as well."""
        exit_ns, fault_ns = self.costs[Cost.VM_EXIT_NS], self.costs[Cost.KVM_FAULT_NS]
        self.count["exits"] += 1
        self.count["pf_taken"] += 1
        task.pml = 0
        present = self.sptes.allows(gfn, Access.READ)  # PFERR_PRESENT_MASK: a leaf is there
        exited = task.time
        yield Kernel(exit_ns // 2 + fault_ns // 2)
        outcome = self.fast_page_fault(gfn) if present and access == Access.WRITE else None
        if outcome is None:
            outcome = yield from self.page_fault(task, gfn, access, prefetch=False)
        self.count["pf_" + outcome.name.lower()] += 1
        back_ns = exit_ns - exit_ns // 2 + fault_ns - fault_ns // 2
        if outcome == Outcome.RETRY and self.in_progress:
            back_ns = max(SHORTEST_RETRY_NS, back_ns)
        latency = task.time + self.scaled(task, back_ns) - exited
        self.count["fault_ns"] += latency
        self.latencies.append(latency)
        yield Entry(back_ns)

    def fast_page_fault(self, gfn: int) -> Outcome | None:
        """fast_page_fault() of a write, for direct MMUs: no lock. None: it cannot help."""
        if not self.config.lockless_fixes:
            return None
        order, leaf = self.sptes.walk(gfn)
        if leaf in WRITABLE:  # "some other CPU has already fixed the PTE after the current CPU took the fault"
            self.count["pf_fast"] += 1
            return Outcome.SPURIOUS
        if leaf != SptePmd.WP or (order > 0 and self.logging):
            return None
        self.sptes.put(order, gfn, SptePmd.RW)
        self.dirty |= self.logging
        self.count["pf_fast"] += 1
        return Outcome.FIXED

    # ---- One fault ---------------------------------------------------------------------------------------------------

    def page_fault(self, task: Task, gfn: int, access: Access, prefetch: bool) -> Path[Outcome]:
        """kvm_tdp_mmu_page_fault(), direct_page_fault(), FNAME(page_fault), fast_page_fault() left out."""
        precheck = self.behaviour[Behaviour.STALE_PRECHECK]
        seq = self.seq  # before GUP: an invalidation during GUP must be seen, this fault's own too
        if precheck and self.in_range(gfn):
            return Outcome.RETRY
        map_writable = yield from self.hva_to_pfn(task, gfn, access == Access.WRITE)
        if precheck and self.is_stale(gfn, seq):
            return Outcome.RETRY
        yield from self.take_mmu_lock(write=not self.config.tdp)
        outcome, flush = Outcome.RETRY, False
        if not self.is_stale(gfn, seq):
            outcome, flush = self.map_leaf(gfn, access, map_writable, prefetch)
        held = self.costs[Cost.MMU_LOCK_READ_NS] + (0 if self.config.tdp else self.costs[Cost.LEGACY_FAULT_NS])
        yield Kernel(held, self.flush_remote_tlbs(task) if flush else 0)
        self.unlock(task, self.mmu_lock)
        return outcome

    def hva_to_pfn(self, task: Task, gfn: int, write: bool) -> Path[bool]:
        """virt/kvm/kvm_main.c hva_to_pfn(): fast for write, slow, and a read once more fast for write. Returns map_writable."""
        page = gfn + self.config.shift
        foll_write = write or bool(self.behaviour[Behaviour.ALWAYS_WRITABLE])
        gup_fast = self.costs[Cost.GUP_FAST_NS]
        if self.host.allows(page, write=True):  # get_user_page_fast_only(FOLL_WRITE), for reads too: the slot is writable
            self.count["gup_fast"] += 1
            yield Kernel(gup_fast)
            return True
        self.count["gup_slow"] += 1
        yield Kernel(gup_fast + self.costs[Cost.GUP_SLOW_NS])
        yield from self.get_user_pages(task, page, foll_write)
        map_writable = self.host.allows(page, write=True)
        yield Kernel(0 if foll_write else gup_fast)
        return map_writable

    # ---- Level and leaf ----------------------------------------------------------------------------------------------

    def goal_order(self, gfn: int, access: Access) -> int:
        """kvm_mmu_hugepage_adjust(), disallowed_hugepage_adjust()."""
        nx, fetch = self.config.nx_huge_pages, access == Access.EXEC
        if self.logging or (nx and fetch):
            return 0
        order = min(self.lpage_order(gfn), self.config.guest_order)
        barring = (SptePmd.T_NX,) if self.behaviour[Behaviour.NX_MARKED_TABLES] else TABLES
        while nx and order > 0 and self.sptes.at(order, gfn) in barring:
            order -= PMD_ORDER
        return order

    def map_leaf(self, gfn: int, access: Access, map_writable: bool, prefetch: bool) -> tuple[Outcome, bool]:
        """kvm_tdp_mmu_map(), direct_map(), FNAME(fetch): the outcome, and whether a flush is due."""
        order = self.goal_order(gfn, access)
        fetch = self.config.nx_huge_pages and access == Access.EXEC  # huge_page_disallowed
        table = SptePmd.T_NX if fetch else SptePmd.T
        in_place = self.config.tdp and bool(self.behaviour[Behaviour.SPLIT_HUGE_SPTE])
        flush = self.sptes.make_way(gfn, order, table, in_place)
        old = self.sptes.at(order, gfn)
        if self.leaf_stays(order, old, access, prefetch):
            return Outcome.SPURIOUS, flush
        new = self.make_spte(old, map_writable)
        self.dirty |= self.logging and new in WRITABLE
        if new == old:
            return Outcome.SPURIOUS, flush
        self.sptes.put(order, gfn, new)
        if not self.config.tdp:
            flush |= old == SptePmd.RW and new == SptePmd.RW_CLEAN  # mmu_spte_update(): a Dirty bit went
            if order == 0 and self.in_progress == 0 and not self.logging:
                self.pte_prefetch(gfn)
        return Outcome.FIXED, flush

    def leaf_stays(self, order: int, old: SptePmd, access: Access, prefetch: bool) -> bool:
        """6.13: "if (is_shadow_present_pte(old) && (fault->prefetch || is_access_allowed(fault, old)))"; without TDP the former."""
        if not self.behaviour[Behaviour.DUPLICATE_IS_SPURIOUS]:
            return False
        if prefetch:
            return is_leaf(old)
        return self.config.tdp and self.sptes.leaf_allows(order, old, access)

    def make_spte(self, old: SptePmd, map_writable: bool) -> SptePmd:
        """The entry written anew; over a writable one make_spte() left the Dirty bit out."""
        if not map_writable:
            return SptePmd.RO
        return SptePmd.RW_CLEAN if old in WRITABLE and self.behaviour[Behaviour.REWRITE_DROPS_DIRTY] else SptePmd.RW

    def pte_prefetch(self, gfn: int) -> None:
        """direct_pte_prefetch() run by run, FNAME(pte_prefetch) entry by entry: the group of 8 around a new 4K leaf."""
        first = gfn // PREFETCH_PAGES * PREFETCH_PAGES
        run: list[int] = []
        for near in range(first, first + PREFETCH_PAGES):
            if not is_leaf(self.sptes.at(0, near)):
                run.append(near)
                if self.config.direct:
                    continue
            if run and not self.prefetch_many(run):
                return
            run = []
        if run:
            self.prefetch_many(run)

    def prefetch_many(self, run: list[int]) -> bool:
        """direct_pte_prefetch_many(), FNAME(prefetch_gpte). False: it got nothing."""
        if run[-1] >= self.config.pages:  # gfn_to_page_many_atomic(): beyond the slot
            return False
        for i, gfn in enumerate(run):
            if not self.host.allows(gfn + self.config.shift, write=True):
                return i > 0
            self.sptes.put(0, gfn, SptePmd.RW)
        return True

    # ---- The VMM's own loops -----------------------------------------------------------------------------------------

    def populate(self, task: Task, part: range, write: bool) -> Iterator[Wait]:
        """madvise_populate(): faults the pages of the slot in, from mapping to mapping; KVM's page table stays as it is."""
        page, end = part.start + self.config.shift, part.stop + self.config.shift
        while page < end:
            yield Kernel(self.costs[Cost.GUP_SLOW_NS])
            yield from self.get_user_pages(task, page, write)
            order = self.host.leaf_order(page)
            page = (page >> order) + 1 << order
            yield Guest(0)

    def pre_fault_memory(self, task: Task) -> Iterator[Wait]:
        """kvm_arch_vcpu_pre_fault_memory(): read faults with prefetch = true, RETRY loops in kvm_tdp_map_page()."""
        gfn = 0
        while gfn < self.config.pages:
            outcome, least_ns = Outcome.RETRY, 0
            while outcome == Outcome.RETRY:
                yield Kernel(max(least_ns, self.costs[Cost.KVM_FAULT_NS]))
                outcome = yield from self.page_fault(task, gfn, Access.READ, prefetch=True)
                least_ns = SHORTEST_RETRY_NS if self.in_progress else 0
            order = self.sptes.walk(gfn)[0]
            gfn = (gfn >> order) + 1 << order
            yield Guest(0)

    def host_touch(self, task: Task, gfns: Iterator[int], write: bool) -> Iterator[Wait]:
        """The VMM's own instructions: exc_page_fault() where its page table does not allow the access."""
        for gfn in gfns:
            page = gfn + self.config.shift
            if not self.host.allows(page, write):
                yield Kernel(self.costs[Cost.GUP_SLOW_NS])
                yield from self.get_user_pages(task, page, write)
            yield Guest(self.costs[Cost.TOUCH_NS])

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
