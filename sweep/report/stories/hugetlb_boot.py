"""The study `hugetlb-boot`: how long preallocation takes, how many threads it can use, and what the guest gains by it."""

from collections.abc import Sequence

import pandas as pd

from sweep.quantity import human_size
from sweep.report.claims import World
from sweep.report.contest import Contest, alike, contest_table, listed, more_or_less, sure, told, winner_of
from sweep.report.story import Figure, Story, about, by, cases_of, default, duration, figure_table, least, own_claim
from sweep.report.tables import ReportTable, pick

NAME = "hugetlb-boot"
ALONE, BOOT, ALL = "nothing", "boot_ovmf", "first_touch"
SHORTER = 0.05  # more threads that save less than this part save nothing
PREALLOCATED: dict[str, object] = {"prealloc": "populate"}
ON_DEMAND: dict[str, object] = {"prealloc": "none", "prealloc_threads": 1}
WORTH = Contest("preallocation", "faults on demand", PREALLOCATED, ON_DEMAND, "prealloc_threads", ("workload", "backing"))
PRE_FAULT = Contest(
    "KVM_PRE_FAULT_MEMORY alone", "faults on demand", {"prealloc": "pre_fault"}, ON_DEMAND, "prealloc_threads", ("workload", "backing")
)
HEADS = {"workload": "guest", "backing": "memory", "prealloc": "preallocation", "prealloc_threads": "threads"}
FIGURES = {
    "preallocation takes": Figure("vmm_ns", duration),
    "guest takes": Figure("guest_ns", duration),
    "both": Figure("total_ns", duration),
    "faults, all vCPUs": Figure("fault_ns", duration),
    "held": Figure("held_bytes", human_size),
}


def described(world: World) -> pd.DataFrame:
    """Points with `vmm_ns`: what the VMM does before and between the guest's steps."""
    return world.points.assign(vmm_ns=world.points["total_ns"] - world.points["guest_ns"])


def alone(cases: pd.DataFrame) -> pd.DataFrame:
    """Preallocation without a guest."""
    return pick(default(cases), workload=ALONE, **PREALLOCATED)


def guests(cases: pd.DataFrame) -> pd.DataFrame:
    return cases[cases["workload"].isin((BOOT, ALL))]


def enough(rows: pd.DataFrame) -> int:
    """The least number of threads with which preallocation is as short as it gets. `rows`: of one memory."""
    good = rows[rows["vmm_ns"] <= rows["vmm_ns"].min() * (1 + SHORTER)]
    return int(good["prealloc_threads"].min())


def threads_table(rows: pd.DataFrame) -> ReportTable:
    lines = []
    for (backing, size), here in rows.groupby(["backing", "memory_bytes"], sort=False):
        by_threads = here.sort_values("prealloc_threads").set_index("prealloc_threads")["vmm_ns"]
        cells = {counted(int(str(threads))): duration(ns) for threads, ns in by_threads.items()}
        lines.append(
            {
                "memory": told("backing", backing),
                "size": told("memory_bytes", size),
                **cells,
                "no shorter beyond": f"{enough(here)} threads",
            }
        )
    return ReportTable("Preallocation by MADV_POPULATE_WRITE, by threads", pd.DataFrame(lines), f"no shorter: by less than {SHORTER:.0%}")


def tables(worlds: Sequence[World]) -> list[ReportTable]:
    cases = cases_of(worlds)
    worth = WORTH.outcomes(guests(cases))
    if alone(cases).empty or worth.empty:
        return []
    heads = {"workload": "guest", "backing": "memory"}
    return [
        threads_table(alone(cases)),
        figure_table("What the guest gains, and what goes before", guests(default(cases)), HEADS, FIGURES),
        contest_table(
            "Preallocation and guest against a guest without, by threads", WORTH, worth, heads, lambda threads: counted(int(threads))
        ),
    ]


def answer(worlds: Sequence[World]) -> str:
    cases = cases_of(worlds)
    if alone(cases).empty or WORTH.outcomes(guests(cases)).empty:
        return ""
    return " ".join(filter(None, [_threads(alone(cases)), _gain(cases, BOOT), _gain(cases, ALL), _pre_fault(cases)]))


def _threads(rows: pd.DataFrame) -> str:
    """How long, and up to how many threads it gets shorter: of the smallest size."""
    size = int(rows["memory_bytes"].min())

    def words(here: pd.DataFrame) -> str:
        threads = enough(here)
        first, best = (about(pick(here, prealloc_threads=count)["vmm_ns"].iloc[0]) for count in (here["prealloc_threads"].min(), threads))
        last = here.sort_values("prealloc_threads").iloc[-1]
        longer = last["vmm_ns"] > (1 + SHORTER) * here["vmm_ns"].min()
        more = f", {about(last['vmm_ns'])} with {last['prealloc_threads']}" if longer else " or more"
        return f"{first} with one thread, {best} with {threads}{more}"

    return f"Preallocating {human_size(size)} takes {alike(by(pick(rows, memory_bytes=size), 'backing', words), '{1} ({0})', '; ')}."


def counted(threads: int) -> str:
    return f"{threads} thread{'s' * bool(threads > 1)}"


def _gain(cases: pd.DataFrame, workload: str) -> str:
    """What preallocated 2 MiB hugetlb pages give a guest, with the most threads."""
    rows = pick(default(cases), workload=workload, backing="anonymous_hugetlb_2mb")
    outcomes = pick(WORTH.outcomes(guests(cases)), workload=workload, backing="anonymous_hugetlb_2mb")
    before, after = pick(rows, **ON_DEMAND), pick(rows, **PREALLOCATED)
    if before.empty or outcomes.empty:
        return ""
    last = after.sort_values("prealloc_threads").iloc[-1]
    last_row = outcomes.iloc[-1]
    told_of = [f"{more_or_less(row['gain'])} with {counted(row['prealloc_threads'])}" for _, row in outcomes.iloc[:-1].iterrows()]
    told_of.append(f"{sure(last_row)} with {counted(last_row['prealloc_threads'])}")
    name = {BOOT: "A boot", ALL: "A guest that writes all its memory"}[workload]
    held = human_size(before["held_bytes"].iloc[0]), human_size(last["held_bytes"])
    return (
        f"{name} with 2 MiB hugetlb pages then takes {duration(last['guest_ns'])} instead of {duration(before['guest_ns'].iloc[0])}; "
        f"with the preallocation that is {listed(told_of)}"
        f"{f', and {held[1]} are held instead of {held[0]}' if held[0] != held[1] else ''}."
    )


def _pre_fault(cases: pd.DataFrame) -> str:
    """Where KVM_PRE_FAULT_MEMORY alone makes it worse."""
    outcomes = pick(PRE_FAULT.outcomes(guests(cases)), workload=ALL)
    worse = outcomes[outcomes["gain"] < -SHORTER]
    if worse.empty:
        return ""
    worst = least(worse, "gain")
    return (
        f"KVM_PRE_FAULT_MEMORY alone is no preallocation: it maps zero pages, read-only, and a guest that writes all its memory then takes "
        f"{1 - worst['gain']:.2g} times as long as without, with {told('backing', worst['backing'])}."
    )


def _boot_gain(world: World) -> float | None:
    rows = pick(WORTH.gains(guests(world.points)), workload=BOOT, backing="anonymous_hugetlb_2mb")
    return None if rows.empty else float(rows["gain"].max())


def _all_gain(world: World) -> float | None:
    rows = pick(WORTH.gains(guests(world.points)), workload=ALL, backing="anonymous_hugetlb_2mb")
    return None if rows.empty else float(rows["gain"].max())


def _threads_needed(world: World) -> str:
    rows = pick(WORTH.gains(guests(world.points)), workload=ALL, backing="anonymous_hugetlb_2mb")
    winning = rows[rows["gain"].map(winner_of) > 0]["prealloc_threads"]
    return f"at least {winning.min()} threads preallocate" if len(winning) and winning.min() > 1 else ""


def _at_best(gain: float | None) -> str:
    return f"{more_or_less(gain or 0.0)} time in all, at best"


CLAIMS = (
    own_claim(
        NAME,
        "preallocating a guest's memory does not pay for a boot",
        "boot_ovmf, hugetlb 2M; preallocation counted in, any number of threads",
        "how much less time, at best",
        measure=_boot_gain,
        holds=lambda v: winner_of(v) <= 0,
        figure=lambda world: _at_best(_boot_gain(world)),
    ),
    own_claim(
        NAME,
        "it pays for a guest that writes all of its memory",
        "first_touch, hugetlb 2M; preallocation counted in",
        "how much less time, at best",
        measure=_all_gain,
        holds=lambda v: winner_of(v) > 0,
        figure=lambda world: _at_best(_all_gain(world)),
        condition=_threads_needed,
    ),
)
STORY = Story(tables, answer, CLAIMS, described)
