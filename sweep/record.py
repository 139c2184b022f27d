"""study.json: a study as understood, whole enough to make its points again without the files it came from."""

from pathlib import Path
from typing import Any

from kernels.cost import Cost
from kernels.jit import model_digest
from sweep.blocks import Axis, Block, Sample
from sweep.configs import COST_NAMES, CostFile, Workload
from sweep.dataset.store import Store
from sweep.errors import DatasetError
from sweep.observations import from_record
from sweep.parameters import PARAMETERS
from sweep.schema import SCHEMA_VERSION
from sweep.steps import STEP
from sweep.study import Study, study_digest
from sweep.where import Where


def study_record(study: Study, points: int) -> dict[str, Any]:
    """Content of study.json: what must not change under a dataset (see Study.identity), how many points, and the study."""
    return {
        **study.identity(),
        "digest": study_digest(study),
        "model_digest": model_digest(),
        "schema_version": SCHEMA_VERSION,
        "points": points,
        "study": {
            "title": study.title,
            "replicates": study.replicates,
            "budget_cpu_hours": study.budget_cpu_hours,
            "blocks": [_block_record(block) for block in study.blocks],
            "workloads": {name: _workload_record(workload) for name, workload in sorted(study.workloads.items())},
            "costs": {name: _cost_record(costs) for name, costs in sorted(study.costs.items())},
            **({"observations": [row.record() for row in study.observations]} if study.observations else {}),
        },
    }


def _block_record(block: Block) -> dict[str, Any]:
    axes = [{"names": axis.names, "values": axis.values} for axis in block.axes]
    sample = {"sample": vars(block.sample)} if block.sample else {}
    return {"axes": axes, "fixed": dict(block.fixed), "where": block.where.text if block.where else None, **sample}


def _workload_record(workload: Workload) -> dict[str, Any]:
    specs = [spec.model_dump(mode="json", exclude_defaults=True) | {"op": spec.op} for spec in workload.specs]
    return {"steps": specs, "folder": str(workload.folder.resolve()) if any("path" in spec for spec in specs) else "."}


def _cost_record(costs: CostFile) -> dict[str, int]:
    return {cost.name.lower(): value for cost, value in costs.values.items()}


def read_study(store: Store) -> Study:
    """The study of a dataset, from its study.json. Raises DatasetError."""
    return study_of(store.json("study.json"), store.name)


def study_of(record: dict[str, Any], dataset: str) -> Study:
    """The study of a record like study_record()'s; `dataset` is its name, for messages. Raises DatasetError."""
    name = f"{dataset}/study.json"
    try:
        inner = record["study"]
        return Study(
            name=record["name"],
            title=inner["title"],
            seed=record["seed"],
            replicates=inner["replicates"],
            budget_cpu_hours=inner["budget_cpu_hours"],
            blocks=tuple(_block(entry) for entry in inner["blocks"]),
            workloads={name: _workload(name, entry) for name, entry in inner["workloads"].items()},
            costs={name: _costs(name, entry) for name, entry in inner["costs"].items()},
            text="",
            path=name,
            observations=tuple(from_record(entry) for entry in inner.get("observations", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{name}: cannot be understood ({error}); run the study again to write it anew") from None


def _block(entry: dict[str, Any]) -> Block:
    axes = tuple(Axis(tuple(axis["names"]), tuple(tuple(values) for values in axis["values"])) for axis in entry["axes"])
    where = Where(entry["where"], frozenset(PARAMETERS)) if entry["where"] else None
    return Block(axes, entry["fixed"], where, Sample(**entry["sample"]) if "sample" in entry else None)


def _workload(name: str, entry: dict[str, Any]) -> Workload:
    return Workload(name, tuple(STEP.validate_python(spec) for spec in entry["steps"]), Path(entry["folder"]))


def _costs(name: str, entry: dict[str, int]) -> CostFile:
    values: dict[Cost, int] = {COST_NAMES[key]: value for key, value in entry.items()}
    return CostFile(name, values, {cost: (value, value) for cost, value in values.items()}, ())
