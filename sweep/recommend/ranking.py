"""Settings by the time that the guest takes, under a memory budget, and the one to choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sweep.report.facts import PARTS
from sweep.report.roles import CONDITIONS, PARAMETER_COLUMNS, SETTINGS, rank, setting_label, word
from sweep.report.standings import MATTERS

GUEST = "guest_ns"
FIGURES = (
    GUEST,
    "total_ns",
    "fault_ns",
    "held_bytes",
    "exits",
    "pf_taken",
    "pf_fixed",
    "pf_retry",
    "pf_spurious",
    "cow_4k",
    "cow_huge",
    "spte_prefetch",
)
MEANS = (*FIGURES, *PARTS)


Row = Mapping[str, Any]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, by the names of their columns."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


@dataclass(frozen=True, eq=False)
class Ranking:
    """The settings under the same conditions.

    `conditions`: what differs from the question. `points`: all replicates, with `setting` (label), `needs` (bytes), `fits` (the budget).
    `rows`: one per setting (index: its label), least guest time first: the parameters, MEANS over replicates, `needs`, `fits`, and `more`,
    `more_low`, `more_high` (guest time beyond that of `best` as a part of it: mean and range over replicates of the same number, which
    touch the same pages)."""

    conditions: str
    points: pd.DataFrame
    rows: pd.DataFrame
    best: str

    def row(self, label: str) -> Row:
        """Of a setting; `label` is one of its columns."""
        return records(self.rows.loc[[label]].reset_index(names="label"))[0]

    @property
    def fitting(self) -> pd.DataFrame:
        return self.rows[self.rows["fits"]]

    def rival(self) -> str | None:
        """The fastest that fits and is slower than the best by as much as matters; if none is, the next one."""
        others = self.fitting.drop(index=self.best)
        slower = others[others["more"] > MATTERS]
        return None if others.empty else str((others if slower.empty else slower).index[0])

    def as_good(self) -> list[str]:
        """Other settings that fit and whose time differs by less than what matters."""
        others = self.fitting.drop(index=self.best)
        return [str(label) for label in others.index[others["more"].abs() <= MATTERS]]


def rankings(points: pd.DataFrame, base: Mapping[str, Any], budget: float) -> list[Ranking]:
    """One for each set of conditions among the points, that of `base` (a point's columns) first. `budget`: bytes for the base's memory;
    other amounts of memory get as much in proportion. Conditions under which nothing fits are left out."""
    points = points.sort_values("point_id")
    varying = [name for name in PARAMETER_COLUMNS if points[name].nunique() > 1]
    settings = [name for name in SETTINGS if name in varying or name == "backing"]
    conditions = [name for name in CONDITIONS if name in varying]
    found = points.assign(needs=needs(points), setting=[setting_label(row) for row in records(points[settings])])
    found["fits"] = found["needs"] <= budget * (points["memory_bytes"] / base["memory_bytes"])
    places = [_differing(conditions, row, base) for row in records(points)]
    order = sorted(set(places), key=lambda place: [(CONDITIONS.index(name), *rank(name, value)) for name, value in place])
    groups = found.groupby(pd.Series([order.index(place) for place in places], points.index))
    made = ((", ".join(word(name, value) for name, value in order[int(str(number))]), rows) for number, rows in groups)
    return [ranking(label, rows) for label, rows in made if rows["fits"].any()]


def _differing(conditions: Sequence[str], row: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The conditions of a point that are not those of the base; as many cores as vCPUs are not said."""
    return tuple(
        (name, row[name]) for name in conditions if row[name] != base[name] and not (name == "cores" and row[name] == row["vcpus"])
    )


def needs(points: pd.DataFrame) -> "pd.Series[float]":
    """Bytes that a guest takes from the host: what it holds in the end; of hugetlb all of its memory, which is reserved at its start."""
    hugetlb = points["backing"].str.contains("hugetlb")
    return points["memory_bytes"].where(hugetlb, points["held_bytes"]).astype(float)


def ranking(conditions: str, points: pd.DataFrame) -> Ranking:
    """Of points whose conditions are equal, of which some fit. The best of those that are as good as the fastest within what matters is the
    one that needs the least memory; then the one that is ready first."""
    kept = [name for name in PARAMETER_COLUMNS if name in points]
    means = points.groupby("setting", sort=False)[[*MEANS, "needs"]].mean()
    rows = points.drop_duplicates("setting").set_index("setting")[kept].join(means).join(points.groupby("setting")["fits"].all())
    rows = rows.sort_index().sort_values([GUEST, "total_ns", "needs"], kind="stable")
    fast = rows[rows["fits"]]
    fast = fast[fast[GUEST] <= fast[GUEST].iloc[0] * (1 + MATTERS)]
    best = str(fast.sort_values(["needs", "total_ns", GUEST], kind="stable").index[0])
    times = points.pivot_table(index="replicate", columns="setting", values=GUEST)
    more = times.div(times[best], axis=0) - 1
    return Ranking(conditions, points, rows.assign(more=more.mean(), more_low=more.min(), more_high=more.max()), best)
