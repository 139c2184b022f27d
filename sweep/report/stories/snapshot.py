"""The study `snapshot`: what a fork of the VMM costs the guest, what both hold, and what the child leaves behind when it ends."""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from sweep.quantity import human_size
from sweep.report.claims import World
from sweep.report.contest import Contest, alike, contest_table, listed, one_of, percent
from sweep.report.story import Figure, Story, by, cases_of, default, duration, figure_table, nth, own_claim, ranged
from sweep.report.tables import ReportTable, pick

NAME = "snapshot"
PACKED = "fork_packed"
PROPOSALS = "6.5"  # the kernel of the thread's proposals
CHILD = Contest("THP", "4K", {"backing": "anonymous_thp"}, {"backing": "anonymous"}, "written", ("kernel",), "child_ns")
AFTER = Contest("THP", "4K", {"backing": "anonymous_thp"}, {"backing": "anonymous"}, "written", ("kernel",), "after_ns")
HUGETLB = Contest("hugetlb 2M", "4K", {"backing": "anonymous_hugetlb_2mb"}, {"backing": "anonymous"}, "written", ("kernel",), "child_ns")
HEADS = {"backing": "memory", "where": "pages", "written": "written meanwhile", "kernel": "kernel"}


FIGURES = {
    "fork": Figure("fork_ns", duration),
    "writes before": Figure("before_ns", duration),
    "writes beside the child": Figure("child_ns", duration),
    "exits a written page": Figure("exits_a_page", lambda value: f"{value:.2f}"),
    "held more": Figure("more_bytes", human_size),
    "all written after its end": Figure("after_ns", duration),
}


def described(world: World) -> pd.DataFrame:
    """Points that fork, with `written` (part of the memory), `where` (spread or packed), `fork_ns`, `before_ns` and `child_ns` (the same
    writes without and with a child), `exits_a_page`, `more_bytes` (held while the child lives), `after_ns` (writing all, after its end)."""
    points, pages = world.points, nth(world, "touch", 2, "writes")
    found = points.assign(
        written=pages * 4096 / points["memory_bytes"],
        where=(points["workload"] == PACKED).map({True: "packed", False: "spread"}),
        fork_ns=nth(world, "fork", 0, "step_ns"),
        before_ns=nth(world, "touch", 1, "step_ns"),
        child_ns=nth(world, "touch", 2, "step_ns"),
        exits_a_page=nth(world, "touch", 2, "exits") / pages,
        more_bytes=nth(world, "touch", 2, "held_bytes") - nth(world, "fork", 0, "held_bytes"),
        after_ns=nth(world, "touch", 3, "step_ns"),
    )
    return found[found["after_ns"].notna()]


def mainline(cases: pd.DataFrame) -> pd.DataFrame:
    """The kernels as they are; the one that stands beside the proposals is left to these."""
    return pick(cases[cases["kernel"] != PROPOSALS], policy="mainline")


def spread(cases: pd.DataFrame) -> pd.DataFrame:
    return pick(mainline(cases), where="spread")


def tables(worlds: Sequence[World]) -> list[ReportTable]:
    cases = cases_of(worlds)
    contests = [(contest, contest.outcomes(spread(cases))) for contest in (CHILD, HUGETLB, AFTER)]
    if any(outcomes.empty for _, outcomes in contests):
        return []
    main = figure_table("A snapshot by fork, by memory and by what is written meanwhile", mainline(default(cases)), HEADS, FIGURES)
    titles = (
        "THP against 4K: writes beside the child",
        "hugetlb against 4K: writes beside the child",
        "THP against 4K: writes after its end",
    )
    versus = [
        contest_table(title, contest, outcomes, {"kernel": "kernel"}, one_of)
        for title, (contest, outcomes) in zip(titles, contests, strict=True)
    ]
    proposals = pick(default(cases), kernel=PROPOSALS)
    heads = {"backing": "memory", "policy": f"kernel {PROPOSALS} with"}
    return [main, *versus, *([figure_table("Proposals of the thread", proposals, heads, FIGURES)] if len(proposals) else [])]


def answer(worlds: Sequence[World]) -> str:
    cases = mainline(default(cases_of(worlds)))
    packed = pick(cases, where="packed")
    rows = spread(cases)[spread(cases)["written"].isin(packed["written"])]  # what is written both in one piece and spread
    if rows.empty:
        return ""
    part = float(rows["written"].iloc[0])
    size = human_size(rows["memory_bytes"].iloc[0])
    plain, beside, fork = (
        alike(by(rows, "backing", partial(_told, column)), "{1} with {0}") for column in ("before_ns", "child_ns", "fork_ns")
    )
    return (
        f"A guest that writes {one_of(part)} of {size} takes {plain} for that, and {beside} while the child lives; the fork itself takes "
        f"{fork}. {_memory_held(rows, pick(packed, written=part))} {_hugetlb(cases)} {_after(rows)}"
    )


def _told(column: str, rows: pd.DataFrame) -> str:
    return ranged(rows[column], duration)


def _memory_held(rows: pd.DataFrame, packed: pd.DataFrame) -> str:
    """Who holds how much more while the child lives."""
    here, there = (by(part, "backing", lambda here: ranged(here["more_bytes"], human_size)) for part in (rows, packed))
    together = dict(there)
    texts = [
        (name, f"{more} more" if more == together.get(name, more) else f"{more} more ({together[name]} where the pages lie together)")
        for name, more in here
    ]
    return f"Both then hold {alike(texts, '{1} with {0}')}."


def _hugetlb(cases: pd.DataFrame) -> str:
    """From which part on hugetlb is the faster one beside a child."""
    outcomes = HUGETLB.outcomes(spread(cases))
    return "" if outcomes.empty else f"Hugetlb's copies of 2 MiB become the faster ones {HUGETLB.turning(outcomes, one_of)}."


def _after(rows: pd.DataFrame) -> str:
    """What the child leaves behind."""

    def kernels(here: pd.DataFrame) -> str:
        return alike(by(here, "kernel", lambda part: ranged(part["after_ns"], duration)), "{1} on {0}")

    return f"After its end, writing all memory takes {alike(by(rows, 'backing', kernels), '{1} with {0}', '; ')}."


def _child_gain(world: World) -> float | None:
    rows = pick(CHILD.gains(spread(world.points)), kernel="6.12", written=1 / 16)
    return None if rows.empty else float(rows["gain"].iloc[0])


def _after_gain(world: World) -> float | None:
    rows = pick(AFTER.gains(spread(world.points)), kernel="6.12", written=1 / 16)
    return None if rows.empty else float(rows["gain"].iloc[0])


def _after_kernels(world: World) -> str:
    rows = pick(AFTER.gains(spread(world.points)), written=1 / 16)
    same = [str(kernel) for kernel, gain in zip(rows["kernel"], rows["gain"], strict=True) if gain > -0.1]
    return f"the kernel is not {listed(same)}" if same else ""


def _memory(world: World) -> float | None:
    rows = pick(spread(world.points), backing="anonymous_hugetlb_2mb", kernel="6.12", written=1 / 16)
    return None if rows.empty else float((rows["more_bytes"] / (rows["written"] * rows["memory_bytes"])).iloc[0])


CLAIMS = (
    own_claim(
        NAME,
        "THP makes a guest's writes beside the child no faster than 4K pages do",
        "kernel 6.12, 4K and THP, one page in 16",
        "how much less time THP takes",
        measure=_child_gain,
        holds=lambda v: v < 0.01,
        figure=lambda world: f"{percent(-(_child_gain(world) or 0))} more time with THP",
    ),
    own_claim(
        NAME,
        "after the child's end, a THP that was written in part costs more than 4K pages do",
        "kernel 6.12, 4K and THP, one page in 16",
        "how much less time THP takes",
        measure=_after_gain,
        holds=lambda v: v < -0.1,
        figure=lambda world: f"{1 - (_after_gain(world) or 0):.2f} times the time with THP",
        condition=_after_kernels,
    ),
    own_claim(
        NAME,
        "with hugetlb both hold far more than what was written",
        "kernel 6.12, hugetlb 2M, one page in 16",
        "bytes held more, over bytes written",
        measure=_memory,
        holds=lambda v: v > 3,
        figure=lambda world: f"{_memory(world):.0f} times what was written",
    ),
)
STORY = Story(tables, answer, CLAIMS, described)
