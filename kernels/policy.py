"""The policy table: what each kernel regime and each proposal does, one row each, one column per behaviour.

A new kernel regime is one row of REGIMES (the columns it does not name stay as in the row before);
a proposal is one row of PROPOSALS. New behaviour is one column of Behaviour and one rule that reads it.
The row reaches the jitted code as an int64 vector, so that one compiled kernel serves all policies.
"""

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Behaviour(IntEnum):
    """Columns. Values are 0/1, or as said."""

    CHANGE_PTE = 0
    """The change_pte notifier exists: mmu_lock for write once more per CoW. Dead in effect since 6bdb913f0a70 (3.7);
    deleted by f3b65bbaed7c, 997308f9ae72, f7842747d13d (6.10)."""
    CHANGE_PTE_PREFETCH = 1
    """change_pte installs the new page's SPTE where a 4K table exists: patch 2 of the thread,
    20230808085431.14814-1-yan.y.zhao@intel.com. Not merged."""
    STALE_PRECHECK = 2
    """An exit that would be stale retries before GUP and before mmu_lock: d02c357e5bfa (6.8)."""
    HUGE_ZERO_WRITE_THP = 3
    """A write to the huge zero page allocates a THP (1); before: the PMD is split and one page copied (0).
    1ced09e0331f (6.13)."""
    DUPLICATE_IS_SPURIOUS = 4
    """A fault that finds its access already allowed is RET_PF_SPURIOUS, and leaves the entry alone: 386d69f9f29b (6.13).
    Before, the entry is written anew; only one that compares equal is spurious."""
    HUGETLB_PGFAULT = 5
    """GUP faults hugetlb through handle_mm_fault(), which counts pgfault: follow_hugetlb_page() retired by
    4849807114b8 (6.6)."""
    PRE_FAULT_MEMORY = 6
    """KVM_PRE_FAULT_MEMORY exists: bc1a5cd00211, 6e01b7601dfe (6.11)."""
    ALWAYS_WRITABLE = 7
    """Every GUP of the slot asks for write permission: the memslot flag sketched in ZN5elYQ5szQndN8n@google.com.
    Not merged."""
    REWRITE_DROPS_DIRTY = 8
    """make_spte() over a writable entry leaves the Dirty bit out, so that the first duplicate differs and counts as fixed:
    "KVM: X86: Don't check unsync if the original spte is writible", Lai Jiangshan, August 2021 (5.16); ended by "KVM:
    x86/mmu: Always set SPTE's dirty bit if it's created as writable" (6.13)."""
    EAGER_SPLIT = 9
    """Huge SPTEs are split when dirty logging begins, where eager_page_split is set: a3fe5dbda0a4 (5.18)."""
    SPLIT_HUGE_SPTE = 10
    """A fault that needs a smaller leaf splits the TDP MMU's huge leaf in place; before, it was zapped: c4b33d28ea51 (6.2)."""
    NX_MARKED_TABLES = 11
    """nx_huge_pages keeps data faults below tables that a fetch made; before, below any table: 76901e56fb51 (6.2)."""
    RECOVER_HUGE_SPTE = 12
    """The TDP MMU makes huge leaves in place when dirty logging ends; before, it zapped the tables: 13e2e4f62a4b (6.13)."""
    COLLAPSE = 13
    """MADV_COLLAPSE exists: 7d8faaf15545 (6.1)."""
    HUGETLB_DONTNEED = 14
    """MADV_DONTNEED works on hugetlb: 90e7e7f5ef3f (5.18)."""
    HUGETLB_ZAP_TWICE = 15
    """Zapping hugetlb runs two notifier pairs, one inside the other; until 369258ce41c6 (6.2)."""
    SUBPAGE_REUSE = 16
    """A write to a PTE-mapped part of a THP that nobody shares any more reuses it; before, it is copied: 1da190f4d0a6 (6.15)."""
    LAST_SUBPAGE_REUSE = 17
    """Before that: the last part of a THP that is still mapped is reused, its reference count being 1. Seen on 6.1, gone in 6.12;
    taken to end with the rework of 00fd05922d12 (6.7)."""
    COLLAPSE_READ_ONLY = 18
    """Collapse needs an anon_vma only, even of a table without a page; before, a writable page. Seen on 6.18 and 7.3, not on 6.12;
    taken to begin with 6.18."""
    RECLAIM_PAGE_TABLES = 19
    """MADV_DONTNEED over a whole region frees its empty page table: 6375e95f381e (6.14)."""
    COLLAPSE_PASSES_EMPTY = 20
    """MADV_COLLAPSE goes on behind a region without a page table; before, it ends there: "mm/khugepaged: continue to collapse on
    SCAN_PMD_NONE" (7.0)."""


class Version(NamedTuple):
    """A mainline release; compares as a version."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


OLDEST = Version(5, 15)
NEWEST = Version(7, 3)
MAX_VERSION_LENGTH = 8
LAST_MINOR = {5: 19, 6: 19, 7: 3}  # the last release of each major version


class Regime(NamedTuple):
    """First release with these values, and what changed there."""

    since: Version
    changes: Mapping[Behaviour, int]


REGIMES: tuple[Regime, ...] = (
    Regime(
        OLDEST, dict.fromkeys(Behaviour, 0) | {Behaviour.CHANGE_PTE: 1, Behaviour.HUGETLB_ZAP_TWICE: 1, Behaviour.LAST_SUBPAGE_REUSE: 1}
    ),
    Regime(Version(5, 16), {Behaviour.REWRITE_DROPS_DIRTY: 1}),
    Regime(Version(5, 18), {Behaviour.EAGER_SPLIT: 1, Behaviour.HUGETLB_DONTNEED: 1}),
    Regime(Version(6, 1), {Behaviour.COLLAPSE: 1}),
    Regime(Version(6, 2), {Behaviour.SPLIT_HUGE_SPTE: 1, Behaviour.NX_MARKED_TABLES: 1, Behaviour.HUGETLB_ZAP_TWICE: 0}),
    Regime(Version(6, 6), {Behaviour.HUGETLB_PGFAULT: 1}),
    Regime(Version(6, 7), {Behaviour.LAST_SUBPAGE_REUSE: 0}),
    Regime(Version(6, 8), {Behaviour.STALE_PRECHECK: 1}),
    Regime(Version(6, 10), {Behaviour.CHANGE_PTE: 0}),
    Regime(Version(6, 11), {Behaviour.PRE_FAULT_MEMORY: 1}),
    Regime(
        Version(6, 13),
        {
            Behaviour.HUGE_ZERO_WRITE_THP: 1,
            Behaviour.DUPLICATE_IS_SPURIOUS: 1,
            Behaviour.REWRITE_DROPS_DIRTY: 0,
            Behaviour.RECOVER_HUGE_SPTE: 1,
        },
    ),
    Regime(Version(6, 14), {Behaviour.RECLAIM_PAGE_TABLES: 1}),
    Regime(Version(6, 15), {Behaviour.SUBPAGE_REUSE: 1}),
    Regime(Version(6, 18), {Behaviour.COLLAPSE_READ_ONLY: 1}),
    Regime(Version(7, 0), {Behaviour.COLLAPSE_PASSES_EMPTY: 1}),
)


class Proposal(NamedTuple):
    """A change on top of a kernel: what it sets, what the kernel must have for it to make sense, and why."""

    changes: Mapping[Behaviour, int]
    needs: Mapping[Behaviour, int]
    reason: str


PROPOSALS: Mapping[str, Proposal] = {
    "mainline": Proposal({}, {}, ""),
    "change_pte_prefetch": Proposal(
        {Behaviour.CHANGE_PTE_PREFETCH: 1},
        {Behaviour.CHANGE_PTE: 1},
        "patch 2 of the thread lives in the change_pte notifier, which 6.10 removed",
    ),
    "no_change_pte": Proposal({Behaviour.CHANGE_PTE: 0}, {Behaviour.CHANGE_PTE: 1}, "6.10 removed the change_pte notifier already"),
    "always_writable": Proposal({Behaviour.ALWAYS_WRITABLE: 1}, {}, ""),
    "huge_zero_thp": Proposal({Behaviour.HUGE_ZERO_WRITE_THP: 1}, {}, ""),
    "huge_zero_split": Proposal({Behaviour.HUGE_ZERO_WRITE_THP: 0}, {}, ""),
}


class UnknownKernelError(ValueError):
    """The kernel version is no mainline release that the table covers."""


class PolicyError(ValueError):
    """The policy is unknown, or makes no sense on that kernel."""


def parse_kernel(text: str) -> Version:
    """'6.12' -> Version(6, 12). Raises UnknownKernelError."""
    parts = text.split(".")
    if len(parts) == 2 and len(text) <= MAX_VERSION_LENGTH and all(p.isascii() and p.isdigit() and str(int(p)) == p for p in parts):
        version = Version(int(parts[0]), int(parts[1]))
        if OLDEST <= version <= NEWEST and version.minor <= LAST_MINOR[version.major]:
            return version
    raise UnknownKernelError(
        f"kernel {text[:40]!r} is no mainline release from {OLDEST} to {NEWEST} (written like '6.12', without -rc or patch level)"
        f"{_nearest_release(text)}"
    )


def _nearest_release(text: str) -> str:
    """'; did you mean '6.19'?' for a version that is merely out of range."""
    match = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})", text, re.ASCII)
    if match is None:
        return ""
    wanted = min(max(Version(int(match[1]), int(match[2])), OLDEST), NEWEST)
    return f"; did you mean '{Version(wanted.major, min(wanted.minor, LAST_MINOR[wanted.major]))}'?"


def regime(kernel: str, table: tuple[Regime, ...] = REGIMES) -> dict[Behaviour, int]:
    """The behaviours of a mainline kernel. Raises UnknownKernelError."""
    version = parse_kernel(kernel)
    row: dict[Behaviour, int] = {}
    for entry in table:
        if entry.since <= version:
            row |= entry.changes
    return row


def behaviours(kernel: str, policy: str = "mainline", table: tuple[Regime, ...] = REGIMES) -> dict[Behaviour, int]:
    """The behaviours of a kernel with a proposal on top. Raises UnknownKernelError, PolicyError."""
    row = regime(kernel, table)
    proposal = PROPOSALS.get(policy)
    if proposal is None:
        raise PolicyError(f"policy {policy!r} is unknown; known: {', '.join(PROPOSALS)}")
    if any(row[b] != v for b, v in proposal.needs.items()):
        raise PolicyError(f"policy {policy!r} makes no sense on kernel {kernel}: {proposal.reason}")
    return row | dict(proposal.changes)


_ALL = tuple(Behaviour)


def policy_row(behaviour: Mapping[Behaviour, int]) -> NDArray[np.int64]:
    """The vector that jitted code indexes with Behaviour; shape (len(Behaviour),)."""
    return np.array([behaviour[b] for b in _ALL], dtype=np.int64)
