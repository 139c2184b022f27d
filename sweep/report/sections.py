"""The sections of a report, in order: what each needs, and what it shows then. One table decides which a study has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sweep.report import charts, profiles
from sweep.report.charts import Chart, coloured
from sweep.report.claims import Judged
from sweep.report.facts import QUANTILES, Facts
from sweep.report.moves import AXES, LINES, Axis, Moves, moves, rates, winners
from sweep.report.observed import predictions
from sweep.report.sensitivity import Sensitivity
from sweep.report.standings import MATTERS, Standings
from sweep.report.tables import ReportTable

Piece = str | ReportTable | Chart
VCPUS = AXES[0]
MAX_MESSAGES = 50


@dataclass(frozen=True, eq=False)
class Material:
    """All that sections draw from."""

    facts: Facts
    standings: Standings
    sensitivity: Sensitivity | None
    configurations: ReportTable
    provenance: Sequence[ReportTable]
    own: Sequence[ReportTable] = ()  # tables of a study that has its own
    claims: Sequence[Judged] = ()
    observed: Sequence[ReportTable] = field(default=())


@dataclass(frozen=True)
class Section:
    """`needs` finds what the section is about in the material; where that is nothing (None, empty), there is no section."""

    key: str
    title: str
    needs: Callable[[Material], Any]
    draw: Callable[[Any], Sequence[Piece]]


@dataclass(frozen=True)
class Drawn:
    """A section as a page shows it."""

    key: str
    title: str
    pieces: Sequence[Piece]


def drawn(material: Material) -> list[Drawn]:
    """The sections that this material has something for."""
    found = ((section, section.needs(material)) for section in SECTIONS)
    return [Drawn(section.key, section.title, section.draw(needed)) for section, needed in found if _something(needed)]


def _something(needed: Any) -> bool:
    return needed is not None and len(needed) > 0 if hasattr(needed, "__len__") else needed is not None


# --- what moves along an axis


def _along(axis: Axis) -> Section:
    def needs(material: Material) -> Moves | None:
        return moves(material.facts, axis, material.standings)

    return Section(f"along-{axis.column}", f"Time along {axis.name}", needs, _lines)


def _lines(found: Moves) -> list[Piece]:
    title = found.axis.title
    caption = (
        f"{_SAMPLED if found.sampled else _BANDS} Grey: further settings. Settings that give the same wherever they meet are one line."
    )
    rows = coloured(found.rows, found.rows["rank"])
    rows = rows.rename(columns={f"y{end}": f"time{end}" for end in ("", "_low", "_high", "_cost_low", "_cost_high")})
    rows = rows.dropna(axis=1, how="all")  # ranges over costs, where none are moved
    compared = not found.sampled and rows.groupby(["panel", "x"], sort=False).size().max() > 1
    views = {name: charts.lines(rows, title, measure) for name, measure in charts.time_measures(rows, compared).items()}
    return [Chart(f"Time along {found.axis.name}", caption + _left_out(found), views, rows), *_flips(found)]


_BANDS = (
    "Time of the guest and of the VMM's steps. Bands: least to greatest replicate. Bars: each cost alone at the ends of its range, where "
    "the study moves costs."
)
_SAMPLED = "Time of the guest and of the VMM's steps: medians over all points of the sample, with quartiles as bands."


def _left_out(found: Moves) -> str:
    panels, lines = found.left_out
    texts = [f"{panels:,} further sets of conditions"] if panels else []
    texts += [f"{lines:,} settings beyond {LINES}"] if lines else []
    return f" Not drawn: {' and '.join(texts)}." if texts else ""


def _flips(found: Moves) -> list[Piece]:
    """Where the setting with the least time changes along the axis."""
    won = winners(found.rows)
    changing = won[won.groupby("panel")["label"].transform("size") > 1]
    panels = won["panel"].nunique()
    if not panels:
        return []
    same = panels - changing["panel"].nunique()
    where = "Throughout" if same == panels else f"Under {same:,} of {panels:,} sets of conditions"
    text = f"{where} the same setting stays within {MATTERS:.0%} of the least time."
    if changing.empty:
        return [text]
    ends = [[f"{value:.6g}" for value in changing[name]] for name in ("from", "to")]
    rows = pd.DataFrame({"conditions": changing["panel"], "from": ends[0], "to": ends[1], "least time": changing["label"]})
    return [*([text] if same else []), ReportTable(f"Where the answer flips along {found.axis.name}", rows)]


def _scaling_needs(material: Material) -> Moves | None:
    found = moves(material.facts, VCPUS, material.standings, rates)
    return found if found is not None and found.rows["x"].nunique() > 2 else None


def _scaling(found: Moves) -> list[Piece]:
    rows = coloured(found.rows, found.rows["rank"]).reset_index(drop=True)
    first = rows.loc[rows.groupby("panel", sort=False)["x"].idxmin()].set_index("panel")
    leader = rows["label"] == rows["panel"].map(first["label"])
    ideal = rows["x"] / rows["panel"].map(first["x"]) * rows["panel"].map(first["y"])
    rows = rows[["panel", "label", "x", "y", "last", "colour", "mark"]].assign(ideal=ideal.where(leader))
    spec = charts.scaling(rows, "vCPUs", "accesses in a second, all vCPUs")
    caption = "Both axes are logarithmic; the dashed line is proportional to vCPUs." + _left_out(found)
    return [Chart("Accesses per second along vCPUs", caption, {"": spec}, rows)]


# --- inside one scenario


def _latencies(rows: pd.DataFrame) -> list[Piece]:
    caption = "From exit to re-entry, waiting included; means over replicates. The fastest settings have letters."
    spec = charts.quantiles(list(QUANTILES.values()), "latency, us")
    rows = rows.assign(last=rows["quantile"] == list(QUANTILES.values())[-1])
    return [Chart("Latency of single faults", caption, {"": spec}, coloured(rows, rows["rank"]))]


def _time_parts(rows: pd.DataFrame) -> list[Piece]:
    caption = (
        "Summed over vCPUs and the VMM's threads: what faults and the VMM's own work took, by what it went to. Fastest settings first. The "
        "guest's own work is not in it."
    )
    data = coloured(rows, rows["rank"]).assign(legend=rows["part"])
    return [Chart("Where the time goes", caption, {"": charts.bars("summed time, ms")}, data.drop(columns="mark"))]


def _memory(rows: pd.DataFrame) -> list[Piece]:
    caption = "Memory that the host holds at the end, beside time. Letters: settings that no other one beats in both."
    spec = charts.scatter(rows, "memory held, MiB", "time, ms")
    return [Chart("Memory held beside speed", caption, {"": spec}, coloured(rows, rows["rank"]))]


def _memory_needs(material: Material) -> pd.DataFrame:
    rows = profiles.memory_and_time(material.facts, material.standings)
    return rows if len(rows) > 1 else rows.head(0)


# --- claims, break-even, observations


def spread(judged: Judged) -> str:
    """The figure of a claim with its ranges."""
    (low, high), (cost_low, cost_high) = judged.spread, judged.cost_spread
    return (
        f"{judged.claim.unit}: {judged.value:.4g} (replicates {low:.4g} ... {high:.4g}; "
        f"over the range of each cost {cost_low:.4g} ... {cost_high:.4g})"
    )


def _claims(claims: Sequence[Judged]) -> list[Piece]:
    rows = [
        {
            "claim": judged.claim.text,
            "verdict": judged.text,
            "figure": f"{judged.figure}. {spread(judged)}",
            "who said it": f"{judged.claim.who} ({judged.claim.message})",
            "rows that test it": judged.claim.rows,
        }
        for judged in claims
    ]
    return [
        ReportTable(
            "Claims and verdicts",
            pd.DataFrame(rows),
            "a verdict holds in every replicate and over the range of every cost, or says where not",
        )
    ]


def _break_even(found: Sensitivity) -> list[Piece]:
    flips = found.effects[found.effects["flips"].notna()]
    text = f"In {found.scenario}, {found.best} takes {found.mean:.3g} % less time than {found.rival}. "
    if flips.empty:
        text += "No cost alone turns that round inside its range."
    else:
        ends = "; or ".join(
            f"{row.cost} is {row.flips:,.0f} (now {row.value:,}, range {row.range_low:,} ... {row.range_high:,})"
            for row in flips.itertuples()
        )
        text += f"That turns round where {ends}."
    if found.flipped is not None:
        text += f" With all costs drawn from their ranges at once, {found.rival} wins in {found.flipped:.1%} of the draws."
    effects = found.effects
    if effects.empty:
        return [text]
    rows = pd.DataFrame({"panel": "", "label": effects["cost"], "x": found.mean, "low": effects["low"], "high": effects["high"]})
    rows = rows.assign(low=rows[["low", "high", "x"]].min(axis=1), high=rows[["low", "high", "x"]].max(axis=1))
    ranks = effects["flips"].isna().astype(int)
    legend = ranks.map({0: "turns the answer round in its range", 1: "does not turn it round"})
    caption = (
        f"How much less time {found.best} takes than {found.rival}; left of the dashed line it takes more. Each bar: one cost from one end "
        f"of its range to the other, the others as they are. {found.note[0].upper()}{found.note[1:]}."
    )
    data = coloured(rows, 3 - 3 * ranks).assign(legend=legend).drop(columns="mark")
    chart = Chart("What moves the difference", caption, {"": charts.effects("less time than the other, %")}, data)
    return [text, chart, _effects_table(found)]


def _effects_table(found: Sensitivity) -> ReportTable:
    def text(value: float) -> str:
        return "" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    effects = found.effects
    table: Mapping[str, Any] = {
        "cost": effects["cost"],
        "ns": [f"{value:,}" for value in effects["value"]],
        "range, ns": [f"{low:,} ... {high:,}" for low, high in zip(effects["range_low"], effects["range_high"], strict=True)],
        "% at its low end": effects["low"].map(text),
        "% at its high end": effects["high"].map(text),
        "turns round at, ns": effects["flips"].map(text),
        "mu*": effects["mu_star"].map(text),
        "sigma": effects["sigma"].map(text),
    }
    frame = pd.DataFrame({name: list(column) for name, column in table.items()})
    screened = effects["mu_star"].notna().any()
    note = "mu* and sigma: mean and spread of the elementary effects, in points of % over a cost's whole range" if screened else ""
    return ReportTable("Costs that move the difference", frame if screened else frame.drop(columns=["mu*", "sigma"]), note)


def _observed_needs(material: Material) -> tuple[pd.DataFrame, Sequence[ReportTable]] | None:
    if not material.observed:
        return None
    return predictions(material.facts.frame, material.facts.study.observations)[0], material.observed


def _observed(needed: tuple[pd.DataFrame, Sequence[ReportTable]]) -> list[Piece]:
    found, tables = needed
    if found.empty:
        return list(tables)
    places = {name: place for place, name in enumerate(dict.fromkeys(found["costs"]))}
    rows = pd.DataFrame(
        {
            "panel": found["metric"],
            "label": found["observation"] + ", " + found["costs"].astype(str),
            "x": found["observed"],
            "y": found["predicted"],
        }
    )
    data = coloured(rows, found["costs"].astype(str).map(places).astype(int)).assign(legend=found["costs"].astype(str), mark="")
    spec = charts.scatter(rows, "observed", "predicted", diagonal=True)
    chart = Chart("Predicted against observed", "On the dashed line they agree.", {"": spec}, data)
    return [chart, *tables]


# --- the rest


def _failed(failed: pd.DataFrame) -> list[Piece]:
    kinds = failed.groupby(["kind", "message"], sort=True).size().sort_values(ascending=False, kind="stable").reset_index(name="points")
    rows = pd.DataFrame(
        {"kind": kinds["kind"], "message": kinds["message"].str[:300], "points": [f"{count:,}" for count in kinds["points"]]}
    )
    return [ReportTable("Points that failed", rows.head(MAX_MESSAGES), f"{len(failed):,} points failed; they are in no figure")]


SECTIONS: tuple[Section, ...] = (
    Section("answers", "Main tables", lambda material: material.own, list),
    Section("configurations", "Configurations", lambda material: [material.configurations], list),
    *(_along(axis) for axis in AXES),
    Section("latency", "Fault latencies", lambda material: profiles.latencies(material.facts, material.standings), _latencies),
    Section("time", "Where the time goes", lambda material: profiles.time_parts(material.facts, material.standings), _time_parts),
    Section("memory", "Memory held beside speed", _memory_needs, _memory),
    Section("scaling", "Scaling with vCPUs", _scaling_needs, _scaling),
    Section("claims", "Claims", lambda material: material.claims, _claims),
    Section("break-even", "Break-even", lambda material: material.sensitivity, _break_even),
    Section("observed", "Prediction beside observation", _observed_needs, _observed),
    Section("failed", "Points that failed", lambda material: material.facts.failed, _failed),
    Section("provenance", "Where this comes from", lambda material: material.provenance, list),
)
