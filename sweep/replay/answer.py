"""What is told of a replayed trace: tables for a terminal and for the report's page, and the same as JSON."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sweep.quantity import format_size, human_time
from sweep.replay.accesses import Folded
from sweep.replay.decode import Decision, Vendor
from sweep.replay.doubles import DOUBLES, by_region, in_time, totals
from sweep.replay.parse import Trace
from sweep.replay.vcpus import Assignment
from sweep.report.tables import ReportTable

MAX_REGIONS = 20
TIME_ROWS = 20
TEXT_WIDTH = 120


@dataclass(frozen=True)
class Imported:
    """A trace that was read, and what was counted."""

    trace: Trace
    decision: Decision
    assignment: Assignment
    folded: Folded

    @property
    def left_out(self) -> int:
        """Lines and faults that --skip-bad let pass."""
        return self.trace.bad.count + self.folded.outside

    @property
    def faults(self) -> int:
        return self.folded.totals["faults"]


def trace_table(imported: Imported) -> ReportTable:
    """What the trace is."""
    trace, folded, decision = imported.trace, imported.folded, imported.decision
    unit = "rows" if trace.format.layout is None else "lines"
    guess = " (a guess: --vendor decides)" if decision.guess else ""
    how = "the GiBs that were touched; --slots says it better" if folded.slots.derived else "--slots"
    again = imported.faults - folded.accesses
    rows = {
        "format": f"{trace.format.name}, {trace.lines:,} {unit}; beside faults {trace.exits:,} kvm_exit, {trace.entries:,} kvm_entry, "
        f"{trace.others:,} other events",
        "error codes": f"{decision.vendor}{guess}: {decision.why}",
        "faults on memory": f"{imported.faults:,} in {_time(trace.span[1] - trace.span[0])}, of {folded.vcpus} vCPUs{_numbered(imported)}",
        "accesses": f"{folded.accesses:,}; {again:,} faults are re-executions of the vCPU's access before",
        "memory": f"{folded.slots} ({how})",
        "left out": _left_out(imported),
        "lost events": _lost(trace),
        "order": _order(trace),
        "time in KVM": _durations(folded.durations),
    }
    return ReportTable(f"The trace {trace.name}", pd.DataFrame(rows.items(), columns=["what", "found"]))


def _time(ns: float) -> str:
    return human_time(ns / 1e9) if ns else "0 s"


def _order(trace: Trace) -> str:
    if not trace.backward:
        return "as recorded"
    return f"{trace.backward:,} rows were earlier than the one before, by {_time(trace.back_ns)} at most: put in order"


def _numbered(imported: Imported) -> str:
    by_appearance = imported.assignment.by_appearance
    return f" ({by_appearance} threads numbered as they appear: neither a line nor their name says a vCPU)" if by_appearance else ""


def _left_out(imported: Imported) -> str:
    folded, bad = imported.folded, imported.trace.bad
    parts = {
        "bad lines": bad.count,
        "faults outside of the slots": folded.outside,
        "faults of devices": folded.devices,
        "faults on MMIO entries": folded.mmio,
        "faults of other threads": imported.trace.faults - imported.trace.rows,
    }
    text = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
    return text or "nothing"


def _lost(trace: Trace) -> str:
    lost = trace.lost
    if not lost.markers:
        return "no marker of lost events"
    unknown = f", {lost.unknown} of which do not say how many" if lost.unknown else ""
    return f"{lost.markers} markers of {lost.events:,} lost events{unknown}: faults are missing, and all counts are too low"


def _durations(found: Mapping[str, int]) -> str:
    if not found:
        return "not known: no fault has its kvm_exit and kvm_entry"
    return (
        f"{found['faults']:,} faults from kvm_exit to kvm_entry: {_time(found['sum_ns'])} in all, median {_time(found['p50_ns'])}, "
        f"p99 {_time(found['p99_ns'])}; re-executions {_time(found['again_sum_ns'])}"
    )


def doubles_table(imported: Imported) -> ReportTable:
    """How many double faults, by kind."""
    found = totals(imported.folded)
    rows = [(text, f"{found[counted.name.lower()]:,}") for counted, text in DOUBLES.items()]
    rows += [
        ("all double faults", f"{found['doubles']:,}"),
        ("part of all faults that is the second one of a double fault", f"{found['doubles'] / max(1, found['faults']):.1%}"),
        ("the same write once more, after a double fault", f"{found['further']:,}"),
        ("not present, though a fault had mapped it", f"{found['refaults']:,}"),
        ("2 MiB regions with a double fault", f"{found['regions_with_doubles']:,} of {found['regions']:,}"),
    ]
    return ReportTable("Double faults", pd.DataFrame(rows, columns=["what", "count"]), "two faults for one write")


def regions_table(imported: Imported) -> ReportTable:
    """The regions with most double faults."""
    regions = by_region(imported.folded)
    top = regions.sort_values(["doubles", "faults", "gpa"], ascending=[False, False, True], kind="stable").head(MAX_REGIONS)
    frame = pd.DataFrame(
        {"gpa": [f"{gpa:#x}" for gpa in top["gpa"]], **{n: top[n].to_numpy() for n in ("pages", "faults", "doubles", "refaults")}}
    )
    rest = len(regions) - len(frame)
    return ReportTable("2 MiB regions", frame, f"{rest:,} more: replay/regions.parquet" if rest > 0 else "")


def time_table(imported: Imported) -> ReportTable:
    """Faults and double faults in time, in at most TIME_ROWS rows."""
    times = in_time(imported.folded)
    columns = ["faults", "doubles", "refaults"]
    grouped = times[columns].groupby(times.index // -(-len(times) // TIME_ROWS)).sum()
    width = imported.folded.width_ns * -(-len(times) // TIME_ROWS)
    frame = pd.DataFrame({"from": [_time(i * width) for i in grouped.index], **{n: grouped[n].to_numpy() for n in columns}})
    return ReportTable("In time", frame[frame["faults"] > 0].reset_index(drop=True), f"stretches of {_time(width)}")


def cannot_show(imported: Imported) -> Sequence[str]:
    """What a trace cannot show, each with this trace's own figures."""
    found, folded, trace = totals(imported.folded), imported.folded, imported.trace
    lines = [
        "Accesses that do not fault are not in a trace. Under a huge mapping one fault stands for 2 MiB: "
        f"{found['regions_with_one_page']:,} of {found['regions']:,} regions have faults on one page only; what else was touched there "
        "is not known, and settings with smaller mappings than the recorded host's show too few faults.",
        "A page that faults again may have been taken away by reclaim, KSM, ballooning, migration, NUMA balancing or dirty logging, "
        f"which a replay does not repeat: {found['refaults']:,} faults found nothing where a fault had mapped a page before. Splits of "
        "the huge zero page do that too, and those the model repeats.",
        "A fault of the same kind on the page of the same vCPU's fault before is taken for a retry of it, not for a new access.",
        "Accesses are replayed in each vCPU's order without pauses: retries that depend on when vCPUs meet, and times, are those of "
        "vCPUs that do nothing else.",
    ]
    if trace.lost.markers:
        lines.append(f"Lost events: {_lost(trace)}.")
    if folded.slots.derived:
        lines.append(
            f"Which addresses are memory was guessed from the faults ({folded.slots}; {format_size(folded.slots.memory)}): a device's "
            "memory among them counts as the guest's. --slots says which is which."
        )
    if imported.decision.vendor is Vendor.SHADOW:
        lines.append(
            "With shadow paging the addresses are guest-virtual: pages of two processes with one address are taken for one page, and "
            "what is said of memory holds only for a guest that maps its memory one to one."
        )
    return lines


def limits_table(imported: Imported) -> ReportTable:
    return ReportTable("What this trace cannot show", pd.DataFrame({"limit": cannot_show(imported)}))


def text_of(table: ReportTable) -> str:
    """A table for a terminal: numbers to the right, text to the left and wrapped; of a single column, a list."""
    frame, parts = table.frame, [table.title]
    if len(frame.columns) == 1:
        for value in frame.iloc[:, 0]:
            parts += textwrap.wrap(str(value), TEXT_WIDTH, initial_indent="- ", subsequent_indent="  ")
    elif len(frame):
        cells = [[str(name), *map(str, frame[name])] for name in frame.columns]
        widths = [max(map(len, column)) for column in cells]
        right = [all(c[:1].isdigit() or c[:1] == "-" for c in column[1:]) for column in cells]
        for row in zip(*cells, strict=True):
            line = "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            parts += textwrap.wrap(line.rstrip(), TEXT_WIDTH + 60, subsequent_indent=" " * (widths[0] + 2), drop_whitespace=False)
    return "\n".join([*parts, *textwrap.wrap(table.note, TEXT_WIDTH)])


def tables_of(imported: Imported) -> list[ReportTable]:
    """All that is told of the trace itself."""
    return [trace_table(imported), doubles_table(imported), regions_table(imported), time_table(imported), limits_table(imported)]


def for_report(imported: Imported) -> list[ReportTable]:
    """The same for the page of `faultsweep report`, which prints the last table too: double faults, and beneath them the limits."""
    doubles = doubles_table(imported)
    limits = " ".join(["What this trace cannot show.", *cannot_show(imported)])
    tables = [trace_table(imported), regions_table(imported), time_table(imported)]
    return [*tables, ReportTable(doubles.title, doubles.frame, limits)]


def as_json(imported: Imported) -> dict[str, Any]:
    """The same, as numbers."""
    trace, folded = imported.trace, imported.folded
    return {
        "trace": {
            "name": trace.name,
            "format": trace.format.name,
            "lines": trace.lines,
            "span_ns": trace.span[1] - trace.span[0],
            "exits": trace.exits,
            "entries": trace.entries,
            "other_events": trace.others,
            "vendor": str(imported.decision.vendor),
            "vendor_why": imported.decision.why,
            "vendor_guessed": imported.decision.guess,
            "release": trace.release,
            "vcpus": folded.vcpus,
            "vcpus_by_appearance": imported.assignment.by_appearance,
            "accesses": folded.accesses,
            "slots": [{"gpa": slot.gpa, "size": slot.size, "base": slot.base} for slot in folded.slots.slots],
            "slots_derived": folded.slots.derived,
            "lost_markers": trace.lost.markers,
            "lost_events": trace.lost.events,
            "lost_unknown": trace.lost.unknown,
            "bad_lines": trace.bad.count,
            "bad_line_samples": trace.bad.samples,
            "outside": folded.outside,
            "devices": folded.devices,
            "mmio": folded.mmio,
            "of_other_threads": trace.faults - trace.rows,
            "backward": trace.backward,
            "backward_ns": trace.back_ns,
            "in_kvm": folded.durations,
        },
        "double_faults": totals(folded),
        "regions": _records(by_region(folded).nlargest(MAX_REGIONS, ["doubles", "faults"])),
        "time": _records(in_time(folded)),
        "cannot_show": list(cannot_show(imported)),
    }


def _records(frame: pd.DataFrame) -> list[dict[str, int]]:
    return [{str(name): int(value) for name, value in row.items()} for row in frame.to_dict("records")]
