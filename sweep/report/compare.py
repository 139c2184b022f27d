"""`report A B`: two datasets of the same points under something else: another kernel, host or model. Differences with intervals.

A pair is two points whose parameters and replicate are the same, but for what has one value in all of A and another one in all of B.
Replicates are paired by number: they touch the same pages (common random numbers).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from sweep.dataset.files import publish
from sweep.dataset.read import Dataset, connection
from sweep.errors import DatasetError
from sweep.record import study_of
from sweep.report import charts
from sweep.report.charts import Chart, coloured
from sweep.report.facts import no_points, numbered, order_of
from sweep.report.page import Page, render
from sweep.report.roles import CONDITIONS, PARAMETER_COLUMNS, SETTINGS, chosen, setting_label, word
from sweep.report.sections import Drawn
from sweep.report.tables import PRINTED_ROWS, SCALE, ReportTable, cell
from sweep.study import Study

MEASURES: Mapping[str, str] = {
    "total_ns": "total ms",
    "guest_ns": "guest ms",
    "exits": "exits",
    "pf_retry": "pf_retry",
    "mmu_lock_write": "mmu_lock_write",
    "held_bytes": "held MiB",
    "fault_p99_ns": "p99 of faults, us",
}
SCALES: Mapping[str, float] = {**SCALE, "fault_p99_ns": 1e-3}
LEVEL = 0.95
TABLE_ROWS, DRAWN_POINTS, DRAWN_SETTINGS, PRINTED = 2000, 1000, 40, 20
METHOD = (
    f"A difference is B less A. {LEVEL:.0%} intervals by Student's t over pairs: of a configuration over its replicates, of a summary "
    "over the configurations' relative differences. Configurations are chosen by the study and no random sample: a summary's interval says "
    "how even the change is."
)


@dataclass(frozen=True)
class Comparison:
    """What `report A B` found. `summary`: one row per measure; `changes`: one per configuration, greatest change of total time first."""

    title: str
    answer: str
    path: Path
    summary: ReportTable
    changes: ReportTable
    notes: tuple[str, ...]

    def as_text(self) -> str:
        changes = self.changes.head(PRINTED)
        parts = [self.title, "", self.answer, *self.notes, ""]
        for table in (self.summary, changes):
            parts += [table.title, table.frame.to_string(index=False), table.note, ""]
        return "\n".join([*parts, f"page: {self.path}"])

    def as_json(self) -> dict[str, Any]:
        tables = [self.summary, self.changes.head(PRINTED_ROWS)]
        return {
            "title": self.title,
            "answer": self.answer,
            "page": str(self.path),
            "notes": list(self.notes),
            "tables": [{"title": t.title, "note": t.note, "rows": t.frame.to_dict("records")} for t in tables],
        }


@dataclass(frozen=True)
class Side:
    """One of the two datasets."""

    name: str
    study: Study
    digests: Mapping[str, str]


def compare(first: Path | str, second: Path | str, page_file: Path | None = None) -> Comparison:
    """Compare two datasets and write the page: `page_file`, without it FIRST/report/compare-SECOND.html. Raises DatasetError where they do
    not pair, EnvironmentProblemError where the page cannot be written."""
    datasets = Dataset(first), Dataset(second)
    rows = tuple(dataset.store.state().rows for dataset in datasets)
    if not all(rows):
        raise no_points(datasets[rows.index(0)])
    sides = _side(datasets[0]), _side(datasets[1])
    with connection({name: _table(dataset) for name, dataset in zip("ab", datasets, strict=True)}, threads=1) as database:
        differs = what_differs(database, sides)
        pairs = paired(database, differs, sides)
    for name in sorted(set(pairs["workload"]) if "workload" in pairs else ()):
        _same_workload(sides, str(name))
    summary, changes = summary_table(pairs), changes_table(pairs)
    alone = without_partner(pairs, rows)
    notes = (*_notes(sides, differs), *alone, METHOD)
    title = f"{sides[0].name} (A) against {sides[1].name} (B)"
    name = f"compare-{re.sub(r'[^A-Za-z0-9._-]+', '-', sides[1].name)[:80]}.html"
    path = page_file or datasets[0].store.local_folder() / "report" / name
    found = Comparison(title, answer(pairs), path, summary, changes, notes)
    sections = [
        Drawn("summary", "Summary", [*notes, summary]),
        Drawn("settings", "Change of each setting", [by_setting(pairs)]),
        Drawn("pairs", "A against B", [against(pairs)]),
        Drawn("changes", "Configurations", [changes]),
        Drawn("provenance", "Where this comes from", [_provenance(sides)]),
    ]
    facts = [("paired points", f"{int(pairs['pairs'].sum()):,}"), ("configurations", f"{len(pairs):,}")]
    page = Page(title, " and ".join(sorted({side.study.name for side in sides})), "", found.answer, facts, (), sections)
    publish(path, render(page))
    return found


def _side(dataset: Dataset) -> Side:
    record = dataset.store.json("study.json")
    seal = dataset.store.seal()
    digests = {"study digest": str(record["digest"]), "model_digest": str(record["model_digest"])}
    digests |= {"root_digest": seal.root_digest, "content_digest": seal.content_digest} if seal else {}
    return Side(dataset.store.name.rstrip("/").rsplit("/", 1)[-1] or "dataset", study_of(record, dataset.store.name), digests)


def _table(dataset: Dataset) -> Any:
    return dataset.scanned("points", ["point_id", "replicate", *PARAMETER_COLUMNS, *MEASURES])


# --- what pairs


def _keys(database: duckdb.DuckDBPyConnection) -> list[str]:
    there = set(database.table("a").columns) & set(database.table("b").columns)
    return [name for name in PARAMETER_COLUMNS if name in there]


def _key(name: str) -> str:
    """The parameter in SQL; of costs the name without what is moved, which is a key of its own."""
    return "split_part(costs, '@', 1)" if name == "costs" else name


MOVED = "substr(costs, length(split_part(costs, '@', 1)) + 1)"


def what_differs(database: duckdb.DuckDBPyConnection, sides: tuple[Side, Side]) -> dict[str, tuple[Any, Any]]:
    """Parameters that have one value in A and another in B. Raises DatasetError for one with no common value and several on a side."""
    found: dict[str, tuple[Any, Any]] = {}
    wrong = []
    for name in _keys(database):
        values = [{row[0] for row in database.sql(f"select distinct {_key(name)} from {side}").fetchall()} for side in "ab"]  # noqa: S608  our own names
        if values[0] & values[1]:
            continue
        if len(values[0]) == len(values[1]) == 1:
            found[name] = (next(iter(values[0])), next(iter(values[1])))
        else:
            wrong.append(f"{name} is {_listed(name, values[0])} in {sides[0].name} and {_listed(name, values[1])} in {sides[1].name}")
    if wrong:
        raise DatasetError(
            f"{sides[0].name} and {sides[1].name} do not pair: {'; '.join(wrong)}. Give datasets that share values, or have one value each"
        )
    return found


def _listed(name: str, values: set[Any]) -> str:
    texts = sorted(word(name, value) for value in values)
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


def paired(database: duckdb.DuckDBPyConnection, differs: Mapping[str, Any], sides: tuple[Side, Side]) -> pd.DataFrame:
    """One row per configuration: the shared parameters that vary, `moved` costs, `pairs` (replicates), `id` (of A's least point), and of
    each measure m_a, m_b (means), m_s (standard deviation of the paired differences; NaN of one pair). Raises DatasetError if nothing
    pairs."""
    keys = [name for name in _keys(database) if name not in differs]
    names = ", ".join(f"{_key(name)} as {name}" for name in keys)
    sides_sql = [f"(select {names}, {MOVED} as moved, replicate, point_id, {', '.join(MEASURES)} from {side}) {side}" for side in "ab"]  # noqa: S608
    figures = ", ".join(f"avg(a.{m})::double as {m}_a, avg(b.{m})::double as {m}_b, stddev_samp(b.{m} - a.{m}) as {m}_s" for m in MEASURES)
    using = ", ".join([*keys, "moved"])
    query = (
        f"select {using}, count(*) as pairs, min(a.point_id) as id, {figures} "  # noqa: S608
        f"from {sides_sql[0]} join {sides_sql[1]} using ({using}, replicate) group by {using} order by id"
    )
    frame: pd.DataFrame = database.sql(query).to_arrow_table().to_pandas(strings_to_categorical=True)
    if frame.empty:
        raise DatasetError(
            f"{sides[0].name} and {sides[1].name} do not pair: no point of one has the parameters and the replicate of a point of the "
            f"other. Studies {sides[0].study.name!r} and {sides[1].study.name!r}; compare runs of one study"
        )
    fixed = [name for name in (*keys, "moved") if frame[name].nunique() == 1]
    frame = frame.drop(columns=[name for name in fixed if name != "workload"]).assign(id=frame["id"].astype(str))
    varying = [name for name in (*CONDITIONS, *SETTINGS, "moved") if name in frame and name not in fixed]
    return frame.loc[order_of(frame, varying)].reset_index(drop=True)


def _same_workload(sides: tuple[Side, Side], name: str) -> None:
    digests = [side.study.workloads[name].digest() for side in sides if name in side.study.workloads]
    if len(digests) == 2 and digests[0] != digests[1]:
        raise DatasetError(
            f"{sides[0].name} and {sides[1].name} do not pair: workload {name!r} has other steps in one than in the other; "
            f"run one of them again with the workload of the other"
        )


def without_partner(pairs: pd.DataFrame, points: tuple[int, ...]) -> list[str]:
    """How many points of A and B are in no pair. `points`: of A, of B."""
    alone = [count - int(pairs["pairs"].sum()) for count in points]
    return [f"{alone[0]:,} of {points[0]:,} points of A and {alone[1]:,} of {points[1]:,} of B have no partner."] if any(alone) else []


def _notes(sides: tuple[Side, Side], differs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """What A and B differ in."""
    told = [f"{name}: {cell(name, one)} in A, {cell(name, other)} in B" for name, (one, other) in differs.items()]
    first, second = sides
    if first.digests["model_digest"] != second.digests["model_digest"]:
        told.append("the model's source differs")
    if first.study.seed != second.study.seed:
        told.append("the seeds differ, so pairs share parameters but not the pages they touch")
    both = sorted(set(first.study.costs) & set(second.study.costs))
    changed = [name for name in both if first.study.costs[name].digest() != second.study.costs[name].digest()]
    if changed:
        told.append(f"costs of the same name have other values: {', '.join(changed[:4])}")
    return ["What differs: " + ("; ".join(told) if told else "nothing that the datasets say") + "."]


# --- what is shown


def relative(pairs: pd.DataFrame, measure: str) -> "pd.Series[float]":
    """(B - A) / A of each configuration where A is not 0."""
    there = pairs[pairs[f"{measure}_a"] > 0]
    return there[f"{measure}_b"] / there[f"{measure}_a"] - 1


def interval(mean: float, deviation: float, count: int) -> tuple[float, float]:
    """Student's t interval of a mean; NaN of less than two."""
    if count < 2 or not np.isfinite(deviation):
        return float("nan"), float("nan")
    from scipy import stats  # half a second, which other commands need not wait for

    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / count**0.5
    return mean - half, mean + half


def _percent(value: float) -> str:
    return "" if not np.isfinite(value) else f"{100 * value:+,.0f}" if abs(value) >= 10 else f"{100 * value:+.3g}"


def _between(low: float, high: float, text: Any) -> str:
    return "" if not np.isfinite(low) else f"{text(low)} ... {text(high)}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:,.4g}"


def summary_table(pairs: pd.DataFrame) -> ReportTable:
    """Of each measure: means of A and B, the mean relative difference with its interval, how many went down, stayed, went up."""
    rows = []
    for measure, label in MEASURES.items():
        one, other = pairs[f"{measure}_a"], pairs[f"{measure}_b"]
        change = relative(pairs, measure)
        low, high = interval(change.mean(), change.std(), len(change))
        scale = SCALES.get(measure, 1.0)
        rows.append(
            {
                "measure": label,
                "A": _figure(one.mean() * scale),
                "B": _figure(other.mean() * scale),
                "mean change, %": _percent(change.mean()),
                "95 % interval": _between(low, high, _percent),
                "median": _percent(change.median()),
                "least ... most": _between(change.min(), change.max(), _percent),
                "lower": f"{(other < one).sum():,}",
                "same": f"{(other == one).sum():,}",
                "higher": f"{(other > one).sum():,}",
            }
        )
    return ReportTable("B compared with A, over all paired configurations", pd.DataFrame(rows), "changes relative to A, where A is not 0")


def changes_table(pairs: pd.DataFrame) -> ReportTable:
    """Configurations, the greatest change of total time first."""
    change = relative(pairs, "total_ns").reindex(pairs.index).fillna(0.0)
    order = change.abs().sort_values(ascending=False, kind="stable").index[:TABLE_ROWS]
    rows = pairs.loc[order]
    keys = [name for name in pairs if name in (*PARAMETER_COLUMNS, "moved")]
    table = pd.DataFrame({name: [cell(str(name), value) for value in rows[name]] for name in keys})
    for measure in ("total_ns", "exits", "held_bytes"):
        table = table.assign(**_columns(rows, measure))
    note = f"{len(rows):,} of {len(pairs):,} configurations, those with the greatest change of total time" if len(rows) < len(pairs) else ""
    return ReportTable("Configurations by change of total time", table, note)


def _columns(rows: pd.DataFrame, measure: str) -> dict[str, list[str]]:
    scale, label = SCALES.get(measure, 1.0), MEASURES[measure]
    found: dict[str, list[str]] = {f"{label}, A": [], f"{label}, B": [], f"{label}, B - A": [], f"{label}, 95 %": []}
    for one, other, deviation, count in rows[[f"{measure}_a", f"{measure}_b", f"{measure}_s", "pairs"]].itertuples(index=False):
        low, high = interval((other - one) * scale, deviation * scale, int(count))
        cells = (_figure(one * scale), _figure(other * scale), _figure((other - one) * scale), _between(low, high, _figure))
        for column, text in zip(found.values(), cells, strict=True):
            column.append(text)
    return found


def answer(pairs: pd.DataFrame) -> str:
    """The change of total time in a sentence."""
    change = relative(pairs, "total_ns")
    low, high = interval(change.mean(), change.std(), len(change))
    same = int((pairs["total_ns_b"] == pairs["total_ns_a"]).sum())
    if same == len(pairs):
        return f"Total time is the same in all {len(pairs):,} configurations."
    sure = f" ({LEVEL:.0%} interval {_between(low, high, _percent)})" if np.isfinite(low) else ""
    return (
        f"Total time changes by {_percent(change.mean())} %{sure} from A to B over {len(pairs):,} configurations: lower in "
        f"{int((pairs['total_ns_b'] < pairs['total_ns_a']).sum()):,}, the same in {same:,}."
    )


def by_setting(pairs: pd.DataFrame) -> Chart:
    """The mean change of total time of each setting, with its interval over the setting's configurations."""
    settings = chosen([str(name) for name in pairs if name in PARAMETER_COLUMNS])
    numbers, labels = numbered(pairs, settings, setting_label)
    change = relative(pairs, "total_ns")
    rows = []
    for number, group in change.groupby(numbers.loc[change.index], sort=True):
        low, high = interval(group.mean(), group.std(), len(group))
        mean = 100 * group.mean()
        ends = (100 * low, 100 * high) if np.isfinite(low) else (mean, mean)
        rows.append(
            {"panel": "", "label": labels.label(int(number)), "x": mean, "low": ends[0], "high": ends[1], "configurations": len(group)}
        )
    drawn = pd.DataFrame(rows).sort_values("x", kind="stable").head(DRAWN_SETTINGS)
    kind = (
        (drawn["high"] < 0)
        .map({True: "less time", False: ""})
        .where(drawn["high"] < 0, (drawn["low"] > 0).map({True: "more time", False: "no clear change"}))
    )
    places = kind.map({"less time": 2, "more time": 3, "no clear change": 0})
    caption = f"Mean over the setting's configurations, with its {LEVEL:.0%} interval."
    data = coloured(drawn, places).assign(legend=kind).drop(columns="mark")
    return Chart("Change of total time by setting", caption, {"": charts.effects("change of total time, %")}, data)


def against(pairs: pd.DataFrame) -> Chart:
    """Total time of B over that of A; of many configurations, an even sample by their ids."""
    rows = pairs[(pairs["total_ns_a"] > 0) & (pairs["total_ns_b"] > 0)]
    drawn = rows.loc[rows["id"].sort_values(kind="stable").index[:DRAWN_POINTS]]
    keys = [str(name) for name in pairs if name in (*PARAMETER_COLUMNS, "moved")]
    labels = [
        ", ".join(word(name, value) for name, value in zip(keys, values, strict=True)) for values in drawn[keys].itertuples(index=False)
    ]
    data = pd.DataFrame(
        {"panel": "", "label": labels, "x": drawn["total_ns_a"].to_numpy() / 1e6, "y": drawn["total_ns_b"].to_numpy() / 1e6}
    )
    sampled = f" {len(drawn):,} of {len(rows):,} configurations, an even sample by their ids." if len(drawn) < len(rows) else ""
    spec = charts.scatter(data, "A: total ms", "B: total ms", diagonal=True)
    data = coloured(data, pd.Series(0, index=data.index)).assign(mark="", legend="a configuration")
    return Chart("Total time", f"On the dashed line nothing changed.{sampled}", {"": spec}, data)


def _provenance(sides: tuple[Side, Side]) -> ReportTable:
    names = list(dict.fromkeys(name for side in sides for name in side.digests))
    rows = [("study", *(side.study.name for side in sides)), ("dataset", *(side.name for side in sides))]
    rows += [(name, *(side.digests.get(name, "not sealed") for side in sides)) for name in names]
    return ReportTable("Datasets", pd.DataFrame(rows, columns=["what", "A", "B"]))
