"""`faultsweep recommend`: ask, run, compare, tell."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sweep.dataset.read import open_dataset
from sweep.errors import DatasetError, InterruptedRunError, UsageError
from sweep.plan import Plan
from sweep.quantity import format_size, human_size, human_time
from sweep.recommend.asked import Asked, Conditions, LeftOut, Posed, RecommendOptions, asked_point, budget_of, check, pose
from sweep.recommend.changes import Changes, changes, enough
from sweep.recommend.ranking import GUEST, Ranking, Row, needs, rankings, records
from sweep.recommend.reason import double_faults, reasons
from sweep.replay.decode import Vendor
from sweep.replay.run import FOLDER, ReplayOptions, replay
from sweep.replay.whatif import LIST_NAME, WORKLOAD, kernel_of, memory_of
from sweep.report.roles import CONDITIONS, DEFAULTS, PARAMETER_COLUMNS, SETTINGS, word
from sweep.runner import run as run_study
from sweep.study import Study

TOLD = ("workload", "memory_bytes", "vcpus", "kernel")  # of every question


@dataclass(frozen=True, eq=False)
class Recommendation:
    """The answer. `question`: what was asked; `budget`: bytes; `out`: the dataset, '' where it was not to be kept; `left_out`: what of
    the settings and conditions that recommend looks at the guest cannot have."""

    question: str
    budget: int | None
    ranking: Ranking
    reasons: list[str]
    changes: Changes
    out: str
    left_out: Sequence[LeftOut]

    def as_text(self) -> str:
        best = self.ranking.row(self.ranking.best)
        parts = [
            self.question,
            "",
            f"Recommended: {self.ranking.best}",
            f"  {_time(best[GUEST])} of guest time, {_of_vmm(best)}, {human_size(best['needs'])} of memory",
            *(f"  {line}" for line in self._against()),
            "",
            "Why",
            *(f"  {reason}" for reason in self.reasons),
            "",
            self._table().to_string(index=False),
            "",
            "What would change it",
            *(f"  {line}" for line in self.changes.lines(self.ranking.best) or ["nothing that was looked at"]),
            *([f"  The same for: {'; '.join(self.changes.same)}"] if self.changes.same else []),
            *([f"  {self.changes.costs.note}"] if self.changes.costs.note else []),
            *(["", "Left out", *(f"  {line}" for line in _lines(self.left_out))] if self.left_out else []),
        ]
        return "\n".join([*parts, *(["", f"next: faultsweep report {self.out}"] if self.out else [])])

    def _against(self) -> Iterator[str]:
        rival, good, costs = self.ranking.rival(), self.ranking.as_good(), self.changes.costs
        if rival is not None:
            row = self.ranking.row(rival)
            word, sign = ("more", 1) if row["more"] >= 0 else ("less", -1)
            spans = [f"replicates {_span(sign * row['more_low'], sign * row['more_high'])}"]
            if costs.mean == costs.mean:  # not NaN
                spans.append(f"each cost over its range {_span(sign * _beyond(costs.low), sign * _beyond(costs.high))}")
            yield f"{rival} takes {_percent(abs(row['more']))} {word} ({'; '.join(spans)})"
        if good:
            yield f"as good, within 1 %: {'; '.join(good)}"

    def _table(self) -> pd.DataFrame:
        rows = self.ranking.rows
        return pd.DataFrame(
            {
                "setting": rows.index,
                "guest time": [_time(ns) for ns in rows[GUEST]],
                "more": [_percent(more, "+") for more in rows["more"]],
                "VMM's time": [_time(ns) if ns > 0 else "" for ns in rows["total_ns"] - rows[GUEST]],
                "memory": [human_size(size) for size in rows["needs"]],
                "exits": [f"{exits:,.0f}" for exits in rows["exits"]],
                "double faults": [f"{double_faults(row):,.0f}" for row in records(rows)],
                "": ["" if fits else "over the budget" for fits in rows["fits"]],
            }
        )

    def as_json(self) -> dict[str, Any]:
        rows = self.ranking.rows.reset_index(names="label")
        names = ["label", *PARAMETER_COLUMNS, GUEST, "total_ns", "held_bytes", "needs", "fits", "exits", "more", "more_low", "more_high"]
        changed, costs = self.changes, self.changes.costs
        return {
            "question": self.question,
            "budget_bytes": self.budget,
            "recommended": self.ranking.best,
            "rival": self.ranking.rival(),
            "as_good": self.ranking.as_good(),
            "reasons": self.reasons,
            "ranking": records(rows[names].assign(double_faults=[double_faults(row) for row in records(rows)])),
            "by_budget": [{"from_bytes": size, "setting": label, GUEST: ns} for size, label, ns in changed.budgets],
            "with_the_vmms_time": changed.ready,
            "changes": [{"conditions": conditions, "setting": label} for conditions, label in changed.others],
            "same": list(changed.same),
            "less_than_rival_percent": {"mean": costs.mean, "low": costs.low, "high": costs.high, "note": costs.note},
            "flips": [{"cost": name, "value_ns": value, "flips_at_ns": flips} for name, value, flips in costs.flips],
            "left_out": [asdict(each) for each in self.left_out],
            "out": self.out,
        }


def recommend(options: RecommendOptions) -> Recommendation:
    """Raises UsageError, StudyError, and what a run and the import of a trace raise."""
    check(options)
    with ExitStack() as stack:
        out = options.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="recommend-"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recommend-")))
        posed = _trace_study(options, out) if options.trace else pose(_asked(options, asked_point(options)), folder)
        study = posed.study
        summary = run_study(study, out, options.run)
        if summary.stopped_by:
            raise InterruptedRunError(summary.stopped_by, _kept(options.out))
        if summary.exit_status:
            raise DatasetError(f"{summary.failed + summary.left} of {summary.total} points have no result; --out DIR keeps their errors")
        points = open_dataset(out).points()
        asked = points["point_id"].isin([planned.point_id for planned in Plan(study)])  # --out may hold answers to other questions
        return tell(points[asked], study, budget_of(options), options.out or "", posed.left_out)


def _kept(out: str | None) -> str:
    return f"what is done is kept in {out}: ask again to go on" if out else "nothing is kept; with --out DIR what is done is"


def _asked(options: RecommendOptions, conditions: Conditions, accesses: str = "") -> Asked:
    return Asked(conditions, accesses, options.study, options.proposals, options.what_if, options.overrides)


def _trace_study(options: RecommendOptions, out: str) -> Posed:
    """Import the trace into the dataset's folder, where the study reads its accesses."""
    replayed = replay(ReplayOptions(str(options.trace), out, kernel=options.kernel, import_only=True, run=options.run))
    imported = replayed.imported
    conditions = {
        "memory": memory_of(imported.folded),
        "vcpus": imported.folded.vcpus,
        "kernel": options.kernel or kernel_of(imported.trace.release),
        "mmu": "shadow" if imported.decision.vendor is Vendor.SHADOW else "tdp",
        "workload": WORKLOAD,
    }
    folder = replayed.out / FOLDER
    return pose(_asked(options, conditions, str((folder / LIST_NAME).resolve())), folder)


def tell(points: pd.DataFrame, study: Study, budget: int | None, out: str = "", left_out: Sequence[LeftOut] = ()) -> Recommendation:
    """The answer from the points of a question's study. Raises UsageError where no setting fits the budget."""
    base = next(iter(Plan(study))).point.columns()
    found = rankings(points, base, float("inf") if budget is None else budget)
    if not found or found[0].conditions:
        raise UsageError(
            f"--budget {format_size(budget or 0)}: every setting needs more, the least {enough(_least(points, base))}; allow that"
        )
    asked = found[0]
    if not (asked.rows[GUEST] > 0).all():
        raise UsageError(f"workload {base['workload']!r}: the guest takes no time in it; settings are ranked by guest time, choose another")
    rival = asked.rival()
    because = (
        [f"no other setting {'fits' if len(asked.rows) > 1 else 'was asked about'}"]
        if rival is None
        else reasons(asked.row(asked.best), asked.row(rival))
    )
    return Recommendation(question(base, budget), budget, asked, because, changes(found, study), out, left_out)


def _least(points: pd.DataFrame, base: Mapping[str, Any]) -> float:
    """Bytes that the setting takes which needs the fewest under the conditions of `base`."""
    asked = points[(points[list(CONDITIONS)] == [base[name] for name in CONDITIONS]).all(axis=1)]
    return float(needs(asked).groupby([asked[name] for name in SETTINGS]).max().min())


def question(base: Mapping[str, Any], budget: int | None) -> str:
    """What is asked, in a line."""
    told = [name for name in CONDITIONS if name in TOLD or base[name] != {**DEFAULTS, "cores": base["vcpus"]}[name]]
    limit = f", at most {human_size(budget)} of host memory" if budget is not None else ""
    return f"Settings for {', '.join(word(name, base[name]) for name in told)}{limit}"


def _beyond(less: float) -> float:
    """x % less than the other: the other takes so much more, as a part."""
    return 1 / (1 - less / 100) - 1


def _span(low: float, high: float) -> str:
    return " ... ".join(_percent(end) for end in sorted((low, high)))


def _percent(part: float, sign: str = "") -> str:
    """Of 1,000 % and more no decimals."""
    return f"{part:{sign}z,.{2 if abs(part) < 10 else 0}%}"


def _lines(left_out: Sequence[LeftOut]) -> list[str]:
    """What is left out for the same reason stands in one line."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for each in left_out:
        by_reason.setdefault((each.place, each.why), []).append(each.setting)
    return [": ".join(filter(None, (place, "; ".join(settings), why))) for (place, why), settings in by_reason.items()]


def _time(ns: float) -> str:
    return human_time(ns / 1e9)


def _of_vmm(row: Row) -> str:
    ns = float(row["total_ns"] - row[GUEST])
    return f"{_time(ns)} of the VMM's" if ns > 0 else "none of the VMM's"
