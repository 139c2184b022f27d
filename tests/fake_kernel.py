"""Kernels for tests of what asks them: counts come from the model, with what the test wants wrong."""

from collections.abc import Callable, Mapping, Sequence

from sweep.host.case import Case, predict
from sweep.host.compare import CaseResult
from sweep.host.litmus import Measured
from sweep.host.target import Layer, Predict, judge

Counts = list[dict[str, int]]
SEEN = (
    *("pf_taken", "pf_fixed", "pf_spurious", "pf_fast", "pgfault", "vmm_pgfault", "invalidate_range_start", "exits"),
    *("thp_fault_alloc", "thp_split_pmd", "thp_collapse_alloc", "remote_tlb_flush_requests", "pages_4k", "pages_2m", "pages_1g"),
)


def measured_like(case: Case, counts: Counts) -> Measured:
    """What a kernel that counts so would have sent."""
    hugetlb, shared = "hugetlb" in case.point.backing, "sh" in case.point.backing
    steps: dict[int, Mapping[str, int]] = {}
    for n, step in enumerate(counts):
        smaps = {"rss": step["held_bytes" if shared else "rss_bytes"] * (not hugetlb), "anon_huge": step["anon_huge_bytes"]}
        steps[n] = {name: step[name] for name in SEEN} | smaps | {"private_hugetlb": step["held_bytes"] * hugetlb}
    return Measured(base={"pf_taken": 0}, steps=steps, ended=len(counts))


class FakeKernel:
    """Counts as the model does, but for what `bug` makes of a case's counts."""

    layer = Layer.BOOT
    kernel = "6.12"
    mmu = "tdp"

    def __init__(self, bug: Callable[[Case, Counts], None] = lambda case, counts: None) -> None:
        self.bug = bug
        self.batches: list[int] = []

    def run(self, cases: Sequence[Case], predict_case: Predict = predict) -> list[CaseResult]:
        self.batches.append(len(cases))
        found = []
        for case in cases:
            counts = [dict(step) for step in predict(case)]
            self.bug(case, counts)
            found.append(judge(case, measured_like(case, counts), predict_case))
        return found

    def description(self) -> Mapping[str, str]:
        return {"release": "6.12.0-fake"}
