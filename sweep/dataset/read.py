"""Opening a dataset: pandas, Arrow, SQL."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from sweep.dataset.storage import LocalStorage
from sweep.dataset.store import Store, missing_tables
from sweep.errors import DatasetError, UsageError
from sweep.schema import TABLES


class Dataset:
    """A dataset, read only."""

    def __init__(self, place: Path | str) -> None:
        try:
            self.store = Store(place)
            missing = missing_tables(self.store)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{str(place)[:200]}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
        if missing:
            raise DatasetError(f"{place}: is no dataset (no {', '.join(missing)}); give the directory of a run")

    def points(self) -> pd.DataFrame:
        """One row per point."""
        return self._frame("points")

    def steps(self) -> pd.DataFrame:
        """One row per point and step."""
        return self._frame("steps")

    def errors(self) -> pd.DataFrame:
        """One row per point that failed."""
        return self._frame("errors")

    def _frame(self, table: str) -> pd.DataFrame:
        frame: pd.DataFrame = self.arrow(table).to_pandas()
        return frame

    def arrow(self, table: str = "points") -> pa.Table:
        """A table as Arrow. Raises UsageError for an unknown table, DatasetError for a damaged part."""
        if table not in TABLES:
            raise UsageError(f"table {table!r} is unknown; there are {', '.join(TABLES)}")
        return self.store.failures() if table == "errors" else self.store.read(table)

    def scanned(self, table: str, columns: Sequence[str] | None = None) -> Any:
        """A table for connection(): of a sealed dataset in a folder, its files, of which only the columns that are asked for are read;
        else those columns (all) in memory. Raises DatasetError for a damaged part."""
        state = self.store.state()
        if table == "errors":
            return self.arrow(table)
        paths = [part.path for part in state.parts() if part.table == table]
        if not paths or state.commits or not isinstance(self.store.storage, LocalStorage):
            return self.store.read(table, columns)
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        files = [str(self.store.storage.root / path) for path in paths]
        return ds.dataset(files, format=ds.ParquetFileFormat(default_fragment_scan_options=options))

    def sql(self, query: str) -> pa.Table:
        """Result of a query over `points`, `steps` and `errors`. The query sees these tables only: no files, no network."""
        with connection({name: self.scanned(name) for name in TABLES}) as database:
            try:
                if len(database.extract_statements(query)) != 1:
                    raise UsageError("query: exactly one statement is needed")
                answer: Any = database.sql(query)
                if answer is None:
                    raise UsageError("query: a SELECT is needed")
                return _plain_integers(answer.to_arrow_table())
            except duckdb.Error as error:
                raise UsageError(f"query: {str(error).splitlines()[0]}") from None


@contextmanager
def connection(tables: Mapping[str, Any], threads: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with these tables and nothing else: no files, no network. One thread sums in one order: the same rows give the same bits."""
    database = duckdb.connect(":memory:", config={"enable_external_access": False, **({"threads": threads} if threads else {})})
    try:
        for name, table in tables.items():
            database.register(name, table)
        yield database
    finally:
        database.close()


def _plain_integers(table: pa.Table) -> pa.Table:
    """DuckDB sums int64 into 38-digit decimals; give int64 back wherever it fits."""
    for number, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type) and field.type.scale == 0:
            try:
                table = table.set_column(number, field.name, table.column(number).cast(pa.int64()))
            except pa.ArrowInvalid:
                continue
    return table


def open_dataset(place: str | Path) -> Dataset:
    """Open a dataset: a directory, or a URL like s3://bucket/name. Raises DatasetError if it is none."""
    return Dataset(place)
