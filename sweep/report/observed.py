"""Predictions beside observations: points of a dataset that are what somebody measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sweep.observations import METRICS, Observation
from sweep.quantity import human_size
from sweep.report.tables import ReportTable, pick

FIRST = ("workload", "backing", "costs", "mmu", "kernel", "cores", "smt")  # in this order; what varies beside them comes after
FREE = "costs"  # a row does not say them: each cost file is a prediction of its own


def predictions(frame: pd.DataFrame, observations: Sequence[Observation]) -> tuple[pd.DataFrame, list[str]]:
    """(observation, costs, metric, predicted, observed, and the parameters in which observations differ; cases without a point).

    One row for every observation and every cost file that configurations with its parameters have."""
    wanted = [{name: value for name, value in row.point.columns().items() if name != FREE} for row in observations]
    told = [name for name in wanted[0] if len({columns[name] for columns in wanted}) > 1]
    lines: list[dict[str, Any]] = []
    missing = []
    for row, columns in zip(observations, wanted, strict=True):
        found = pick(frame, **columns)
        if found.empty:
            missing.append(row.case)
        for costs, group in found.groupby(FREE, sort=True, observed=True):
            predicted = row.of({metric.column: group[metric.column].mean() for metric in METRICS.values()})
            line = {"observation": row.case, **{name: columns[name] for name in told}, "costs": costs, "metric": row.metric}
            lines.append(line | {"predicted": predicted, "observed": row.value})
    return pd.DataFrame(lines), missing


def observed_table(frame: pd.DataFrame, observations: Sequence[Observation]) -> ReportTable:
    """predictions() as a reader sees them, with their ratio."""
    found, missing = predictions(frame, observations)
    note = f"no point of this dataset has the parameters of {', '.join(missing)}" if missing else ""
    if found.empty:
        return ReportTable(TITLE, found, note)
    columns: dict[str, list[str]] = {}
    for name in map(str, found):
        figures = name in ("predicted", "observed")
        columns[name] = [_figure(value) if figures else _cell(name, value) for value in found[name]]
    columns["predicted/observed"] = [f"{value:.3f}" for value in found["predicted"] / found["observed"]]
    return ReportTable(TITLE, pd.DataFrame(columns), note)


TITLE = "Prediction beside observation"


def figures_table(frame: pd.DataFrame, varying: Sequence[str], observations: Sequence[Observation]) -> ReportTable:
    """What every configuration gives in the metrics of the observations, in the order of the parameters; means over replicates."""
    keys = [name for name in FIRST if name in varying] + [name for name in varying if name not in FIRST] or ["workload"]
    metrics = {name: METRICS[name] for name in dict.fromkeys(row.metric for row in observations)}
    means = frame.groupby(keys, sort=True, observed=True)[list({m.column for m in metrics.values()})].mean().reset_index()
    table: Mapping[str, list[str]] = {name: [_cell(name, value) for value in means[name]] for name in keys}
    figures = {name: [_figure(value) for value in means[metric.column] * metric.scale] for name, metric in metrics.items()}
    return ReportTable("Predictions", pd.DataFrame({**table, **figures}))


def _cell(name: str, value: Any) -> str:
    return human_size(value) if name == "memory_bytes" else str(value)


def _figure(value: float) -> str:
    """A rate or a duration; nothing where there is none (no guest time: no rate)."""
    if value == 0:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
