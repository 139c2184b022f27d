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
from sweep.plan import Plan, Points
from sweep.point import context_of
from sweep.record import read_study
from sweep.rows import Recorder
from sweep.schema import TABLES


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
    recorder = Recorder(context_of(plan.study))
    for at in spread(len(chosen), recompute) if recompute else ():
        for points in plan.points_at(chosen[at : at + 1]):
            verdict.wrong += _compare(str(place), points, recorder, tables)
            verdict.recomputed += 1
    return verdict


def _compare(place: str, points: Points, recorder: Recorder, tables: dict[str, pa.Table]) -> list[str]:
    recorder.begin()
    recorder.run(points)
    fresh = recorder.tables()
    return [
        f"{place}: point {points.ids[0]} of table {name} differs from what the model gives now"
        for name in ("points", "steps")
        if not tables[name].filter(pc.equal(tables[name].column("point_id"), points.ids[0])).equals(fresh[name])
    ]
