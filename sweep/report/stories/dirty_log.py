"""The study `dirty-log`: what logging costs per round by the part of the memory written, how pages are split, and what stays behind."""

from collections.abc import Sequence

import pandas as pd

from sweep.quantity import human_size
from sweep.report.claims import World
from sweep.report.contest import Contest, alike, contest_table, listed, one_of, percent
from sweep.report.story import Figure, Story, by, cases_of, default, duration, figure_table, nth, own_claim, ranged
from sweep.report.tables import ReportTable, pick

NAME = "dirty-log"
TYPICAL = 1 / 16
LITTLE = 0.05
HUGE = ("anonymous_thp", "anonymous_hugetlb_2mb")
PML = Contest("PML", "write protection", {"pml": True}, {"pml": False}, "written", ("backing", "kernel"), "round_ns")
EAGER = Contest(
    "splitting pages when logging begins",
    "splitting them at the first write",
    {"eager_page_split": True},
    {"eager_page_split": False},
    "written",
    ("pml", "backing", "kernel"),
    "first_ns",
)
HEADS = {
    "pml": "PML",
    "mmu": "MMU",
    "eager_page_split": "eager split",
    "backing": "memory",
    "written": "written a round",
    "kernel": "kernel",
}
FIGURES = {
    "writes before": Figure("before_ns", duration),
    "log on": Figure("on_ns", duration),
    "first round": Figure("first_ns", duration),
    "a later round": Figure("round_ns", duration),
    "exits a written page": Figure("exits_a_page", lambda value: f"{value:.2g}"),
    "harvest": Figure("get_ns", duration),
    "log off": Figure("off_ns", duration),
    "all written afterwards": Figure("after_ns", duration),
    "exits afterwards": Figure("exits_after", lambda value: f"{value:,.0f}"),
}


def described(world: World) -> pd.DataFrame:
    """Points that log, with `written` (part of the memory a round writes), `before_ns` (these writes without logging), `on_ns`, `first_ns`
    (in the first round), `round_ns` (in a later one), `get_ns`, `off_ns`, `exits_a_page` (of a later round), `after_ns` and `exits_after`
    (writing all memory when logging has ended)."""
    points, pages = world.points, nth(world, "touch", 2, "writes")
    found = points.assign(
        written=pages * 4096 / points["memory_bytes"],
        before_ns=nth(world, "touch", 1, "step_ns"),
        on_ns=nth(world, "dirty_log", 0, "step_ns"),
        first_ns=nth(world, "touch", 2, "step_ns"),
        round_ns=(nth(world, "touch", 3, "step_ns") + nth(world, "touch", 4, "step_ns")) / 2,
        exits_a_page=nth(world, "touch", 4, "exits") / pages,
        get_ns=nth(world, "dirty_log", 3, "step_ns"),
        off_ns=nth(world, "dirty_log", 4, "step_ns"),
        after_ns=nth(world, "touch", 5, "step_ns"),
        exits_after=nth(world, "touch", 5, "exits"),
    )
    return found[found["after_ns"].notna()]


def usual(cases: pd.DataFrame) -> pd.DataFrame:
    """What a host does if nobody says otherwise: TDP MMU, eager split."""
    return pick(cases, mmu="tdp", eager_page_split=True)


def huge(cases: pd.DataFrame) -> pd.DataFrame:
    """Where there is something to split."""
    return cases[cases["backing"].isin(HUGE) & (cases["mmu"] == "tdp")]


def tables(worlds: Sequence[World]) -> list[ReportTable]:
    cases = cases_of(worlds)
    pml, eager = PML.outcomes(usual(cases)), EAGER.outcomes(huge(cases))
    if pml.empty or eager.empty:
        return []
    heads = {"pml": "PML", "backing": "memory", "kernel": "kernel"}
    return [
        figure_table("Dirty logging, by the part of the memory that each round writes", default(cases), HEADS, FIGURES),
        contest_table("A later round: PML against write protection", PML, pml, heads, one_of),
        contest_table("First round: pages split when logging begins against at the first write", EAGER, eager, heads, one_of),
    ]


def answer(worlds: Sequence[World]) -> str:
    cases = cases_of(worlds)
    rows, eager = usual(default(cases)), EAGER.outcomes(huge(cases))
    if rows.empty or eager.empty:
        return ""
    part = min(rows["written"].unique(), key=lambda part: (abs(part - TYPICAL), part))
    typical = pick(rows, written=part)
    return " ".join(filter(None, [_round(typical), _share(rows), _eager(pick(huge(default(cases)), written=part)), _after(typical)]))


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """With words for how writes are seen."""
    return rows.assign(pml=rows["pml"].map({True: "PML", False: "write protection"}))


def _round(rows: pd.DataFrame) -> str:
    """A later round, with and without PML."""

    def cost(here: pd.DataFrame) -> str:
        times = ranged(here["round_ns"] / here["before_ns"], lambda value: f"{value:.3g}")
        exits = ranged(here["exits_a_page"], lambda value: f"{value:.2g}")
        return f"{ranged(here['round_ns'], duration)} ({times} times as long; exits a page: {exits})"

    size, part = human_size(rows["memory_bytes"].iloc[0]), one_of(rows["written"].iloc[0])
    return (
        f"A guest that writes {part} of {size} takes {ranged(rows['before_ns'], duration)} for that, and in a round of dirty logging "
        f"{alike(by(named(rows), 'pml', cost), '{1} under {0}')}."
    )


def _share(rows: pd.DataFrame) -> str:
    """How a round grows with what it writes."""
    ends = [pick(rows, pml=False, written=end) for end in (rows["written"].min(), rows["written"].max())]
    words = [f"{ranged(here['round_ns'], duration)} with {one_of(here['written'].iloc[0])} written" for here in ends if len(here)]
    return f"Under write protection it grows from {' to '.join(words)}." if len(words) == 2 else ""


def _eager(rows: pd.DataFrame) -> str:
    """What splitting beforehand costs the VMM, and spares the guest in its first round."""
    rows = rows.groupby("pml", sort=False).filter(lambda here: here["eager_page_split"].nunique() == 2)
    if rows.empty:
        return ""
    eager = pick(rows, eager_page_split=True)

    def spared(here: pd.DataFrame) -> str:
        late = pick(here, eager_page_split=False)
        most = late.groupby("kernel", sort=False)["first_ns"].mean()
        kernel = "" if most.max() < 1.01 * most.min() else f" (the most on {most.idxmax()})"
        return f"{ranged(pick(here, eager_page_split=True)['first_ns'], duration)} instead of {ranged(late['first_ns'], duration)}{kernel}"

    return (
        f"Splitting huge pages beforehand takes the VMM {ranged(eager['on_ns'], duration)}; the guest's first round then takes "
        f"{alike(by(named(rows), 'pml', spared), '{1} under {0}')}."
    )


def _after(rows: pd.DataFrame) -> str:
    """What is left when logging has ended."""

    def exits(here: pd.DataFrame) -> str:
        return ranged(here["exits_after"], lambda value: f"{value:,.0f}")

    def kernels(here: pd.DataFrame) -> str:
        return alike(by(here, "kernel", exits), "{1} on {0}")

    def memories(here: pd.DataFrame) -> str:
        return alike(by(here, "backing", kernels), "{1} with {0}")

    return (
        f"Exits of a guest that then writes all its memory: {alike(by(named(rows), 'pml', memories), 'after {0} {1}', '; ')}; that takes "
        f"{duration(rows['after_ns'].min())} to {duration(rows['after_ns'].max())}."
    )


def _pml_gain(world: World) -> float | None:
    rows = PML.gains(usual(world.points))
    rows = rows[rows["written"] == TYPICAL]
    return None if rows.empty else float(rows["gain"].min())


def _eager_gain(world: World) -> float | None:
    rows = pick(EAGER.gains(huge(world.points)), pml=False, kernel="6.12", written=TYPICAL)
    return None if rows.empty else float(rows["gain"].max())


def _eager_kernels(world: World) -> str:
    rows = pick(EAGER.gains(huge(world.points)), pml=False, written=TYPICAL)
    gains = rows.groupby("kernel", sort=False)["gain"].max()
    spared = [str(kernel) for kernel, gain in gains.items() if gain > LITTLE]
    return f"the kernel is not {listed(spared)}" if spared else ""


def _exits(world: World) -> float | None:
    rows = pick(usual(world.points), pml=False)
    return None if rows.empty else float((rows["exits_a_page"] - 1).abs().max())


CLAIMS = (
    own_claim(
        NAME,
        "under write protection each round costs one exit per written page, whatever the page size",
        "TDP MMU, eager split, no PML; all kernels, memories and shares",
        "largest distance from one exit a page",
        measure=_exits,
        holds=lambda v: v < 0.01,
        figure=lambda world: f"{1 + (_exits(world) or 0):.3f} exits a page at most",
    ),
    own_claim(
        NAME,
        "PML takes most of a round's cost away",
        "TDP MMU, eager split, one page in 16; all kernels and memories",
        "least gain of PML",
        measure=_pml_gain,
        holds=lambda v: v > 0.5,
        figure=lambda world: f"a later round takes at least {percent(_pml_gain(world) or 0)} less",
    ),
    own_claim(
        NAME,
        "without PML the guest gains little by pages that are split beforehand",
        "kernel 6.12, TDP MMU, THP and hugetlb, one page in 16",
        f"gain of the first round (little: below {LITTLE:.0%})",
        measure=_eager_gain,
        holds=lambda v: v < LITTLE,
        figure=lambda world: f"its first round takes {percent(_eager_gain(world) or 0)} less",
        condition=_eager_kernels,
    ),
)
STORY = Story(tables, answer, CLAIMS, described)
