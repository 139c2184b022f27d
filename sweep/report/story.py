"""What a study may have of its own in its report: tables, claims, and the answer to its question."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from sweep.quantity import human_time
from sweep.report.claims import DEFAULT_COSTS, Claim, Judged, World, judge
from sweep.report.contest import LISTED, together, told
from sweep.report.facts import order_of
from sweep.report.roles import SETTINGS
from sweep.report.tables import ReportTable, pick

Cases = pd.DataFrame  # one row per point: parameters, columns of table `points`, and what a question is about


def as_they_are(world: World) -> Cases:
    return world.points


@dataclass(frozen=True)
class Story:
    """A study's own tables, claims and answer. `tables` gives none where the dataset lacks the rows for them; then the report is the one
    that any study has. `answer`: from the dataset alone; '' where the rows for it are not there. `described`: the points of a world with
    further columns, of what the question is about."""

    tables: Callable[[Sequence[World]], Sequence[ReportTable]]
    answer: Callable[[Sequence[World]], str]
    claims: Sequence[Claim] = ()
    described: Callable[[World], Cases] = as_they_are

    def told(self, worlds: Sequence[World]) -> tuple[list[ReportTable], list[Judged], str]:
        """(tables, judged claims, answer); nothing where the dataset lacks the rows."""
        known = [replace(world, points=self.described(world)) for world in worlds]
        known = [world for world in known if len(world.points)]
        tables = list(self.tables(known)) if known else []
        if not tables:
            return [], [], ""
        claims = [judged for claim in self.claims if (judged := judge(claim, known)) is not None]
        return tables, claims, self.answer(known)


def cases_of(worlds: Sequence[World]) -> Cases:
    """The points of all worlds, in the order of their backings, kernels and other settings."""
    cases = pd.concat([world.points for world in worlds], ignore_index=True)
    return cases.loc[order_of(cases, tuple(dict.fromkeys(("backing", "kernel", *SETTINGS, "memory_bytes", "thp_failure"))))]


def default(cases: Cases) -> Cases:
    """Those at default costs."""
    return pick(cases, costs=DEFAULT_COSTS)


def nth(world: World, op: str, number: int, column: str) -> "pd.Series[Any]":
    """A column of the `number`-th step (from 0) with that op, for each row of `world.points`; NaN for points that have fewer."""
    steps = world.steps[world.steps["op"] == op].sort_values(["point_id", "step"])
    found = steps[steps.groupby("point_id").cumcount() == number].set_index("point_id")[column]
    return world.points["point_id"].map(found)


def own_claim(study: str, text: str, rows: str, unit: str, **measured: Any) -> Claim:
    """A statement that a study puts to the test itself; `measured`: measure, holds, figure, condition."""
    return Claim(text=text, who="this study", message=f"configs/studies/{study}.toml", rows=rows, unit=unit, **measured)


# --- tables


def figure_table(title: str, cases: Cases, heads: Mapping[str, str], figures: Mapping[str, "Figure"], note: str = "") -> ReportTable:
    """One row per combination of the columns of `heads` (column -> head), in their order; figures: means over replicates."""
    keys = list(heads)
    frame = cases.groupby(keys, sort=False, observed=True)[[figure.column for figure in figures.values()]].mean().reset_index()
    frame = frame.loc[order_of(frame, keys)]
    cells = {head: [told(name, value) for value in frame[name]] for name, head in heads.items()}
    cells |= {head: [figure.word(float(value)) for value in frame[figure.column]] for head, figure in figures.items()}
    return ReportTable(title, together(pd.DataFrame(cells), [head for name, head in heads.items() if name in LISTED]), note)


@dataclass(frozen=True)
class Figure:
    """A column, and how its values are said."""

    column: str
    word: Callable[[float], str]


def least(rows: pd.DataFrame, column: str) -> "pd.Series[Any]":
    """The row with the least value of a column, the first of them."""
    return rows.sort_values(column, kind="stable").iloc[0]


def duration(ns: float) -> str:
    return human_time(ns / 1e9)


def about(ns: float) -> str:
    """A duration of two digits."""
    return human_time(float(f"{ns:.2g}") / 1e9)


def ranged(values: "pd.Series[Any]", word: Callable[[float], str]) -> str:
    """'31 ms', or '31 ms to 35 ms'."""
    low, high = word(float(values.min())), word(float(values.max()))
    return low if low == high else f"{low} to {high}"


def by(cases: Cases, name: str, figure: Callable[[Cases], str]) -> list[tuple[str, str]]:
    """(value of a condition, what is told of the cases that have it), for alike()."""
    return [(told(name, value), figure(here)) for value, here in cases.groupby(name, sort=False, observed=True)]
