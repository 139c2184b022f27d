"""Tables of a report: text in cells, as a reader sees it; and the configurations of a study, as many as a page holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sweep.quantity import format_size
from sweep.report.facts import Facts
from sweep.report.roles import SIZES

MEASURES: Mapping[str, str] = {
    "exits": "exits",
    "pf_retry": "pf_retry",
    "mmu_lock_write": "mmu_lock_write",
    "guest_ns": "guest ms",
    "total_ns": "total ms",
    "held_bytes": "held MiB",
}
SCALE: Mapping[str, float] = {"guest_ns": 1e-6, "total_ns": 1e-6, "held_bytes": 1 / (1 << 20)}
PRINTED_ROWS = 400  # of a terminal
SAMPLED_POINTS = 10_000  # of a page; beyond, configurations are drawn


@dataclass(frozen=True, eq=False)
class ReportTable:
    """A titled table; `frame` holds what is shown, as text. One that may be cut to fit says of how many rows it is a sample, and in which
    order rows are kept (their index)."""

    title: str
    frame: pd.DataFrame
    note: str = ""
    sample_of: int = 0
    keep: "pd.Index[Any] | None" = None

    def head(self, rows: int) -> "ReportTable":
        """The first rows, and how many there are more."""
        most = max(len(self.frame), self.sample_of)
        if most <= rows:
            return self
        more = f"{most - rows:,} more rows: faultsweep query DIR 'select ...'"
        return ReportTable(self.title, self.frame.head(rows), f"{self.note}; {more}" if self.note else more)

    def within(self, weights: "pd.Series[int]", most: int) -> "ReportTable":
        """As many rows, in the order of `keep`, as weigh no more than that together; the note says of how many."""
        if self.keep is None:
            return self
        fits = weights.reindex(self.keep.intersection(self.frame.index, sort=False)).cumsum() <= most
        frame = self.frame[fits.reindex(self.frame.index)]
        left_out = len(frame) < self.sample_of
        note = f"{len(frame):,} of {self.sample_of:,} configurations, an even sample by their ids" if left_out else self.note
        return ReportTable(self.title, frame, note)


def pick(frame: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """Rows whose columns have these values."""
    kept = np.ones(len(frame), np.bool_)
    for column, value in wanted.items():
        kept &= (frame[column] == value).to_numpy()
    return frame[kept]


def means(points: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean of each measure over replicates, one row per combination of `keys`, in order of first appearance."""
    return points.groupby(list(keys), sort=False, observed=True)[list(MEASURES)].mean().reset_index()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def cell(name: str, value: Any) -> str:
    """A parameter as text; sizes with their unit."""
    return format_size(int(value)) if name in SIZES else f"{value:.6g}" if isinstance(value, float) else str(value)


def shown(frame: pd.DataFrame, keys: Sequence[str], base: pd.Series | None) -> pd.DataFrame:
    """Keys and measures as text, each measure with its ratio to the base."""
    out = pd.DataFrame({name: _cells(frame[name]) for name in keys}, index=frame.index)
    for column, label in MEASURES.items():
        values = frame[column] * SCALE.get(column, 1.0)
        texts = [_number(value) for value in values]
        if base is not None and base[column]:
            ratios = frame[column] / base[column]
            texts = [f"{text} ({ratio:.3g}x)" for text, ratio in zip(texts, ratios, strict=True)]
        out[label] = texts
    return out


def _cells(column: "pd.Series[Any]") -> "pd.Series[Any]":
    texts = {value: cell(str(column.name), value) for value in column.unique()}
    return column.astype(object).map(texts)


def general_table(facts: Facts) -> ReportTable:
    """The configurations of any study: what varies, and the measures. Of more than SAMPLED_POINTS points, those with the lowest ids: ids
    are digests, so that is an even sample, and always the same."""
    keys = list(facts.varying) or ["workload"]
    by_id = facts.frame["id"].sort_values(kind="stable").index
    kept = facts.frame.loc[by_id, "replicates"].cumsum() <= max(SAMPLED_POINTS, facts.frame["replicates"].iloc[0])
    drawn = facts.frame[kept.reindex(facts.frame.index)] if facts.points > SAMPLED_POINTS else facts.frame
    return ReportTable("Configurations, means over replicates", shown(drawn, keys, None), "", len(facts.frame), by_id)
