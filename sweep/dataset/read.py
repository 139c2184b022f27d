"""Opening a dataset: pandas, Arrow, SQL."""

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

    def _scanned(self, table: str) -> Any:
        """A table for DuckDB: of a sealed dataset in a folder, its files, of which only the columns that are asked for are read."""
        state = self.store.state()
        if table == "errors" or state.commits or not isinstance(self.store.storage, LocalStorage):
            return self.arrow(table)
        paths = [str(self.store.storage.root / part.path) for part in state.parts() if part.table == table]
        if not paths:
            return self.arrow(table)
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        return ds.dataset(paths, format=ds.ParquetFileFormat(default_fragment_scan_options=options))

    def sql(self, query: str) -> pa.Table:
        """Result of a query over `points`, `steps` and `errors`. The query sees these tables only: no files, no network."""
        connection = duckdb.connect(":memory:", config={"enable_external_access": False})
        try:
            for name in TABLES:
                connection.register(name, self._scanned(name))
            if len(connection.extract_statements(query)) != 1:
                raise UsageError("query: exactly one statement is needed")
            answer: Any = connection.sql(query)
            if answer is None:
                raise UsageError("query: a SELECT is needed")
            result = answer.to_arrow_table()
            return _plain_integers(result)
        except duckdb.Error as error:
            raise UsageError(f"query: {str(error).splitlines()[0]}") from None
        finally:
            connection.close()


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
