"""Blocks of a study: a product of axes, or a sample of one, addressed by an index and never expanded as a whole."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.kept import Kept
from sweep.parameters import Point
from sweep.where import Where, WhereError

MAX_COMBINATIONS = 10_000_000  # of the axes that a `where` looks at
MAX_HELD = 1 << 16  # of them that keeps() remembers, where mask was not made
METHODS = ("sobol", "latin_hypercube", "random")
MAX_SAMPLE = 1 << 24
GOLDEN_RATIO = 0.6180339887498949
DEFAULTS: Mapping[str, Any] = {name: info.default for name, info in Point.model_fields.items()}


@dataclass(frozen=True)
class Axis:
    """One dimension of a block: the parameters that move together, and their values, each once."""

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    @cached_property
    def place(self) -> dict[tuple[Any, ...], int]:
        """Where each value stands."""
        return {hashable(row): i for i, row in enumerate(self.values)}


def _named(axis: Axis, digit: int) -> dict[str, Any]:
    return dict(zip(axis.names, axis.values[digit], strict=True))


def hashable(row: Sequence[Any]) -> tuple[Any, ...]:
    """Values of an axis as a key; settings of a daemon are a table."""
    return tuple(tuple(value.items()) if isinstance(value, dict) else value for value in row)


def axis(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Axis:
    """An axis; a value that is given twice stands once."""
    return Axis(tuple(names), tuple({hashable(row): tuple(row) for row in rows}.values()))


@dataclass(frozen=True)
class Sample:
    """So many points of a product instead of all: `method` of METHODS, seeded by the study."""

    method: str
    n: int
    seed: int

    def digits(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """Which value of each axis; shape (points, axes), rows that fall together once, in the order of the sample."""
        if not shape:
            return np.zeros((1, 0), np.int64)
        digits = np.minimum((self._unit(len(shape)) * np.array(shape)).astype(np.int64), np.array(shape) - 1)
        _, first = np.unique(digits, axis=0, return_index=True)
        kept: NDArray[np.int64] = digits[np.sort(first)]
        return kept

    def _unit(self, dimensions: int) -> NDArray[np.float64]:
        """Points of the unit cube; shape (n, dimensions)."""
        from scipy.stats import qmc  # half a second, which most studies need not wait for

        rng = np.random.default_rng(self.seed)
        if self.method == "random":
            return rng.random((self.n, dimensions))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a number that is no power of two: said in the study's notes
            engine = qmc.Sobol(dimensions, rng=rng) if self.method == "sobol" else qmc.LatinHypercube(dimensions, rng=rng)
            unit: NDArray[np.float64] = engine.random(self.n)
            return unit


class Source(NamedTuple):
    """The axis that moves a parameter, its values, and which part of each is the parameter's; no axis (None): one value."""

    position: int | None
    rows: tuple[tuple[Any, ...], ...]
    part: int = 0

    def value(self, digit: int) -> Any:
        return self.rows[digit][self.part]


@dataclass(frozen=True)
class Block:
    """A product of axes over fixed parameters, or a sample of it, with an optional condition.

    Point `index` has the mixed-radix digits of the index, the last axis fastest; of a sample, those of its row."""

    axes: tuple[Axis, ...]
    fixed: Mapping[str, Any]
    where: Where | None
    sample: Sample | None = None

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis.values) for axis in self.axes)

    @cached_property
    def product(self) -> int:
        """Combinations of all axes."""
        return prod(self.shape)

    @cached_property
    def sampled(self) -> NDArray[np.int64] | None:
        return self.sample.digits(self.shape) if self.sample else None

    def size(self) -> int:
        """Points before `where`."""
        return self.product if self.sampled is None else len(self.sampled)

    def digits(self, index: int) -> tuple[int, ...]:
        """Which value of each axis."""
        if self.sampled is not None:
            return tuple(self.sampled[index].tolist())
        return self._decoded(index, range(len(self.axes)))

    def _decoded(self, index: int, positions: Sequence[int]) -> tuple[int, ...]:
        """Digits of a combination of some axes, the others 0."""
        whole = [0] * len(self.axes)
        for position in reversed(positions):
            index, whole[position] = divmod(index, self.shape[position])
        return tuple(whole)

    def values(self, digits: Sequence[int]) -> dict[str, Any]:
        """Parameters, those given alone."""
        values = dict(self.fixed)
        for rows, digit in zip(self._rows, digits, strict=True):
            values.update(rows[digit])
        return values

    def every_value(self, digits: Sequence[int]) -> dict[str, Any]:
        """Every parameter; `cores` is None where it is not given."""
        values = self._constant.copy()
        for rows, digit in zip(self._rows, digits, strict=True):
            values.update(rows[digit])
        return values

    @cached_property
    def _constant(self) -> dict[str, Any]:
        return {**DEFAULTS, **self.fixed}

    @cached_property
    def _rows(self) -> list[Kept[int, dict[str, Any]]]:
        """Of each axis, its parameters by digit."""
        return [Kept(partial(_named, axis)) for axis in self.axes]

    def point(self, digits: Sequence[int]) -> Point:
        return Point.model_construct(**self.values(digits))

    def canonical(self, digits: Sequence[int]) -> dict[str, Any]:
        """Every parameter, as Point.values() gives them."""
        values = self.every_value(digits)
        if values["cores"] is None:
            values["cores"] = values["vcpus"]
        return values

    def source(self, name: str) -> Source:
        """Where a parameter's value comes from; `cores` comes from where `vcpus` does if it is not given."""
        for position, each in enumerate(self.axes):
            if name in each.names:
                return Source(position, each.values, each.names.index(name))
        value = self.fixed.get(name, DEFAULTS[name])
        return self.source("vcpus") if name == "cores" and value is None else Source(None, ((value,),))

    def positions(self, names: frozenset[str]) -> tuple[int, ...]:
        """Axes that move one of these parameters; `cores` moves with `vcpus` where it is not given."""
        moving = names | ({"vcpus"} if "cores" in names and not self.gives("cores") else frozenset())
        return tuple(i for i, axis in enumerate(self.axes) if moving & set(axis.names))

    def gives(self, name: str) -> bool:
        return name in self.fixed or any(name in axis.names for axis in self.axes)

    def combinations(self, positions: Sequence[int]) -> int:
        return prod(self.shape[i] for i in positions)

    @cached_property
    def looked_at(self) -> tuple[int, ...]:
        """Axes whose parameters the condition names."""
        return self.positions(self.where.used) if self.where else ()

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Whether the condition holds, over the axes it looks at. Raises WhereError."""
        shape = tuple(self.shape[i] for i in self.looked_at)
        if self.combinations(self.looked_at) > MAX_COMBINATIONS:
            names = ", ".join(name for i in self.looked_at for name in self.axes[i].names)
            raise WhereError(f"looks at {self.combinations(self.looked_at):,} combinations of {names}; at most {MAX_COMBINATIONS:,}")
        held = np.ones(shape, np.bool_)
        for where in np.ndindex(*shape) if self.where else ():
            held[where] = self.holds(self._embed(where))
        return held

    def _embed(self, digits: Sequence[int]) -> list[int]:
        """Digits of the axes that the condition looks at, 0 elsewhere."""
        whole = [0] * len(self.axes)
        for i, digit in zip(self.looked_at, digits, strict=True):
            whole[i] = digit
        return whole

    def holds(self, digits: Sequence[int]) -> bool:
        """The condition, computed. Raises WhereError."""
        return self.where is None or self.where(self.canonical(digits))

    def keeps(self, digits: Sequence[int]) -> bool:
        """The condition, looked up where it was computed before."""
        if self.where is None:
            return True
        place = tuple([digits[i] for i in self.looked_at])
        return bool(self.mask[place]) if "mask" in vars(self) else self._held[place]

    @cached_property
    def _held(self) -> Kept[tuple[int, ...], bool]:
        """What holds() says, by the digits that it looks at."""
        return Kept(lambda place: self.holds(self._embed(place)), MAX_HELD)

    @cached_property
    def kept(self) -> int:
        """Points that the condition keeps."""
        if self.where is None:
            return self.size()
        if self.sampled is not None:
            return int(self.mask[tuple(self.sampled[:, i] for i in self.looked_at)].sum())
        return int(self.mask.sum()) * (self.product // max(1, self.mask.size))

    def kept_of(self, start: int, end: int) -> NDArray[np.bool_]:
        """Which of the indices from `start` to `end` the condition keeps."""
        if not self.looked_at:
            return np.full(end - start, bool(self.mask))
        rows = self.rows(start, end)
        kept: NDArray[np.bool_] = np.broadcast_to(self.mask[tuple(rows[i] for i in self.looked_at)], end - start).copy()
        return kept

    def rows(self, start: int, end: int) -> NDArray[np.int64]:
        """Digits of the indices from `start` to `end`; shape (axes, end - start)."""
        return self.digits_at(np.arange(start, end))

    def digits_at(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Digits of these indices; shape (axes, indices)."""
        if self.sampled is not None:
            return self.sampled[indices].T
        if not self.axes:
            return np.zeros((0, len(indices)), np.int64)
        return np.array(np.unravel_index(indices, self.shape))

    def find(self, values: Mapping[str, Any]) -> bool:
        """A point with these canonical values (Point.values()) is one of this block's."""
        for name, value in values.items():
            if not any(name in axis.names for axis in self.axes) and not self._is_fixed(name, value, values):
                return False
        digits = [axis.place.get(hashable([values[name] for name in axis.names])) for axis in self.axes]
        if any(digit is None for digit in digits):
            return False
        found = [digit for digit in digits if digit is not None]
        return self.keeps(found) and (self.sampled is None or tuple(found) in self._sampled_rows)

    def _is_fixed(self, name: str, value: Any, values: Mapping[str, Any]) -> bool:
        mine = self.fixed.get(name, DEFAULTS[name])
        return bool(value == (values["vcpus"] if name == "cores" and mine is None else mine))

    @cached_property
    def _sampled_rows(self) -> frozenset[tuple[int, ...]]:
        return frozenset(map(tuple, self.sampled.tolist())) if self.sampled is not None else frozenset()

    def apart(self, other: "Block") -> bool:
        """No point can be in both: some parameter has no value in common."""
        return any(not (mine & other.values_of(name)) for name in DEFAULTS if name != "cores" and (mine := self.values_of(name)))

    def values_of(self, name: str) -> frozenset[Any]:
        """Every value that a parameter takes."""
        for axis in self.axes:
            if name in axis.names:
                at = axis.names.index(name)
                return frozenset(hashable([row[at]]) for row in axis.values)
        return frozenset([hashable([self.fixed.get(name, DEFAULTS[name])])])

    def evenly(self, most: int, positions: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Digits of at most so many combinations of some axes, the others 0: all of them, or evenly spread; of a sample, of its points."""
        total = self.size() if self.sampled is not None else self.combinations(positions)
        for number in spread(total, most):
            yield self.digits(number) if self.sampled is not None else self._decoded(number, positions)


def spread(total: int, most: int) -> Iterator[int]:
    """All of 0 ... total - 1, or `most` of them, one somewhere in each of as many equal stretches (evenly spaced ones could
    all have the same digit)."""
    if total <= most:
        yield from range(total)
        return
    for i in range(most):
        low, high = total * i // most, total * (i + 1) // most
        yield low + int((high - low) * (i * GOLDEN_RATIO % 1.0))
