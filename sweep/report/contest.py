"""Contests: one choice against another in all else equal; by how much it wins, how sure that is, and where it flips."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pandas as pd

from sweep.report.claims import DEFAULT_COSTS
from sweep.report.facts import TIME, order_of
from sweep.report.roles import PARAMETER_COLUMNS
from sweep.report.standings import MATTERS
from sweep.report.tables import ReportTable, cell, pick

LISTED = ("kernel", "policy", "mmu", "backing", "khugepaged")  # of which several stand in one row, where all figures are the same


@dataclass(frozen=True)
class Contest:
    """One choice against another.

    `one`, `other`: their names; `ours`, `theirs`: the parameters they differ in. What `theirs` fixes beyond that (4K pages have no rate of
    failing huge allocations) is free on our side. `along`: the condition along which the answer may flip; `held`: the further conditions
    that are told apart; `measure`: a column, of which less is better."""

    one: str
    other: str
    ours: Mapping[str, object]
    theirs: Mapping[str, object]
    along: str
    held: tuple[str, ...]
    measure: str = TIME

    def gains(self, cases: pd.DataFrame) -> pd.DataFrame:
        """Each pair of points that agree in all other parameters and in the replicate: `held`, `along`, costs, replicate, and `gain`: how
        much less our side takes, as a part of the other's; negative where it takes more."""
        fixed = {*self.ours, *self.theirs}
        on = [name for name in (*PARAMETER_COLUMNS, "replicate") if name not in fixed and name in cases]
        pairs = pick(cases, **self.ours).merge(pick(cases, **self.theirs)[[*on, self.measure]], on=on, suffixes=("", "_of_other"))
        theirs = pairs[f"{self.measure}_of_other"]
        pairs = pairs[theirs > 0]
        wanted = dict.fromkeys((*self.held, self.along, "costs", "replicate"))
        gains: pd.DataFrame = pairs.assign(gain=1 - pairs[self.measure] / theirs)[[*wanted, "gain"]]
        return gains

    def outcomes(self, cases: pd.DataFrame) -> pd.DataFrame:
        """One row per `held` and `along`, in their order: `gain` (mean over replicates at default costs), `low`, `high` (replicates),
        `cost_low`, `cost_high` (each cost at the ends of its range; NaN where the study moves none)."""
        gains, keys = self.gains(cases), [*self.held, self.along]
        own = gains["costs"] == DEFAULT_COSTS
        found = gains[own].groupby(keys, sort=False)["gain"].agg(gain="mean", low="min", high="max")
        moved = gains[~own].groupby([*keys, "costs"], sort=False)["gain"].mean().groupby(level=keys, sort=False)
        found = found.join(moved.agg(cost_low="min", cost_high="max")).reset_index()
        ordered: pd.DataFrame = found.loc[order_of(found, keys)].reset_index(drop=True)
        return ordered

    def courses(self, outcomes: pd.DataFrame) -> "list[tuple[tuple[object, ...], list[Stretch]]]":
        """How the answer goes along `along`, for each combination of `held`."""
        return [(values, stretches(rows, self.along)) for values, rows in outcomes.groupby(list(self.held), sort=False)]

    def turning(self, outcomes: pd.DataFrame, word: Callable[[float], str]) -> str:
        """Where our side becomes the better one, or stops being it, in words; of a contest that holds the kernel alone."""
        told_of = []
        for (kernel,), course in self.courses(outcomes):
            flip = flips(course)
            told_of.append((str(kernel), f"between {word(flip[0])} and {word(flip[1])}" if flip else "nowhere"))
        return alike(told_of, "{1} on {0}")


@dataclass(frozen=True)
class Stretch:
    """Neighbouring values of a condition with one winner: 1 (our side), -1 (the other), 0 (nobody by as much as matters)."""

    winner: int
    first: float
    last: float


def winner_of(gain: float) -> int:
    """1, -1, or 0 where the difference is below MATTERS."""
    return 0 if abs(gain) <= MATTERS else 1 if gain > 0 else -1


def stretches(outcomes: pd.DataFrame, along: str) -> list[Stretch]:
    """Outcomes of one scenario, in the order of the condition, taken together while the winner stays the same."""
    rows = [(float(x), float(gain)) for x, gain in zip(outcomes[along], outcomes["gain"], strict=True)]
    found = []
    for winner, group in groupby(rows, key=lambda row: winner_of(row[1])):
        part = list(group)
        found.append(Stretch(winner, part[0][0], part[-1][0]))
    return found


def flips(course: Sequence[Stretch]) -> tuple[float, float] | None:
    """The two neighbouring values between which the winner becomes another one; None where one never does."""
    won = [stretch for stretch in course if stretch.winner]
    return next(((a.last, b.first) for a, b in pairwise(won) if a.winner != b.winner), None)


# --- words


def percent(part: float) -> str:
    """'87%', '0.42%': two digits, and nothing below 0.05 %."""
    return "0%" if abs(part) < 0.0005 else f"{part:.0%}" if abs(part) >= 0.0995 else f"{100 * part:.2g}%"


def more_or_less(gain: float) -> str:
    """'35% less', '10% more', '7.6 times as much'."""
    return f"{percent(gain)} less" if gain >= 0 else f"{percent(-gain)} more" if gain > -0.5 else f"{1 - gain:.2g} times as much"


def sure(row: "pd.Series[Any]") -> str:
    """A gain with its ranges, where there are any: '87% less (each cost over its range 60% ... 95%)'."""
    ranges = (("replicates", "low", "high"), ("each cost over its range", "cost_low", "cost_high"))
    told_of = []
    for name, low, high in ranges:
        word = percent if row[low] >= 0 else more_or_less
        if not pd.isna(row[low]) and word(row[low]) != word(row[high]):
            told_of.append(f"{name} {word(row[low])} ... {word(row[high])}")
    return more_or_less(row["gain"]) + (f" ({'; '.join(told_of)})" if told_of else "")


def listed(words: Iterable[object]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    texts = [str(word) for word in words]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1]))) if texts else ""


def alike(told: Iterable[tuple[str, str]], form: str, between: str = ", ") -> str:
    """Names with what is true of each, in the form '{1} on {0}'; those of which the same is true are taken together, and what is true of
    all stands without names."""
    by_text: dict[str, list[str]] = {}
    for name, text in told:
        by_text.setdefault(text, []).append(name)
    if len(by_text) == 1:
        return next(iter(by_text))
    return between.join(form.format(listed(dict.fromkeys(names)), text) for text, names in by_text.items())


def ratio(gain: float) -> str:
    """A gain as a cell: '87%' less; 'x 61': 61 times as much, where it is more than a half more."""
    return f"x {1 - gain:.3g}" if gain < -0.5 else percent(gain)


def one_of(part: float) -> str:
    """'one page in 16'; 'all'."""
    return "all" if part >= 1 else f"one page in {1 / part:,.3g}"


# --- tables


def contest_table(
    title: str, contest: Contest, outcomes: pd.DataFrame, names: Mapping[str, str], word: Callable[[float], str]
) -> ReportTable:
    """One row per combination of `held`, one column per value of `along`: by how much less our side takes (negative: more), and where the
    answer flips; below, the range over moved costs. `names`: heads of the columns of `held`."""
    rows, ranges = [], []
    values = sorted(outcomes[contest.along].unique())
    for held, course in contest.courses(outcomes):
        here = pick(outcomes, **dict(zip(contest.held, held, strict=True))).set_index(contest.along)
        scenario = {names[name]: told(name, value) for name, value in zip(contest.held, held, strict=True)}
        cells = {word(float(x)): ratio(here["gain"][x]) if x in here.index else "" for x in values}
        flip = flips(course)
        rows.append({**scenario, **cells, "flips between": f"{word(flip[0])} and {word(flip[1])}" if flip else ""})
        moved = here.dropna(subset="cost_low")
        ends = zip(moved.index, moved["cost_low"], moved["cost_high"], strict=True)
        where = ", ".join(f"{head} {text}" for head, text in scenario.items())
        ranges += [f"{where}, {word(float(x))}: {ratio(low)} ... {ratio(high)}" for x, low, high in ends]
    frame = pd.DataFrame(rows)
    if not frame.empty:
        frame = together(frame.loc[:, (frame != "").any()], [names[name] for name in contest.held if name in LISTED])
    note = f"how much less time {contest.one} takes than {contest.other}; negative: more; x 3: three times as much; means over replicates"
    return ReportTable(title, frame, f"{note}. Each cost over its range: {'; '.join(ranges)}" if ranges else note)


def together(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows that differ in one of these columns only, as one row, with its values listed; column by column."""
    for column in columns:
        others = [name for name in frame if name != column]
        if others and len(frame) > 1:
            joined = frame.groupby(others, sort=False)[column].agg(lambda words: ", ".join(dict.fromkeys(words)))
            frame = joined.reset_index()[list(frame.columns)]
    return frame


def told(name: str, value: object) -> str:
    """A condition's value in a cell."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return WORDS.get(name, cell)(name, value)


WORDS: Mapping[str, Callable[[str, Any], str]] = {  # of the columns that describe a study's points
    **dict.fromkeys(("read_first", "thp_failure"), lambda _, part: percent(float(part))),
    **dict.fromkeys(("touched", "written"), lambda _, part: one_of(float(part))),
    "backing": lambda _, backing: BACKINGS.get(backing, backing),
}
BACKINGS: Mapping[str, str] = {
    "anonymous": "4K",
    "anonymous_thp": "THP",
    "anonymous_hugetlb_2mb": "hugetlb 2M",
    "anonymous_hugetlb_1gb": "hugetlb 1G",
    "private_memfd": "private memfd",
    "shmem_thp": "shmem THP",
}
