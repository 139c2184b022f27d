"""Wall time, worker and attempt of each point: side tables of a run, never part of the data."""

import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.dataset.store import Store
from sweep.schema import numbers, texts
from sweep.worker import ChunkResult

FILE_ROWS = 1 << 16


class Timings:
    """Of one run; written now and then, so that a long one keeps little in memory."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.run = f"run-{time.time_ns():020d}-{os.getpid()}"
        self._tables: list[pa.Table] = []
        self._files = 0

    def add(self, result: ChunkResult) -> None:
        if result.point_ids is None:
            return
        count = len(result.point_ids)
        columns = {
            "point_id": result.point_ids,
            "wall_ns": numbers(result.wall_ns),
            "worker": texts([result.worker]).take(numbers(np.zeros(count, np.int64))),
            "attempt": numbers(np.full(count, result.attempt, np.int32)),
        }
        self._tables.append(pa.table(columns))
        if sum(table.num_rows for table in self._tables) >= FILE_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what has come together."""
        if not self._tables:
            return
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(self._tables), sink, compression="zstd", write_page_checksum=True)
        self.store.storage.replace(f"provenance/{self.run}-{self._files:04d}.parquet", bytes(sink.getvalue()))
        self._tables, self._files = [], self._files + 1
