"""What is written down beside the data: which parts a chunk or a seal has, with checksums, and which indices of which plan they are."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sweep.errors import DatasetError
from sweep.schema import TABLES

Int64s = NDArray[np.int64]
PART_NAME = re.compile(r"part-[0-9A-Za-z-]{1,80}\.parquet")


@dataclass(frozen=True)
class PartRecord:
    """One data file."""

    table: str
    name: str
    rows: int
    nbytes: int
    sha256: str

    @property
    def path(self) -> str:
        return f"{self.table}/{self.name}"

    def as_json(self) -> dict[str, Any]:
        return {"table": self.table, "name": self.name, "rows": self.rows, "bytes": self.nbytes, "sha256": self.sha256}


@dataclass(frozen=True)
class Commit:
    """A chunk that is done: its parts, and the indices of the plan that they are the rows of ('' where no plan is known)."""

    key: str
    parts: tuple[PartRecord, ...]
    plan: str = ""
    indices: tuple[tuple[int, int, int], ...] = ()  # start, stop, step
    failed: tuple[int, ...] = ()  # of these, the points that failed

    def as_json(self) -> dict[str, Any]:
        parts = [part.as_json() for part in self.parts]
        return {"parts": parts, "plan": self.plan, "indices": [list(run) for run in self.indices], "failed": list(self.failed)}


@dataclass(frozen=True)
class Seal:
    """A complete dataset, compacted: the sorted parts, the commits that went into them, the plan that is complete."""

    parts: tuple[PartRecord, ...]
    absorbed: tuple[str, ...]
    plan: str
    study_digest: str
    root_digest: str
    content_digest: str

    @property
    def fits(self) -> bool:
        """Its root digest is that of the parts it names."""
        return self.root_digest == root_digest(self.parts)

    def completes(self, plan: str) -> bool:
        """All points of the plan of that digest are in it."""
        return self.fits and self.plan == plan

    def as_json(self) -> dict[str, Any]:
        return {
            "parts": [part.as_json() for part in self.parts],
            "absorbed": list(self.absorbed),
            "plan": self.plan,
            "study_digest": self.study_digest,
            "root_digest": self.root_digest,
            "content_digest": self.content_digest,
        }


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def root_digest(records: Iterable[PartRecord]) -> str:
    """Digest of a seal's files: names and sha256."""
    return hashlib.sha256("".join(f"{r.path} {r.sha256}\n" for r in records).encode()).hexdigest()


def is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def parse_object(name: str, content: bytes) -> dict[str, Any]:
    """A JSON object of the dataset. Raises DatasetError for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{name}: cannot be read ({error}); restore it or start with a new directory") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{name}: holds no JSON object; restore it or start with a new directory")
    return value


def _part(name: str, entry: Any) -> PartRecord:
    part = PartRecord(str(entry["table"]), str(entry["name"]), int(entry["rows"]), int(entry["bytes"]), str(entry["sha256"]))
    if part.table not in TABLES or not PART_NAME.fullmatch(part.name):
        raise DatasetError(f"{name}: names the part {part.name!r} of table {part.table!r}, which cannot be; delete it and run again")
    return part


def _run(entry: Any) -> tuple[int, int, int]:
    start, stop, step = (int(number) for number in entry)
    if not 0 <= start <= stop or step < 1:
        raise ValueError(f"{entry} is no range")
    return start, stop, step


def parse_commit(name: str, key: str, content: bytes) -> Commit:
    """A commit record. Raises DatasetError for one that cannot be understood."""
    value = parse_object(name, content)
    try:
        parts = tuple(_part(name, entry) for entry in value["parts"])
        indices = tuple(_run(entry) for entry in value.get("indices", ()))
        return Commit(key, parts, str(value.get("plan", "")), indices, tuple(int(i) for i in value.get("failed", ())))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{name}: is no commit record ({error}); delete it and run again") from None


def parse_seal(name: str, content: bytes) -> Seal:
    """sealed.json. Raises DatasetError for one that cannot be understood."""
    value = parse_object(name, content)
    try:
        parts = tuple(_part(name, entry) for entry in value["parts"])
        texts = [str(value.get(key, "")) for key in ("plan", "study_digest", "root_digest", "content_digest")]
        return Seal(parts, tuple(str(key) for key in value["absorbed"]), *texts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{name}: is no seal ({error}); delete it and run again") from None


def runs_of(indices: range | Int64s) -> tuple[tuple[int, int, int], ...]:
    """Ascending indices as runs (start, stop, step), few where they are regular."""
    if isinstance(indices, range):
        return ((indices.start, indices.stop, indices.step),) if len(indices) else ()
    found: list[tuple[int, int, int]] = []
    values: Sequence[int] = indices.tolist()
    at = 0
    while at < len(values):
        step = values[at + 1] - values[at] if at + 1 < len(values) else 1
        end = at + 1
        while end < len(values) and values[end] - values[end - 1] == step:
            end += 1
        found.append((values[at], values[end - 1] + 1, step))
        at = end
    return tuple(found)
