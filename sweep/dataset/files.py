"""How a table becomes bytes, and what is known of bytes."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.dataset.storage import LocalStorage

ROW_GROUP_ROWS = 65_536


def publish(path: Path, content: bytes) -> None:
    """Write a file atomically, in the place of an earlier one. Raises EnvironmentProblemError."""
    LocalStorage(path.parent).replace(path.name, content)


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
