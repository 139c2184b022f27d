"""Building a report: what is gathered from a dataset, the text for the terminal, the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep.dataset.files import publish
from sweep.dataset.read import Dataset, connection
from sweep.report.claims import Judged, worlds_of
from sweep.report.facts import Facts, gather
from sweep.report.observed import figures_table, observed_table
from sweep.report.origin import provenance
from sweep.report.page import Page, render
from sweep.report.replayed import trace_tables
from sweep.report.sections import Material, drawn, spread
from sweep.report.sensitivity import sensitivity
from sweep.report.standings import answer, details, standings
from sweep.report.stories import STORIES
from sweep.report.tables import PRINTED_ROWS, SAMPLED_POINTS, ReportTable, general_table


@dataclass(frozen=True)
class Report:
    """A study's report: title, answer, printed tables, judged claims."""

    title: str
    answer: str
    path: Path
    tables: list[ReportTable]
    claims: list[Judged]
    digests: Mapping[str, str]

    def as_text(self) -> str:
        """Main table (the first), the last one and the claims for a terminal; the page has all tables."""
        parts = [self.title, "", self.answer, ""]
        for table in dict.fromkeys((self.tables[0], self.tables[-1])):
            parts += [table.title, table.frame.to_string(index=False), table.note, ""]
        for judged in self.claims:
            claim = judged.claim
            parts += [
                f"CLAIM   {claim.text}",
                f"  said by {claim.who}, {claim.message}",
                f"  rows    {claim.rows}",
                f"  figure  {judged.figure}",
                f"  {spread(judged)}",
                f"  verdict {judged.text}",
                "",
            ]
        parts.append(f"page: {self.path}")
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "answer": self.answer,
            "page": str(self.path),
            "digests": dict(self.digests),
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


def build_report(place: Path | str, page_file: Path | None = None) -> Report:
    """Compute the report of a dataset and write its page: `page_file`, without it DIR/report/index.html. Raises DatasetError, and
    EnvironmentProblemError where the page cannot be written."""
    dataset = Dataset(place)
    facts = gather(dataset)
    standing = standings(facts)
    with connection({"points": dataset.scanned("points", None)}, threads=1) as database:
        rows = details(database, facts, standing.reference)
    own, claims, text = _story(dataset, facts)
    traces = trace_tables(dataset.store.local_folder())
    configurations, observed = general_table(facts), _observed(facts)
    material = Material(
        facts,
        standing,
        sensitivity(facts, standing, rows),
        configurations,
        provenance(dataset, facts),
        [*own, *traces],
        claims,
        observed[-1:],
    )
    path = page_file or dataset.store.local_folder() / "report" / "index.html"
    tables = [*(own or observed[:1] or [configurations.head(PRINTED_ROWS)]), *observed[-1:], *traces]
    report = Report(facts.title, text or answer(facts, standing, rows), path, tables, claims, facts.digests)
    page = Page(report.title, facts.study.name, facts.question, report.answer, figures(facts), notes(facts), drawn(material))
    publish(path, render(page))
    return report


def _story(dataset: Dataset, facts: Facts) -> tuple[list[ReportTable], list[Judged], str]:
    """(tables, claims, answer) of a study that has its own and the points for it."""
    story = STORIES.get(facts.study.name)
    return story.told(worlds_of(dataset.points(), dataset.steps())) if story else ([], [], "")


def _observed(facts: Facts) -> list[ReportTable]:
    """Predictions, and predictions beside observations, of a study that names observations."""
    seen = facts.study.observations
    return [figures_table(facts.frame, facts.varying, seen), observed_table(facts.frame, seen)] if seen else []


def figures(facts: Facts) -> list[tuple[str, str]]:
    """What stands under the answer."""
    found = {"points": facts.points, "configurations": len(facts.frame), "settings": len(facts.settings), "scenarios": len(facts.scenarios)}
    return [(name, f"{value:,}") for name, value in found.items()]


def notes(facts: Facts) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    if facts.points < facts.planned:
        found.append(f"{facts.points:,} of {facts.planned:,} points are there; {len(facts.failed):,} failed.")
    if facts.points > SAMPLED_POINTS:
        found.append(
            f"{facts.points:,} points: the table of configurations has an even sample of at most {SAMPLED_POINTS:,}, always the same; "
            f"answer and lines are made from all."
        )
    return found
