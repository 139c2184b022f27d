"""`explain`: one point again, its events step by step in the kernel's words."""

from collections.abc import Iterator
from pathlib import Path

from kernels.spec import HostPmd, HostPte, Phase, Spte, SptePmd, Trace
from sweep.dataset.store import Store
from sweep.errors import UsageError
from sweep.plan import Plan, PlannedPoint
from sweep.point import context_of, simulate_point
from sweep.record import read_study
from sweep.study import Study

WORDS = {
    Phase.TOUCH: "access begins",
    Phase.FAULT: "exit handled: sequence snapshot, GUP-fast",
    Phase.WALK: "slow GUP walk",
    Phase.COMMIT: "host entry set",
    Phase.START: "invalidate_range_start",
    Phase.START_HELD: "mmu_lock held (write): zap, flush",
    Phase.START_DONE: "mmu_lock released; host entry replaced",
    Phase.CHANGE: "change_pte",
    Phase.CHANGE_HELD: "mmu_lock held (write): change_pte",
    Phase.CHANGE_DONE: "mmu_lock released",
    Phase.END: "invalidate_range_end",
    Phase.END_HELD: "mmu_lock held (write): sequence + 1",
    Phase.END_DONE: "mmu_lock released",
    Phase.MAP: "pre-check, asks for mmu_lock (read)",
    Phase.MAP_HELD: "mmu_lock held (read): stale check, install",
    Phase.MAP_DONE: "mmu_lock released; back to the guest",
    Phase.SCAN: "the daemon looks at the next region or page",
    Phase.ALLOC: "khugepaged has its THP, asks for mmap_lock (write)",
    Phase.COPIED: "khugepaged sets the THP, releases mmap_lock",
    Phase.MERGE: "KSM: next pair of the page",
    Phase.DONE: "done",
}


def find_point(place: Path | str, prefix: str) -> tuple[Study, PlannedPoint]:
    """The point of a dataset whose id starts so. Raises UsageError if none or several do."""
    study = read_study(Store(place))
    found = [p for p in Plan(study) if p.point_id.startswith(prefix.lower())]
    if len(found) != 1:
        raise UsageError(f"point {prefix!r}: {len(found)} points of {place} start so; give more of the id")
    return study, found[0]


def explain(place: Path | str, prefix: str, rows: int) -> Iterator[str]:
    """Lines of text: the point, its first `rows` events, its totals."""
    study, planned = find_point(place, prefix)
    try:
        run = simulate_point(planned, context_of(study), trace_rows=rows)
    except (ValueError, RuntimeError) as error:  # what simulate() raises: the point has a row in `errors`, or cannot be traced
        raise UsageError(f"point {planned.point_id}: {error}") from None
    yield f"point {planned.point_id} replicate {planned.replicate}"
    yield "  ".join(f"{key}={value}" for key, value in planned.point.canonical().items())
    yield f"{'ns':>14} {'who':>5} {'gfn':>9}  access  what (host entry / SPTE, sequence)"
    for row in run.trace:
        yield event_line([int(v) for v in row])
    yield f"... {len(run.trace)} events shown"
    for number, step in enumerate(run.steps):
        moved = ", ".join(f"{key} {value}" for key, value in step.counters.items() if value)
        yield f"step {number} {step.op}: {step.ns} ns; {moved}"


def event_line(row: list[int]) -> str:
    """One event of Machine.trace."""
    host = HostPmd(row[Trace.HOST_PMD]).name
    if row[Trace.HOST_PTE] >= 0:
        host += "/" + HostPte(row[Trace.HOST_PTE]).name
    entry = SptePmd(row[Trace.SPTE_PMD]).name
    if row[Trace.SPTE] >= 0:
        entry += "/" + Spte(row[Trace.SPTE]).name
    access = ("read", "write", "fetch")[row[Trace.WRITE]]
    return (
        f"{row[Trace.TIME]:>14} {row[Trace.ACTOR]:>5} {row[Trace.GFN]:>9}  {access:<6}  "
        f"{WORDS[Phase(row[Trace.PHASE])]} ({host} / {entry}, {row[Trace.SEQ]})"
    )
