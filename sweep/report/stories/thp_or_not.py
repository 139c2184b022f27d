"""The study `thp-or-not`: what failing allocations, reads before the first write, and memory never touched leave of THP's gain."""

from collections.abc import Sequence

import pandas as pd

from sweep.report.claims import World
from sweep.report.contest import Contest, alike, contest_table, flips, listed, more_or_less, one_of, percent, stretches, sure, winner_of
from sweep.report.story import Story, cases_of, least, own_claim
from sweep.report.tables import ReportTable, pick

NAME = "thp-or-not"
SMALL: dict[str, object] = {"backing": "anonymous", "thp_failure": 0.0, "use_zero_page": True}
THP: dict[str, object] = {"backing": "anonymous_thp"}
FAILING = Contest("THP", "4K", THP, SMALL, "thp_failure", ("use_zero_page", "read_first", "kernel"))
ZERO_PAGE = Contest(
    "THP without the huge zero page",
    "THP with it",
    {**THP, "use_zero_page": False},
    {**THP, "use_zero_page": True},
    "thp_failure",
    ("read_first", "kernel"),
)
TOUCHED = Contest("THP", "4K", THP, SMALL, "touched", ("thp_failure", "kernel"))
UNFAILING = Contest("THP", "4K", {**THP, "thp_failure": 0.0}, SMALL, "touched", ("kernel",))
HEADS = {"kernel": "kernel", "use_zero_page": "huge zero page", "read_first": "read first", "thp_failure": "huge allocations that fail"}


def described(world: World) -> pd.DataFrame:
    """Points with `touched` (part of the memory that is written) and `read_first` (part of that which is read before)."""
    points = world.points
    return points.assign(
        touched=points["writes"] * 4096 / points["memory_bytes"], read_first=points["reads"] / points["writes"].clip(lower=1)
    )


def dense(cases: pd.DataFrame) -> pd.DataFrame:
    """Guests that write all of their memory."""
    return cases[cases["touched"] == 1]


def sparse(cases: pd.DataFrame) -> pd.DataFrame:
    """Guests that read nothing before they write it."""
    return cases[(cases["read_first"] == 0) & cases["use_zero_page"]]


def tables(worlds: Sequence[World]) -> list[ReportTable]:
    cases = cases_of(worlds)
    whole, part = dense(cases), sparse(cases)
    failing, zero, touched = FAILING.outcomes(whole), ZERO_PAGE.outcomes(whole), TOUCHED.outcomes(part)
    if failing.empty or zero.empty or touched.empty:
        return []
    return [
        contest_table("THP against 4K pages, by huge allocations that fail; all memory is written", FAILING, failing, HEADS, percent),
        contest_table("THP against 4K pages, by the part of the memory that is written at all", TOUCHED, touched, HEADS, one_of),
        contest_table("Without the huge zero page against with it, THP, by huge allocations that fail", ZERO_PAGE, zero, HEADS, percent),
    ]


def answer(worlds: Sequence[World]) -> str:
    cases = cases_of(worlds)
    failing, zero = FAILING.outcomes(dense(cases)), ZERO_PAGE.outcomes(dense(cases))
    touched = TOUCHED.outcomes(sparse(cases))
    if failing.empty or zero.empty or touched.empty:
        return ""
    return " ".join(filter(None, [_failing(failing), _read_first(failing), _zero_page(zero), _touched(touched)]))


def _failing(failing: pd.DataFrame) -> str:
    """What failing allocations leave of THP's gain, and whether anything turns it round, where a guest writes all its memory."""
    plain = pick(failing, read_first=0.0, use_zero_page=True)
    lost = failing[failing["gain"].map(winner_of) < 0]
    turned = (
        f"and 4K pages win in {len(lost)} of {len(failing)} cases"
        if len(lost)
        else f"and 4K pages win nowhere, whatever fails or is read first ({len(failing)} cases)"
    )
    told = alike(((str(kernel), _along_failure(rows)) for kernel, rows in plain.groupby("kernel", sort=False)), "{1} on {0}", "; ")
    return f"Where a guest writes all its memory, THP takes {told}, {turned}."


def _along_failure(rows: pd.DataFrame) -> str:
    """The gain where nothing fails, where half of it is gone, and where most fails."""
    first, last = rows.iloc[0], rows.iloc[-1]
    halved = rows[rows["gain"] < first["gain"] / 2].head(1)
    rest = [f"{percent(row['gain'])} at {percent(row['thp_failure'])}" for _, row in pd.concat([halved, rows.tail(1)]).iterrows()]
    told_of = list(dict.fromkeys(rest)) if len(rows) > 1 and first["thp_failure"] != last["thp_failure"] else []
    return "".join([f"{percent(first['gain'])} less time than 4K pages if no huge allocation fails", *(f", {text}" for text in told_of)])


def _read_first(failing: pd.DataFrame) -> str:
    """What reading first leaves of the gain, with the huge zero page: at the share for which costs are moved, if there is one."""
    rows = pick(failing, thp_failure=0.0, use_zero_page=True)
    rows = rows[rows["read_first"] > 0]
    if rows.empty:
        return ""
    with_costs = rows[rows["cost_low"].notna()]
    at = (rows if with_costs.empty else with_costs)["read_first"].iloc[0]
    told = alike(((str(row["kernel"]), sure(row)) for _, row in pick(rows, read_first=at).iterrows()), "{1} on {0}")
    return f"With {percent(at)} read first, under the huge zero page, it takes {told}."


def _zero_page(zero: pd.DataFrame) -> str:
    """On which kernels switching the huge zero page off pays where something is read first."""
    groups: dict[tuple[int, int], list[str]] = {}
    rows = zero[zero["read_first"] > 0]
    calm = pick(rows, thp_failure=0.0).groupby("kernel", sort=False)["gain"]
    for kernel, low, high in zip(calm.min().index, calm.min(), calm.max(), strict=True):
        groups.setdefault((winner_of(low), winner_of(high)), []).append(str(kernel))
    told_of = []
    for (worst, _), kernels in groups.items():
        here = rows[rows["kernel"].isin(kernels)]
        gains = pick(here, thp_failure=0.0)["gain"]
        found = [
            flip for _, group in here.groupby(["kernel", "read_first"], sort=False) if (flip := flips(stretches(group, "thp_failure")))
        ]
        ends = [percent(end) for end in (min((a for a, _ in found), default=0.0), max((b for _, b in found), default=0.0))]
        turns = f", and ceases to pay where between {ends[0]} and {ends[1]} of the allocations fail" if found and worst > 0 else ""
        told_of.append(f"{more_or_less(gains.min())} to {more_or_less(gains.max())} on {listed(kernels)}{turns}")
    return f"Without that page THP takes, beside THP with it, {'; '.join(told_of)}." if told_of else ""


def _touched(touched: pd.DataFrame) -> str:
    """Where 4K pages win, by the part of the memory that is touched."""
    rows = pick(touched, thp_failure=0.0)
    if rows.empty:
        return ""
    worst = least(rows, "gain")
    if winner_of(float(worst["gain"])) >= 0:
        return "Nor do 4K pages win where little of the memory is written."
    at = f"with {one_of(worst['touched'])} written THP takes {1 - worst['gain']:,.0f} times as long"
    return f"What turns the answer is memory that is never touched: THP begins to win {UNFAILING.turning(rows, one_of)} written; {at}."


def _least(world: World) -> float | None:
    found = FAILING.gains(dense(world.points))
    return None if found.empty else float(found["gain"].min())


def _least_figure(world: World) -> str:
    worst = FAILING.gains(dense(world.points)).sort_values("gain", kind="stable").iloc[0]
    where = f"{percent(worst['thp_failure'])} failing, {percent(worst['read_first'])} read first"
    return f"least gain {percent(worst['gain'])}: kernel {worst['kernel']}, {where}"


def _zero_page_off(world: World) -> float | None:
    rows = ZERO_PAGE.gains(dense(world.points))
    rows = rows[(rows["thp_failure"] == 0) & (rows["read_first"] > 0) & (rows["kernel"] == "6.12")]
    return None if rows.empty else float(rows["gain"].min())


def _kernels_it_helps(world: World) -> str:
    rows = ZERO_PAGE.gains(dense(world.points))
    worst = rows[(rows["thp_failure"] == 0) & (rows["read_first"] > 0)].groupby("kernel")["gain"].min()
    not_so = [str(kernel) for kernel, gain in worst.items() if winner_of(float(gain)) <= 0]
    return f"the kernel is not {listed(not_so)}" if not_so else ""


def _sparse(world: World) -> float | None:
    rows = TOUCHED.gains(sparse(world.points))
    rows = rows[(rows["thp_failure"] == 0) & (rows["touched"] == 1 / 16)]
    return None if rows.empty else float(rows["gain"].max())


CLAIMS = (
    own_claim(
        NAME,
        "THP takes no longer than 4K pages where all memory is written, whatever fails and is read first",
        "all kernels; read_first_*",
        "least gain",
        measure=_least,
        holds=lambda v: winner_of(v) >= 0,
        figure=_least_figure,
    ),
    own_claim(
        NAME,
        "without the huge zero page THP takes less time where memory is read first",
        "kernel 6.12, no failing allocation; read_first_10 ... 100",
        "least gain",
        measure=_zero_page_off,
        holds=lambda v: winner_of(v) > 0,
        figure=lambda world: f"at least {percent(_zero_page_off(world) or 0)} less",
        condition=_kernels_it_helps,
    ),
    own_claim(
        NAME,
        "4K pages take less time where one page in 16 is written",
        "all kernels, no failing allocation; one_of_16",
        "largest gain of THP",
        measure=_sparse,
        holds=lambda v: winner_of(v) < 0,
        figure=lambda world: f"THP takes {1 - (_sparse(world) or 0):.2f} times as long",
    ),
)
STORY = Story(tables, answer, CLAIMS, described)
