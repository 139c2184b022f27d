"""Putting damaged parts aside, so that their points run again, and only those."""

import pyarrow as pa
import pyarrow.compute as pc

from sweep.dataset.records import Commit, PartRecord, Seal, is_json
from sweep.dataset.store import SEALED, Store, chunk_key
from sweep.errors import DatasetError
from sweep.schema import TABLES, arrow_schema


def repair(store: Store) -> list[str]:
    """Put damaged files aside; one line each. A commit that lost a part runs again; of a seal, the good rows are kept."""
    told = _put_torn_aside(store)
    state = store.state()
    for commit in state.commits:
        if bad := _damaged(store, commit.parts):
            told += _put_aside(store, bad)
            store.remove_commit(commit.key)
            for part in commit.parts:
                store.storage.remove(part.path)
    if state.seal and (bad := _damaged(store, state.seal.parts)):
        told += _put_aside(store, bad)
        _keep_rest(store, state.seal, {part for part, _ in bad})
        store.storage.remove(SEALED)  # last: a crash before leaves a seal of missing parts, and this runs again
    return told


def _put_torn_aside(store: Store) -> list[str]:
    """Records that are no JSON: a disk that lied left half of them. What they named runs again."""
    commits = [name for name in store.storage.names("commits") if store.commit_of(name.removesuffix(".json")) is None]
    told = []
    for name in [SEALED, *(f"commits/{name}" for name in commits)]:
        if store.has(name) and not is_json(content := store.storage.read(name)):
            store.storage.replace(f"quarantine/{name.replace('/', '-')}", content)
            store.storage.remove(name)
            told.append(f"{store.name}/{name}: is no whole record")
    return told


def _damaged(store: Store, parts: tuple[PartRecord, ...]) -> list[tuple[PartRecord, str]]:
    bad = [(part, text) for part in parts if (text := store.damage(part))]
    named = store.state().parts_named if bad else frozenset()
    return [(part, text) for part, text in bad if part.path in named]  # else another run sealed meanwhile


def _put_aside(store: Store, bad: list[tuple[PartRecord, str]]) -> list[str]:
    for part, _ in bad:
        if store.storage.size(part.path) is not None:
            store.storage.replace(f"quarantine/{part.table}-{part.name}", store.storage.read(part.path))
            store.storage.remove(part.path)
    return [text for _, text in bad]


def _keep_rest(store: Store, seal: Seal, bad: set[PartRecord]) -> None:
    """Commit the points whose rows in `points` and `steps` are both still there."""
    good = {table: [part for part in seal.parts if part.table == table and part not in bad] for table in TABLES}
    tables = {table: _rows(store, table, parts) for table, parts in good.items()}
    if any(part.table != "errors" for part in bad):
        ids = [tables[name].column("point_id").combine_chunks() for name in ("points", "steps")]
        both = ids[0].filter(pc.is_in(ids[0], value_set=ids[1].unique()))
        tables = {name: rows.filter(pc.is_in(rows.column("point_id"), value_set=both)) for name, rows in tables.items()}
    if tables["points"].num_rows:
        key = chunk_key(tables["points"].column("point_id").to_pylist())
        store.commit(Commit(key, store.publish(key, tables)))


def _rows(store: Store, table: str, parts: list[PartRecord]) -> pa.Table:
    schema = arrow_schema(table)
    found = []
    for part in parts:
        try:
            found.append(store.read_part(part, schema.names).cast(schema))
        except DatasetError:
            continue
    return pa.concat_tables(found) if found else pa.Table.from_batches([], schema)
