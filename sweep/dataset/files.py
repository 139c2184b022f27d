"""How a table becomes bytes, and what is known of bytes."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.dataset.compact import Compact
from sweep.dataset.storage import LocalStorage

ROW_GROUP_ROWS = 65_536
SEALED_LEVEL, PART_LEVEL = 6, 1  # of compression: parts are read once, to be sealed


def publish(path: Path, content: bytes) -> None:
    """Write a file atomically, in the place of an earlier one. Raises EnvironmentProblemError."""
    LocalStorage(path.parent).replace(path.name, content)


def parquet_bytes(rows: pa.Table | Compact, level: int) -> bytes:
    """Canonical Parquet of a table: the same rows give the same bytes with one lock file; every page has a checksum."""
    sink = pa.BufferOutputStream()
    options = {"compression": "zstd", "compression_level": level, "write_page_checksum": True, "store_schema": False, "version": "2.6"}
    with pq.ParquetWriter(sink, rows.schema, **options) as writer:
        for start in range(0, rows.num_rows, ROW_GROUP_ROWS):
            part = rows.slice(start, ROW_GROUP_ROWS)
            writer.write_table(part.table() if isinstance(part, Compact) else part)
    return bytes(sink.getvalue())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
