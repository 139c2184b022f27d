"""`verify`: is all there, undamaged, and does the model still give the same?"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sweep.blocks import spread
from sweep.dataset.read import Dataset
from sweep.dataset.store import once_each
from sweep.left import done_now, kept_of
from sweep.plan import Plan, PlannedPoint
from sweep.point import Context, context_of, point_row, simulate_point, step_row
from sweep.record import read_study
from sweep.schema import TABLES, to_table


@dataclass
class Verdict:
    """What was looked at, and one line for each thing that is wrong."""

    points: int = 0
    recomputed: int = 0
    wrong: list[str] = field(default_factory=list)


def verify(place: Path | str, recompute: int = 0) -> Verdict:
    """Checksums, schema, completeness; recompute so many points (evenly spread) and compare every deterministic column."""
    store = Dataset(place).store
    verdict = Verdict(wrong=store.check())
    if verdict.wrong:
        return verdict
    tables = {name: once_each(store.name, name, store.read(name)) for name in TABLES}
    plan = Plan(read_study(store))
    kept = kept_of(plan)
    done = done_now(plan, store, kept)
    verdict.points = tables["points"].num_rows
    missing = int((kept & ~done).sum())
    if missing or verdict.points < int(kept.sum()):
        verdict.wrong.append(f"{place}: {missing} of {int(kept.sum())} points are missing; run again to compute them")
    chosen = np.flatnonzero(done)
    context = context_of(plan.study)
    for at in spread(len(chosen), recompute) if recompute else ():
        for _, planned in plan.at(chosen[at : at + 1]):
            verdict.wrong += _compare(str(place), planned, context, tables)
            verdict.recomputed += 1
    return verdict


def _compare(place: str, planned: PlannedPoint, context: Context, tables: dict[str, pa.Table]) -> list[str]:
    run = simulate_point(planned, context)
    fresh = {
        "points": [point_row(planned, context, run)],
        "steps": [step_row(planned, context, i, step) for i, step in enumerate(run.steps)],
    }
    return [
        f"{place}: point {planned.point_id} of table {name} differs from what the model gives now"
        for name, rows in fresh.items()
        if not tables[name].filter(pc.equal(tables[name].column("point_id"), planned.point_id)).equals(to_table(name, rows))
    ]
