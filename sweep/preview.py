"""What `plan` and `status` print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweep.configs import digest_of
from sweep.dataset.files import read_object
from sweep.dataset.read import Dataset
from sweep.plan import BYTES_PER_POINT, Plan, PlannedPoint
from sweep.predict import predict_bytes, predict_seconds
from sweep.quantity import human_size, human_time
from sweep.record import read_study
from sweep.runner import default_workers
from sweep.study import Block, load_study

SHOWN_POINTS = 3


def preview(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Points, axes, predictions, first and last points of a study. Raises StudyError."""
    study = load_study(path, overrides)
    plan = Plan(study)
    points = plan.points()
    seconds = sum(predict_seconds(p.point, study.workloads[p.point.workload]) for p in points)
    workers = default_workers()
    return {
        "study": study.name,
        "digest": digest_of(study.identity())[:16],
        "points": len(points),
        "left out by where, or given twice": plan.upper - len(points),
        "blocks": [_axes(number, block) for number, block in enumerate(study.blocks)],
        "replicates": study.replicates,
        "predicted CPU time": f"{human_time(seconds)} ({human_time(seconds / workers)} on {workers} CPUs)",
        "predicted memory": f"{human_size(max(predict_bytes(p.point) for p in points))} per worker",
        "predicted bytes on disk": human_size(len(points) * BYTES_PER_POINT),
        "notes": list(study.notes),
        "first points": [_line(p) for p in points[:SHOWN_POINTS]],
        "last points": [_line(p) for p in points[-SHOWN_POINTS:]],
    }


def _axes(number: int, block: Block) -> str:
    axes = " x ".join(f"{'+'.join(axis.names)}[{len(axis.values)}]" for axis in block.axes) or "one point"
    return f"{number}: {axes}" + (f" where {block.where.text}" if block.where else "")


def _line(planned: PlannedPoint) -> str:
    values = planned.point.model_dump(exclude_defaults=True)
    return f"{planned.point_id} " + " ".join(f"{k}={v}" for k, v in values.items()) + f" replicate={planned.replicate}"


def status_of(root: Path) -> dict[str, Any]:
    """How far a dataset is."""
    dataset = Dataset(root)
    planned = {p.point_id for p in Plan(read_study(root)).points()}
    committed = dataset.store.done()
    done, left = len(committed & planned), len(planned - committed)
    runs = [read_object(path) for path in sorted((root / "provenance").glob("run-*.json"))]
    seconds = sum(float(run.get("seconds", 0)) for run in runs)
    rate = sum(int(run.get("done", 0)) for run in runs) / seconds if seconds else 0.0
    return {
        "study": read_study(root).name,
        "points": len(planned),
        "done": done,
        "failed": dataset.arrow("errors").num_rows,
        "left": left,
        "of earlier plans": len(committed - planned),
        "rate": f"{rate:.1f} points/s",
        "time left": human_time(left / rate) if left and rate else "none" if not left else "unknown",
        "sealed": dataset.store.sealed() is not None and not left,
    }
