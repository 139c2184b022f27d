"""The study `scaling`: from how many vCPUs on faults wait more than they work, and which settings run into retry storms."""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from sweep.report.claims import World
from sweep.report.contest import alike, listed, percent, together, told
from sweep.report.facts import PARTS
from sweep.report.story import Figure, Story, by, cases_of, default, figure_table, own_claim, ranged
from sweep.report.tables import ReportTable, pick

NAME = "scaling"
WORK = ("clear_ns",)  # of the parts of the summed time, what is no waiting
WAITS: Mapping[str, str] = {name: word.removeprefix("waiting for ") for name, word in PARTS.items() if name not in WORK}
DOMINATES = 0.5  # of the fault time
STORM = 0.1  # exits in vain per written page
COPYING, FIRST = "read_then_write", "demand_paging"
TASKS: Mapping[str, str] = {FIRST: "First writes", COPYING: "Reads, then writes"}


def described(world: World) -> pd.DataFrame:
    """Points with `setting`, `host` (kernel and proposal), `crowd` (vCPUs a core), `rate` (accesses a second), `waiting` (part of the fault
    time), `wait` (what most of that is for), and `vain`: exits that were retried, without a copy's own one, per written page."""
    points = world.points
    waits = points[list(WAITS)].rename(columns=WAITS)
    faults = points["fault_ns"].clip(lower=1)
    off = (~points["use_zero_page"]).map({True: " without huge zero page", False: ""})
    proposal = (" with " + points["policy"].astype(str)).where(points["policy"] != "mainline", "")
    return points.assign(
        setting=points["backing"].map(lambda backing: told("backing", backing)) + off,
        host=points["kernel"].astype(str) + proposal,
        crowd=points["vcpus"] / points["cores"],
        rate=points["touches"] / points["guest_ns"].clip(lower=1) * 1e9,
        waiting=waits.sum(axis=1) / faults,
        wait=waits.idxmax(axis=1),
        vain=(points["pf_retry"] - points["cow_4k"]).clip(lower=0) / points["writes"].clip(lower=1),
    )


def growing(cases: pd.DataFrame) -> pd.DataFrame:
    """As much memory for each vCPU as one alone has, a core for each, no daemon."""
    cases = cases[cases["memory_bytes"] / cases["vcpus"] == (cases["memory_bytes"] / cases["vcpus"]).min()]
    cases = cases[cases["workload"].isin(TASKS)].sort_values(["workload", "vcpus"], kind="stable")
    return pick(cases, crowd=1.0, khugepaged="false", policy="mainline", kernel="6.12")


def crowded(cases: pd.DataFrame) -> pd.DataFrame:
    """The same memory for any number of vCPUs and cores, every page read and then written: settings that were crowded at all."""
    rows = pick(cases, workload=COPYING, khugepaged="false", mmu="tdp")
    keys = ["host", "setting", "memory_bytes"]
    return rows[rows.groupby(keys)["crowd"].transform("max") > 1]


def across(rows: pd.DataFrame, title: str, words: Callable[[pd.DataFrame], str]) -> ReportTable:
    """One row per guest, memory and MMU, one column per number of vCPUs: `words` of the replicates."""
    lines = []
    heads = ["guest", "memory", "MMU"]
    counts = [int(vcpus) for vcpus in sorted(rows["vcpus"].unique())]
    for _, here in rows.groupby(["workload", "setting", "mmu"], sort=False):
        first = here.iloc[0]
        parts = ((vcpus, pick(here, vcpus=vcpus)) for vcpus in counts)
        cells = {f"{vcpus} vCPU{'s' * (vcpus > 1)}": words(part) if len(part) else "" for vcpus, part in parts}
        lines.append({**dict(zip(heads, (TASKS[first["workload"]], first["setting"], first["mmu"]), strict=True)), **cells})
    frame = together(pd.DataFrame(lines), heads[1:])
    return ReportTable(
        title, frame, f"a core and {told('memory_bytes', int((rows['memory_bytes'] / rows['vcpus']).iloc[0]))} for each vCPU"
    )


def _waiting(rows: pd.DataFrame) -> str:
    part = rows["waiting"].mean()
    return f"{percent(part)} {rows['wait'].iloc[0]}" if part > STORM else percent(part)


def _rate(rows: pd.DataFrame) -> str:
    return f"{rows['rate'].mean() / 1e6:.3g}"


def storm_table(rows: pd.DataFrame) -> ReportTable:
    """Exits in vain per page, by vCPUs and cores."""
    lines = []
    for (host, setting), here in rows.groupby(["host", "setting"], sort=False):
        groups = here.groupby(["vcpus", "cores"])
        cells = {f"{vcpus} on {cores}": ranged(part["vain"], lambda value: f"{value:.2g}") for (vcpus, cores), part in groups}
        lines.append({"kernel": host, "memory": setting, **cells})
    note = "vCPUs on cores; least to greatest replicate; a copy's own retry is not counted"
    return ReportTable("Exits in vain per page that is read and then written", pd.DataFrame(lines), note)


def tables(worlds: Sequence[World]) -> list[ReportTable]:
    cases = default(cases_of(worlds))
    grown, storms = growing(cases), crowded(cases)
    if grown.empty or storms.empty or grown["vcpus"].nunique() < 2:
        return []
    found = [
        across(grown, "Part of the fault time that is waiting, and for what most, by vCPUs", _waiting),
        across(grown, "Accesses of all vCPUs, millions a second", _rate),
        storm_table(storms),
    ]
    daemon = cases[cases["khugepaged"] != "false"]
    return [*found, *([_daemon_table(cases, daemon)] if len(daemon) else [])]


def _daemon_table(cases: pd.DataFrame, daemon: pd.DataFrame) -> ReportTable:
    """With khugepaged and without."""
    keys = ["vcpus", "cores", "memory_bytes", "backing", "kernel", "policy", "use_zero_page", "workload", "mmu"]
    both = cases.merge(daemon[keys].drop_duplicates(), on=keys)
    figures = {
        "accesses, millions a second": Figure("rate", lambda value: f"{value / 1e6:.3g}"),
        "waiting": Figure("waiting", percent),
        "for mmap_lock, ms": Figure("mmap_lock_wait_ns", lambda value: f"{value / 1e6:,.3g}"),
        "collapses": Figure("thp_collapse_alloc", lambda value: f"{value:,.0f}"),
    }
    return figure_table(
        "khugepaged beside the vCPUs: reads, then writes of THP", both, {"vcpus": "vCPUs", "khugepaged": "khugepaged"}, figures
    )


def answer(worlds: Sequence[World]) -> str:
    cases = default(cases_of(worlds))
    grown, storms = growing(cases), crowded(cases)
    if grown.empty or storms.empty:
        return ""
    return " ".join(filter(None, [_dominated(grown), _rates(grown), _storms(storms), _calm(storms)]))


def dominated_from(rows: pd.DataFrame) -> int | None:
    """The least number of vCPUs from which on more than half of the fault time is waiting."""
    parts = rows.groupby("vcpus")["waiting"].mean().sort_index()
    below = parts.index[parts <= DOMINATES]
    above = parts.index[parts > DOMINATES]
    last = max(below) if len(below) else 0
    return next((int(vcpus) for vcpus in above if vcpus > last), None)


def _waits(rows: pd.DataFrame) -> str:
    """From how many vCPUs on waiting dominates, and for what."""
    first = dominated_from(rows)
    return f"from {first} vCPUs on for {pick(rows, vcpus=first)['wait'].iloc[0]}" if first else f"nowhere up to {rows['vcpus'].max()} vCPUs"


def _dominated(rows: pd.DataFrame) -> str:
    """The same by setting, where pages are written; and where they were read before, as far as that is another answer."""

    def mmus(here: pd.DataFrame) -> str:
        return alike(by(here, "mmu", _waits), "{1} (MMU: {0})")

    first, copying = (by(pick(rows, workload=task), "setting", mmus) for task in (FIRST, COPYING))
    others = [pair for pair in copying if pair not in first]
    read = f"; where pages were read before, {'; '.join(f'with {name} {text}' for name, text in others)}" if others else ""
    return f"Faults wait more than they work {alike(first, '{1} ({0})')}{read}." if first else ""


def _rates(rows: pd.DataFrame) -> str:
    """With how many vCPUs most is done."""

    def most(here: pd.DataFrame) -> str:
        rates = here.groupby("vcpus")["rate"].mean()
        return f"{rates.idxmax()} vCPUs"

    tdp = pick(rows, mmu="tdp", workload=FIRST)
    return f"Most is done in a second by {alike(by(tdp, 'setting', most), '{1} ({0})')}." if len(tdp) else ""


def _storms(rows: pd.DataFrame) -> str:
    """How large the storms are where there are half as many cores as vCPUs."""
    half = pick(rows, crowd=2.0)
    most = half[half["vcpus"] == half["vcpus"].max()]
    stormy = most.groupby(["host", "setting"], sort=False).filter(lambda group: group["vain"].mean() > STORM)
    if stormy.empty:
        return "No setting runs into retry storms."
    texts = [
        (f"{setting} on {host}", ranged(here["vain"], lambda value: f"{value:.2g}" if value < 10 else f"{value:.0f}"))
        for (host, setting), here in stormy.groupby(["host", "setting"], sort=False)
    ]
    vcpus, cores = int(most["vcpus"].iloc[0]), int(most["cores"].iloc[0])
    return f"{vcpus} vCPUs on {cores} cores run into retry storms; exits in vain for each written page: {alike(texts, '{1} with {0}')}."


def _calm(rows: pd.DataFrame) -> str:
    """Which settings have none anywhere, and whether they need a crowd."""
    calm = [
        f"{setting} on {host}" for (setting, host), here in rows.groupby(["setting", "host"], sort=False) if here["vain"].max() <= STORM
    ]
    free = pick(rows, crowd=1.0)
    few = free.loc[free["vain"] > STORM, "vcpus"].min()
    alone = f"With a core for each vCPU some begin at {few:.0f} vCPUs." if few > 0 else "With a core for each vCPU there are none."
    return f"{f'None in any crowd: {listed(calm)}. ' if calm else ''}{alone}"


def _more_vcpus(world: World) -> float | None:
    rows = pick(growing(world.points), workload=FIRST, backing="anonymous", mmu="tdp")
    rates = rows.groupby("vcpus")["rate"].mean()
    return float(rates[64] / rates[16]) if {16, 64} <= set(rates.index) else None


def _vain(world: World, **setting: object) -> float | None:
    rows = pick(crowded(world.points), crowd=2.0, vcpus=16, policy="mainline", kernel="6.12", **setting)
    return None if rows.empty else float(rows["vain"].mean())


def _storm(world: World) -> float | None:
    return _vain(world, backing="anonymous")


def _no_storm(world: World) -> float | None:
    return _vain(world, backing="anonymous_hugetlb_2mb")


CLAIMS = (
    own_claim(
        NAME,
        "64 vCPUs together take no more first faults of 4K pages a second than 16 do",
        "demand_paging, 4K, TDP MMU, a core for each vCPU",
        "rate of 64 vCPUs, over that of 16",
        measure=_more_vcpus,
        holds=lambda v: v <= 1,
        figure=lambda world: f"{_more_vcpus(world):.2f} times the rate",
    ),
    own_claim(
        NAME,
        "copy-on-write of zero pages runs into retry storms where there are half as many cores as vCPUs",
        "read_then_write, 4K, 6.12, 16 vCPUs on 8 cores",
        "exits in vain per page",
        measure=_storm,
        holds=lambda v: v > STORM,
        figure=lambda world: f"{_storm(world):.3g} exits in vain per page",
    ),
    own_claim(
        NAME,
        "hugetlb has no storm there",
        "read_then_write, hugetlb 2M, 6.12, 16 vCPUs on 8 cores",
        "exits in vain per page",
        measure=_no_storm,
        holds=lambda v: v <= STORM,
        figure=lambda world: f"{_no_storm(world):.3g} exits in vain per page",
    ),
)
STORY = Story(tables, answer, CLAIMS, described)
