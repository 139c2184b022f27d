"""Parquet files of accesses into raw rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kernels.spec import KVM_MAX_VCPUS
from sweep.errors import TraceError
from sweep.replay.formats import Format, check_columns
from sweep.replay.parse import BATCH_ROWS, BadLines, Evidence, Lost, RawFile, ReadOptions, Trace
from sweep.replay.scan import ABSENT, FETCH, PRESENT, READ, WRITE
from sweep.replay.source import Source

WORDS: Mapping[str, int] = {"read": READ, "r": READ, "write": WRITE, "w": WRITE, "fetch": FETCH, "x": FETCH}
BAD = -1
MAX_SHOWN_BAD = 64  # rows of a batch that are told one by one


def read_parquet(source: Source, format: Format, options: ReadOptions, raw: RawFile) -> Trace:
    """Rows of ns, vcpu, gpa, access and perhaps present. Raises TraceError."""
    name = source.name
    if source.path is None or source.packed:
        raise TraceError(name, "is Parquet, which is read from its end: from a pipe or a gz file that cannot be; give its own path")
    bad, rows = BadLines(name, options.skip_bad), _Rows()
    try:
        file = pq.ParquetFile(source.path, page_checksum_verification=True)
        check_columns(name, file.schema_arrow.names)
        wanted = [column for column in ("ns", "vcpu", "gpa", "access", "present") if column in file.schema_arrow.names]
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            columns = {column: _numbers(name, column, batch.column(column)) for column in wanted}
            raw.add(rows.take(columns, batch.num_rows, bad))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise TraceError(name, f"cannot be read as Parquet: {str(error).splitlines()[0]}; write it anew") from None
    return Trace(
        name=name,
        format=format,
        rows=rows.count,
        lines=rows.seen,
        span=rows.span,
        backward=rows.backward,
        back_ns=rows.back_ns,
        faults=rows.count,
        exits=0,
        entries=0,
        others=0,
        threads=(),
        evidence=Evidence(),
        lost=Lost(),
        bad=bad,
    )


class _Rows:
    """Rows taken so far."""

    def __init__(self) -> None:
        self.count = self.seen = self.backward = self.back_ns = 0
        self.span, self.last = (0, 0), 0

    def take(self, columns: Mapping[str, Any], rows: int, bad: BadLines) -> list[Any]:
        """One array per field of scan.Rows, of the rows that are whole."""
        line = np.arange(self.seen + 1, self.seen + rows + 1, dtype=np.int64)
        self.seen += rows
        present = columns.get("present", np.zeros(rows, np.int64))
        good = (columns["ns"] >= 0) & (columns["gpa"] >= 0) & (columns["access"] >= READ) & (columns["access"] <= FETCH)
        good &= (columns["vcpu"] >= 0) & (columns["vcpu"] < KVM_MAX_VCPUS) & (present >= 0)
        for row in np.flatnonzero(~good)[: bad.allowed - bad.count + 1]:
            shown = ", ".join(f"{name} {int(column[row])}" for name, column in columns.items())
            bad.add(int(line[row]), f"holds an empty, negative or unknown value ({shown}; -1 for what is no number)", unit="row ")
        unknown = np.full(int(good.sum()), -1, np.int64)
        ns = columns["ns"][good]
        self._follow(ns)
        code = (columns["access"] | present)[good]
        return [ns, columns["vcpu"][good], columns["gpa"][good], code, line[good], unknown]

    def _follow(self, ns: Any) -> None:
        if not len(ns):
            return
        back = np.diff(ns, prepend=self.last if self.count else ns[0])
        self.backward += int((back < 0).sum())
        self.back_ns = max(self.back_ns, -int(back.min()))
        low, high = int(ns.min()), int(ns.max())
        self.span = (min(self.span[0], low), max(self.span[1], high)) if self.count else (low, high)
        self.count += len(ns)
        self.last = int(ns[-1])


def _numbers(name: str, column: str, values: pa.Array) -> Any:
    """A column as int64; BAD where it is empty or says nothing. Raises TraceError for a type that cannot be one."""
    if column == "access" and (
        pa.types.is_string(values.type) or pa.types.is_dictionary(values.type) or pa.types.is_large_string(values.type)
    ):
        found = pc.index_in(pc.utf8_lower(values.cast(pa.string())), value_set=pa.array(list(WORDS)))
        codes = np.array([*WORDS.values(), BAD], np.int64)
        return codes[found.fill_null(len(WORDS)).to_numpy(zero_copy_only=False)]
    if column == "present":
        if not pa.types.is_boolean(values.type):
            raise TraceError(name, f"column present is of type {values.type}; true and false are needed")
        known = np.where(values.fill_null(False).to_numpy(zero_copy_only=False), PRESENT, ABSENT)
        return np.where(values.is_null().to_numpy(zero_copy_only=False), 0, known).astype(np.int64)
    if pa.types.is_timestamp(values.type) and column == "ns":
        values = values.cast(pa.timestamp("ns")).cast(pa.int64())
    elif pa.types.is_boolean(values.type) and column == "access":
        values = values.cast(pa.int64())
    if not pa.types.is_integer(values.type):
        raise TraceError(name, f"column {column} is of type {values.type}; whole numbers are needed")
    return values.fill_null(0).cast(pa.int64(), safe=False).to_numpy() if not values.null_count else _with_gaps(values)


def _with_gaps(values: pa.Array) -> Any:
    numbers = values.fill_null(0).cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False).copy()
    numbers[values.is_null().to_numpy(zero_copy_only=False)] = BAD
    return numbers
