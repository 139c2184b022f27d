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
TABLE_BYTES = 700_000  # of a page: what its largest table may take


@dataclass(frozen=True, eq=False)
class ReportTable:
    """A titled table; `frame` holds what is shown, as text."""

    title: str
    frame: pd.DataFrame
    note: str = ""

    def head(self, rows: int) -> "ReportTable":
        """The first rows, and what is left out."""
        if len(self.frame) <= rows:
            return self
        more = f"{len(self.frame) - rows:,} more rows: faultsweep query DIR 'select ...'"
        return ReportTable(self.title, self.frame.head(rows), f"{self.note}; {more}" if self.note else more)


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
    """The configurations of any study: what varies, and the measures. Of more than SAMPLED_POINTS points, and of more than TABLE_BYTES,
    those with the lowest ids: ids are digests, so that is an even sample, and always the same."""
    keys = list(facts.varying) or ["workload"]
    drawn = facts.frame
    if facts.points > SAMPLED_POINTS:
        drawn = _lowest(drawn, drawn["replicates"], SAMPLED_POINTS)
    table = shown(drawn, keys, None)
    widths = pd.concat([_widths(table[name]) for name in table], axis=1).sum(axis=1)
    if widths.sum() > TABLE_BYTES:
        table = table.loc[_lowest(drawn, widths, TABLE_BYTES).index]
    left = len(facts.frame) - len(table)
    note = f"{len(table):,} of {len(facts.frame):,} configurations, an even sample by their ids" if left else ""
    return ReportTable("Configurations, means over replicates", table, note)


def _widths(column: "pd.Series[str]") -> "pd.Series[int]":
    """Bytes of each cell on the page, where words that come again are numbers (page.columns())."""
    again = column.nunique() * 2 <= len(column)
    return pd.Series(5, index=column.index) if again else column.map(lambda text: len(text.encode()) + 3)


def _lowest(frame: pd.DataFrame, weights: "pd.Series[Any]", most: int) -> pd.DataFrame:
    """Rows with the lowest ids whose weights add up to at most so much, in the order of the frame."""
    kept = weights.loc[frame["id"].sort_values(kind="stable").index].cumsum() <= most
    return frame[kept.reindex(frame.index)]
