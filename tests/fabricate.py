"""Datasets of any size without running the model: the rows of one real point under other parameters, with figures drawn from a seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import sweep
from sweep.dataset.records import Commit
from sweep.dataset.store import Store
from sweep.schema import arrow_schema

DRAWN = (
    "exits",
    "pf_retry",
    "mmu_lock_write",
    "guest_ns",
    "total_ns",
    "fault_ns",
    "clear_ns",
    "held_bytes",
    "fault_p50_ns",
    "fault_p99_ns",
)
STUDY = """
[study]
name = "made"
title = "T"
replicates = {replicates}
[point]
memory = "4MiB"
"""


def dataset(folder: Path, points: int, columns: Mapping[str, Sequence[Any]], replicates: int = 1) -> Path:
    """A dataset of so many points, which is not sealed. Point i has columns[name][i % len(columns[name])], and figures of its own."""
    study = folder / "made.toml"
    study.write_text(STUDY.format(replicates=replicates))
    out = folder / "made"
    sweep.run(study, out, sweep.RunOptions(executor="inline", quiet=True, limit=1))
    template = sweep.open_dataset(out).arrow().slice(0, 1)
    configurations = np.arange(points) // replicates
    rng = np.random.default_rng(7)
    made: dict[str, Any] = {}
    for field in arrow_schema("points"):
        first = template.column(field.name)[0].as_py()
        made[field.name] = pa.array([first], field.type).take(pa.array(np.zeros(points, np.int64)))
        if field.name in columns:
            values = columns[field.name]
            made[field.name] = pa.array([values[i % len(values)] for i in configurations], field.type)
        elif field.name in DRAWN:
            made[field.name] = pa.array(rng.integers(1, 1 << 33, points), field.type)
    made["replicate"] = pa.array(np.arange(points) % replicates, pa.int32())
    made["point_id"] = pa.array([f"{value:032x}" for value in rng.permutation(points)])
    store = Store(out)
    rows = pa.table(made, schema=arrow_schema("points"))
    for path in (out / "points").iterdir():
        path.unlink()
    for path in (out / "commits").iterdir():
        path.unlink()
    (out / "sealed.json").unlink(missing_ok=True)
    store.commit(Commit("0" * 24, store.publish("0" * 24, {"points": rows})))
    return out
