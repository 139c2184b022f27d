"""Building a report: which tables a study has, the text for the terminal, the page."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sweep.dataset.files import publish
from sweep.dataset.read import Dataset
from sweep.errors import DatasetError
from sweep.record import read_study
from sweep.report.claims import Judged, judge, worlds_of
from sweep.report.observed import figures_table, observed_table
from sweep.report.replayed import trace_tables
from sweep.report.tables import ReportTable, general_table
from sweep.report.thread import CLAIMS, main_tables, switch_table

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .25rem .5rem; }
th, td { text-align: left; vertical-align: top; }
th { background: color-mix(in srgb, currentColor 8%, transparent); }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Report:
    """A study's report: title, main tables, judged claims, further tables."""

    title: str
    path: Path
    tables: list[ReportTable]
    claims: list[Judged]
    digests: dict[str, str]

    def as_text(self) -> str:
        """Main table (the first), the last one and the claims for a terminal; the page has all tables."""
        parts = [self.title, ""]
        for table in dict.fromkeys((self.tables[0], self.tables[-1])):
            parts += [table.title, table.frame.to_string(index=False), table.note, ""]
        for judged in self.claims:
            claim = judged.claim
            parts += [
                f"CLAIM   {claim.text}",
                f"  said by {claim.who}, {claim.message}",
                f"  rows    {claim.rows}",
                f"  figure  {judged.figure}",
                f"  {_spread(judged)}",
                f"  verdict {judged.text}",
                "",
            ]
        parts.append(f"page: {self.path}")
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "page": str(self.path),
            "digests": self.digests,
            "tables": [{"title": t.title, "note": t.note, "rows": t.frame.to_dict("records")} for t in self.tables],
            "claims": [
                {
                    "claim": j.claim.text,
                    "who": j.claim.who,
                    "message": j.claim.message,
                    "rows": j.claim.rows,
                    "figure": j.figure,
                    "unit": j.claim.unit,
                    "value": j.value,
                    "over_replicates": j.spread,
                    "over_costs": j.cost_spread,
                    "flips": j.flips,
                    "verdict": str(j.verdict),
                    "verdict_text": j.text,
                }
                for j in self.claims
            ],
        }


def _spread(judged: Judged) -> str:
    low, high = judged.spread
    cost_low, cost_high = judged.cost_spread
    return (
        f"{judged.claim.unit}: {judged.value:.4g} (replicates {low:.4g} ... {high:.4g}; "
        f"over the range of each cost {cost_low:.4g} ... {cost_high:.4g})"
    )


def build_report(place: Path | str) -> Report:
    """Compute the report of a dataset and write DIR/report/index.html. Raises DatasetError."""
    dataset = Dataset(place)
    record = dataset.store.json("study.json")
    points = dataset.points()
    if points.empty:
        raise DatasetError(f"{place}: holds no points yet; run the study first")
    tables, claims = [general_table(points)], []
    if record["name"] == "thread" and (main := main_tables(points)):
        worlds = worlds_of(points, dataset.steps())
        claims = [judged for claim in CLAIMS if (judged := judge(claim, worlds)) is not None]
        tables = [*main, switch_table(worlds[0])]
    if observations := read_study(dataset.store).observations:
        tables = [*(tables if claims else [figures_table(points, observations)]), observed_table(points, observations)]
    tables += trace_tables(dataset.store.local_folder())
    seal = dataset.store.seal()
    digests: dict[str, str] = {"model_digest": str(record["model_digest"])}
    digests |= {"root_digest": seal.root_digest, "content_digest": seal.content_digest} if seal else {}
    path = dataset.store.local_folder() / "report" / "index.html"
    report = Report(record["study"]["title"] or record["name"], path, tables, claims, digests)
    publish(report.path, page(report).encode())
    return report


def page(report: Report) -> str:
    """One HTML file without scripts or network, every text escaped."""
    body = [f"<h1>{escape(report.title)}</h1>"]
    if report.claims:
        body += ["<h2>Claims</h2>", _claims_html(report.claims)]
    for table in report.tables:
        body += [f"<h2>{escape(table.title)}</h2>", _table_html(table)]
    digests = "".join(f"<li>{escape(name)}: <code>{escape(value)}</code></li>" for name, value in report.digests.items())
    body.append(f"<h2>Digests</h2><ul>{digests}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table_html(table: ReportTable) -> str:
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return f'<div class="scroll">{table.frame.to_html(index=False, escape=True, border=0)}</div>{note}'


def _claims_html(claims: list[Judged]) -> str:
    rows = "".join(
        f"<tr><td>{escape(j.claim.text)}</td><td>{escape(j.claim.who)}<br><code>{escape(j.claim.message)}</code></td>"
        f"<td>{escape(j.claim.rows)}</td><td>{escape(j.figure)}<br>{escape(_spread(j))}</td><td><b>{escape(j.text)}</b></td></tr>"
        for j in claims
    )
    head = "".join(f"<th>{name}</th>" for name in ("claim", "who said it", "rows that test it", "figure", "verdict"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
