"""Charts as Vega-Lite specifications, made and checked by altair; the page's script gives them their rows.

A chart's rows have columns `panel` (one is shown at a time, chosen by the reader), `label` (what a colour stands for), `colour` and
`mark` (a letter: colour is never the only sign; '' for quiet ones). Text follows the page's colour in light and dark; names go into data,
never into expressions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

COLOURS = ("#3b7dc4", "#d9772b", "#2f9465", "#c2493d", "#8a63c9", "#1295a3", "#a8842c", "#c2528f", "#6b7280")
QUIET = "#8b8f98"  # lines without a colour of their own
HEIGHT = 300
ROWS = alt.NamedData("rows")


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart: what it shows (for readers who do not see it as well), its specifications (one view of the rows each), its rows."""

    title: str
    caption: str
    views: Mapping[str, dict[str, Any]]
    rows: pd.DataFrame


def coloured(rows: pd.DataFrame, rank: "pd.Series[int]") -> pd.DataFrame:
    """Rows with `colour` and `mark` by rank; below 0 they are quiet."""
    return rows.assign(
        colour=rank.map(lambda place: COLOURS[place % len(COLOURS)] if place >= 0 else QUIET),
        mark=rank.map(lambda place: chr(ord("A") + place % 26) if place >= 0 else ""),
    )


def scale_of(values: "pd.Series[float]", base: int = 10) -> alt.Scale:
    """Logarithmic where the values span more than a factor of eight."""
    least, most = float(values.min()), float(values.max())
    if least > 0 and most / least > 8:
        return alt.Scale(type="log", base=base, nice=False, padding=8)
    return alt.Scale(zero=False, nice=False, padding=8)


def _ticks(values: "pd.Series[float]") -> alt.Axis:
    """A tick at each value, where there are few."""
    marks = sorted(float(value) for value in values.unique())
    return alt.Axis(values=marks, labelOverlap=True, format=",.6~g") if len(marks) <= 12 else alt.Axis(format=",.6~g", tickCount=8)


def _x(title: str, values: "pd.Series[float]") -> alt.X:
    return alt.X("x:Q", title=title, scale=scale_of(values, 2), axis=_ticks(values))


def _colour() -> alt.Color:
    return alt.Color("colour:N", scale=None, legend=None)


def _tooltip(*fields: tuple[str, str]) -> list[alt.Tooltip]:
    return [alt.Tooltip(field, title=title, format=",.4~g" if field.endswith(":Q") else alt.Undefined) for field, title in fields]


def finished(chart: Any, height: int | None = HEIGHT) -> dict[str, Any]:
    """The specification: as wide as the page, text in the page's colour. Without a height the page gives each label a line."""
    sized = chart.properties(width="container", data=ROWS, autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    if height:
        sized = sized.properties(height=height)
    text = {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal"}
    axis = {**text, "gridColor": "currentColor", "gridOpacity": 0.12, "domainColor": "currentColor", "tickColor": "currentColor"}
    framed = sized.configure(background="transparent", font="system-ui, sans-serif").configure_view(stroke=None).configure_axis(**axis)
    spec: dict[str, Any] = framed.to_dict()
    return spec


QUIETLY, BOLDLY = "datum.mark === ''", "datum.mark !== ''"


def _drawn(x: alt.X, y: alt.Y, told: list[alt.Tooltip], last: str, between: Sequence[Any] = ()) -> list[Any]:
    """Layers of lines: quiet ones below, then `between`, then bold ones with their letters where `last` holds."""
    base = alt.Chart().encode(x, y, _colour())
    quiet, bold = base.transform_filter(QUIETLY), base.transform_filter(BOLDLY)
    return [
        quiet.mark_line(strokeWidth=1, opacity=0.35).encode(detail="label:N"),
        quiet.mark_point(filled=True, size=20, opacity=0.35).encode(tooltip=told),
        *between,
        bold.mark_line(strokeWidth=2).encode(detail="label:N"),
        bold.mark_point(filled=True, size=45, opacity=0.9).encode(tooltip=told),
        bold.transform_filter(last).mark_text(align="left", dx=7, fontWeight="bold").encode(text="mark:N"),
    ]


@dataclass(frozen=True)
class Measure:
    """What stands on the y axis of lines(): columns `name`, `name_low`, `name_high` (replicates), `name_cost_low`, `name_cost_high`;
    and what the axis holds in any case."""

    name: str
    title: str
    scale: alt.Scale
    axis: alt.Axis
    least_range: Sequence[float] = ()


def time_measures(rows: pd.DataFrame, compared: bool) -> Mapping[str, Measure]:
    """The views of lines(): how much more than the least, where lines are compared; and time itself."""
    more = "more time than the least, %"
    steps = alt.Axis(values=[-90, -30, -3, -0.3, 0, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000], format=",.6~g", labelOverlap=True)
    whole = pd.concat([rows["time_low"], rows["time_high"]])
    found = {
        more: Measure("more", more, alt.Scale(type="symlog", constant=0.1, nice=False, padding=8), steps, (0, 1)),
        "time": Measure("time", "time, ms", scale_of(whole), alt.Axis(format=",.6~g")),
    }
    return found if compared else {"time": found["time"]}


def lines(rows: pd.DataFrame, x: str, measure: Measure) -> dict[str, Any]:
    """Lines over x with bands of replicates and bars of costs. Columns: x, label, last (the row is its line's last), those of the measure
    (of costs only where there are any)."""
    name, title = measure.name, measure.title
    across = _x(x, rows["x"])
    up = alt.Y(f"{name}:Q", title=title, scale=measure.scale, axis=measure.axis)
    told = _tooltip(
        ("mark:N", "line"), ("label:N", "setting"), ("x:Q", x), ("time:Q", "time, ms"), ("more:Q", "more than the least, %"),
        (f"{name}_low:Q", "replicates, least"), (f"{name}_high:Q", "replicates, most"),
    )  # fmt: skip
    bold = alt.Chart().transform_filter(BOLDLY).encode(across, _colour())
    band = bold.mark_area(opacity=0.2).encode(alt.Y(f"{name}_low:Q", title=title), alt.Y2(f"{name}_high:Q"), detail="label:N")
    between = [band]
    if f"{name}_cost_low" in rows:
        told += _tooltip((f"{name}_cost_low:Q", "costs, least"), (f"{name}_cost_high:Q", "costs, most"))
        moved = bold.transform_filter(f"isValid(datum.{name}_cost_low)").mark_rule(strokeWidth=5, opacity=0.4)
        between.append(moved.encode(alt.Y(f"{name}_cost_low:Q", title=title), alt.Y2(f"{name}_cost_high:Q")))
    layers = _drawn(across, up, told, "datum.last", between)
    if measure.least_range:
        unseen = alt.Chart(alt.InlineData([{name: value} for value in measure.least_range])).mark_point(opacity=0, aria=False)
        layers.append(unseen.encode(up))
    return finished(alt.layer(*layers))


def scaling(rows: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """Lines on two logarithmic axes beside the ideal. Columns: x, y, label, last, ideal (NaN but for one line of a panel)."""
    across = alt.X("x:Q", title=x, scale=alt.Scale(type="log", base=2, nice=False, padding=8), axis=_ticks(rows["x"]))
    up = alt.Y("y:Q", title=y, scale=alt.Scale(type="log", nice=False, padding=8), axis=alt.Axis(format="~s"))
    told = _tooltip(("mark:N", "line"), ("label:N", "setting"), ("x:Q", x), ("y:Q", y))
    ideal = (
        alt.Chart().transform_filter("isValid(datum.ideal)").mark_line(strokeDash=[4, 4], strokeWidth=1, opacity=0.6, color="currentColor")
    )
    return finished(alt.layer(*_drawn(across, up, told, "datum.last", [ideal.encode(across, alt.Y("ideal:Q", title=y))])))


def quantiles(order: Sequence[str], y: str) -> dict[str, Any]:
    """Latency by quantile. Columns: quantile, y, label, last."""
    across = alt.X("quantile:N", title="quantile of single faults", sort=list(order), axis=alt.Axis(labelAngle=0))
    up = alt.Y("y:Q", title=y, scale=alt.Scale(type="log", nice=False, padding=8), axis=alt.Axis(format=",.6~g"))
    told = _tooltip(("mark:N", "line"), ("label:N", "setting"), ("quantile:N", "quantile"), ("y:Q", y))
    return finished(alt.layer(*_drawn(across, up, told, "datum.last")))


def bars(title: str) -> dict[str, Any]:
    """Stacked bars in the order of the rows: one per `label`, parts by colour. Columns: label, part, rank, x, share."""
    told = _tooltip(("label:N", "setting"), ("part:N", "part"), ("x:Q", title), ("share:Q", "of its bar, %"))
    chart = alt.Chart().mark_bar(stroke=None)
    encoded = chart.encode(
        alt.X("x:Q", title=title, stack="zero", axis=_few()), _names(), _colour(), order=alt.Order("rank:Q"), tooltip=told
    )
    return finished(encoded, None)


def _names() -> alt.Y:
    """Labels as they come, cut where they leave no room; the tooltip has all."""
    return alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=170))


def _few() -> alt.Axis:
    return alt.Axis(tickCount=6, format=",.6~g", labelOverlap=True, labelSeparation=6)


def scatter(rows: pd.DataFrame, x: str, y: str, diagonal: bool = False) -> dict[str, Any]:
    """Points, bold ones with letters. Columns: x, y, label. With `diagonal`, the line of equal values."""
    across = alt.X("x:Q", title=x, scale=scale_of(rows["x"]), axis=_few())
    up = alt.Y("y:Q", title=y, scale=scale_of(rows["y"]), axis=_few())
    told = _tooltip(("label:N", "point"), ("x:Q", x), ("y:Q", y))
    base = alt.Chart().encode(across, up, _colour())
    layers = [
        base.transform_filter(QUIETLY).mark_point(filled=True, size=50, opacity=0.6).encode(tooltip=told),
        base.transform_filter(BOLDLY).mark_point(filled=True, size=80, opacity=0.9).encode(tooltip=told),
        base.transform_filter(BOLDLY).mark_text(align="left", dx=8, fontWeight="bold").encode(text="mark:N"),
    ]
    if diagonal:
        line = alt.Chart().mark_line(strokeDash=[4, 4], strokeWidth=1, opacity=0.6, color="currentColor")
        layers.insert(0, line.encode(across, alt.Y("x:Q", title=y)))
    return finished(alt.layer(*layers))


def effects(x: str) -> dict[str, Any]:
    """Ranges in the order of the rows, one per `label`, with a mark inside, and 0 in sight. Columns: label, low, high, x."""
    told = _tooltip(("label:N", "cost"), ("x:Q", x), ("low:Q", "least"), ("high:Q", "most"))
    base = alt.Chart().encode(_names(), tooltip=told)
    zero = alt.Chart().mark_rule(color="currentColor", strokeDash=[4, 4]).encode(x=alt.datum(0))
    return finished(
        alt.layer(
            base.mark_bar(opacity=0.85).encode(alt.X("low:Q", title=x, axis=_few()), alt.X2("high:Q"), _colour()),
            base.mark_tick(thickness=2, color="currentColor").encode(alt.X("x:Q", title=x)),
            zero,
        ),
        None,
    )
