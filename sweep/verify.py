"""`verify`: is all there, undamaged, and does the model still give the same?"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sweep.blocks import spread
from sweep.dataset.read import Dataset
from sweep.dataset.store import State, Store
from sweep.left import done_of, kept_of
from sweep.plan import Int64s, Plan
from sweep.point import context_of
from sweep.record import read_study
from sweep.rows import Recorder
from sweep.schema import KEYS, TABLES, as_numpy, texts


@dataclass
class Verdict:
    """What was looked at, and one line for each thing that is wrong."""

    points: int = 0
    recomputed: int = 0
    wrong: list[str] = field(default_factory=list)


def verify(place: Path | str, recompute: int = 0) -> Verdict:
    """Checksums, schema, completeness; recompute so many points (evenly spread) and compare every deterministic column."""
    store = Dataset(place).store
    with store.remembering():
        return store.stable(lambda state: _verify(str(place), store, state, recompute))


def _verify(place: str, store: Store, state: State, recompute: int) -> Verdict:
    verdict = Verdict(wrong=store.check(state))
    if verdict.wrong:
        return verdict
    verdict.wrong += _twice(place, store, state)
    if state.commits:
        for table in TABLES:
            store.read(table, state=state)  # what two runs both made must agree
    plan = Plan(read_study(store))
    kept = kept_of(plan)
    done = done_of(plan, store, state, kept)
    verdict.points = len(store.done(state))
    missing = int((kept & ~done).sum())
    if missing or verdict.points < int(kept.sum()):
        verdict.wrong.append(f"{place}: {missing} of {int(kept.sum())} points are missing; run again to compute them")
    chosen = np.flatnonzero(done)
    for line in _recomputed(place, store, state, plan, chosen[list(spread(len(chosen), recompute))] if recompute else chosen[:0]):
        verdict.recomputed += 1
        verdict.wrong += line
    return verdict


def _twice(place: str, store: Store, state: State) -> Iterator[str]:
    """What a seal's parts say twice, or not in order: a seal has each row once, sorted by its keys."""
    for table, keys in KEYS.items():
        parts = [part for part in (state.seal.parts if state.seal else ()) if part.table == table]
        rows = pa.concat_tables([store.read_part(part, keys) for part in parts]) if parts else None
        if rows is not None and (wrong := _not_ascending(rows)):
            names = ", ".join(part.path for part in parts)
            yield f"{place}: {wrong} rows of {table} stand twice, or out of order, in {names}; remove sealed.json and these, and run again"


def _not_ascending(rows: pa.Table) -> int:
    """How many rows are not greater than the one before."""
    if rows.num_rows < 2:
        return 0
    greater, equal = np.zeros(rows.num_rows - 1, np.bool_), np.ones(rows.num_rows - 1, np.bool_)
    for chunked in rows.columns:
        column = chunked.combine_chunks()
        after, before = column.slice(1), column.slice(0, len(column) - 1)
        greater |= equal & as_numpy(pc.greater(after, before)).astype(np.bool_)
        equal &= as_numpy(pc.equal(after, before)).astype(np.bool_)
    return int((~greater).sum())


def _recomputed(place: str, store: Store, state: State, plan: Plan, indices: Int64s) -> Iterator[list[str]]:
    """Of each of these points, one line for each table that does not hold what the model gives."""
    recorder = Recorder(context_of(plan.study))
    ids = [planned.point_id for _, planned in plan.at(indices)]
    tables = {name: store.rows_of(name, texts(ids), state) for name in ("points", "steps")} if ids else {}
    for index, point_id in zip(indices.tolist(), ids, strict=True):
        recorder.begin()
        for points in plan.points_at(range(index, index + 1)):
            recorder.run(points)
        fresh = recorder.tables()
        yield [
            f"{place}: point {point_id} of table {name} differs from what the model gives now"
            for name, rows in tables.items()
            if not rows.filter(pc.equal(rows.column("point_id"), point_id)).equals(fresh[name])
        ]
