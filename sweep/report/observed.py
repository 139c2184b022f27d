"""Predictions beside observations: points of a dataset that are what somebody measured."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from sweep.observations import METRICS, Observation
from sweep.quantity import human_size
from sweep.report.tables import ReportTable, pick, varying

FIRST = ("workload", "backing", "costs", "mmu", "kernel", "cores", "smt")  # in this order; what varies beside them comes after
FREE = "costs"  # a row does not say them: each cost file is a prediction of its own


def observed_table(points: pd.DataFrame, observations: Sequence[Observation]) -> ReportTable:
    """A line for every observation and every cost file that points with its parameters have."""
    wanted = [{name: value for name, value in row.point.columns().items() if name != FREE} for row in observations]
    told = [name for name in wanted[0] if len({columns[name] for columns in wanted}) > 1]
    lines: list[dict[str, Any]] = []
    missing = []
    for row, columns in zip(observations, wanted, strict=True):
        found = pick(points, **columns)
        if found.empty:
            missing.append(row.case)
        for costs, group in found.groupby(FREE, sort=True):
            predicted = row.of({metric.column: group[metric.column].mean() for metric in METRICS.values()})
            shown = {name: _cell(name, columns[name]) for name in told}
            line = {"observation": row.case, **shown, "costs": costs, "metric": row.metric, "predicted": _figure(predicted)}
            lines.append(line | {"observed": _figure(row.value), "predicted/observed": f"{predicted / row.value:.3f}"})
    note = f"no point of this dataset has the parameters of {', '.join(missing)}" if missing else ""
    return ReportTable("Prediction beside observation", pd.DataFrame(lines), note)


def figures_table(points: pd.DataFrame, observations: Sequence[Observation]) -> ReportTable:
    """What every configuration gives in the metrics of the observations, in the order of the parameters; means over replicates."""
    names = varying(points)
    keys = [name for name in FIRST if name in names] + [name for name in names if name not in FIRST] or ["workload"]
    metrics = {name: METRICS[name] for name in dict.fromkeys(row.metric for row in observations)}
    frame = points.groupby(keys, sort=True, observed=True)[list({m.column for m in metrics.values()})].mean().reset_index()
    shown = pd.DataFrame({name: [_cell(name, value) for value in frame[name]] for name in keys})
    for name, metric in metrics.items():
        shown[name] = [_figure(value) for value in frame[metric.column] * metric.scale]
    return ReportTable("Predictions", shown)


def _cell(name: str, value: Any) -> str:
    return human_size(value) if name == "memory_bytes" else str(value)


def _figure(value: float) -> str:
    """A rate or a duration; nothing where there is none (no guest time: no rate)."""
    if value == 0:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
