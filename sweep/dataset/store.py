"""Parts and commits: what a dataset directory holds, what is done, how a chunk is added, how a finished one is sealed.

A chunk's rows become one part per table, named by the chunk's key (a digest of its point ids); the commit record is
published last and names the parts with rows, bytes and sha256. A part without a commit does not exist.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sweep.dataset.files import TEMP_PREFIX, file_sha256, parquet_bytes, publish, publish_json, read_object, sha256
from sweep.errors import DatasetError, EnvironmentProblemError
from sweep.schema import TABLES, arrow_schema

SEALED_FILE_ROWS = 1 << 20


@dataclass(frozen=True)
class PartRecord:
    """One data file as a commit or the seal names it."""

    table: str
    name: str
    rows: int
    nbytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {"table": self.table, "name": self.name, "rows": self.rows, "bytes": self.nbytes, "sha256": self.sha256}


def _record(entry: Any) -> PartRecord:
    try:
        name = str(entry["name"])
        if entry["table"] not in TABLES or "/" in name or not name.endswith(".parquet"):
            raise DatasetError(f"a commit names the part {name!r} of table {entry['table']!r}, which cannot be")
        return PartRecord(entry["table"], name, int(entry["rows"]), int(entry["bytes"]), str(entry["sha256"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"a commit record cannot be understood ({error}); delete it and run again") from None


def root_digest(records: Iterable[PartRecord]) -> str:
    """Digest of a seal's files: names and sha256."""
    return hashlib.sha256("".join(f"{r.table}/{r.name} {r.sha256}\n" for r in records).encode()).hexdigest()


def chunk_key(point_ids: Iterable[str]) -> str:
    """Name of a chunk: digest of its point ids, in any order."""
    return hashlib.sha256("".join(sorted(point_ids)).encode()).hexdigest()[:24]


class Store:
    """One dataset directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def sealed_path(self) -> Path:
        return self.root / "sealed.json"

    def prepare(self) -> None:
        """Make the folders, and try a write before any work. Raises EnvironmentProblemError."""
        try:
            for name in (*TABLES, "commits", "provenance"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblemError(f"{self.root}: cannot be created: {error.strerror}; choose another with --out") from None
        publish(self.root / "provenance" / ".probe", b"")
        (self.root / "provenance" / ".probe").unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One driver at a time. Raises DatasetError while another one runs."""
        with (self.root / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DatasetError(f"{self.root}: another run is writing here; wait for it, or choose another --out") from None
            yield

    def sealed(self) -> dict[str, Any] | None:
        """sealed.json, or None where there is none. Raises DatasetError for one of another shape."""
        if not self.sealed_path.exists():
            return None
        sealed = read_object(self.sealed_path)
        if not isinstance(sealed.get("parts"), list) or not isinstance(sealed.get("absorbed"), list):
            raise DatasetError(f"{self.sealed_path}: is no seal (parts or absorbed are missing); delete it and run again")
        return sealed

    def commits(self) -> dict[str, list[PartRecord]]:
        """Parts by the commit that names them; those of the seal under ''."""
        sealed = self.sealed() or {"parts": [], "absorbed": []}
        found = {"": [_record(entry) for entry in sealed["parts"]]}
        for path in sorted((self.root / "commits").glob("*.json")):
            if path.stem not in sealed["absorbed"]:
                parts = read_object(path).get("parts")
                if not isinstance(parts, list):
                    raise DatasetError(f"{path}: is no commit record; delete it and run again")
                found[path.stem] = [_record(entry) for entry in parts]
        return found

    def records(self) -> list[PartRecord]:
        """Every part that counts: those of the seal, and of commits made since."""
        return [record for records in self.commits().values() for record in records]

    def paths(self, table: str) -> list[Path]:
        return [self.root / table / record.name for record in self.records() if record.table == table]

    def damage(self, record: PartRecord) -> str:
        """What is wrong with a part, or ''."""
        path = self.root / record.table / record.name
        if not path.exists():
            return f"{path}: is missing"
        if path.stat().st_size != record.nbytes or file_sha256(path) != record.sha256:
            return f"{path}: is damaged (size or sha256 differs from its commit)"
        return ""

    def check(self) -> list[str]:
        """One line for each part that is missing, damaged or unknown, and for digests that do not fit."""
        records = self.records()
        wrong = [text for record in records if (text := self.damage(record))]
        known = {(record.table, record.name) for record in records}
        for table in TABLES:
            for path in sorted((self.root / table).glob("*.parquet")):
                if (table, path.name) not in known:
                    wrong.append(f"{path}: belongs to no commit; the next run removes it")
        if self.sealed() is not None and not self.seal_fits():
            wrong.append(f"{self.sealed_path}: root_digest does not fit the parts it names; run again to seal anew")
        return wrong

    def seal_fits(self) -> bool:
        """There is a seal, and its root digest is that of the parts it names."""
        sealed = self.sealed()
        return sealed is not None and sealed.get("root_digest") == root_digest(self.commits()[""])

    def repair(self) -> list[str]:
        """Put damaged parts aside, with what was committed beside them, so that their points run again; one line each.

        The good rows of a chunk or seal that lost a part are committed anew: only points that miss rows are lost."""
        told = []
        for key, records in self.commits().items():
            bad = [record for record in records if self.damage(record)]
            if not bad:
                continue
            told += [self.damage(record) for record in bad]
            good = [record for record in records if record not in bad]
            rows = {name: [self._part(record) for record in good if record.table == name] for name in TABLES}
            for record in bad:
                self._put_aside(record)
            if self._commit_whole(rows, {record.table for record in bad}) != key:
                self._forget(key)  # last: a crash before leaves a record of missing parts, and this runs again
        return told

    def _part(self, record: PartRecord) -> pa.Table:
        schema = arrow_schema(record.table)
        return self._read_part(self.root / record.table / record.name, schema.names).cast(schema)

    def _put_aside(self, record: PartRecord) -> None:
        path = self.root / record.table / record.name
        if path.exists():
            (self.root / "quarantine").mkdir(exist_ok=True)
            path.replace(self.root / "quarantine" / f"{record.table}-{record.name}")

    def _forget(self, key: str) -> None:
        (self.root / "commits" / f"{key}.json" if key else self.sealed_path).unlink(missing_ok=True)

    def _commit_whole(self, parts: dict[str, list[pa.Table]], broken: set[str]) -> str | None:
        """Commit the points whose rows in `points` and `steps` are both still there; returns the commit's key, if any."""
        if not parts["points"] or not parts["steps"]:
            return None
        tables = {name: pa.concat_tables(found) if found else arrow_schema(name).empty_table() for name, found in parts.items()}
        if broken - {"errors"}:
            ids = set(tables["points"].column("point_id").to_pylist()) & set(tables["steps"].column("point_id").to_pylist())
            keep = pa.array(sorted(ids), pa.string())
            tables = {name: table.filter(pc.is_in(table.column("point_id"), value_set=keep)) for name, table in tables.items()}
        if not tables["points"].num_rows:
            return None
        key = chunk_key(tables["points"].column("point_id").to_pylist())
        self.commit(key, tables)
        return key

    def done(self) -> set[str]:
        """Ids of the points that are committed."""
        return set(self.read("points", ["point_id"]).column("point_id").to_pylist())

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """A table of the dataset as Arrow. Raises DatasetError for a damaged part."""
        schema = arrow_schema(table)
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        parts = [self._read_part(path, schema.names) for path in self.paths(table)]
        if parts:  # a dataset of an older version has fewer columns: those it has
            had = set(parts[0].column_names)
            schema = pa.schema([field for field in schema if field.name in had], metadata=schema.metadata)
        return pa.concat_tables([part.cast(schema) for part in parts]) if parts else schema.empty_table()

    def failures(self) -> pa.Table:
        """Table `errors` as it stands: the last word on each point, and nothing on those that are done by now."""
        table = self.read("errors")
        done = pa.array(sorted(self.done()), pa.string())
        table = table.filter(pc.invert(pc.is_in(table.column("point_id"), value_set=done)))
        last = {point_id: row for row, point_id in enumerate(table.column("point_id").to_pylist())}
        return table.take(pa.array(sorted(last.values()), pa.int64()))

    @staticmethod
    def _read_part(path: Path, columns: list[str]) -> pa.Table:
        try:
            return pq.ParquetFile(path, page_checksum_verification=True).read(columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{path}: is damaged ({str(error).splitlines()[0]}); delete its commit and run again") from None

    def commit(self, key: str, tables: dict[str, pa.Table]) -> None:
        """Publish the parts of a chunk, then its commit record."""
        records = []
        for name, table in tables.items():
            if table.num_rows:
                records.append(self._publish_part(name, f"part-{key}.parquet", table))
        publish_json(self.root / "commits" / f"{key}.json", {"parts": [record.as_json() for record in records]})

    def _publish_part(self, table: str, name: str, rows: pa.Table) -> PartRecord:
        content = parquet_bytes(rows)
        publish(self.root / table / name, content)
        return PartRecord(table, name, rows.num_rows, len(content), sha256(content))

    def seal(self, study_digest: str) -> dict[str, Any]:
        """Compact a complete dataset: rows sorted by point, duplicates checked, errors of points done since dropped.

        The new parts are published, then sealed.json (which makes the old ones void), then the old ones are removed:
        a crash in between leaves a dataset that counts every row once."""
        commits = sorted(path.stem for path in (self.root / "commits").glob("*.json"))
        records, content = [], hashlib.sha256()
        for name in TABLES:
            table = self._sorted(name)
            content.update(_content_digest(table))
            for start in range(0, table.num_rows, SEALED_FILE_ROWS):
                rows = table.slice(start, SEALED_FILE_ROWS)
                digest = _content_digest(rows).hex()[:24]
                records.append(self._publish_part(name, f"part-{start // SEALED_FILE_ROWS:05d}-{digest}.parquet", rows))
        parts = [record.as_json() for record in records]
        sealed = {
            "study_digest": study_digest,
            "parts": parts,
            "root_digest": root_digest(records),
            "content_digest": content.hexdigest(),
            "absorbed": commits,
        }
        publish_json(self.sealed_path, sealed)
        self.sweep_up()
        publish_json(self.sealed_path, {**sealed, "absorbed": []})
        return sealed

    def _sorted(self, name: str) -> pa.Table:
        table = self.failures() if name == "errors" else self.read(name)
        keys = ["point_id", "step"] if name == "steps" else ["point_id"]
        table = table.sort_by([(key, "ascending") for key in keys]).combine_chunks()
        unique = table.group_by(keys).aggregate([]).num_rows
        if unique != table.num_rows:
            raise DatasetError(f"{self.root / name}: {table.num_rows - unique} rows stand twice; remove the commits of one run")
        return table

    def sweep_up(self) -> None:
        """Remove what does not count: parts and commits that a seal absorbed, temporary files of dead runs."""
        sealed = self.sealed() or {}
        keep = {(record.table, record.name) for record in self.records()}
        for table in TABLES:
            for path in (self.root / table).glob("part-*.parquet"):
                if (table, path.name) not in keep:
                    path.unlink(missing_ok=True)
        for stem in sealed.get("absorbed", ()):
            (self.root / "commits" / f"{os.path.basename(stem)}.json").unlink(missing_ok=True)  # noqa: PTH119
        for path in self.root.glob(f"*/{TEMP_PREFIX}*"):
            path.unlink(missing_ok=True)


def _content_digest(table: pa.Table) -> bytes:
    """Digest of the values, column by column, free of how Parquet or Arrow lay them out."""
    digest = hashlib.sha256()
    for name in table.column_names:
        digest.update(f"\0{name}\0".encode())
        digest.update("\n".join(map(repr, table.column(name).to_pylist())).encode())
    return digest.digest()


def missing_tables(root: Path) -> Sequence[str]:
    """What a dataset must have and this folder has not; empty tables may be missing (git keeps no empty folders)."""
    return [name for name in ("study.json", "points") if not (root / name).exists()]
