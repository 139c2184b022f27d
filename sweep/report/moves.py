"""How settings move along an axis (vCPUs, memory, share of pages read before they are written ...), all other conditions held.

A *panel* is one such set of other conditions, a *line* a setting in it. Along vCPUs, cores and memory are held either as they are or
per vCPU: both are panels, where a study has both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sweep.configs import Workload, digest_of
from sweep.quantity import human_size
from sweep.report.facts import TIME, Combinations, Facts, numbered
from sweep.report.roles import SETTINGS, scenario_label, setting_label
from sweep.report.standings import MATTERS, Standings

Held = dict[str, "pd.Series[Any]"]  # conditions by name
LINES, PANELS, VALUES, ROWS = 40, 24, 64, 1500  # at most so many of each in a chart
SAMPLED_VALUES = 12  # values of an axis that are told apart in a sample
HIGHLIGHTED = 8
TOGETHER = "all other conditions together"


@dataclass(frozen=True)
class Axis:
    """What is moved: its column, what it is called, its unit; `scale` turns the column's values into that unit."""

    column: str
    title: str
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Without the unit."""
        return self.title.partition(",")[0]


@dataclass(frozen=True)
class Field:
    """A number of a workload's steps that a family of workloads differs in, and nothing else."""

    name: str
    axis: Axis


FIELDS = (
    Field("read_first", Axis("read_first", "share of pages read before they are written")),
    Field("write_percent", Axis("write_percent", "writes among the accesses, %")),
)
AXES = (
    Axis("vcpus", "vCPUs"),
    Axis("memory_bytes", "memory, GiB", 1 / (1 << 30)),
    *(field.axis for field in FIELDS),
    Axis("thp_failure", "chance that a THP allocation fails"),
    Axis("cores", "host cores"),
    Axis("prealloc_threads", "threads that preallocate"),
)


@dataclass(frozen=True, eq=False)
class Moves:
    """Lines along an axis. `rows`: panel, label (of the line's setting), rank (0 ... for the highlighted ones, -1 for the rest), x, last
    (the line's last row), y; with its ranges over replicates (y_low, y_high) and over costs moved one by one (y_cost_low, y_cost_high; NaN
    where none is); and the same of `more`: how much more y is than the least of all lines there, in %. `sampled`: the study is a sample,
    and these are medians and quartiles over everything else. `left_out`: (panels, lines) that are not shown."""

    axis: Axis
    rows: pd.DataFrame
    sampled: bool
    left_out: tuple[int, int]


def families(workloads: Mapping[str, Workload], name: str) -> dict[str, tuple[str, float]]:
    """Workload -> (its family, the value of the field), for families whose workloads differ in that field alone and have two values of
    it or more. A workload whose steps have several values of it belongs to none."""
    found: dict[str, tuple[str, float]] = {}
    for workload, content in workloads.items():
        specs = [spec.model_dump(mode="json") for spec in content.specs]
        values = {spec[name] for spec in specs if name in spec and spec["op"] == "touch" and _counts(spec, name)}
        for spec in specs:
            spec.pop(name, None)
        if len(values) == 1:
            found[workload] = (digest_of(specs), float(values.pop()))
    values_of: dict[str, set[float]] = {}
    for family, value in found.values():
        values_of.setdefault(family, set()).add(value)
    members = {family: sorted((value, name) for name, (own, value) in found.items() if own == family) for family in values_of}
    return {
        workload: (f"{members[family][0][1]} ... {members[family][-1][1]}", value)
        for workload, (family, value) in found.items()
        if len(values_of[family]) > 1
    }


def _counts(spec: Mapping[str, Any], name: str) -> bool:
    """read_first is of the steps that write; write_percent of those that mix."""
    return bool(spec["access"] == ("write" if name == "read_first" else "mixed"))


def times(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with y, y_low, y_high: TIME in ms; and `effort`, by which lines are ranked."""
    rows = rows[rows[TIME] > 0]
    return rows.assign(y=rows[TIME] / 1e6, y_low=rows["low"] / 1e6, y_high=rows["high"] / 1e6, effort=rows[TIME])


def rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with y: accesses of all vCPUs in a second of the guest's time."""
    rows = rows[(rows["guest_ns"] > 0) & (rows["touches"] > 0)]
    rate = rows["touches"] / rows["guest_ns"] * 1e9
    return rows.assign(y=rate, y_low=rate, y_high=rate, effort=1 / rate)


def moves(facts: Facts, axis: Axis, found: Standings, measure: Callable[[pd.DataFrame], pd.DataFrame] = times) -> Moves | None:
    """The lines along an axis; None where the study does not move it."""
    rows = measure(facts.frame)
    field = next((field for field in FIELDS if field.axis == axis), None)
    if field is not None:
        family = families(facts.study.workloads, field.name)
        rows = rows[rows["workload"].isin(family)]
        names = rows["workload"].astype(str)
        values, named = ({name: member[i] for name, member in family.items()} for i in (1, 0))
        rows = rows.assign(workload=names.map(named))
        rows[axis.column] = names.map(values).astype(float)
    if axis.column not in rows or rows[axis.column].nunique() < 2:
        return None
    lines = _lines_of(facts, axis, found, rows)
    sampled = any(block.sample for block in facts.study.blocks)
    if sampled:
        chosen, left = _together(lines), 0
    else:
        chosen, left = _chosen_panels(facts, axis, lines, found.reference)
    if chosen.empty:
        return None
    shown, lines_left = _chosen_lines(chosen, found)
    return Moves(axis, shown, sampled, (left, lines_left))


def _lines_of(facts: Facts, axis: Axis, found: Standings, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with `label`, `leader` (the setting's number; of several that fall together, the first) and `x`."""
    if axis.column in SETTINGS:
        own = facts.settings.values.drop(columns=axis.column)
        numbers, lines = numbered(own, [str(name) for name in own], setting_label)
        rows = rows.assign(line=rows["setting"].map(numbers))
        first = rows.groupby("line")["setting"].transform("min")
        rows = rows.assign(leader=first, label=lines.labels(rows["line"]))
    else:
        rows = rows[rows["setting"].map(found.same) == rows["setting"]]
        rows = rows.assign(leader=rows["setting"], label=facts.settings.labels(rows["setting"]))
    return rows.assign(x=thinned(rows[axis.column].astype(float) * axis.scale, VALUES))


def thinned(x: "pd.Series[float]", most: int) -> "pd.Series[float]":
    """Neighbouring values taken together (the lowest stands for them), where there are more than so many."""
    values = np.unique(x)
    if len(values) <= most:
        return x
    bins = np.arange(len(values)) * most // len(values)
    return x.map(dict(zip(values, values[-(-bins * len(values) // most)], strict=True)))


def _together(rows: pd.DataFrame) -> pd.DataFrame:
    """No two points of a sample differ in one thing: one panel, with medians and quartiles over everything but line and x."""
    rows = rows[rows["moved"] == ""].assign(panel=TOGETHER)
    rows = rows.assign(x=thinned(rows["x"], SAMPLED_VALUES), paired_low=1.0, paired_high=1.0)
    times = rows.groupby(["leader", "x"])["y"]
    return rows.assign(y_low=times.transform("quantile", 0.25), y_high=times.transform("quantile", 0.75))


PER_VCPU: Mapping[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "cores": ("crowd", lambda vcpus, cores: vcpus / cores),
    "memory_bytes": ("part", lambda vcpus, memory: memory / vcpus),
}


def _ways(facts: Facts, axis: Axis, rows: pd.DataFrame) -> list[Held]:
    """The conditions that are held along an axis. Along vCPUs there are several ways: cores as they are or per vCPU, memory likewise."""
    ways: list[Held] = [{name: rows[name] for name in facts.given if name != axis.column and name in rows}]
    for name, (per_vcpu, ratio) in PER_VCPU.items() if axis.column == "vcpus" else ():
        if name in ways[0]:
            relative = ratio(rows["vcpus"].astype(float), rows[name].astype(float))
            ways += [{**{key: column for key, column in way.items() if key != name}, per_vcpu: relative} for way in ways]
    return ways


def _panels_of(held: Held, rows: pd.DataFrame) -> tuple["pd.Series[int]", Combinations]:
    """The panel of each row; conditions that never change are not said."""
    keys = pd.DataFrame({name: column for name, column in held.items() if column.nunique() > 1}, index=rows.index)
    return numbered(keys, [str(name) for name in keys], _panel_label)


def _panel_label(values: Mapping[str, Any]) -> str:
    told = [scenario_label({name: value for name, value in values.items() if name not in ("crowd", "part")}, "")]
    if "crowd" in values:
        told.append("a core for each vCPU" if values["crowd"] == 1 else f"{values['crowd']:g} vCPUs a core")
    if "part" in values:
        told.append(f"{human_size(values['part'])} a vCPU")
    return ", ".join(filter(None, told)) or "everywhere"


def _chosen_panels(facts: Facts, axis: Axis, rows: pd.DataFrame, reference: int) -> tuple[pd.DataFrame, int]:
    """Rows of the panels that have a line with two values of x or more, with their label as `panel`: first those of the reference
    scenario, then those with the most values; and how many are left out."""
    own = rows["moved"] == ""
    panels = [_panels_of(held, rows) for held in _ways(facts, axis, rows)]
    merits = []
    for way, (numbers, _) in enumerate(panels):
        merit = _merits(rows[own].assign(panel=numbers[own]), reference)
        merits.append(merit.assign(way=way, panel=merit.index))
    ranked = pd.concat(merits).sort_values(["seen", "longest", "rows"], ascending=False, kind="stable")
    shown = ranked.head(PANELS)
    shown = shown[(shown["rows"].clip(upper=LINES * VALUES).cumsum() <= ROWS) | (np.arange(len(shown)) == 0)]
    chosen = [
        rows[panels[way][0] == panel].assign(panel=panels[way][1].label(panel))
        for way, panel in zip(shown["way"], shown["panel"], strict=True)
    ]
    return pd.concat(chosen) if chosen else rows.head(0), len(ranked) - len(shown)


def _merits(rows: pd.DataFrame, reference: int) -> pd.DataFrame:
    """Of each panel with a line of two values or more: `seen` (has the reference), `longest` (most values of a line), `rows`."""
    longest = rows.groupby(["panel", "leader"], sort=False)["x"].nunique().groupby(level="panel", sort=False).max()
    found = pd.DataFrame({"longest": longest, "rows": rows.groupby("panel", sort=False).size()})
    found["seen"] = found.index.isin(rows[rows["scenario"] == reference]["panel"])
    return found[found["longest"] > 1]


def _chosen_lines(rows: pd.DataFrame, found: Standings) -> tuple[pd.DataFrame, int]:
    """One row per panel, line and x; see Moves.rows."""
    keys = ["panel", "label", "leader", "x"]
    own = rows[rows["moved"] == ""].groupby(keys, sort=False, observed=True)
    ends = {
        "effort": ("effort", "median"),
        "y_low": ("y_low", "min"),
        "y_high": ("y_high", "max"),
        "low": ("paired_low", "min"),
        "high": ("paired_high", "max"),
    }
    shown = own.agg(y=("y", "median"), **ends).reset_index()
    least = shown.groupby(["panel", "x"], sort=False)["y"].transform("min")
    ratio = shown["y"] / least
    shown = shown.assign(more=100 * (ratio - 1), more_low=100 * (ratio * shown["low"] - 1), more_high=100 * (ratio * shown["high"] - 1))
    shown = shown.merge(_cost_ranges(rows, shown[shown["y"] == least], keys), on=keys, how="left")
    leaders = _ranked(shown, found)
    shown = shown[shown["leader"].isin(leaders[:LINES])]
    ranks = {leader: place if place < HIGHLIGHTED else -1 for place, leader in enumerate(leaders)}
    last = shown.groupby(["panel", "leader"], sort=False)["x"].transform("max") == shown["x"]
    return shown.assign(rank=shown["leader"].map(ranks), last=last).drop(columns=["leader", "low", "high", "effort"]), max(
        0, len(leaders) - LINES
    )


def _cost_ranges(rows: pd.DataFrame, best: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Ranges of y and `more` over moved costs. `more` compares with what takes least at unmoved costs (`best`), under the same moved
    cost."""
    moved = rows[rows["moved"] != ""].groupby([*keys, "moved"], sort=False, observed=True)["y"].mean().reset_index()
    winner = best.drop_duplicates(["panel", "x"])[["panel", "x", "leader"]]
    against = moved.merge(winner, on=["panel", "x", "leader"])[["panel", "x", "moved", "y"]].rename(columns={"y": "least"})
    moved = moved.merge(against, on=["panel", "x", "moved"], how="left")
    moved = moved.assign(more=100 * (moved["y"] / moved["least"] - 1))
    ranges = {f"{name}_cost_{end}": (name, how) for name in ("y", "more") for end, how in (("low", "min"), ("high", "max"))}
    return moved.groupby(keys, sort=False, observed=True).agg(**ranges).reset_index()


def _ranked(shown: pd.DataFrame, found: Standings) -> list[int]:
    """Lines worth a colour first: those that win somewhere along the axis, then the most usual setting, then the rest spread over their
    ranks from fast to slow."""
    least = shown.groupby(["panel", "x"], sort=False)["effort"].transform("min")
    wins = shown[shown["effort"] == least].groupby("leader").size().sort_values(ascending=False, kind="stable")
    everyone = [int(leader) for leader in shown["leader"].unique()]
    by_speed = [int(number) for number in found.table.index if number in everyone]
    by_speed += [leader for leader in everyone if leader not in by_speed]
    first = list(dict.fromkeys([*(int(leader) for leader in wins.index[: HIGHLIGHTED // 2]), min(everyone)]))
    rest = [leader for leader in by_speed if leader not in first]
    room = max(1, HIGHLIGHTED - len(first))
    spread = [rest[i * (len(rest) - 1) // max(1, room - 1)] for i in range(min(room, len(rest)))]
    return list(dict.fromkeys([*first, *spread, *rest]))


def winners(rows: pd.DataFrame) -> pd.DataFrame:
    """Who takes the least time from where to where: panel, from, to, label. A line within MATTERS of the least goes on winning."""
    found: list[dict[str, Any]] = []
    for panel, group in rows.groupby("panel", sort=False, observed=True):
        last: dict[str, Any] = {}
        for x, here in group.sort_values("x", kind="stable").groupby("x"):
            if len(here) < 2:
                continue
            good = set(here[here["y"] <= here["y"].min() * (1 + MATTERS)]["label"])
            if last.get("label") in good:
                last["to"] = x
            else:
                last = {"panel": panel, "from": x, "to": x, "label": here["label"].iloc[int(here["y"].argmin())]}
                found.append(last)
    return pd.DataFrame(found, columns=["panel", "from", "to", "label"])
