"""Main tables: means over replicates, relative to a base configuration where a study has one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from sweep.parameters import COLUMN_OF, PARAMETERS

MEASURES: Mapping[str, str] = {
    "exits": "exits",
    "pf_retry": "pf_retry",
    "mmu_lock_write": "mmu_lock_write",
    "guest_ns": "guest ms",
    "total_ns": "total ms",
    "held_bytes": "held MiB",
}
SCALE: Mapping[str, float] = {"guest_ns": 1e-6, "total_ns": 1e-6, "held_bytes": 1 / (1 << 20)}
PARAMETER_COLUMNS = [COLUMN_OF.get(name, name) for name in PARAMETERS]
MAX_ROWS = 400


@dataclass(frozen=True, eq=False)
class ReportTable:
    """A titled table; `frame` holds what is shown, as text."""

    title: str
    frame: pd.DataFrame
    note: str = ""


def pick(frame: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """Rows whose columns have these values."""
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame


def means(points: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean of each measure over replicates, one row per combination of `keys`, in order of first appearance."""
    return points.groupby(list(keys), sort=False, observed=True)[list(MEASURES)].mean().reset_index()


def varying(points: pd.DataFrame) -> list[str]:
    """Parameter columns with more than one value."""
    return [name for name in PARAMETER_COLUMNS if points[name].nunique() > 1]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def shown(frame: pd.DataFrame, keys: Sequence[str], base: pd.Series | None) -> pd.DataFrame:
    """Keys and measures as text, each measure with its ratio to the base."""
    out = frame[list(keys)].astype(str).copy()
    for column, label in MEASURES.items():
        values = frame[column] * SCALE.get(column, 1.0)
        texts = [_number(value) for value in values]
        if base is not None and base[column]:
            ratios = frame[column] / base[column]
            texts = [f"{text} ({ratio:.3g}x)" for text, ratio in zip(texts, ratios, strict=True)]
        out[label] = texts
    return out


def general_table(points: pd.DataFrame) -> ReportTable:
    """Any study: what varies, and the measures."""
    keys = varying(points) or ["workload"]
    frame = means(points, keys)
    cut = frame.head(MAX_ROWS)
    note = f"{len(frame) - MAX_ROWS} more rows: faultsweep query DIR 'select ...'" if len(frame) > MAX_ROWS else ""
    return ReportTable("Configurations, means over replicates", shown(cut, keys, None), note)
