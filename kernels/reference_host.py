"""The VMM's own page table and the frames behind it as plain state: mm/ without locks, notifiers and time.

Pages are those of the VMA. A region (2 MiB; 1 GiB for 1 GiB hugetlb) has a HostPmd; one with a page table has a HostPte
per page. `rss` and `anon_huge` follow from the entries; `held` is what frames are taken and given back.
"""

from collections import Counter
from collections.abc import Mapping

from kernels.policy import Behaviour
from kernels.reference_config import Config
from kernels.spec import FAULT_AROUND_PAGES, KSM_PAGE_SHARING, PAGE_BYTES, PMD_BYTES, PMD_PAGES, Backing, HostPmd, HostPte

THP = (HostPmd.THP_RW, HostPmd.THP_EX, HostPmd.THP_SH)
HUGETLB = (HostPmd.HUGE_RW, HostPmd.HUGE_RO, HostPmd.HUGE_SH, HostPmd.HUGE_SH_BUSY)
LEAVES = (HostPmd.HZ_RO, HostPmd.SHM_THP, *THP, *HUGETLB)
WRITABLE_LEAVES = (HostPmd.THP_RW, HostPmd.HUGE_RW, HostPmd.SHM_THP)
ANON = (HostPte.ANON_RW, HostPte.ANON_TRW, HostPte.ANON_EX, HostPte.ANON_SH, HostPte.ANON_TSH)
WHOLE = (HostPte.ANON_RW, HostPte.ANON_EX, HostPte.ANON_SH)  # pages with a folio of their own
PARTS = (HostPte.ANON_TRW, HostPte.ANON_TSH)  # pages of a THP's folio
SHARED = (HostPte.ANON_SH, HostPte.ANON_TSH)  # with the child, if it lives
IN_RSS = (*ANON, HostPte.KSM_RO, HostPte.FILE_RO)
ABSENT = (HostPte.NONE, HostPte.CACHED, HostPte.SHM_BUSY)
WRITABLE = (HostPte.ANON_RW, HostPte.ANON_TRW, HostPte.SHM_RW)

FORK_PMD = {
    HostPmd.THP_RW: HostPmd.THP_SH,
    HostPmd.THP_EX: HostPmd.THP_SH,
    HostPmd.HUGE_RW: HostPmd.HUGE_SH,
    HostPmd.HUGE_RO: HostPmd.HUGE_SH,
}
FORK_PTE = {HostPte.ANON_RW: HostPte.ANON_SH, HostPte.ANON_EX: HostPte.ANON_SH, HostPte.ANON_TRW: HostPte.ANON_TSH}
EXIT_PMD = {HostPmd.THP_SH: HostPmd.THP_EX, HostPmd.HUGE_SH: HostPmd.HUGE_RO}
SPLIT_FOLIO = {HostPmd.THP_RW: HostPte.ANON_RW, HostPmd.THP_EX: HostPte.ANON_EX, HostPmd.THP_SH: HostPte.ANON_SH}


class Host:
    """Page table of the VMA, the child, KSM, and memory."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pmds: dict[int, HostPmd] = {}  # by region; missing: NONE
        self.ptes: dict[int, dict[int, HostPte]] = {}  # by region, then by page; missing: NONE
        self.rss = self.anon_huge = self.held = 0  # bytes
        self.anon_vma = False  # fork has to copy the VMA
        self.child = False
        self.child_bytes = 0  # frames that only the child has by now
        self.ksm_sharers = self.ksm_frames = self.ksm_merges = 0

    # ---- Entries -----------------------------------------------------------------------------------------------------

    def region(self, page: int) -> int:
        return page >> self.config.host_order

    def span(self, region: int) -> range:
        """Its pages."""
        return range(region << self.config.host_order, region + 1 << self.config.host_order)

    def pmd(self, region: int) -> HostPmd:
        return self.pmds.get(region, HostPmd.NONE)

    def pte(self, page: int) -> HostPte:
        """NONE also where there is no page table."""
        region = self.region(page)
        return self.ptes[region].get(page, HostPte.NONE) if self.pmd(region) == HostPmd.TBL else HostPte.NONE

    def set_pmd(self, region: int, new: HostPmd) -> None:
        """Entries below stay: those of a page table that is being collapsed are copied later."""
        thps = (new in THP) - (self.pmd(region) in THP)
        self.rss += thps * PMD_BYTES
        self.anon_huge += thps * PMD_BYTES
        self.pmds[region] = new
        if new == HostPmd.TBL:
            self.ptes.setdefault(region, {})

    def set_pte(self, page: int, new: HostPte) -> None:
        ptes = self.ptes[self.region(page)]
        old = ptes.pop(page, HostPte.NONE)
        if new != HostPte.NONE:
            ptes[page] = new
        self.rss += ((new in IN_RSS) - (old in IN_RSS)) * PAGE_BYTES

    def allows(self, page: int, write: bool) -> bool:
        """follow_page_mask() finds the page present with those rights."""
        pmd = self.pmd(self.region(page))
        if pmd == HostPmd.TBL:
            return self.pte(page) in WRITABLE if write else self.pte(page) not in ABSENT
        return pmd in (WRITABLE_LEAVES if write else LEAVES)

    def leaf_order(self, page: int) -> int:
        """host_pfn_mapping_level(): asks nothing but the level."""
        return self.config.host_order if self.pmd(self.region(page)) in LEAVES else 0

    # ---- Frames ------------------------------------------------------------------------------------------------------

    def free(self, nbytes: int, shared: bool) -> None:
        """A frame of ours is no longer mapped: the child keeps what it shares."""
        if shared and self.child:
            self.child_bytes += nbytes
        else:
            self.held -= nbytes

    def free_page(self, pte: HostPte) -> None:
        """What the entry held; pages of the page cache stay there."""
        if pte in ANON:
            self.free(PAGE_BYTES, pte in SHARED)
        elif pte == HostPte.KSM_RO:
            self.ksm_sharers -= 1
            if self.ksm_sharers == 0:
                self.held -= self.ksm_frames * PAGE_BYTES
                self.ksm_frames = 0

    def free_leaf(self, pmd: HostPmd) -> None:
        if pmd in THP or (pmd in HUGETLB and not self.config.shared):
            self.free(self.config.huge_bytes, pmd in (HostPmd.THP_SH, HostPmd.HUGE_SH))

    def new_page(self, page: int) -> None:
        """An anonymous page of our own in place of what was there."""
        self.free_page(self.pte(page))
        self.set_pte(page, HostPte.ANON_RW)
        self.held += PAGE_BYTES

    def reused_as(self, page: int) -> HostPte | None:
        """wp_can_reuse_anon_folio(): what a write makes of a read-only page that nobody shares. None: it is copied."""
        pte = self.pte(page)
        if pte == HostPte.ANON_EX:
            return HostPte.ANON_RW
        if pte != HostPte.ANON_TSH or self.child or not self.config.behaviour[Behaviour.LAST_SUBPAGE_REUSE]:
            return None
        parts = sum(part in PARTS for part in self.ptes[self.region(page)].values())
        return HostPte.ANON_TRW if parts == 1 else None  # the folio's reference count

    # ---- Splits ------------------------------------------------------------------------------------------------------

    @property
    def unshared_part(self) -> HostPte:
        """A part of a THP's folio that nobody shares any more: wp_can_reuse_anon_folio() takes it, or not."""
        return HostPte.ANON_EX if self.config.behaviour[Behaviour.SUBPAGE_REUSE] else HostPte.ANON_TSH

    def split_pmd(self, region: int) -> None:
        """__split_huge_pmd(): the folio stays whole. File PMDs are not split, they vanish."""
        parts = {
            HostPmd.HZ_RO: HostPte.Z_RO,
            HostPmd.THP_RW: HostPte.ANON_TRW,
            HostPmd.THP_SH: HostPte.ANON_TSH,
            HostPmd.THP_EX: self.unshared_part,
        }
        if self.pmd(region) == HostPmd.SHM_THP:
            self.set_pmd(region, HostPmd.CACHED)
        else:
            self.fill_table(region, parts[self.pmd(region)])

    def split_folio(self, region: int) -> None:
        """split_huge_page(): every page of the THP gets a folio of its own."""
        self.fill_table(region, SPLIT_FOLIO[self.pmd(region)])

    def fill_table(self, region: int, pte: HostPte) -> None:
        self.set_pmd(region, HostPmd.TBL)
        for page in self.span(region):
            self.set_pte(page, pte)

    def unshare_folio(self, region: int) -> None:
        """split_huge_page() of a THP whose PMD was split before."""
        alone = {HostPte.ANON_TRW: HostPte.ANON_RW, HostPte.ANON_TSH: HostPte.ANON_SH if self.child else HostPte.ANON_EX}
        self.convert(region, alone)

    def convert(self, region: int, states: Mapping[HostPte, HostPte]) -> None:
        """Entries of a page table turn into others."""
        for page, pte in list(self.ptes[region].items()):
            if pte in states:
                self.set_pte(page, states[pte])

    # ---- The page cache ----------------------------------------------------------------------------------------------

    def map_around(self, page: int) -> None:
        """do_fault_around(): what is in the page cache in the aligned 16 pages around."""
        first = page // FAULT_AROUND_PAGES * FAULT_AROUND_PAGES
        for near in range(first, first + FAULT_AROUND_PAGES):
            if self.pte(near) == HostPte.CACHED:
                self.set_pte(near, HostPte.SHM_RW if self.config.shared else HostPte.FILE_RO)

    # ---- MADV_DONTNEED -----------------------------------------------------------------------------------------------

    def zap_leaf(self, region: int) -> None:
        """zap_huge_pmd(), __unmap_hugepage_range(): shared memory stays in the page cache."""
        self.free_leaf(self.pmd(region))
        self.set_pmd(region, HostPmd.CACHED if self.config.shared else HostPmd.NONE)

    def zap_pages(self, region: int, span: range) -> int:
        """zap_pte_range(). Returns how many entries went."""
        gone = [(page, pte) for page, pte in self.ptes[region].items() if page in span and pte not in ABSENT]
        cached = self.config.shared or self.config.backing == Backing.PRIVATE_MEMFD
        for page, pte in gone:
            self.free_page(pte)
            self.set_pte(page, HostPte.CACHED if cached else HostPte.NONE)
        return len(gone)

    # ---- Collapse ----------------------------------------------------------------------------------------------------

    def can_collapse(self, region: int, max_none: int, max_shared: int, read_only: bool) -> bool:
        """hpage_collapse_scan_pmd(); `read_only`: no page needs to be writable, but thp_vma_allowable_order() asks for an anon_vma."""
        if self.pmd(region) != HostPmd.TBL:
            return False
        states = Counter(self.ptes[region].values())
        none = PMD_PAGES - states.total() + states[HostPte.Z_RO]
        shared = states[HostPte.ANON_SH] + states[HostPte.ANON_TSH] + states[HostPte.KSM_RO]
        enough = any(states[pte] for pte in WRITABLE) or (read_only and self.anon_vma)
        return none <= max_none and shared <= max_shared and enough

    def to_copy(self, region: int) -> int:
        """How many pages a collapse copies; it clears the rest."""
        return sum(pte != HostPte.Z_RO for pte in self.ptes[region].values())

    def collapse(self, region: int) -> None:
        """A new THP in place of the page table and its pages."""
        for pte in self.ptes.pop(region).values():
            self.free_page(pte)
            self.rss -= PAGE_BYTES * (pte in IN_RSS)
        self.set_pmd(region, HostPmd.THP_RW)
        self.held += PMD_BYTES

    # ---- KSM ---------------------------------------------------------------------------------------------------------

    @property
    def next_merge_is_first(self) -> bool:
        """max_page_sharing: so often a page does not join a KSM page, but becomes one."""
        return self.ksm_merges % KSM_PAGE_SHARING == 0

    def merge_page(self, page: int) -> None:
        """The page becomes the KSM page, or (replace_page()) is given back for it."""
        if self.next_merge_is_first:
            self.ksm_frames += 1
        else:
            self.free_page(self.pte(page))
        self.ksm_merges += 1
        self.ksm_sharers += 1
        self.set_pte(page, HostPte.KSM_RO)
