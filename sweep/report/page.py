"""The page: one HTML file with its script, style and data inside, no network, every name escaped (docs/adr/0012).

Text goes through jinja2's autoescape. Data go as JSON with <, > and & escaped into a script element that is no script. What may run or
style is named by its SHA-256 in the Content-Security-Policy, so that nothing else can; charts are computed by Vega's expression
interpreter, which needs no eval.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2
import pandas as pd

from sweep.report.charts import Chart
from sweep.report.sections import Drawn
from sweep.report.tables import ReportTable

MOST_BYTES = 1_980_000
STATIC_ROWS = 25  # of a table that are in the HTML itself: for readers without scripts, and before they run
LONG = 60  # characters of a cell that is a sentence
DIGITS = 5  # of a number in a chart
_NUMBER = re.compile(r"[-+]?[0-9][0-9,]*(\.[0-9]+)?(e[-+]?[0-9]+)?( ?(B|[KMGT]iB|%))?( ?\(.*\))?|-?", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """What stands on a page. `facts`: a few words and figures under the answer."""

    title: str
    study: str
    question: str
    answer: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    sections: Sequence[Drawn]


def render(page: Page) -> bytes:
    """The file, UTF-8. Tables that may be cut are cut to what the rest leaves of MOST_BYTES."""
    rest = len(_rendered(page, lambda table: table.within(pd.Series(1, index=table.frame.index), 0)))
    return _rendered(page, lambda table: table.within(weights(table.frame), MOST_BYTES - rest))


def _rendered(page: Page, fitted: Callable[[ReportTable], ReportTable]) -> bytes:
    sections = [
        Drawn(section.key, section.title, [fitted(piece) if isinstance(piece, ReportTable) else piece for piece in section.pieces])
        for section in page.sections
    ]
    data = [_data(piece) for section in sections for piece in section.pieces if not isinstance(piece, str)]
    library = _library() if any("views" in entry for entry in data) else ""
    script, style = _asset("page.js"), _asset("page.css")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.tests |= {"text": lambda piece: isinstance(piece, str), "chart": lambda piece: isinstance(piece, Chart), "long": _is_long}
    text = environment.from_string(_asset("page.html.jinja")).render(
        page=page,
        sections=sections,
        static_rows=STATIC_ROWS,
        policy=policy([library, script], [style]),
        library=library,
        script=script,
        style=style,
        data=embedded(data),
    )
    return text.encode()


def weights(frame: pd.DataFrame) -> "pd.Series[int]":
    """Bytes that each row takes on the page, or a few more; the first ones stand there twice."""
    cells = [_weights(frame[name]) for name in frame]
    return pd.concat(cells, axis=1).sum(axis=1) if cells else pd.Series(0, index=frame.index)


def _weights(column: "pd.Series[Any]") -> "pd.Series[int]":
    texts = column.astype(str)
    if texts.nunique() * 2 <= len(texts):  # a number for each, and the words once
        return pd.Series(len(str(len(texts))) + 1, index=texts.index)
    return texts.map(lambda text: len(embedded(text).encode()) + 1)


def policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Nothing but these scripts and styles, by their digests: no network, no eval, no attribute that runs."""
    allowed = {name: " ".join(_digest(text) for text in texts if text) for name, texts in (("script-src", scripts), ("style-src", styles))}
    return f"default-src 'none'; script-src {allowed['script-src']}; style-src {allowed['style-src']}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(value: Any) -> str:
    """JSON that can end no script element, and start none."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _is_long(piece: ReportTable) -> bool:
    """A table of sentences, not of figures: its cells are wrapped, and stand below one another on a phone."""
    return any(piece.frame[name].astype(str).str.len().max() > LONG for name in piece.frame) if len(piece.frame) else False


def _data(piece: ReportTable | Chart) -> dict[str, Any]:
    if isinstance(piece, ReportTable):
        return {"columns": columns(piece.frame), "rows": len(piece.frame)}
    return {"columns": columns(piece.rows), "rows": len(piece.rows), "views": list(piece.views.items())}


def columns(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Columns as the page's script reads them: values, or the distinct ones and which of them each row has."""
    return [_column(str(name), frame[name]) for name in frame]


def _column(name: str, column: "pd.Series[Any]") -> dict[str, Any]:
    if pd.api.types.is_numeric_dtype(column.dtype):
        return {"name": name, "kind": "number", "values": [short(value) for value in column.tolist()]}
    texts = [str(value) for value in column.tolist()]
    kind = "number" if name != "kernel" and all(_NUMBER.fullmatch(text) for text in set(texts)) else "text"
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    if len(places) * 2 > len(texts):
        return {"name": name, "kind": kind, "values": texts}
    return {"name": name, "kind": kind, "words": list(places), "codes": [places[text] for text in texts]}


def short(value: float) -> float | int | None:
    """A number with DIGITS digits, whole where it is (a truth value as 1 or 0); None for what JSON does not have."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


@lru_cache(maxsize=1)
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version that altair writes for."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


@lru_cache(maxsize=8)
def _asset(name: str) -> str:
    return files("sweep.report").joinpath(name).read_text("utf-8")
