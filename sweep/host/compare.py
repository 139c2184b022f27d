"""What a real kernel counted against what the model predicts: which counters must be equal, and why some need not be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kernels.primary_mmu import Traits
from sweep.host.case import AccessList, Case
from sweep.steps import traits_of_point

Counts = Mapping[str, int]
YIELDS = 3  # a long zap that yields asks for so many flushes more
YIELDING = frozenset({"dontneed", "fork", "collapse"})
MACHINE_WIDE = frozenset({"thp_fault_alloc", "thp_split_pmd", "thp_collapse_alloc"})
ANY_MORE = 1 << 62


class Verdict(StrEnum):
    """Of one counter, or of a whole case."""

    EQUAL = "equal"
    DIFFERS = "differs"
    FREE = "free"  # need not be equal: see the reason
    LEFT_OUT = "left out"  # a case that did not run
    FAILED = "failed"  # a case that the kernel or the program broke off


@dataclass(frozen=True)
class Row:
    """One counter of one step."""

    step: int
    op: str
    counter: str
    real: int
    predicted: int
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class CaseResult:
    """What became of a case. `reason` says why it did not run, or why it failed."""

    case: Case
    verdict: Verdict
    rows: tuple[Row, ...] = ()
    reason: str = ""

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == Verdict.DIFFERS]

    @property
    def is_bad(self) -> bool:
        """It makes the command end with status 1."""
        return self.verdict in (Verdict.DIFFERS, Verdict.FAILED)


DIFFERENCES = {"pf_taken_less_spurious": ("pf_taken", "pf_spurious")}


WITNESSED = {"pagemap_rss_bytes": "rss_bytes", "pagemap_huge_bytes": "anon_huge_bytes"}
"""What PAGEMAP_SCAN finds -> what it must be equal to: a second witness of what smaps says."""


def value_of(counts: Counts, name: str) -> int:
    """A counter, or the difference of two."""
    return sum(sign * counts[part] for sign, part in zip((1, -1), _parts(name), strict=False))


def _parts(name: str) -> tuple[str, ...]:
    return DIFFERENCES.get(name, (name,))


def within(value: int, expected: int | Sequence[int]) -> bool:
    """Equal to a number, or inside a pair [low, high]."""
    low, high = (expected, expected) if isinstance(expected, int) else expected
    return low <= value <= high


@dataclass(frozen=True)
class _Step:
    """What decides whether a counter must be equal."""

    case: Case
    traits: Traits
    op: str
    state: str
    alone: bool  # nobody else runs on that kernel
    gone: bool  # a dontneed, or a fork before: the page cache or a child may hold more than is mapped


def _retries(step: _Step) -> str:
    return "retries of several vCPUs depend on time" if step.case.point.vcpus > 1 else ""


def _always(_step: _Step) -> str:
    return ""


def _spurious(_step: _Step) -> str:
    return "a TLB that is not flushed on an upgrade makes some faults spurious; pf_taken less these is compared"


def _exits(_step: _Step) -> str:
    return "interrupts of the host are exits too"


def _rss(step: _Step) -> str:
    return "smaps counts shared and hugetlb memory otherwise; held_bytes is compared" if step.traits.shared or step.traits.hugetlb else ""


def _held(step: _Step) -> str:
    if not (step.traits.shared or step.traits.hugetlb):
        return "rss_bytes is compared"
    return "the page cache or a child holds more than is mapped" if step.gone else ""


RULES = {
    "pf_taken_less_spurious": _retries,
    "pf_fixed": _always,
    "pf_fast": _retries,
    "pf_spurious": _spurious,
    "pgfault": _always,
    "vmm_pgfault": _always,
    "invalidate_range_start": _always,
    "change_pte": _always,
    "remote_tlb_flush_requests": _always,
    "thp_fault_alloc": _always,
    "thp_split_pmd": _always,
    "thp_collapse_alloc": _always,
    "pages_4k": _always,
    "pages_2m": _always,
    "pages_1g": _always,
    "rss_bytes": _rss,
    "anon_huge_bytes": _rss,
    "held_bytes": _held,
    "pagemap_rss_bytes": _rss,
    "pagemap_huge_bytes": _rss,
    "exits": _exits,
}
"""Counter -> why it need not be equal in that step; '' where it must."""


def _allowance(name: str, step: _Step, predicted: Counts) -> tuple[int, str]:
    """By how much the kernel itself may count more from run to run, and why. What replaces or splits a huge page zaps 2 MiB."""
    zaps = predicted["thp_split_pmd"] + min(predicted["thp_fault_alloc"], predicted["invalidate_range_start"])
    yields = step.op in YIELDING or (step.op == "dirty_log" and step.state == "off") or zaps > 0
    if name == "remote_tlb_flush_requests" and yields:
        return YIELDS, "a zap that yields flushes once more"
    if name in MACHINE_WIDE and not step.alone:
        return ANY_MORE, "other processes of this host count there, too; smaps and the page map are compared"
    return 0, ""


def _row(number: int, step: _Step, name: str, counted: Counts, expected: Counts) -> Row:
    real, predicted = value_of(counted, name), value_of(expected, WITNESSED.get(name, name))
    more, why = _allowance(name, step, expected)
    if real == predicted:
        return Row(number, step.op, name, real, predicted, Verdict.EQUAL)
    if within(real, (predicted, predicted + more)):
        return Row(number, step.op, name, real, predicted, Verdict.FREE, why)
    reason = RULES[name](step)
    return Row(number, step.op, name, real, predicted, Verdict.FREE if reason else Verdict.DIFFERS, reason)


def compare(case: Case, real: Sequence[Counts], predicted: Sequence[Counts], alone: bool = True) -> CaseResult:
    """Every counter of RULES that the kernel gave, step by step. A step too few or too many is a failure.

    `alone`: nothing else runs on that kernel, so that its machine-wide counters are the case's own."""
    if len(real) != len(predicted):
        return CaseResult(case, Verdict.FAILED, (), f"{len(real)} steps came back, {len(predicted)} were asked for")
    traits = traits_of_point(case.point)
    rows = []
    gone = False
    for number, (spec, counted, expected) in enumerate(zip(case.steps, real, predicted, strict=True)):
        gone = gone or spec.op in ("dontneed", "fork")
        step = _Step(case, traits, _op(spec), getattr(spec, "state", ""), alone, gone)
        names = [name for name in RULES if all(part in counted for part in _parts(name))]
        rows += [_row(number, step, name, counted, expected) for name in names]
    bad = any(row.verdict == Verdict.DIFFERS for row in rows)
    return CaseResult(case, Verdict.DIFFERS if bad else Verdict.EQUAL, tuple(rows))


def _op(spec: Any) -> str:
    return "touch" if isinstance(spec, AccessList) else str(spec.op)
