"""Where shared files are found, and the loading of cost and workload files."""

import hashlib
import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from kernels.cost import MAX_COST_NS, Cost
from sweep.errors import Fault, StudyError
from sweep.files import nearest, pydantic_fault, read_toml
from sweep.locate import Location, Source, where_is
from sweep.steps import STEP, STEP_CAME_LATER, STEP_CLASSES

WORKLOAD_KEYS = ("steps", "about")
MAX_STEPS = 10_000
COST_NAMES = {cost.name.lower(): cost for cost in Cost}


def config_root() -> Path:
    """The folder `configs` of the checkout, or the copy inside the installed package."""
    checkout = Path(__file__).resolve().parent.parent / "configs"
    return checkout if checkout.is_dir() else Path(__file__).resolve().parent / "configs"


def digest_of(value: object) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class CostFile:
    """Values and ranges (low, high) in ns of every parameter, and where each comes from."""

    name: str
    values: Mapping[Cost, int]
    ranges: Mapping[Cost, tuple[int, int]]
    notes: tuple[str, ...]
    about: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[Cost, Mapping[str, str]] = field(default_factory=dict)  # basis, source and the like of each entry

    def digest(self) -> str:
        return digest_of({cost.name: value for cost, value in self.values.items()})

    def variant(self, text: str) -> "CostFile":
        """'exit_ns=low' or 'exit_ns=700': the same file with one value moved. Raises ValueError."""
        key, _, value = text.partition("=")
        if key not in COST_NAMES:
            raise ValueError(f"unknown cost {key!r}; {nearest(key, COST_NAMES)}")
        cost = COST_NAMES[key]
        if value in ("low", "high"):
            number = self.ranges[cost][value == "high"]
        elif re.fullmatch(r"[0-9]{1,13}", value) and int(value) <= MAX_COST_NS:
            number = int(value)
        else:
            raise ValueError(f"{text!r}: low, high or a number of ns is needed behind the =")
        return replace(self, name=f"{self.name}@{text}", values={**self.values, cost: number})


def load_costs(text: str, folder: Path) -> CostFile:
    """'default', a path, or either with '@parameter=low'. Raises StudyError; a fault of the name itself has no place."""
    base, moves, moved = text.partition("@")
    path = Path(base) if base.endswith(".toml") else config_root() / "costs" / f"{base}.toml"
    if base.endswith(".toml") and not path.is_absolute():
        path = folder / path
    elif not base.endswith(".toml") and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", base):
        raise StudyError([Fault("", "costs", f"{base!r} is neither the name of a cost file nor the path of a .toml file")])
    try:
        stamp = path.stat()
    except (OSError, ValueError) as error:
        known = "" if base.endswith(".toml") else "; " + nearest(base, [p.stem for p in (config_root() / "costs").glob("*.toml")])
        raise StudyError([Fault("", "costs", f"{base}: {getattr(error, 'strerror', error)}{known}")]) from None
    file = _read_costs(base.removesuffix(".toml") if "/" not in base else Path(base).stem, path, stamp.st_mtime_ns, stamp.st_size)
    if not moves:
        return file
    try:
        return file.variant(moved)
    except ValueError as error:
        raise StudyError([Fault("", "costs", f"{text}: {error}")]) from None


@lru_cache(maxsize=64)
def _read_costs(name: str, path: Path, _mtime_ns: int, _size: int) -> CostFile:
    content, text = read_toml(path)
    faults: list[Fault] = []
    found = _Costs({}, {}, [], {})
    for key in set(content) - {"about", "cost"}:
        faults.append(Fault(where_is([(path, text)], (key,)), key, f"unknown table; {nearest(key, ('about', 'cost'))}"))
    costs = content.get("cost", {})
    if not isinstance(costs, dict):
        raise StudyError([Fault(where_is([(path, text)], ("cost",)), "cost", "must be a table of costs, [cost.NAME]")])
    for key, entry in costs.items():
        fault = _add_cost(found, path, key, entry)
        if fault:
            faults.append(Fault(where_is([(path, text)], ("cost", key)), f"cost.{key}", fault))
    missing = [key for key, cost in COST_NAMES.items() if cost not in found.values and key not in costs]
    if missing and not faults:
        faults.append(Fault(str(path), "cost", f"lacks {', '.join(missing)}"))
    if faults:
        raise StudyError(faults)
    values = {cost: found.values[cost] for cost in Cost}
    ranges = {cost: found.ranges[cost] for cost in Cost}
    about = content.get("about", {})
    about = {key: text for key, text in about.items() if isinstance(text, str)} if isinstance(about, dict) else {}
    return CostFile(name, values, ranges, tuple(found.notes), about, found.texts)


class _Costs(NamedTuple):
    values: dict[Cost, int]
    ranges: dict[Cost, tuple[int, int]]
    notes: list[str]
    texts: dict[Cost, dict[str, str]]


COST_TEXTS = ("unit", "basis", "machine", "method", "date", "source")  # what is said of a cost, beside value and range
COST_KEYS = ("value", "range", *COST_TEXTS)


def _add_cost(found: _Costs, path: Path, key: str, entry: Any) -> str:
    """Take one entry of a cost file; returns what is wrong with it, or ''."""
    if key not in COST_NAMES:
        unit = f"{key}_ns is meant? a unit is part of the name" if f"{key}_ns" in COST_NAMES else nearest(key, COST_NAMES)
        return f"unknown cost; {unit}"
    fault, (value, low, high) = _cost_entry(entry)
    if fault:
        return fault
    cost = COST_NAMES[key]
    found.values[cost], found.ranges[cost] = value, (low, high)
    found.texts[cost] = {name: entry[name] for name in COST_TEXTS if name in entry}
    if value == 0:
        found.notes.append(f"{path}: cost.{key} is 0")
    elif not low <= value <= high:
        found.notes.append(f"{path}: cost.{key} = {value} lies outside its range {low} ... {high}")
    return ""


def _cost_entry(entry: Any) -> tuple[str, tuple[int, int, int]]:
    """(what is wrong or '', (value, low, high))."""
    none = (0, 0, 0)
    if not isinstance(entry, dict) or "value" not in entry:
        return "must be a table with value, range, basis, source", none
    unknown = set(entry) - set(COST_KEYS)
    if unknown:
        return f"unknown key {min(unknown)!r}; {nearest(min(unknown), COST_KEYS)}", none
    spread = entry.get("range", [entry["value"], entry["value"]])
    if not isinstance(spread, list):
        return f"range must be [low, high], got {spread!r}", none
    for name in COST_TEXTS:
        if not isinstance(entry.get(name, ""), str):
            return f"{name} must be text, got {entry[name]!r}", none
    if entry.get("unit", "ns") != "ns":
        return f"unit must be 'ns', got {entry['unit']!r}; all costs are virtual nanoseconds", none
    numbers = [entry["value"], *spread]
    if len(numbers) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MAX_COST_NS for n in numbers):
        return f"value and range must be whole ns from 0 to {MAX_COST_NS}, got {numbers}", none
    if numbers[1] > numbers[2]:
        return f"range {numbers[1:]} has its ends swapped", none
    return "", (numbers[0], numbers[1], numbers[2])


@dataclass(frozen=True)
class Workload:
    """Checked steps of one workload, and the folder that its touch lists are relative to."""

    name: str
    specs: tuple[Any, ...]
    folder: Path

    def digest(self) -> str:
        """Content of the steps and of the files they name; fields that came later only where they differ from their default, so
        that older points keep their identity."""
        parts = []
        for spec in self.specs:
            part = {name: value for name, value in spec.model_dump().items() if STEP_CAME_LATER.get(name, ...) != value}
            if "path" in part:
                part["content"] = _file_digest(self.folder / part.pop("path"))
            parts.append(part)
        return digest_of(parts)


def _file_digest(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StudyError([Fault("", "touch_list", f"{path} is no regular file, and cannot be read")])
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise StudyError([Fault("", "touch_list", f"{path} cannot be read: {getattr(error, 'strerror', error)}")]) from None


def parse_workload(name: str, table: Any, sources: Sequence[Source], location: Location) -> tuple[Workload | None, list[Fault]]:
    """Check `steps` of a workload's table; faults carry the file's lines."""
    where = where_is(sources, location)
    label = ".".join(str(part) for part in location)
    if not isinstance(table, dict):
        return None, [Fault(where, label, "must be a table with steps")]
    faults = [
        Fault(where_is(sources, (*location, key)), f"{label}.{key}".lstrip("."), f"unknown key; {nearest(key, WORKLOAD_KEYS)}")
        for key in set(table) - set(WORKLOAD_KEYS)
    ]
    steps = table.get("steps")
    if not isinstance(steps, list) or not steps or len(steps) > MAX_STEPS:
        return None, [
            *faults,
            Fault(where_is(sources, (*location, "steps")), f"{label}.steps".lstrip("."), f"must be a list of 1 to {MAX_STEPS:,} steps"),
        ]
    specs = []
    for number, step in enumerate(steps):
        try:
            specs.append(STEP.validate_python(step))
        except ValidationError as error:
            faults += [_step_fault(sources, (*location, "steps", number), step, detail) for detail in error.errors()]
    return Workload(name, tuple(specs), Path(sources[0][0]).parent), faults


def _step_fault(sources: Sequence[Source], location: Location, step: Any, detail: Any) -> Fault:
    op = step.get("op") if isinstance(step, dict) else None
    label = ".".join(map(str, location))
    if not isinstance(step, dict):
        return Fault(where_is(sources, location), label, f"{step!r} is no step; a table with op is needed")
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return Fault(where_is(sources, location), label, f"op = {op!r} is unknown; {nearest(str(op), STEP_CLASSES)}")
    detail["loc"] = tuple(part for part in detail["loc"] if part not in STEP_CLASSES)
    known = STEP_CLASSES[op].model_fields if op in STEP_CLASSES else ()
    return pydantic_fault(sources, location, detail, known)


def load_workload(name: str) -> tuple[Workload | None, list[Fault]]:
    """A shared workload of configs/workloads."""
    path = config_root() / "workloads" / f"{name}.toml"
    content, text = read_toml(path)
    return parse_workload(name, content, [(path, text)], ())


def shared_workloads() -> Sequence[str]:
    """Names of the workloads that ship."""
    return sorted(path.stem for path in (config_root() / "workloads").glob("*.toml"))
