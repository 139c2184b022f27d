"""Rows of many parts in little memory: a column that holds one value is that value, and its pages are not even read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.schema import column_of


@lru_cache(maxsize=16)
def _repeated(value: pa.Scalar, count: int) -> pa.Array:
    """Most columns of one value hold zeros, and can share them."""
    return pa.repeat(value, count)


@dataclass(frozen=True)
class Compact:
    """A table."""

    schema: pa.Schema
    num_rows: int
    same: Mapping[str, pa.Scalar]
    rest: pa.Table  # the other columns

    def column(self, name: str) -> pa.Array:
        if name in self.same:
            return _repeated(self.same[name], self.num_rows)
        column = self.rest.column(name)
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

    def take(self, rows: pa.Array) -> "Compact":
        return replace(self, num_rows=len(rows), rest=self.rest.take(rows).combine_chunks())

    def slice(self, start: int, count: int) -> "Compact":
        return replace(self, num_rows=min(count, max(0, self.num_rows - start)), rest=self.rest.slice(start, count))

    def filter(self, mask: pa.Array) -> "Compact":
        rest = self.rest.filter(mask)
        return replace(self, num_rows=rest.num_rows, rest=rest)

    def table(self) -> pa.Table:
        """All of it."""
        return pa.Table.from_arrays([self.column(name) for name in self.schema.names], schema=self.schema)


def read_compact(file: pq.ParquetFile, schema: pa.Schema, varying: Iterable[str]) -> Compact:
    """The columns of `schema`; those of `varying` are read in any case. Raises what reading a Parquet file does."""
    same = {name: value for name, value in _one_valued(file, schema).items() if name not in set(varying)}
    rest = file.read(columns=[name for name in schema.names if name not in same])
    return Compact(schema, file.metadata.num_rows, same, rest.cast(pa.schema([schema.field(name) for name in rest.column_names])))


def _one_valued(file: pq.ParquetFile, schema: pa.Schema) -> dict[str, pa.Scalar]:
    """By what the file says of each column. No fractions: two zeros are equal, and what is no number is not counted."""
    found: dict[str, pa.Scalar] = {}
    for number, name in enumerate(file.schema_arrow.names):
        if name not in schema.names or pa.types.is_floating(schema.field(name).type):
            continue
        said = [file.metadata.row_group(group).column(number).statistics for group in range(file.num_row_groups)]
        if not said or any(each is None or not each.has_min_max or each.null_count for each in said):
            continue
        if len({value for each in said for value in (each.min, each.max)}) == 1:
            found[name] = column_of([said[0].min], schema.field(name).type)[0]
    return found


def joined(parts: list[Compact]) -> Compact:
    """One after the other; they have one schema."""
    first = parts[0]
    same = {name: value for name, value in first.same.items() if all(name in part.same and part.same[name] == value for part in parts)}
    names = [name for name in first.schema.names if name not in same]
    schema = pa.schema([first.schema.field(name) for name in names])
    tables = [pa.Table.from_arrays([part.column(name) for name in names], schema=schema) for part in parts]
    return Compact(first.schema, sum(part.num_rows for part in parts), same, pa.concat_tables(tables))
