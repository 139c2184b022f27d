"""The result of a validation as a dataset: which kernels, which counts, which verdicts; and the table that README shows."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.errors import DatasetError
from sweep.host.case import AccessList
from sweep.host.compare import CaseResult, Verdict

CASES = pa.schema(
    [
        pa.field("layer", pa.string(), metadata={"doc": "memory, kvm or boot"}),
        pa.field("kernel", pa.string(), metadata={"doc": "the version the model predicted for"}),
        pa.field("release", pa.string(), metadata={"doc": "what the kernel calls itself"}),
        pa.field("mmu", pa.string(), metadata={"doc": "tdp, legacy or shadow; none without a guest"}),
        pa.field("case", pa.string(), metadata={"doc": "name"}),
        pa.field("text", pa.string(), metadata={"doc": "parameters and steps"}),
        pa.field("verdict", pa.string(), metadata={"doc": "equal, differs, left out, failed"}),
        pa.field("reason", pa.string(), metadata={"doc": "why it did not run, or failed"}),
        pa.field("accesses", pa.int64(), metadata={"doc": "single accesses named in its lists"}),
        pa.field("equal", pa.int64(), metadata={"doc": "counters that are equal, over all steps"}),
        pa.field("differs", pa.int64(), metadata={"doc": "counters that differ and must not"}),
        pa.field("free", pa.int64(), metadata={"doc": "counters that differ and may"}),
    ]
)
COUNTS = pa.schema(
    [
        *(CASES.field(name) for name in ("layer", "kernel", "release", "mmu", "case")),
        pa.field("step", pa.int32(), metadata={"doc": "from 0"}),
        pa.field("op", pa.string(), metadata={"doc": "what the step does"}),
        pa.field("counter", pa.string(), metadata={"doc": "name of the counter or gauge"}),
        pa.field("real", pa.int64(), metadata={"doc": "what the kernel counted"}),
        pa.field("predicted", pa.int64(), metadata={"doc": "what the model counts"}),
        pa.field("verdict", pa.string(), metadata={"doc": "equal, differs, free"}),
        pa.field("reason", pa.string(), metadata={"doc": "why it need not be equal"}),
    ]
)
TABLES = {"cases": CASES, "counts": COUNTS}
SEAL = "sealed.json"


@dataclass(frozen=True)
class LayerResult:
    """What one kernel said. Without results, `skipped` says why."""

    layer: str
    kernel: str
    mmu: str
    host: Mapping[str, str]
    results: Sequence[CaseResult] = ()
    skipped: str = ""
    asked: bool = True  # False: nobody named it, so that it may be skipped
    notes: Sequence[str] = ()

    @property
    def identity(self) -> dict[str, str]:
        return {"layer": self.layer, "kernel": self.kernel, "release": self.host.get("release", ""), "mmu": self.mmu}

    def count(self, verdict: Verdict) -> int:
        return sum(result.verdict == verdict for result in self.results)


def _case_row(result: CaseResult) -> dict[str, Any]:
    tally = {
        verdict.value: sum(row.verdict == verdict for row in result.rows) for verdict in (Verdict.EQUAL, Verdict.DIFFERS, Verdict.FREE)
    }
    accesses = sum(len(step.accesses) for step in result.case.steps if isinstance(step, AccessList))
    text = str(result.case) if accesses <= 200 else str(result.case)[:400]
    return {
        "case": result.case.name,
        "text": text,
        "verdict": result.verdict.value,
        "reason": result.reason,
        "accesses": accesses,
        **tally,
    }


def tables_of(layers: Sequence[LayerResult]) -> dict[str, pa.Table]:
    """The rows of `cases` and `counts`, in the order of running."""
    ran = [(layer.identity, result) for layer in layers for result in layer.results]
    cases = [identity | _case_row(result) for identity, result in ran]
    counts = [
        identity | {"case": result.case.name, **{name: getattr(row, name) for name in COUNTS.names[5:]}}
        for identity, result in ran
        for row in result.rows
    ]
    return {"cases": pa.Table.from_pylist(cases, CASES), "counts": pa.Table.from_pylist(counts, COUNTS)}


def write_dataset(layers: Sequence[LayerResult], folder: Path, about: Mapping[str, Any]) -> None:
    """cases.parquet, counts.parquet, hosts.json and, last, sealed.json with their digests. Raises DatasetError if something is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DatasetError(f"{folder} is not empty; choose another --out, or remove it")
    digests = {}
    for name, table in tables_of(layers).items():
        path = folder / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)
        digests[path.name] = _digest(path)
    hosts = [layer.identity | dict(layer.host) | {"skipped": layer.skipped, "notes": list(layer.notes)} for layer in layers]
    path = folder / "hosts.json"
    path.write_text(json.dumps({"about": about, "hosts": hosts}, indent=1) + "\n")
    digests[path.name] = _digest(path)
    seal = folder / f"{SEAL}.new"
    seal.write_text(json.dumps({"sha256": digests}, indent=1) + "\n")
    seal.replace(folder / SEAL)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_dataset(folder: Path) -> dict[str, pa.Table]:
    """The tables of a sealed validation. Raises DatasetError that names what is missing or damaged."""
    try:
        sealed: dict[str, str] = json.loads((folder / SEAL).read_text())["sha256"]
        for name, digest in sealed.items():
            if _digest(folder / Path(name).name) != digest:
                raise DatasetError(f"{folder / name}: does not match {SEAL}; the file was changed or damaged")
        return {name: pq.read_table(folder / f"{name}.parquet", page_checksum_verification=True) for name in TABLES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{folder} is no validation dataset: {type(error).__name__}: {str(error)[:200]}") from None


LAYER_NAMES = {"boot": "booted", "kvm": "/dev/kvm", "memory": "host memory"}
MMU_NAMES = {"tdp": "TDP MMU", "legacy": "legacy MMU", "shadow": "shadow paging", "none": "no guest"}


def agreement(cases: pa.Table) -> str:
    """Kernel, cases, exact, as a Markdown table: one row per layer, kernel and MMU, in the order of the dataset."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for case in cases.to_pylist():
        tally = rows.setdefault((case["layer"], case["release"], case["mmu"]), [0, 0, 0, 0])
        ran = case["verdict"] != Verdict.LEFT_OUT
        for n, more in enumerate((ran, case["verdict"] == Verdict.EQUAL, case["equal"], case["differs"])):
            tally[n] += int(more)
    lines = ["| kernel | how | MMU | cases | exact | counts equal | counts that differ |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {release} | {LAYER_NAMES[layer]} | {MMU_NAMES[mmu]} | {ran} | {exact} | {equal:,} | {differ} |"
        for (layer, release, mmu), (ran, exact, equal, differ) in rows.items()
    ]
    return "\n".join(lines)
