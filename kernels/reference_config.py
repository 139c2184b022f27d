"""What a point is: geometry of slot and VMA, the backing's traits, KVM's settings. Read, never written, by reference_*.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kernels.cost import Cost
from kernels.policy import Behaviour
from kernels.spec import PAGE_BYTES, PMD_ORDER, PUD_ORDER, Backing, Mmu, ThpEnabled

GIGANTIC = (Backing.ANONYMOUS_HUGETLB_1GB, Backing.SHARED_HUGETLB_1GB)
PRIVATE_HUGETLB = (Backing.ANONYMOUS_HUGETLB_2MB, Backing.ANONYMOUS_HUGETLB_1GB)
SHARED_HUGETLB = (Backing.SHARED_HUGETLB_2MB, Backing.SHARED_HUGETLB_1GB)
ANONYMOUS = (Backing.ANONYMOUS, Backing.ANONYMOUS_THP, Backing.ANONYMOUS_DEFAULT)
SHMEM = (Backing.SHMEM, Backing.SHMEM_THP)


@dataclass(frozen=True)
class Config:
    """One VM with one memslot."""

    pages: int  # of the slot
    backing: Backing
    behaviour: Mapping[Behaviour, int]
    costs: Mapping[Cost, int]
    thp_enabled: ThpEnabled
    use_zero_page: bool
    thp_failure: float
    offset: int  # bytes
    mmu: Mmu
    guest_page: int  # bytes; shadow paging only
    nx_huge_pages: bool
    eager_page_split: bool
    pml: bool
    cores: int | None  # of the host, for the vCPUs; None: each has a CPU of its own
    smt: int  # hardware threads per core

    # ---- Geometry ----------------------------------------------------------------------------------------------------

    @cached_property
    def host_order(self) -> int:
        """Of a host region."""
        return PUD_ORDER if self.backing in GIGANTIC else PMD_ORDER

    @cached_property
    def huge_bytes(self) -> int:
        return PAGE_BYTES << self.host_order

    @cached_property
    def shift(self) -> int:
        """Page of the VMA that is gfn 0 of the slot."""
        return self.offset // PAGE_BYTES % (1 << self.host_order)

    @cached_property
    def regions(self) -> int:
        """Host regions of the VMA, which ends at the next host page behind the slot."""
        return -(-(self.shift + self.pages) >> self.host_order)

    def gfns(self, span: range) -> tuple[int, int]:
        """The part of the slot, [start, end), behind these pages of the VMA."""
        return max(0, span.start - self.shift), min(self.pages, span.stop - self.shift)

    # ---- CPUs --------------------------------------------------------------------------------------------------------

    def cpus(self, vcpus: int) -> int:
        """How many so many vCPUs have together."""
        return vcpus if self.cores is None else min(vcpus, self.cores * self.smt)

    # ---- KVM ---------------------------------------------------------------------------------------------------------

    @cached_property
    def tdp(self) -> bool:
        return self.mmu == Mmu.TDP

    @cached_property
    def lockless_fixes(self) -> bool:
        """page_fault_can_be_fast(): "KVM only supports fixing page faults outside of MMU lock for direct MMUs"."""
        return self.mmu != Mmu.SHADOW

    @cached_property
    def orders(self) -> tuple[int, ...]:
        """Of KVM's entries, the highest first; 1G entries only where a leaf can be one."""
        return (PUD_ORDER, PMD_ORDER, 0) if self.backing in GIGANTIC else (PMD_ORDER, 0)

    @cached_property
    def guest_order(self) -> int:
        """Under shadow paging a leaf is no larger than the guest's own."""
        if self.mmu != Mmu.SHADOW:
            return PUD_ORDER
        return 0 if self.guest_page == PAGE_BYTES else PMD_ORDER

    @cached_property
    def direct(self) -> bool:
        """KVM's tables of 4K entries are direct: all but those that shadow the guest's own."""
        return self.guest_order > 0

    def lpage_allowed(self, gfn: int, order: int) -> bool:
        """lpage_info: slot and VMA are aligned to each other, and the slot holds the whole of it."""
        return self.shift % (1 << order) == 0 and ((gfn >> order) + 1) << order <= self.pages

    # ---- Backing -----------------------------------------------------------------------------------------------------

    @cached_property
    def hugetlb(self) -> bool:
        return self.backing in PRIVATE_HUGETLB + SHARED_HUGETLB

    @cached_property
    def anonymous(self) -> bool:
        """Private, without a file behind it, no hugetlb."""
        return self.backing in ANONYMOUS

    @cached_property
    def shared(self) -> bool:
        return self.backing in SHARED_HUGETLB + SHMEM

    @cached_property
    def thp(self) -> bool:
        """A fault on an empty region makes an anonymous THP: MADV_HUGEPAGE, or thp_enabled = always."""
        if self.backing == Backing.ANONYMOUS_THP:
            return self.thp_enabled != ThpEnabled.NEVER
        return self.backing == Backing.ANONYMOUS_DEFAULT and self.thp_enabled == ThpEnabled.ALWAYS
