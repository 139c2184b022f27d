"""A dataset: what is there, what is done, how a chunk is added, what is damaged.

A chunk's rows are one part per table, named by the chunk's key (a digest of its point ids) and published once; the commit
record is published last and names the parts with rows, bytes and sha256. A part without a commit does not exist. Two runs may
write at once: they publish the same bytes under the same names, or the dataset is not deterministic and both stop.
"""

import fcntl
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sweep.dataset.compact import Compact, read_compact
from sweep.dataset.files import PART_LEVEL, SEALED_LEVEL, parquet_bytes, sha256
from sweep.dataset.records import Commit, Int64s, PartRecord, Seal, json_bytes, parse_commit, parse_object, parse_seal
from sweep.dataset.storage import LocalStorage, Storage, open_storage
from sweep.errors import DatasetError, EnvironmentProblemError, MissingFileError, NondeterminismError
from sweep.schema import KEYS, TABLES, arrow_schema, as_numpy, numbers

SEALED = "sealed.json"
TRIES = 20  # to read what another run changes
T = TypeVar("T")


def chunk_key(point_ids: Iterable[str]) -> str:
    """Name of a chunk: digest of its point ids, in any order."""
    return hashlib.sha256("".join(sorted(point_ids)).encode()).hexdigest()[:24]


class Store:
    """One dataset, over its storage."""

    def __init__(self, place: Path | str | Storage) -> None:
        self.storage: Storage = open_storage(place) if isinstance(place, Path | str) else place
        self._remembered: dict[str, Commit] | None = None

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def place(self) -> Path | str:
        """The folder, or the URL."""
        return self.storage.root if isinstance(self.storage, LocalStorage) else self.name

    def local_folder(self) -> Path:
        """The dataset's folder; of an object store, one of its name in the current directory."""
        if isinstance(self.storage, LocalStorage):
            return self.storage.root
        return Path(self.name.rstrip("/").rsplit("/", 1)[-1])

    def prepare(self) -> None:
        """Try a write before any work. Raises EnvironmentProblemError."""
        try:
            self.storage.replace("provenance/probe", b"")
            self.storage.remove("provenance/probe")
        except OSError as error:
            raise EnvironmentProblemError(f"{self.name}: cannot be used: {error.strerror}; choose another with --out") from None

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Each commit record is read once. One that another run replaces meanwhile (points that had failed are done) counts as it was."""
        outer, self._remembered = self._remembered, {} if self._remembered is None else self._remembered
        try:
            yield
        finally:
            self._remembered = outer

    @contextmanager
    def writing(self) -> Iterator[None]:
        """For the time of a run. One that begins while no other run of this machine writes here removes what dead ones left, others
        wait for that; one that ends while no other writes removes what its own dead workers left. Raises EnvironmentProblemError."""
        with ExitStack() as stack:
            stack.enter_context(self.remembering())
            if not isinstance(self.storage, LocalStorage):
                yield
                return
            try:
                self.storage.root.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((self.storage.root / ".lock").open("a"))
                self._tidy_alone(file, self.storage)
                fcntl.flock(file, fcntl.LOCK_SH)
            except OSError as error:
                raise EnvironmentProblemError(f"{self.name}: cannot be used: {error.strerror}; choose another with --out") from None
            yield
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.storage.remove_leftovers()

    def _tidy_alone(self, file: IO[str], storage: LocalStorage) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        storage.remove_leftovers()
        with suppress(DatasetError):  # of records that cannot be read: repair() comes first
            self.remove_strays()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the dataset. Raises DatasetError."""
        return parse_object(f"{self.name}/{name}", self.storage.read(name))

    def has(self, name: str) -> bool:
        return self.storage.size(name) is not None

    def write_json(self, name: str, value: Any) -> None:
        self.storage.replace(name, json_bytes(value))

    # what is there

    def seal(self) -> Seal | None:
        """sealed.json, or None. Raises DatasetError for one of another shape."""
        return parse_seal(f"{self.name}/{SEALED}", self.storage.read(SEALED)) if self.has(SEALED) else None

    def commits(self, seal: Seal | None) -> list[Commit]:
        """What was committed and is in no seal."""
        absorbed = set(seal.absorbed) if seal else set()
        keys = [name.removesuffix(".json") for name in self.storage.names("commits") if name.endswith(".json")]
        return [self._commit(key) for key in keys if key not in absorbed]

    def commit_of(self, key: str) -> Commit | None:
        """The commit of that key, if there is one that can be understood."""
        try:
            return self._commit(key)
        except DatasetError:
            return None

    def _commit(self, key: str) -> Commit:
        if self._remembered and key in self._remembered:
            return self._remembered[key]
        name = f"commits/{key}.json"
        commit = parse_commit(f"{self.name}/{name}", key, self.storage.read(name))
        self._remember(commit)
        return commit

    def remove_commit(self, key: str) -> None:
        """Its record; the parts stay."""
        self.storage.remove(f"commits/{key}.json")
        self._forget(key)

    def _forget(self, key: str) -> None:
        if self._remembered is not None:
            self._remembered.pop(key, None)

    def _remember(self, commit: Commit) -> None:
        if self._remembered is not None:
            self._remembered[commit.key] = commit

    def state(self) -> "State":
        """Seal and commits as they stand. Raises DatasetError."""
        for _ in range(TRIES):
            seal = self.seal()
            try:
                return State(seal, tuple(self.commits(seal)))
            except MissingFileError:
                continue  # another run sealed meanwhile: what it absorbed is gone
        raise DatasetError(f"{self.name}: changes faster than it can be read; run again when no other run writes here")

    def stable(self, act: "Callable[[State], T]") -> T:
        """act(state), again while another run seals and takes away what the state named. Raises what act() raises."""
        for _ in range(TRIES):
            state = self.state()
            try:
                return act(state)
            except MissingFileError:
                if self.state().parts_named == state.parts_named:
                    raise
        return act(self.state())

    def damage(self, part: PartRecord) -> str:
        """What is wrong with a part, or ''."""
        size = self.storage.size(part.path)
        try:
            whole = size == part.nbytes and sha256(self.storage.read(part.path)) == part.sha256
        except MissingFileError:  # since its size was asked, another run sealed and took it away
            size, whole = None, False
        if size is None:
            return f"{self.name}/{part.path}: is missing"
        if not whole:
            return f"{self.name}/{part.path}: is damaged (size or sha256 differs from its commit)"
        return ""

    def check(self, state: "State | None" = None) -> list[str]:
        """One line for each part that is missing, damaged or unknown, and for digests that do not fit."""
        state = state or self.state()
        wrong = [text for part in state.parts() if (text := self.damage(part))]
        wrong += [f"{self.name}/{path}: belongs to no commit; the next run removes it" for path in self.strays(state)]
        if state.seal is not None and not state.seal.fits:
            wrong.append(f"{self.name}/{SEALED}: root_digest does not fit the parts it names; run again to seal anew")
        return wrong

    def strays(self, state: "State") -> list[str]:
        """Parts that belong to no commit."""
        known = {part.path for part in state.parts()}
        paths = [f"{table}/{name}" for table in TABLES for name in self.storage.names(table)]
        return [path for path in paths if path not in known]

    # reading

    def read(self, table: str, columns: Sequence[str] | None = None, state: "State | None" = None) -> pa.Table:
        """A table as Arrow, every row once. Raises DatasetError for a damaged part, NondeterminismError where rows disagree."""
        if state is None:
            return self.stable(lambda found: self.read(table, columns, found))
        schema = arrow_schema(table)
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        parts = [self.read_part(part, schema.names) for part in state.parts() if part.table == table]
        if not parts:
            return pa.Table.from_batches([], schema)
        had = set(parts[0].column_names)  # a dataset of an older version has fewer columns: those it has
        schema = pa.schema([field for field in schema if field.name in had], metadata=schema.metadata)
        whole = pa.concat_tables([part.cast(schema) for part in parts])
        return once_each(self.name, table, whole) if state.commits and set(KEYS[table]) <= had else whole

    def read_part(self, part: PartRecord, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of a part (all), page checksums verified. Raises DatasetError."""
        content = pa.BufferReader(self.storage.read(part.path))
        try:
            return pq.ParquetFile(content, page_checksum_verification=True).read(columns=columns)
        except (OSError, pa.ArrowException) as error:
            text = str(error).splitlines()[0]
            raise DatasetError(f"{self.name}/{part.path}: is damaged ({text}); run again to compute it anew") from None

    def rows_of(self, table: str, point_ids: pa.Array, state: "State") -> pa.Table:
        """The rows of some points, in parts that are whole; a row group at a time."""
        found = [pa.Table.from_batches([], arrow_schema(table))]
        for part in state.parts():
            if part.table == table:
                file = pq.ParquetFile(pa.BufferReader(self.storage.read(part.path)), page_checksum_verification=True)
                groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
                found += [rows.filter(pc.is_in(rows.column("point_id"), value_set=point_ids)) for rows in groups]
        return once_each(self.name, table, pa.concat_tables(found))

    def read_compact(self, part: PartRecord) -> Compact:
        """A part as it was published. Raises DatasetError for another."""
        content = self.storage.read(part.path)
        if sha256(content) != part.sha256:
            raise DatasetError(f"{self.name}/{part.path}: is damaged (its sha256 differs from its commit); run again to compute it anew")
        return read_compact(pq.ParquetFile(pa.BufferReader(content)), arrow_schema(part.table), KEYS[part.table])

    def _readable(self, part: PartRecord) -> bool:
        try:
            self.read_part(part)
        except DatasetError:
            return False
        return True

    def done(self, state: "State | None" = None) -> pa.Array:
        """Ids of the points that are committed."""
        return self.read("points", ["point_id"], state).column("point_id").combine_chunks()

    def failures(self) -> pa.Table:
        """Table `errors` as it stands: the last word on each point, and nothing on those that are done by now."""
        return self.stable(self.failures_of)

    def failures_of(self, state: "State") -> pa.Table:
        """The same, of a state."""
        table = self.read("errors", state=state)
        if not table.num_rows:
            return table
        table = table.filter(pc.invert(pc.is_in(table.column("point_id"), value_set=self.done(state))))
        last = {point_id: row for row, point_id in enumerate(table.column("point_id").to_pylist())}
        return table.take(numbers(np.array(sorted(last.values()), np.int64)))

    # writing

    def publish(self, key: str, tables: Mapping[str, pa.Table]) -> tuple[PartRecord, ...]:
        """The parts of a chunk. Raises NondeterminismError where a part of that name holds other rows."""
        parts = [(table, f"part-{key}.parquet", rows) for table, rows in tables.items() if rows.num_rows]
        return tuple([self.publish_part(*part, PART_LEVEL) for part in parts])

    def publish_part(self, table: str, name: str, rows: pa.Table | Compact, level: int = SEALED_LEVEL) -> PartRecord:
        content = parquet_bytes(rows, level)
        part = PartRecord(table, name, rows.num_rows, len(content), sha256(content))
        self.adopt(part, content)
        return part

    def adopt(self, part: PartRecord, content: bytes) -> None:
        """Publish a part as it is. Raises NondeterminismError where one of that name holds other rows."""
        if not self.storage.create(part.path, content) and self.damage(part):
            self._replace(part, content)

    def _replace(self, part: PartRecord, content: bytes) -> None:
        """Another file has the name: it is damaged, or errors read otherwise this time, or the same points gave other rows."""
        if part.table == "errors" or not self._readable(part):
            self.storage.replace(part.path, content)
            return
        raise NondeterminismError(
            f"{self.name}/{part.path}: the same points gave other rows before; compare the machines' versions (provenance/), "
            f"then remove the part that is wrong"
        )

    def commit(self, commit: Commit) -> None:
        """Publish a commit record. Raises NondeterminismError where there is one with other parts."""
        name, content = f"commits/{commit.key}.json", json_bytes(commit.as_json())
        if not self.storage.create(name, content):
            self._forget(commit.key)
            before = self.commit_of(commit.key) or commit
            if before.parts != commit.parts and not before.failed:
                raise NondeterminismError(f"{self.name}/{name}: the same points gave other rows before; remove the commit that is wrong")
            self.storage.replace(name, content)
        self._remember(commit)

    def forget_sealed(self) -> bool:
        """Remove commits that came after another run had sealed the same rows and taken their parts away; True if there were any."""
        state = self.state()
        if state.seal is None:
            return False
        sealed = [commit for commit in state.commits if state.seal.completes(commit.plan)]
        late = [commit for commit in sealed if any(self.storage.size(part.path) is None for part in commit.parts)]
        for commit in late:
            self.remove_commit(commit.key)
            self.discard(commit, state.seal)
        return bool(late)

    def discard(self, commit: Commit, seal: Seal) -> None:
        """Remove the parts of a commit whose rows are in the seal: nobody else would, where storage has no locks."""
        kept = {part.path for part in seal.parts}
        for part in commit.parts:
            if part.path not in kept:
                self.storage.remove(part.path)

    def remove_strays(self) -> None:
        """Parts of runs that died before their commit; only while no other run writes here."""
        for path in self.strays(self.state()):
            self.storage.remove(path)


class State:
    """A seal, and what was committed since."""

    def __init__(self, seal: Seal | None, commits: tuple[Commit, ...]) -> None:
        self.seal, self.commits = seal, commits

    @cached_property
    def rows(self) -> int:
        """Rows of `points`, those that stand twice counted twice."""
        return sum(part.rows for part in self.parts() if part.table == "points")

    @cached_property
    def parts_named(self) -> frozenset[str]:
        return frozenset(part.path for part in self.parts())

    def parts(self) -> Iterator[PartRecord]:
        """Every part that counts, each once."""
        seen: set[str] = set()
        for parts in (self.seal.parts if self.seal else (), *(commit.parts for commit in self.commits)):
            for part in parts:
                if part.path not in seen:
                    seen.add(part.path)
                    yield part


def once_each(name: str, table: str, rows: pa.Table) -> pa.Table:
    """Every row once. Rows that two runs both made must agree, but for errors, whose messages may differ.

    Raises NondeterminismError."""
    if table == "errors":
        return rows
    order = in_order(name, table, rows)
    return rows if len(order) == rows.num_rows else rows.take(pc.take(order, pc.array_sort_indices(order)))


def in_order(name: str, table: str, rows: "pa.Table | Compact") -> pa.Array:
    """Which rows to take so that they are sorted by their keys, each key once: the first of those that stand twice.

    Raises NondeterminismError where such rows differ."""
    keys = pa.table({key: rows.column(key) for key in KEYS[table]})
    order = pc.sort_indices(keys, sort_keys=[(key, "ascending") for key in KEYS[table]])
    again = _equal_previous(keys.take(order))
    if not len(again):
        return order
    places = as_numpy(order)
    if differ := _differing(rows, places[again], places[again - 1]):
        raise NondeterminismError(
            f"{name}: {differ} rows of {table} were made twice and differ; compare the machines' versions (provenance/), "
            f"then remove the commits that are wrong"
        )
    return numbers(np.delete(places, again))


def _equal_previous(rows: pa.Table) -> Int64s:
    """Those that are the same as the row before."""
    if not rows.num_rows:
        return np.zeros(0, np.int64)
    columns = [column.combine_chunks() for column in rows.columns]
    same = [pc.equal(column.slice(1), column.slice(0, len(column) - 1)) for column in columns]
    return 1 + np.flatnonzero(np.logical_and.reduce([as_numpy(each) for each in same]))


def _differing(rows: "pa.Table | Compact", first: Int64s, second: Int64s) -> int:
    """How many of these pairs are not the same in every column."""
    one, other = rows.take(numbers(first)), rows.take(numbers(second))
    names = one.rest.column_names if isinstance(one, Compact) else one.column_names
    differs = [pc.not_equal(one.column(name), other.column(name)) for name in names]
    return int(np.logical_or.reduce([as_numpy(each if isinstance(each, pa.Array) else each.combine_chunks()) for each in differs]).sum())


def missing_tables(store: Store) -> Sequence[str]:
    """What a dataset must have and this place has not; empty tables may be missing (git keeps no empty folders)."""
    missing = [] if store.has("study.json") else ["study.json"]
    return missing if store.storage.names("points") or store.has("study.json") else [*missing, "points"]
