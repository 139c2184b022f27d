"""Points become rows of the tables: the numbers of their runs and their parameters, put together by column."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kernels.results import VALUES
from sweep.parameters import COLUMN_OF, PARAMETERS, column_value
from sweep.plan import Bools, Int64s, PlannedPoint, Points
from sweep.point import Context, Runner, error_row, touch_rate
from sweep.schema import arrow_schema, column_of, numbers, texts, to_table


class Recorder:
    """Runs points, and makes tables of what came of them."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._runner = Runner(context)
        self.begin()

    def begin(self) -> None:
        """Forget all rows."""
        self._runner.forget()
        self._done: list[Points] = []
        self._ops: list[tuple[str, ...]] = []  # of the steps of each
        self._errors: list[dict[str, Any]] = []

    def run(self, points: Points) -> tuple[Bools, Int64s]:
        """Run them one after the other; returns which were done (others are rows of `errors` now), and the wall time of each, ns."""
        ran = self._runner.run(points)
        done = np.ones(len(points), np.bool_)
        for number, error in ran.failures:
            done[number] = False
            self.fail(points[number], type(error).__name__, str(error))
        self._ops += ran.ops
        self._done.append(points.chosen(done) if ran.failures else points)
        return done, ran.wall_ns

    def fail(self, planned: PlannedPoint, kind: str, message: str) -> None:
        """Make a point a row of `errors`."""
        self._errors.append(error_row(planned, kind, message))

    def tables(self) -> dict[str, pa.Table]:
        """All rows, in the order in which they were made."""
        results = self._runner.results()
        points, steps = [], []
        point, step = 0, 0
        for each in self._done:
            ops = self._ops[point : point + len(each)]
            counts = np.fromiter(map(len, ops), np.int64, len(ops))
            points.append(_points_table(each, self.context, results.points[point : point + len(each)]))
            steps.append(_steps_table(each, self.context, results.steps[step : step + counts.sum()], ops, counts))
            point, step = point + len(each), step + int(counts.sum())
        return {
            "points": _joined("points", points),
            "steps": _joined("steps", steps),
            "errors": to_table("errors", self._errors),
        }


def _joined(table: str, parts: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(parts).combine_chunks() if parts else pa.Table.from_batches([], arrow_schema(table))


def _points_table(points: Points, context: Context, rows: Int64s) -> pa.Table:
    measured = dict(zip(VALUES, rows.T.copy(), strict=True))
    named = {COLUMN_OF.get(name, name): name for name in PARAMETERS}
    columns = {column: _parameter(points, column, name, partial(column_value, name)) for column, name in named.items()}
    columns["pages_per_s_per_vcpu"] = _rates(measured["touches"], columns["vcpus"], measured["guest_ns"])
    columns["costs_digest"] = _parameter(points, "costs_digest", "costs", context.cost_digests.__getitem__)
    return _table("points", {**_identity(points, context), **columns, **measured})


def _rates(touches: Int64s, vcpus: pa.Array, guest_ns: Int64s) -> NDArray[np.float64]:
    rates = np.zeros(len(touches), np.float64)
    some = np.flatnonzero(guest_ns)
    known = zip(touches[some].tolist(), vcpus.take(numbers(some)).to_pylist(), guest_ns[some].tolist(), strict=True)
    rates[some] = [touch_rate(*each) for each in known]
    return rates


def _steps_table(points: Points, context: Context, rows: Int64s, ops: Sequence[tuple[str, ...]], counts: Int64s) -> pa.Table:
    measured = dict(zip(VALUES, rows.T.copy(), strict=True))
    whose = np.repeat(np.arange(len(points)), counts)
    identity = {name: column.take(numbers(whose)) for name, column in _identity(points, context).items()}
    places = np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)
    steps = {"step": places, "op": texts(list(chain.from_iterable(ops))), "step_ns": measured["total_ns"]}
    return _table("steps", {**identity, **measured, **steps})


def _identity(points: Points, context: Context) -> dict[str, pa.Array]:
    always = numbers(np.zeros(len(points), np.int64))
    return {
        "point_id": texts(points.ids),
        "study": texts([context.study]).take(always),
        "replicate": numbers(points.replicates),
        "seed": numbers(np.full(len(points), points.seed, np.uint64)),
    }


def _parameter(points: Points, column: str, name: str, shown: Callable[[Any], Any]) -> pa.Array:
    """What is shown of a parameter; made once for each of its values."""
    values, which = points.values_of(name)
    return column_of([shown(value) for value in values], arrow_schema("points").field(column).type).take(numbers(which))


def _table(table: str, columns: Mapping[str, Any]) -> pa.Table:
    schema = arrow_schema(table)
    return pa.Table.from_arrays([_array(columns[field.name]).cast(field.type) for field in schema], schema=schema)


def _array(values: pa.Array | NDArray[Any]) -> pa.Array:
    return numbers(values) if isinstance(values, np.ndarray) else values
