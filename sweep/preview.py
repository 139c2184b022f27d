"""What `plan` and `status` print."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sweep.blocks import Block
from sweep.configs import digest_of
from sweep.dataset.read import Dataset
from sweep.errors import Fault, StudyError
from sweep.left import done_of, kept_of
from sweep.machine import default_workers
from sweep.parameters import COLUMN_OF
from sweep.plan import BYTES_PER_POINT, Plan, PlannedPoint
from sweep.price import Prices
from sweep.quantity import format_size, human_size, human_time
from sweep.record import read_study
from sweep.runner import chunks_of
from sweep.study import load_study

SHOWN_POINTS = 3
RUN_RECORD = re.compile(r"run-[0-9]+-[0-9]+\.json")
COUNTED = 1_000_000  # indices; of a larger plan the points are estimated
NOT_COUNTED = "so large a plan is not counted point by point: what where keeps is an estimate, what two blocks give counts twice"


def preview(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Points, axes, predictions, first and last points of a study. Raises StudyError."""
    study = load_study(path, overrides)
    plan = Plan(study)
    estimate = Prices(plan).estimate()
    counted = plan.upper <= COUNTED
    points = len(plan) if counted else estimate.points
    if not points:
        raise StudyError([Fault(study.where("block", 0, "where"), "where", "keeps no point; loosen it")])
    notes = [*study.notes] if counted else [*study.notes, NOT_COUNTED]
    workers = default_workers()
    seconds = estimate.seconds * points / max(1, estimate.points)
    return {
        "study": study.name,
        "digest": digest_of(study.identity())[:16],
        "points": points,
        "left out by where, or given twice": plan.upper - points,
        "blocks": [_block(number, block) for number, block in enumerate(study.blocks)],
        "axes": [row for number, block in enumerate(study.blocks) for row in _axes(number, block)],
        "replicates": study.replicates,
        "predicted CPU time": f"{human_time(seconds)} ({human_time(seconds / workers)} on {workers} CPUs)",
        "predicted memory": f"{human_size(estimate.nbytes)} per worker",
        "predicted bytes on disk": human_size(points * BYTES_PER_POINT),
        "notes": notes,
        "first points": [_row(p) for p in islice(plan, SHOWN_POINTS)],
        "last points": [_row(p) for p in reversed(list(islice(plan.backwards(), SHOWN_POINTS)))],
    }


def as_text(shown: Mapping[str, Any]) -> str:
    """What preview() or status_of() found: a line each, lists and tables below."""
    import pandas as pd  # a third of a second, which --json need not wait for

    lines = [f"{name}: {value}" for name, value in shown.items() if not isinstance(value, list)]
    for name, rows in shown.items():
        if rows and isinstance(rows, list):
            tabular = isinstance(rows[0], dict)
            told = pd.DataFrame(rows).fillna("").astype(str).to_string(index=False).splitlines() if tabular else rows
            lines += ["", name, *(f"  {line}" for line in told)]
    return "\n".join(lines)


def _block(number: int, block: Block) -> str:
    sampled = f", {block.sample.n:,} of them ({block.sample.method})" if block.sample else ""
    where = f", where {block.where.text}" if block.where else ""
    return f"{number}: {block.product:,} combinations{sampled}{where}"


def _axes(number: int, block: Block) -> Iterator[dict[str, Any]]:
    """A row for each axis of a block."""
    for axis in block.axes:
        first, last = (_value(axis.names, axis.values[place]) for place in (0, -1))
        yield {"block": number, "axis": "+".join(axis.names), "values": len(axis.values), "from": first, "to": last}


def _value(names: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(format_size(value) if name in COLUMN_OF else str(value) for name, value in zip(names, values, strict=True))


def _row(planned: PlannedPoint) -> dict[str, Any]:
    """The parameters that are not at their default."""
    values = planned.point.model_dump(exclude_defaults=True)
    told = {name: _value([name], [value]) for name, value in values.items()}
    return {"point": planned.point_id, **told, "replicate": planned.replicate}


def status_of(place: Path | str) -> dict[str, Any]:
    """How far a dataset is."""
    store = Dataset(place).store
    plan = Plan(read_study(store))
    kept, state = kept_of(plan), store.state()
    done = done_of(plan, store, state, kept)
    finished, left = int(done.sum()), int((kept & ~done).sum())
    runs = [store.json(f"provenance/{name}") for name in store.storage.names("provenance") if RUN_RECORD.fullmatch(name)]
    seconds, predicted = (sum(float(run.get(key, 0)) for run in runs) for key in ("seconds", "predicted_s"))
    ahead = sum(chunk.seconds for chunk in chunks_of(Prices(plan), kept, kept & ~done)) if left and predicted else 0.0
    rate = sum(int(run.get("done", 0)) for run in runs) / seconds if seconds else 0.0
    return {
        "study": plan.study.name,
        "points": int(kept.sum()),
        "done": finished,
        "failed": store.failures().num_rows,
        "left": left,
        "of earlier plans": len(store.done(state)) - finished,
        "rate": f"{rate:.1f} points/s",
        "time left": human_time(ahead * seconds / predicted) if ahead else "unknown" if left else "none",
        "sealed": state.seal is not None and not left and not state.commits,
    }
