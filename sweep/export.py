"""`export`: a table of a dataset as one file."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq

from sweep.dataset.files import publish
from sweep.dataset.read import Dataset
from sweep.errors import UsageError


def _parquet(table: pa.Table, sink: pa.BufferOutputStream) -> None:
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)


def _csv(table: pa.Table, sink: pa.BufferOutputStream) -> None:
    pyarrow.csv.write_csv(table, sink)


def _arrow(table: pa.Table, sink: pa.BufferOutputStream) -> None:
    pyarrow.feather.write_feather(table, sink, compression="zstd")


WRITERS: Mapping[str, Callable[[pa.Table, pa.BufferOutputStream], None]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".arrow": _arrow,
    ".feather": _arrow,
}


def export(place: Path | str, to: Path, table: str = "points") -> int:
    """Write a table, sorted as it is sealed, to one file; returns its rows. Raises UsageError, DatasetError, EnvironmentProblemError."""
    if to.suffix.lower() not in WRITERS:
        raise UsageError(f"--to {str(to)!r}: the name must end with {', '.join(WRITERS)}")
    rows = Dataset(place).arrow(table)
    keys = [name for name in ("point_id", "step") if name in rows.column_names]
    sink = pa.BufferOutputStream()
    WRITERS[to.suffix.lower()](rows.sort_by([(key, "ascending") for key in keys]), sink)
    publish(to, bytes(sink.getvalue()))
    return int(rows.num_rows)
