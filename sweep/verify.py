"""`verify`: is all there, undamaged, and does the model still give the same?"""

from dataclasses import dataclass, field
from pathlib import Path

from sweep.dataset.read import Dataset
from sweep.plan import Plan
from sweep.point import Context, point_row, simulate_point, step_row
from sweep.record import read_study
from sweep.schema import TABLES, to_table


@dataclass
class Verdict:
    """What was looked at, and one line for each thing that is wrong."""

    points: int = 0
    recomputed: int = 0
    wrong: list[str] = field(default_factory=list)


def verify(root: Path, recompute: int = 0) -> Verdict:
    """Checksums, schema, completeness; recompute so many points (evenly spread) and compare every deterministic column."""
    dataset = Dataset(root)
    verdict = Verdict(wrong=dataset.store.check())
    if verdict.wrong:
        return verdict
    tables = {name: dataset.arrow(name) for name in TABLES}
    plan = Plan(read_study(root))
    planned = {p.point_id: p for p in plan.points()}
    have = tables["points"].column("point_id").to_pylist()
    verdict.points = len(have)
    missing = set(planned) - set(have)
    if missing:
        verdict.wrong.append(f"{root}: {len(missing)} of {len(planned)} points are missing; run again to compute them")
    if len(have) != len(set(have)):
        verdict.wrong.append(f"{root}: {len(have) - len(set(have))} points stand twice")
    context = Context(plan.study.name, dict(plan.study.workloads), dict(plan.study.costs))
    chosen = [i for i in have if i in planned][:: max(1, len(have) // recompute)][:recompute] if recompute else []
    for point_id in chosen:
        run = simulate_point(planned[point_id], context)
        rows = {
            "points": [point_row(planned[point_id], context, run)],
            "steps": [step_row(planned[point_id], context, i, step) for i, step in enumerate(run.steps)],
        }
        for name, fresh in rows.items():
            mask = [other == point_id for other in tables[name].column("point_id").to_pylist()]
            if not tables[name].filter(mask).equals(to_table(name, fresh)):
                verdict.wrong.append(f"{root}: point {point_id} of table {name} differs from what the model gives now")
        verdict.recomputed += 1
    return verdict
