"""`explain`: one point again, its events step by step in the kernel's words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
ACCESSES = ("read", "write", "fetch")


def find_point(place: Path | str, prefix: str) -> tuple[Study, PlannedPoint]:
    """The point of a dataset whose id starts so. Raises UsageError if none or several do."""
    study = read_study(Store(place))
    found = [p for p in Plan(study) if p.point_id.startswith(prefix.lower())]
    if len(found) != 1:
        raise UsageError(f"point {prefix!r}: {len(found)} points of {place} start so; give more of the id")
    return study, found[0]


@dataclass(frozen=True)
class Explained:
    """A point that was run again.

    `events`: the first ones, with ns, who (vCPU or VMM thread), gfn, access, what, host (entry), spte, sequence (mmu_invalidate_seq).
    `steps`: op, ns, counters that moved."""

    planned: PlannedPoint
    events: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]

    def as_text(self) -> str:
        parameters = self.planned.point.canonical()
        return "\n".join(
            [
                f"point {self.planned.point_id} replicate {self.planned.replicate}",
                "  ".join(f"{key}={value}" for key, value in parameters.items()),
                f"{'ns':>14} {'who':>5} {'gfn':>9}  access  what (host entry / SPTE, sequence)",
                *(event_line(event) for event in self.events),
                f"... {len(self.events)} events shown",
                *(f"step {number} {step['op']}: {step['ns']} ns; {_moved(step)}" for number, step in enumerate(self.steps)),
            ]
        )

    def as_json(self) -> dict[str, Any]:
        known = {"point_id": self.planned.point_id, "replicate": self.planned.replicate, "parameters": self.planned.point.canonical()}
        return known | {"events": self.events, "steps": self.steps}


def explain(place: Path | str, prefix: str, rows: int) -> Explained:
    """Run a point again and keep its first `rows` events. Raises UsageError."""
    study, planned = find_point(place, prefix)
    try:
        run = simulate_point(planned, context_of(study), trace_rows=rows)
    except (ValueError, RuntimeError) as error:  # what simulate() raises: the point has a row in `errors`, or cannot be traced
        raise UsageError(f"point {planned.point_id}: {error}") from None
    events = [_event([int(value) for value in row]) for row in run.trace]
    counted = [{name: int(value) for name, value in step.counters.items() if value} for step in run.steps]
    steps = [{"op": step.op, "ns": int(step.ns), "counters": moved} for step, moved in zip(run.steps, counted, strict=True)]
    return Explained(planned, events, steps)


def _moved(step: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in step["counters"].items())


def _event(row: list[int]) -> dict[str, Any]:
    """One event of Machine.trace."""
    host = HostPmd(row[Trace.HOST_PMD]).name
    if row[Trace.HOST_PTE] >= 0:
        host += "/" + HostPte(row[Trace.HOST_PTE]).name
    entry = SptePmd(row[Trace.SPTE_PMD]).name
    if row[Trace.SPTE] >= 0:
        entry += "/" + Spte(row[Trace.SPTE]).name
    known = {"ns": row[Trace.TIME], "who": row[Trace.ACTOR], "gfn": row[Trace.GFN], "access": ACCESSES[row[Trace.WRITE]]}
    return known | {"what": WORDS[Phase(row[Trace.PHASE])], "host": host, "spte": entry, "sequence": row[Trace.SEQ]}


def event_line(event: Mapping[str, Any]) -> str:
    """An event as a line of the table."""
    begin = f"{event['ns']:>14} {event['who']:>5} {event['gfn']:>9}  {event['access']:<6}  "
    return begin + f"{event['what']} ({event['host']} / {event['spte']}, {event['sequence']})"
