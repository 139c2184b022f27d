"""Publishing files so that a reader sees all of a file or none of it, and a crash loses nothing that was committed."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.errors import DatasetError, EnvironmentProblemError

TEMP_PREFIX = ".tmp-"
ROW_GROUP_ROWS = 65_536


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(path: Path, content: bytes) -> None:
    """Write a file atomically: temporary name, fsync, rename, fsync of the folder. Raises EnvironmentProblemError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=TEMP_PREFIX, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o644)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise EnvironmentProblemError(
            f"{path}: cannot be written: {error.strerror}; free space or change rights, then run again"
        ) from error


def publish_json(path: Path, value: Any) -> None:
    publish(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file of the dataset. Raises DatasetError for one that cannot be read."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); restore it or start with a new directory") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of the dataset. Raises DatasetError for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DatasetError(f"{path}: holds no JSON object; restore it or start with a new directory")
    return value


def parquet_bytes(table: pa.Table) -> bytes:
    """Canonical Parquet of a table: the same rows give the same bytes with one lock file; every page has a checksum."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=6,
        write_page_checksum=True,
        row_group_size=ROW_GROUP_ROWS,
        store_schema=False,
        version="2.6",
    )
    return bytes(sink.getvalue())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Digest of a file. Raises DatasetError if it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}; run again to compute it anew") from None
