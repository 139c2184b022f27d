"""Sealing: a complete dataset becomes few files, sorted by point, with a digest of the files and one of the values.

Large ones are sealed by a process of their own (`python -m sweep.dataset.seal`): the rows pass through its memory, not the driver's.
"""

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sweep.dataset.compact import Compact, joined
from sweep.dataset.records import Seal, json_bytes, root_digest
from sweep.dataset.store import SEALED, State, Store, in_order
from sweep.errors import DatasetError, MissingFileError
from sweep.schema import KEYS, TABLES, as_numpy

FILE_ROWS = 1 << 19  # of a sealed file: 50 ... 150 MB
BATCH_ROWS = FILE_ROWS * 8  # in memory at once
SMALL_ROWS = 50_000  # points; so many are sealed at once, without another process
DEADLINE_S = 6 * 3600


def seal(store: Store, plan_digest: str, study_digest: str) -> Seal:
    """Seal a complete dataset. Raises DatasetError, NondeterminismError, EnvironmentProblemError."""
    if store.state().rows <= SMALL_ROWS:
        return seal_here(store, plan_digest, study_digest)
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from sweep.dataset.seal import main; main()"
    command = [sys.executable, "-c", code, store.name, plan_digest, study_digest]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    made = store.seal()
    if done.returncode or made is None:
        raise DatasetError((done.stderr.strip().splitlines() or [f"{store.name}: sealing ended with status {done.returncode}"])[-1])
    return made


def main() -> None:
    store = Store(sys.argv[1])
    with store.writing():  # also when the driver has died meanwhile: the next one must not tidy under our hands
        seal_here(store, sys.argv[2], sys.argv[3])


def seal_here(store: Store, plan_digest: str, study_digest: str) -> Seal:
    """The new parts are published, then sealed.json (which makes the old ones void), then the old ones are removed: a crash in
    between leaves a dataset that counts every row once."""
    with store.remembering():
        try:
            return store.stable(lambda state: _seal(store, state, plan_digest, study_digest))
        except MissingFileError:
            if not store.forget_sealed():
                raise
        return store.stable(lambda state: _seal(store, state, plan_digest, study_digest))


def _seal(store: Store, state: State, plan_digest: str, study_digest: str) -> Seal:
    records, content = [], hashlib.sha256()
    for table in TABLES:
        for number, rows in enumerate(_slices(store, state, table)):
            digest = content_digest(rows)
            content.update(f"{table} {digest}\n".encode())
            records.append(store.publish_part(table, f"part-{number:05d}-{digest[:24]}.parquet", rows))
    absorbed = tuple(commit.key for commit in state.commits)
    made = Seal(tuple(records), absorbed, plan_digest, study_digest, root_digest(records), content.hexdigest())
    store.storage.replace(SEALED, json_bytes(made.as_json()))
    for part in state.seal.parts if state.seal else ():
        if part not in made.parts:
            store.storage.remove(part.path)
    return clear_away(store, made)


def clear_away(store: Store, made: Seal) -> Seal:
    """Remove the commits that a seal stands for, and their parts; a run that died meanwhile left the rest to the next one."""
    for key in made.absorbed:
        if commit := store.commit_of(key):
            store.discard(commit, made)
        store.remove_commit(key)
    made = replace(made, absorbed=())
    store.storage.replace(SEALED, json_bytes(made.as_json()))
    return made


def _slices(store: Store, state: State, table: str) -> Iterator[Compact]:
    """The rows in order, FILE_ROWS at a time."""
    if table == "errors":
        failures = store.failures_of(state)
        order = pc.sort_indices(failures, sort_keys=[(key, "ascending") for key in KEYS[table]])
        yield from _cut(Compact(failures.schema, failures.num_rows, {}, failures).take(order))
        return
    parts = [part for part in state.parts() if part.table == table]
    if sum(part.rows for part in parts) <= BATCH_ROWS:
        yield from _cut(_sorted(store, table, [store.read_compact(part) for part in parts]))
        return
    for low, high in _ranges(store, state, table):
        yield from _cut(_sorted(store, table, [_between(store.read_compact(part), low, high) for part in parts]))


def _ranges(store: Store, state: State, table: str) -> Iterator[tuple[str, str]]:
    """Ranges of point ids with at most about BATCH_ROWS rows each, cut where a file ends."""
    ids = np.sort(store.read(table, list(KEYS[table]), state).column("point_id").to_numpy(zero_copy_only=False).astype("S32"))
    starts = [int(np.searchsorted(ids, ids[at])) for at in range(0, len(ids), BATCH_ROWS)]
    bounds = ["", *(ids[at].decode() for at in starts[1:]), "g"]
    yield from itertools.pairwise(bounds)


def _between(rows: Compact, low: str, high: str) -> Compact:
    ids = rows.column("point_id")
    return rows.filter(pc.and_(pc.greater_equal(ids, low), pc.less(ids, high)))


def _sorted(store: Store, table: str, parts: list[Compact]) -> Compact:
    """Raises NondeterminismError."""
    rows = joined(parts)
    return rows.take(in_order(store.name, table, rows))


def _cut(rows: Compact) -> Iterator[Compact]:
    for start in range(0, rows.num_rows, FILE_ROWS):
        yield rows.slice(start, FILE_ROWS)


def content_digest(rows: Compact) -> str:
    """SHA-256 (hex) of the values, free of how Parquet, Arrow or their versions lay them out."""
    digest = hashlib.sha256()
    for name in rows.schema.names:
        digest.update(f"\0{name}\0{rows.num_rows}\0".encode())
        for part in _canonical(rows.column(name)):
            digest.update(part)
    return digest.hexdigest()


def _canonical(column: pa.Array) -> Iterator[Any]:
    """Little-endian numbers of 8 bytes (one NaN, one zero), bytes for truth values, UTF-8 with lengths for text."""
    if pa.types.is_string(column.type):
        _, offsets, text = column.buffers()
        places = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].astype("<i8")
        yield np.diff(places)
        yield memoryview(text)[places[0] : places[-1]] if text else b""
        return
    values = as_numpy(column)
    if pa.types.is_floating(column.type):
        yield np.where(np.isnan(values), np.nan, values + 0.0).astype("<f8")
    elif pa.types.is_boolean(column.type):
        yield values.astype(np.uint8)
    else:
        yield values.astype("<u8" if pa.types.is_unsigned_integer(column.type) else "<i8", copy=False)


if __name__ == "__main__":
    main()
