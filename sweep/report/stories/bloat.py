"""The study `bloat`: memory held against time, where a guest touches its memory sparsely."""

from collections.abc import Sequence

import pandas as pd

from sweep.quantity import human_size
from sweep.report.claims import World
from sweep.report.contest import Contest, alike, contest_table, flips, listed, one_of, stretches
from sweep.report.story import Figure, Story, by, cases_of, default, duration, figure_table, nth, own_claim, ranged
from sweep.report.tables import ReportTable, pick

NAME = "bloat"
SMALL: dict[str, object] = {"backing": "anonymous", "use_zero_page": True}
HUGE: dict[str, object] = {"backing": "anonymous_thp", "use_zero_page": True}
TIME = Contest("THP", "4K", HUGE, SMALL, "touched", ("kernel",))
HELD = Contest("THP", "4K", HUGE, SMALL, "touched", ("kernel",), "held_bytes")
HEADS = {
    "access": "touched by",
    "touched": "touched",
    "backing": "memory",
    "use_zero_page": "huge zero page",
    "policy": "policy",
    "kernel": "kernel",
}
FIGURES = {
    "held": Figure("held_bytes", human_size),
    "held, of what is touched": Figure("bloat", lambda value: f"x {value:,.3g}"),
    "time": Figure("total_ns", duration),
}
LATER = {"backing": "memory", "touched": "touched", "kernel": "kernel", "khugepaged": "khugepaged"}
LATER_FIGURES = {
    "held at first": Figure("held_first", human_size),
    "held in the end": Figure("held_bytes", human_size),
    "collapses": Figure("thp_collapse_alloc", lambda value: f"{value:,.0f}"),
    "touched once more": Figure("again_ns", duration),
}


def described(world: World) -> pd.DataFrame:
    """Points with `touched` (part of the memory), `access`, `bloat` (bytes held over bytes touched), and, where the guest touches, sleeps
    and touches again, `held_first` (before it sleeps) and `again_ns` (the last touches)."""
    points, first = world.points, nth(world, "touch", 0, "touches")
    reads, writes = points["reads"] > 0, points["writes"] > 0
    access = pd.Series("write", points.index).mask(reads & ~writes, "read").mask(reads & writes, "read, then write")
    return points.assign(
        touched=first * 4096 / points["memory_bytes"],
        access=access,
        bloat=points["held_bytes"] / (first * 4096),
        held_first=nth(world, "touch", 1, "held_bytes"),
        again_ns=nth(world, "touch", 2, "step_ns"),
    )


def once(cases: pd.DataFrame) -> pd.DataFrame:
    """Guests that touch, and that is all."""
    return cases[cases["again_ns"].isna()]


def written(cases: pd.DataFrame) -> pd.DataFrame:
    return pick(once(cases), access="write", policy="mainline")


def tables(worlds: Sequence[World]) -> list[ReportTable]:
    cases = cases_of(worlds)
    time = TIME.outcomes(written(cases))
    if time.empty:
        return []
    later = default(cases)[default(cases)["again_ns"].notna()]
    return [
        figure_table("Memory held and time, by memory and by what is touched", once(default(cases)), HEADS, FIGURES),
        contest_table("Time of THP against 4K pages", TIME, time, {"kernel": "kernel"}, one_of),
        *([figure_table("Read, written, left alone for 10 s, written again", later, LATER, LATER_FIGURES)] if len(later) else []),
    ]


def answer(worlds: Sequence[World]) -> str:
    cases = cases_of(worlds)
    time, held = TIME.outcomes(written(cases)), HELD.outcomes(written(cases))
    if time.empty or held.empty:
        return ""
    return " ".join(
        filter(
            None,
            [
                _trade(default(cases), time),
                f"It begins to save time {TIME.turning(time, one_of)}.",
                _reads(default(cases)),
                _later(default(cases)),
            ],
        )
    )


def _trade(cases: pd.DataFrame, time: pd.DataFrame) -> str:
    """Memory and time at both sides of the flip."""
    rows = written(cases)
    flip = flips(stretches(time[time["kernel"] == time["kernel"].iloc[0]], "touched"))
    parts = flip or (rows["touched"].min(), rows["touched"].max())
    return " ".join(filter(None, (_at(pick(rows, touched=part)) for part in parts)))


def _at(rows: pd.DataFrame) -> str:
    thp, small = (pick(rows, **side) for side in (HUGE, SMALL))
    if thp.empty or small.empty:
        return ""
    size, part = human_size(rows["memory_bytes"].iloc[0]), one_of(rows["touched"].iloc[0])
    figures = (("held_bytes", human_size), ("total_ns", duration))
    held, times = ([ranged(here[name], word) for here in (thp, small)] for name, word in figures)
    return (
        f"A guest that writes {part} of {size} makes the host hold {held[0]} with THP instead of {held[1]}, and takes {times[0]} for it "
        f"instead of {times[1]}."
    )


def _reads(cases: pd.DataFrame) -> str:
    """What memory that is only read makes the host hold."""
    rows = pick(once(cases), access="read")
    if rows.empty:
        return ""

    thp = pick(rows, backing="anonymous_thp")
    pages = thp.assign(use_zero_page=thp["use_zero_page"].map({True: "with", False: "without"}))

    def held(here: pd.DataFrame) -> str:
        return ranged(here["held_bytes"], human_size)

    others = pick(pages, policy="always_writable")
    slot = f", under an always-writable slot {alike(by(others, 'use_zero_page', held), '{1} {0} it')}" if len(others) else ""
    zero = alike(by(pick(pages, policy="mainline"), "use_zero_page", held), "{1} {0} the huge zero page")
    return f"Of memory that is only read ({one_of(rows['touched'].iloc[0])}), THP holds {zero}{slot}."


def _later(cases: pd.DataFrame) -> str:
    """What khugepaged, or a newer kernel, makes of memory that was read before it was written."""
    rows = cases[cases["again_ns"].notna()]
    if rows.empty:
        return ""
    rows = rows[rows["touched"] == rows["touched"].min()]

    def kernels(here: pd.DataFrame) -> str:
        return alike(by(here, "kernel", lambda part: ranged(part["held_bytes"], human_size)), "{1} on {0}")

    named = rows.assign(
        khugepaged=rows["khugepaged"].map(lambda text: "no khugepaged" if text == "false" else f"khugepaged ({text.rpartition(',')[2]})")
    )
    return (
        f"Of memory that is read and then written ({one_of(rows['touched'].iloc[0])}), THP holds, 10 s later, "
        f"{alike(by(named, 'khugepaged', kernels), '{1} with {0}', '; ')}."
    )


def _time_gain(world: World) -> float | None:
    rows = TIME.gains(written(world.points))
    rows = rows[rows["touched"] == 1 / 64]
    return None if rows.empty else float(rows["gain"].max())


def _held_times(world: World) -> float | None:
    rows = HELD.gains(written(world.points))
    rows = rows[rows["touched"] == 1 / 64]
    return None if rows.empty else 1 - float(rows["gain"].max())


def _khugepaged(world: World) -> float | None:
    cases = world.points
    rows = cases[(cases["khugepaged"] != "false") & cases["again_ns"].notna()]
    rows = rows[(rows["touched"] == 1 / 64) & (rows["kernel"] == "6.12")]
    return None if rows.empty else float((rows["held_bytes"] / rows["held_first"]).max())


def _khugepaged_condition(world: World) -> str:
    cases = world.points
    rows = cases[(cases["khugepaged"] != "false") & cases["again_ns"].notna() & (cases["touched"] == 1 / 64) & (cases["kernel"] == "6.12")]
    calm = [
        str(text).rpartition(",")[2]
        for text, times in zip(rows["khugepaged"], rows["held_bytes"] / rows["held_first"], strict=True)
        if times < 1.5
    ]
    return f"khugepaged does not run with {listed(calm)}" if calm else ""


CLAIMS = (
    own_claim(
        NAME,
        "where one page in 64 is written, THP costs more memory and more time",
        "THP and 4K, write_1_of_64; all kernels",
        "how much less time THP takes",
        measure=_time_gain,
        holds=lambda v: v < 0,
        figure=lambda world: f"{_held_times(world):,.0f} times the memory, {1 - (_time_gain(world) or 0):.2g} times the time",
    ),
    own_claim(
        NAME,
        "khugepaged makes huge pages of sparsely written memory afterwards",
        "6.12, THP, read_write_1_of_64, khugepaged",
        "memory held in the end, over memory held at first",
        measure=_khugepaged,
        holds=lambda v: v > 1.5,
        figure=lambda world: f"{_khugepaged(world):,.0f} times the memory",
        condition=_khugepaged_condition,
    ),
)
STORY = Story(tables, answer, CLAIMS, described)
