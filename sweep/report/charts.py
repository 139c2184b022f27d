"""Charts as Vega-Lite specifications, made and checked by altair; the page's script gives them their rows.

A chart's rows have columns `panel` (one is shown at a time, chosen by the reader), `label` (what a colour stands for), `colour` and `mark` (a
letter: colour is never the only sign). Text follows the page's colour in light and dark; names go into data, never into expressions.
"""

from collections.abc import Sequence
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
    """A chart: its specification, its rows, what it shows (for readers who do not see it as well)."""

    title: str
    caption: str
    spec: dict[str, Any]
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
        return alt.Scale(type="log", base=base, nice=False) if base != 10 else alt.Scale(type="log")
    return alt.Scale(zero=False)


def _ticks(values: "pd.Series[float]") -> alt.Axis:
    """A tick at each value, where there are few."""
    marks = sorted(float(value) for value in values.unique())
    return alt.Axis(values=marks, labelOverlap=True, format="~g") if len(marks) <= 12 else alt.Axis(format="~g")


def _x(title: str, values: "pd.Series[float]") -> alt.X:
    return alt.X("x:Q", title=title, scale=scale_of(values, 2), axis=_ticks(values))


def _colour() -> alt.Color:
    return alt.Color("colour:N", scale=None, legend=None)


def _tooltip(*fields: tuple[str, str]) -> list[alt.Tooltip]:
    formats = {"N": {}, "Q": {"format": ",.4~g"}}
    return [alt.Tooltip(field, title=title, **formats[field[-1]]) for field, title in fields]


def finished(chart: Any, height: int | None = HEIGHT) -> dict[str, Any]:
    """The specification: as wide as the page, text in the page's colour."""
    sized = chart.properties(width="container", data=ROWS, **({"height": height} if height else {}))
    text = {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal"}
    axis = {**text, "gridColor": "currentColor", "gridOpacity": 0.12, "domainColor": "currentColor", "tickColor": "currentColor"}
    spec: dict[str, Any] = sized.configure(background="transparent", font="system-ui, sans-serif").configure_view(stroke=None).configure_axis(**axis).to_dict()
    return spec


def lines(rows: pd.DataFrame, x: str, y: str, band: str, costs: str) -> dict[str, Any]:
    """Lines over x with bands (low ... high) and bars (cost_low ... cost_high). Columns: x, y, low, high, cost_low, cost_high, label."""
    base = alt.Chart()
    bold, quiet = base.transform_filter("datum.mark !== ''"), base.transform_filter("datum.mark === ''")
    across = _x(x, rows["x"])
    up = alt.Y("y:Q", title=y, scale=scale_of(pd.concat([rows["y"], rows["low"], rows["high"]])))
    told = _tooltip(("mark:N", "line"), ("label:N", "setting"), ("x:Q", x), ("y:Q", y), ("low:Q", f"{band}, least"), ("high:Q", f"{band}, most"))
    moved = rows["cost_low"].notna().any()
    if moved:
        told += _tooltip(("cost_low:Q", f"{costs}, least"), ("cost_high:Q", f"{costs}, most"))
    layers = [
        quiet.mark_line(strokeWidth=1, opacity=0.35).encode(across, up, _colour(), detail="label:N"),
        bold.mark_area(opacity=0.2).encode(across, alt.Y("low:Q", title=y), alt.Y2("high:Q"), _colour(), detail="label:N"),
    ]
    if moved:
        bars = base.transform_filter("isValid(datum.cost_low) && datum.mark !== ''")
        layers.append(bars.mark_rule(strokeWidth=4, opacity=0.45).encode(across, alt.Y("cost_low:Q", title=y), alt.Y2("cost_high:Q"), _colour()))
    layers += [
        bold.mark_line(strokeWidth=2).encode(across, up, _colour(), detail="label:N"),
        _last(bold).mark_text(align="left", dx=6, fontWeight="bold").encode(across, up, _colour(), text="mark:N"),
        base.mark_point(filled=True, size=45, opacity=0.9).encode(across, up, _colour(), tooltip=told),
    ]
    return finished(alt.layer(*layers))


def scaling(rows: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """Lines on two logarithmic axes beside the ideal. Columns: x, y, label, ideal (NaN but for one line of a panel)."""
    across = alt.X("x:Q", title=x, scale=alt.Scale(type="log", base=2, nice=False), axis=_ticks(rows["x"]))
    up = alt.Y("y:Q", title=y, scale=alt.Scale(type="log"), axis=alt.Axis(format="~s"))
    told = _tooltip(("mark:N", "line"), ("label:N", "setting"), ("x:Q", x), ("y:Q", y))
    base = alt.Chart()
    ideal, bold = base.transform_filter("isValid(datum.ideal)"), base.transform_filter("datum.mark !== ''")
    layers = [
        ideal.mark_line(strokeDash=[4, 4], strokeWidth=1, opacity=0.6, color="currentColor").encode(across, alt.Y("ideal:Q", title=y)),
        base.transform_filter("datum.mark === ''").mark_line(strokeWidth=1, opacity=0.35).encode(across, up, _colour(), detail="label:N"),
        bold.mark_line(strokeWidth=2).encode(across, up, _colour(), detail="label:N"),
        _last(bold).mark_text(align="left", dx=6, fontWeight="bold").encode(across, up, _colour(), text="mark:N"),
        base.mark_point(filled=True, size=45, opacity=0.9).encode(across, up, _colour(), tooltip=told),
    ]
    return finished(alt.layer(*layers))


def _last(chart: Any) -> Any:
    """Of each line, the row with the greatest x."""
    ranked = chart.transform_window(place="rank()", sort=[alt.SortField("x", order="descending")], groupby=["label"])
    return ranked.transform_filter("datum.place === 1")


def bars(title: str) -> dict[str, Any]:
    """Stacked bars in the order of the rows: one per `label`, parts by colour. Columns: label, part, rank, x, share."""
    told = _tooltip(("label:N", "setting"), ("part:N", "part"), ("x:Q", title), ("share:Q", "of its bar, %"))
    across = alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=170))
    chart = alt.Chart().mark_bar(stroke=None)
    encoded = chart.encode(alt.X("x:Q", title=title, stack="zero"), across, _colour(), order=alt.Order("rank:Q"), tooltip=told)
    return finished(encoded.properties(height=alt.Step(20)), None)


def quantiles(order: Sequence[str], y: str) -> dict[str, Any]:
    """Latency by quantile. Columns: quantile, y, label."""
    across = alt.X("quantile:N", title="quantile of single faults", sort=list(order), axis=alt.Axis(labelAngle=0))
    up = alt.Y("y:Q", title=y, scale=alt.Scale(type="log"))
    told = _tooltip(("mark:N", "line"), ("label:N", "setting"), ("quantile:N", "quantile"), ("y:Q", y))
    base = alt.Chart()
    last = base.transform_filter(alt.FieldEqualPredicate(field="quantile", equal=order[-1])).transform_filter("datum.mark !== ''")
    return finished(
        alt.layer(
            base.mark_line(strokeWidth=2).encode(across, up, _colour(), detail="label:N"),
            last.mark_text(align="left", dx=6, fontWeight="bold").encode(across, up, _colour(), text="mark:N"),
            base.mark_point(filled=True, size=45).encode(across, up, _colour(), tooltip=told),
        )
    )


def scatter(rows: pd.DataFrame, x: str, y: str, diagonal: bool = False) -> dict[str, Any]:
    """Points with letters. Columns: x, y, label; `shape` says what is filled. With `diagonal`, the line of equal values."""
    across = alt.X("x:Q", title=x, scale=scale_of(rows["x"]))
    up = alt.Y("y:Q", title=y, scale=scale_of(rows["y"]))
    told = _tooltip(("label:N", "point"), ("x:Q", x), ("y:Q", y))
    base = alt.Chart()
    named = base.transform_filter("datum.mark !== ''")
    layers = [
        base.mark_point(filled=True, size=60, opacity=0.8).encode(across, up, _colour(), tooltip=told),
        named.mark_text(align="left", dx=7, fontWeight="bold").encode(across, up, _colour(), text="mark:N"),
    ]
    if diagonal:
        line = base.mark_line(strokeDash=[4, 4], strokeWidth=1, opacity=0.6, color="currentColor")
        layers.insert(0, line.encode(across, alt.Y("x:Q", title=y)))
    return finished(alt.layer(*layers))


def effects(x: str) -> dict[str, Any]:
    """Ranges in the order of the rows, one per `label`, with a mark inside. Columns: label, low, high, x."""
    across = alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=170))
    told = _tooltip(("label:N", "cost"), ("x:Q", x), ("low:Q", "least"), ("high:Q", "most"))
    base = alt.Chart()
    return finished(
        alt.layer(
            base.mark_bar(opacity=0.85).encode(alt.X("low:Q", title=x), alt.X2("high:Q"), across, _colour(), tooltip=told),
            base.mark_tick(thickness=2, color="currentColor").encode(alt.X("x:Q", title=x), across, tooltip=told),
        ).properties(height=alt.Step(20)),
        None,
    )
