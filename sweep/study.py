"""Study files: parse, check everything, report every fault at once."""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sweep.blocks import MAX_SAMPLE, METHODS, Axis, Block, Sample, axis
from sweep.configs import CostFile, Workload, digest_of, load_costs, load_workload, parse_workload, shared_workloads
from sweep.errors import Fault, StudyError
from sweep.files import nearest, pydantic_fault, read_toml, short
from sweep.locate import Location, Source, where_is
from sweep.observations import Observation, load_observations
from sweep.parameters import ALLOWED_VALUES, DAEMON_ADAPTERS, DAEMONS, NAME_PATTERN, PARAMETERS, Point
from sweep.steps import check_steps
from sweep.where import Where, WhereError

MAX_REPLICATES = 10_000
MAX_SEED = (1 << 64) - 1
MAX_TITLE = 500  # characters
MAX_BUDGET_CPU_HOURS = 1e9
MAX_PATH = 1000  # characters
MAX_INCLUDES = 64
MAX_CHECKED = 50_000  # combinations of a block that are checked before it runs; nonsense beyond them becomes rows of `errors`
MAX_CHECKED_OF_LARGE = 500
LARGE = 1_000_000  # points of a block
MAX_AXIS = 1_000_000
DEFAULT_BUDGET_CPU_HOURS = 100.0
RESERVED = frozenset({"con", "prn", "aux", "nul"} | {f"{p}{i}" for p in ("com", "lpt") for i in range(1, 10)})
CURE = "; change the value, or leave such points out with where"  # of a combination that cannot be


@dataclass(frozen=True)
class Study:
    """A study as understood: every value checked and canonical."""

    name: str
    title: str
    seed: int
    replicates: int
    budget_cpu_hours: float
    blocks: tuple[Block, ...]
    workloads: Mapping[str, Workload]
    costs: Mapping[str, CostFile]
    text: str
    path: str = ""
    notes: tuple[str, ...] = ()
    observations: tuple[Observation, ...] = ()  # what the report shows beside predictions; no part of the identity

    def where(self, *location: int | str) -> str:
        """'file:line' of a key, for messages."""
        return where_is([(self.path, self.text)], location)

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same study: name, seed, and the digests of workloads and costs. Axes may grow."""
        return {
            "name": self.name,
            "seed": self.seed,
            "workloads": {name: workload.digest() for name, workload in sorted(self.workloads.items())},
            "costs": {name: costs.digest() for name, costs in sorted(self.costs.items())},
        }


class _Reader:
    """Collects the faults of one study while its parts are read."""

    def __init__(self, sources: Sequence[Source], content: dict[str, Any], folder: Path) -> None:
        self.sources, self.content, self.folder = sources, content, folder
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.overridden: dict[str, str] = {}  # key of study or point -> the --set it came from

    def where(self, location: Location) -> str:
        if len(location) == 2 and location[1] in self.overridden and location[0] in ("study", "point"):
            return "--set"
        return where_is(self.sources, location)

    def fault(self, location: Location, text: str) -> None:
        self.faults.append(Fault(self.where(location), ".".join(str(p) for p in location), text))

    def in_order(self) -> list[Fault]:
        """Faults as the file has them: by file and line."""

        def place(fault: Fault) -> tuple[str, int]:
            name, _, line = fault.where.rpartition(":")
            return (name, int(line)) if line.isdigit() else (fault.where, 0)

        return sorted(self.faults, key=place)

    def table(self, location: Location, value: Any, known: Sequence[str]) -> dict[str, Any]:
        """A table with known keys only."""
        if not isinstance(value, dict):
            self.fault(location, "must be a table")
            return {}
        for key in value:
            if key not in known:
                self.fault((*location, key), f"unknown key {short(key)}; {nearest(key, known)}")
        return {key: entry for key, entry in value.items() if key in known}

    def parameter(self, location: Location, name: str, value: Any) -> Any:
        """A checked, canonical parameter value, or None after a fault."""
        if name not in PARAMETERS:
            self.fault(location, f"unknown parameter {short(name)}; {nearest(name, PARAMETERS)}")
            return None
        try:
            return FIELD_ADAPTERS[name].validate_python(value)
        except ValidationError as error:
            for detail in error.errors() if name in DAEMONS else error.errors()[:1]:
                inner = [part for part in detail["loc"][-1:] if name in DAEMONS and "function-" not in str(part)]
                known = DAEMONS[name].model_fields if name in DAEMONS else PARAMETERS
                fault = pydantic_fault(self.sources, location, {**detail, "loc": tuple(inner)}, known)
                self.faults.append(Fault(self.where(location), fault.field, fault.text))
            return None

    def parameters(self, location: Location, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fault(location, "must be a table of parameters")
            return {}
        checked = {key: self.parameter((*location, key), key, entry) for key, entry in value.items()}
        return {key: entry for key, entry in checked.items() if key in PARAMETERS}


FIELD_ADAPTERS: dict[str, TypeAdapter[Any]] = {}
for _name, _info in Point.model_fields.items():
    FIELD_ADAPTERS[_name] = DAEMON_ADAPTERS.get(_name) or TypeAdapter(_info.rebuild_annotation())


def load_study(path: Path, overrides: Sequence[str] = (), folder: Path | None = None) -> Study:
    """Read and check a study file, with `key=value` overrides in TOML. `folder`: what the files it names are relative to; default: its
    own. Raises StudyError with every fault."""
    sources: list[Source] = []
    content = _with_includes(path, (), sources)
    reader = _Reader(sources, content, path.parent if folder is None else folder)
    if path.read_bytes()[:3] == b"\xef\xbb\xbf":
        reader.notes.append(f"{path}: begins with a BOM, which was left out")
    _apply_overrides(reader, overrides)
    head = _read_head(reader)
    blocks = _read_blocks(reader, head["seed"])
    workloads = _read_workloads(reader, blocks)
    costs = _read_costs(reader, blocks)
    observations = _read_observations(reader)
    _check_combinations(reader, blocks, workloads)
    if reader.faults:
        raise StudyError(reader.in_order())
    return Study(
        **head,
        blocks=tuple(blocks),
        workloads=workloads,
        costs=costs,
        text=sources[0][1],
        path=str(path),
        notes=tuple(reader.notes),
        observations=observations,
    )


def _with_includes(path: Path, above: tuple[Path, ...], sources: list[Source]) -> dict[str, Any]:
    """`include`d files give defaults: tables are merged key by key, everything else is replaced. Collects the texts."""
    content, text = read_toml(path)
    sources.append((path, text))
    at = where_is([(path, text)], ("include",))
    includes = content.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(entry, str) for entry in includes):
        raise StudyError([Fault(at, "include", 'must be a list of file names, like ["base.toml"]')])
    merged: dict[str, Any] = {}
    for entry in includes:
        other = path.parent / entry
        if other.resolve() in (path.resolve(), *above):
            raise StudyError([Fault(at, "include", f"{entry!r} includes itself; take it out")])
        if len(sources) >= MAX_INCLUDES:
            raise StudyError([Fault(at, "include", f"more than {MAX_INCLUDES} files in all; put some together")])
        merged = _merge(merged, _with_includes(other, (path.resolve(), *above), sources))
    return _merge(merged, content)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_overrides(reader: _Reader, overrides: Sequence[str]) -> None:
    """`--set seed=3`, `--set vcpus=4`: a key of [study], or a parameter, whose axes it takes away."""
    for override in overrides:
        key, equals, value = override.partition("=")
        parts = key.strip().split(".")
        if len(parts) == 1:
            parts = ["point" if parts[0] in PARAMETERS else "study", *parts]
        known = {"study": STUDY_KEYS, "point": PARAMETERS}.get(parts[0], ())
        if not equals or not value.strip() or len(parts) != 2 or parts[1] not in known:
            text = f"must be study.KEY=VALUE or PARAMETER=VALUE; {nearest(parts[-1], (*PARAMETERS, *STUDY_KEYS))}"
            reader.faults.append(Fault("--set", override, text))
            continue
        reader.overridden[parts[1]] = key
        table = reader.content.setdefault(parts[0], {})
        if isinstance(table, dict):
            table[parts[1]] = _override_value(parts[1], value)
        if parts[0] == "point":
            _drop_axis(reader.content, parts[1])


def _override_value(key: str, value: str) -> Any:
    """The value as TOML, or as the text it is: 6.10 is a kernel, not a number."""
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except ValueError:
        return value
    return value if key in _TEXT and not isinstance(parsed, str) else parsed


_TEXT = frozenset(name for name, info in Point.model_fields.items() if isinstance(info.default, str)) | {"name", "title", "observations"}
TOP_KEYS = ("study", "point", "block", "workload", "include")
BLOCK_KEYS = ("grid", "zip", "point", "where", "sample")
SAMPLE_KEYS = ("method", "n")
STUDY_KEYS = ("name", "title", "seed", "replicates", "budget_cpu_hours", "observations")


def _drop_axis(content: dict[str, Any], name: str) -> None:
    blocks = content.get("block")
    for block in blocks if isinstance(blocks, list) else []:
        for kind in ("grid", "zip", "point"):
            if isinstance(block, dict) and isinstance(block.get(kind), dict):
                block[kind].pop(name, None)


def _read_head(reader: _Reader) -> dict[str, Any]:
    content = reader.content
    reader.table((), content, TOP_KEYS)
    study = reader.table(("study",), content.get("study", {}), STUDY_KEYS)
    name = study.get("name")
    if "name" not in study:
        if isinstance(content.get("study", {}), dict):
            reader.fault(("study", "name"), "is missing; give the study a name")
    elif not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name) or name.split(".")[0] in RESERVED:
        reader.fault(("study", "name"), f"{name!a} is no name; use a-z, 0-9, '.', '_', '-', at most 64, starting with a letter or digit")
    title = study.get("title", "")
    if not isinstance(title, str) or len(title) > MAX_TITLE or not title.isprintable():
        reader.fault(("study", "title"), f"{ascii(title)[:80]}: must be text of at most {MAX_TITLE} characters without control characters")
    seed = _number(reader, study, "seed", 0, MAX_SEED)
    replicates = _number(reader, study, "replicates", 1, MAX_REPLICATES, low=1)
    budget = study.get("budget_cpu_hours", DEFAULT_BUDGET_CPU_HOURS)
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < MAX_BUDGET_CPU_HOURS:
        reader.fault(("study", "budget_cpu_hours"), f"{budget!r}: a number of hours above 0 is needed")
    return {"name": name, "title": title, "seed": seed, "replicates": replicates, "budget_cpu_hours": budget}


def _number(reader: _Reader, table: Mapping[str, Any], key: str, default: int, high: int, low: int = 0) -> int:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        reader.fault(("study", key), f"{short(value)}: an integer from {low} to {high} is needed")
        return default
    return value


def _read_blocks(reader: _Reader, seed: int) -> list[Block]:
    base = reader.parameters(("point",), reader.content.get("point", {}))
    listed = reader.content.get("block", [{}])
    if not isinstance(listed, list) or not listed:
        reader.fault(("block",), "must be written [[block]]")
        return []
    return [_read_block(reader, number, entry, base, seed) for number, entry in enumerate(listed)]


def _read_block(reader: _Reader, number: int, entry: Any, base: Mapping[str, Any], seed: int) -> Block:
    at: Location = ("block", number)
    block = reader.table(at, entry, BLOCK_KEYS)
    fixed = {**base, **reader.parameters((*at, "point"), block.get("point", {}))}
    grid = _axes(reader, (*at, "grid"), block.get("grid", {}))
    axes: list[Axis] = [axis((name,), [(v,) for v in values]) for name, values in grid.items()]
    zipped = _axes(reader, (*at, "zip"), block.get("zip", {}))
    lengths = {name: len(values) for name, values in zipped.items()}
    if len(set(lengths.values())) > 1:
        reader.fault((*at, "zip"), "lists of unequal length: " + ", ".join(f"{n} has {k}" for n, k in lengths.items()))
    elif zipped:
        axes.append(axis(tuple(zipped), list(zip(*zipped.values(), strict=True))))
    names = [name for each in axes for name in each.names]
    for name in sorted({name for name in names if names.count(name) > 1}):
        reader.fault((*at, "zip", name), f"{name} stands in grid and in zip; keep one")
    where = _read_where(reader, (*at, "where"), block.get("where"))
    return Block(tuple(axes), fixed, where, _read_sample(reader, (*at, "sample"), block.get("sample"), axes, seed))


def _read_sample(reader: _Reader, location: Location, given: Any, axes: Sequence[Axis], seed: int) -> Sample | None:
    """`sample = { method = "sobol", n = 1024 }`: so many points of the product of grid and zip."""
    if given is None:
        return None
    table = reader.table(location, given, SAMPLE_KEYS)
    method, n = table.get("method"), table.get("n")
    if not isinstance(method, str) or method not in METHODS:
        reader.fault((*location, "method"), f"{short(method)}: one of {', '.join(METHODS)} is needed")
        return None
    if type(n) is not int or not 1 <= n <= MAX_SAMPLE:
        reader.fault((*location, "n"), f"{short(n)}: an integer from 1 to {MAX_SAMPLE:,} is needed")
        return None
    if not axes:
        reader.fault(location, "has no axis to draw from; give the block a grid")
        return None
    if method == "sobol" and n & (n - 1):
        reader.notes.append(f"{reader.where((*location, 'n'))}: a Sobol sample is balanced for powers of two; {n} is none")
    return Sample(method, n, seed)


def _axes(reader: _Reader, location: Location, table: Any) -> dict[str, list[Any]]:
    if not isinstance(table, dict):
        reader.fault(location, "must be a table of lists")
        return {}
    axes = {}
    for name, given in table.items():
        if name not in PARAMETERS:
            reader.fault((*location, name), f"unknown parameter {short(name)}; {nearest(name, PARAMETERS)}")
            continue
        values = _axis_values(reader, (*location, name), given)
        if values is None:
            continue
        if not values:
            reader.fault((*location, name), "is an empty axis: the block would have 0 points; give it a value or take it out")
        axes[name] = [reader.parameter((*location, name), name, value) for value in values]
    return axes


def _axis_values(reader: _Reader, location: Location, given: Any) -> list[Any] | None:
    """The values of an axis; None after a fault."""
    if isinstance(given, list):
        return given
    if isinstance(given, dict) and len(given) == 1:
        kind, numbers = next(iter(given.items()))
        if kind in GENERATORS and isinstance(numbers, list) and all(type(n) in (int, float) for n in numbers):
            try:
                values = GENERATORS[kind](*numbers)
            except TypeError:
                reader.fault(location, f"{kind} = {short(numbers)}: {_SHAPES[kind]} is needed")
                return None
            except (ValueError, OverflowError) as error:
                reader.fault(location, f"{kind} = {short(numbers)}: {error}")
                return None
            return values
    reader.fault(location, "must be a list, or { range = [start, stop, step] }, { pow2 = [low, high] }, { linspace = [low, high, n] }")
    return None


def _range(start: int, stop: int, step: int = 1) -> list[int]:
    """As Python's range: the stop is left out."""
    made = range(start, stop, step)
    if len(made) > MAX_AXIS:
        raise ValueError(f"{len(made)} values; at most {MAX_AXIS}")
    return list(made)


def _pow2(low: int, high: int) -> list[int]:
    """Powers of two from low to high, both included."""
    if not 1 <= low <= high < 1 << 62:
        raise ValueError("1 <= low <= high is needed")
    return [1 << i for i in range(63) if low <= 1 << i <= high]


def _linspace(low: float, high: float, n: int) -> list[float]:
    """n evenly spaced values, both ends included."""
    if not isinstance(n, int) or not 2 <= n <= MAX_AXIS:
        raise ValueError(f"n must be 2 ... {MAX_AXIS}")
    return [low + (high - low) * i / (n - 1) for i in range(n)]


GENERATORS: Mapping[str, Callable[..., list[Any]]] = {"range": _range, "pow2": _pow2, "linspace": _linspace}
_SHAPES = {"range": "[start, stop, step] of whole numbers", "pow2": "[low, high] of whole numbers", "linspace": "[low, high, n]"}


def _read_where(reader: _Reader, location: Location, text: Any) -> Where | None:
    if text is None:
        return None
    try:
        if not isinstance(text, str):
            raise WhereError(f"{text!r}: must be text")
        return Where(text, frozenset(PARAMETERS), ALLOWED_VALUES)
    except WhereError as error:
        reader.fault(location, str(error))
        return None


def _used(blocks: Sequence[Block], name: str) -> list[Any]:
    """Every value a parameter takes in the study."""
    default = Point.model_fields[name].default
    values: dict[Any, None] = {}
    for block in blocks:
        moving = [v[axis.names.index(name)] for axis in block.axes if name in axis.names for v in axis.values]
        for value in moving or [block.fixed.get(name, default)]:
            values[value] = None
    return [value for value in values if value is not None]


def _read_workloads(reader: _Reader, blocks: Sequence[Block]) -> dict[str, Workload]:
    own = reader.content.get("workload", {})
    if not isinstance(own, dict):
        reader.fault(("workload",), "must be a table of workloads, [workload.NAME]")
        own = {}
    shared = shared_workloads()
    found: dict[str, Workload] = {}
    used = _used(blocks, "workload")
    for name in [*own, *(name for name in used if name not in own)]:
        if name in own:
            workload, faults = parse_workload(name, own[name], reader.sources, ("workload", name))
        elif name in shared:
            workload, faults = load_workload(name)
        else:
            reader.fault(("point", "workload"), f"workload {name!r} is unknown; {nearest(name, [*own, *shared])}")
            continue
        reader.faults += faults
        if workload is not None and not faults and name in used:
            found[name] = replace(workload, folder=reader.folder) if name in own else workload
    return found


def _read_costs(reader: _Reader, blocks: Sequence[Block]) -> dict[str, CostFile]:
    found: dict[str, CostFile] = {}
    for name in _used(blocks, "costs"):
        try:
            found[name] = load_costs(name, reader.folder)
            reader.notes += [note for note in found[name].notes if note not in reader.notes]
        except StudyError as error:
            at = reader.where(("point", "costs"))
            reader.faults += [fault if fault.where else Fault(at, fault.field, fault.text) for fault in error.faults]
    return found


def _read_observations(reader: _Reader) -> tuple[Observation, ...]:
    """The file of observed rates that [study] names, if it does."""
    study = reader.content.get("study", {})
    text = study.get("observations") if isinstance(study, dict) else None
    if text is None:
        return ()
    at: Location = ("study", "observations")
    if not isinstance(text, str) or not 0 < len(text) <= MAX_PATH:
        reader.fault(at, f"{short(text)}: must be the name of an observations file or the path of a .csv file")
        return ()
    try:
        return load_observations(text, reader.folder)
    except StudyError as error:
        reader.faults += [fault if fault.where else Fault(reader.where(at), "study.observations", fault.text) for fault in error.faults]
        return ()


def _check_combinations(reader: _Reader, blocks: Sequence[Block], workloads: Mapping[str, Workload]) -> None:
    """Values that are well alone and make no sense together, each reason once per block; and steps against their points."""
    for number, block in enumerate(blocks):
        given = [value for each in block.axes for row in each.values for value in row] + list(block.fixed.values())
        if any(value is None for value in given) or not all(block.shape):
            continue  # told already
        at: Location = ("block", number) if isinstance(reader.content.get("block"), list) else ("point",)
        try:
            reasons = _reasons(block, workloads)
        except WhereError as error:
            reader.fault((*at, "where"), str(error))
            continue
        if reasons is None:
            reader.notes.append(f"{reader.where((*at, 'where'))}: block.{number}.where keeps no point of its block")
        for place, text in reasons or ():
            fault = Fault(reader.where(place or at), ".".join(map(str, place or at)), text)
            reader.faults.append(fault)


STEP_PARAMETERS = (
    "workload",
    "memory",
    "kernel",
    "policy",
    "vcpus",
    "mmu",
    "backing",
    "thp_enabled",
    "offset",
)  # what steps are checked against


CHECKED = frozenset({*STEP_PARAMETERS, "prealloc", "use_zero_page", "cores", "smt"})  # and by Point.faults()


def _reasons(block: Block, workloads: Mapping[str, Workload]) -> list[tuple[Location, str]] | None:
    """(place, what is wrong) of a block's points, each once; an empty place means the block. None: it has no points."""
    found: dict[tuple[Location, str], None] = {}
    seen: set[tuple[Any, ...]] = set()
    names = CHECKED | (block.where.used if block.where else frozenset())
    positions = block.positions(names)
    most = MAX_CHECKED if block.size() <= LARGE else MAX_CHECKED_OF_LARGE
    empty = block.combinations(positions) <= most
    for digits in block.evenly(most, positions):
        if not block.holds(digits):
            continue
        empty, point = False, block.point(digits)
        if faults := point.faults():
            found |= {((), f"{text}{CURE}"): None for text in faults}
            continue
        key = tuple(getattr(point, name) for name in STEP_PARAMETERS)
        if key in seen or point.workload not in workloads:
            continue
        seen.add(key)
        workload = workloads[point.workload]
        for number, text in check_steps(workload.specs, workload.folder, point):
            found[(("workload", point.workload, "steps", number), text)] = None
    return None if empty else list(found)


def study_digest(study: Study) -> str:
    """Digest of what makes it the same study (see Study.identity)."""
    return digest_of(study.identity())
