"""MMU notifiers (virt/kvm/kvm_main.c) and TLB flushes: how what happens to the VMM's page table reaches KVM's."""

from kernels.cost import Cost
from kernels.policy import Behaviour
from kernels.reference_config import Config
from kernels.reference_host import Host
from kernels.reference_sptes import Sptes
from kernels.reference_tasks import Kernel, Path, Scheduler, Task
from kernels.spec import PMD_ORDER, Actor, SptePmd

VCPUS = (Actor.GUEST, Actor.PREFAULT)  # whose thread is kvm_get_running_vcpu()


class MmuNotifier(Scheduler):
    """Both page tables, and what keeps KVM's from being newer or older than the VMM's."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.behaviour = config.behaviour
        self.host = Host(config)
        self.sptes = Sptes(config.orders, config.nx_huge_pages)
        self.seq = 0  # mmu_invalidate_seq
        self.in_progress = 0  # mmu_invalidate_in_progress
        self.range = (0, 0)  # of the invalidations in progress, [start, end) in gfns
        self.logging = False  # KVM_MEM_LOG_DIRTY_PAGES
        self.dirty = False  # the dirty bitmap is not empty

    # ---- Flushes -----------------------------------------------------------------------------------------------------

    def shootdown(self, now: int, targets: list[Task]) -> int:
        """A synchronous IPI to each target: those in the guest exit, lose time, and are not there meanwhile. Returns the sender's ns."""
        for target in targets:
            if self.who == Actor.GUEST and target.in_guest_at(now):
                self.count["exits"] += 1
                target.pml = 0
                target.time += self.costs[Cost.TLB_VICTIM_NS]
                target.entered = now + self.costs[Cost.TLB_VICTIM_NS]
        if not targets:
            return 0
        ns = self.costs[Cost.TLB_FLUSH_NS] + (len(targets) - 1) * self.costs[Cost.TLB_FLUSH_TARGET_NS]
        self.count["tlb_ipis"] += len(targets)
        self.count["flush_ns"] += ns
        return ns

    def flush_remote_tlbs(self, task: Task) -> int:
        """kvm_flush_remote_tlbs(): every other vCPU in the guest."""
        vcpus = self.actors if self.who == Actor.GUEST else []
        targets = [a for a in vcpus if a is not task and a.in_guest_at(task.time) and a.on_cpu]
        self.count["remote_tlb_flush_requests"] += 1
        self.count["remote_tlb_flush"] += bool(targets)
        return self.shootdown(task.time, targets)

    def flush_tlb_mm(self, task: Task) -> int:
        """flush_tlb_mm_range() of the VMM's own page table: every other thread of it on a CPU, in the guest or not."""
        return self.shootdown(task.time, [a for a in self.actors if a is not task and a.kind != Actor.IDLE and a.works])

    # ---- Callbacks ---------------------------------------------------------------------------------------------------

    def hold_mmu_lock(self, task: Task, flush_ns: int) -> Path[None]:
        """The rest of a callback under mmu_lock, its flush included; then the unlock."""
        yield Kernel(self.costs[Cost.MMU_LOCK_WRITE_NS], flush_ns)
        self.unlock(task, self.mmu_lock)

    def invalidate_range_start(self, task: Task, span: range) -> Path[None]:
        """kvm_mmu_notifier_invalidate_range_start(): the range is a union until nothing is in progress any more."""
        start, end = self.config.gfns(span)
        self.count["invalidate_range_start"] += 1
        yield from self.take_mmu_lock(write=True)
        self.range = (min(start, self.range[0]), max(end, self.range[1])) if self.in_progress else (start, end)
        self.in_progress += 1
        zapped = self.sptes.zap_leafs(start, end)
        yield from self.hold_mmu_lock(task, self.flush_remote_tlbs(task) if zapped else 0)

    def change_pte(self, task: Task, page: int) -> Path[None]:
        """kvm_mmu_notifier_change_pte(): finds no SPTE, start zapped it. Patch 2 makes one where a 4K table is."""
        self.count["change_pte"] += 1
        yield from self.take_mmu_lock(write=True)
        if self.behaviour[Behaviour.CHANGE_PTE_PREFETCH] and self.config.tdp and task.kind in VCPUS:
            self.prefetch_own_copy(page - self.config.shift)
        yield from self.hold_mmu_lock(task, 0)

    def prefetch_own_copy(self, gfn: int) -> None:
        """Patch 2 of the thread."""
        if self.sptes.walk(gfn)[0] == 0:
            self.sptes.put(0, gfn, SptePmd.RW)
            self.count["spte_prefetch"] += 1
            self.dirty |= self.logging

    def invalidate_range_end(self, task: Task) -> Path[None]:
        """kvm_mmu_notifier_invalidate_range_end(): here the sequence moves, not at the start."""
        self.count["invalidate_range_end"] += 1
        yield from self.take_mmu_lock(write=True)
        self.seq += 1
        self.in_progress -= 1
        yield from self.hold_mmu_lock(task, 0)

    def set_pte_at_notify(self, task: Task, page: int) -> Path[None]:
        """A PTE was replaced inside a pair: its flush, then change_pte in kernels that have it."""
        yield Kernel(self.costs[Cost.NOTIFIER_NS], self.flush_tlb_mm(task))
        if self.behaviour[Behaviour.CHANGE_PTE]:
            yield from self.change_pte(task, page)
            yield Kernel(self.costs[Cost.NOTIFIER_NS])

    # ---- Faults ------------------------------------------------------------------------------------------------------

    def in_range(self, gfn: int) -> bool:
        """The gfn lies in the union of the ranges being invalidated."""
        return self.in_progress > 0 and self.range[0] <= gfn < self.range[1]

    def is_stale(self, gfn: int, seq: int) -> bool:
        """mmu_invalidate_retry_gfn() [6.12], mmu_invalidate_retry_hva() [6.1]: the address counts only while in progress."""
        return self.in_range(gfn) or self.seq != seq

    def lpage_order(self, gfn: int) -> int:
        """kvm_mmu_max_mapping_level(): the largest leaf that the host's mapping and lpage_info allow."""
        order = self.host.leaf_order(gfn + self.config.shift)
        while order > 0 and not self.config.lpage_allowed(gfn, order):
            order -= PMD_ORDER
        return order
