"""The `where` of a block: comparisons and arithmetic over the parameters of a point.

The text is parsed with the standard library's parser and interpreted node by node from a list of what is allowed;
nothing is evaluated as Python.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from kernels.policy import UnknownKernelError, Version, parse_kernel
from sweep.quantity import BINARY_UNITS, parse_size

MAX_LENGTH = 2000
MAX_DEPTH = 40
COUNTS = frozenset({"vcpus", "prealloc_threads", "cores", "smt", "thp_failure"})
SIZE_NAMES = frozenset({"memory", "offset", "guest_page"})
Value = Any

_BINARY: Mapping[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Value, Value], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ALLOWED = "comparisons, + - * / // %, and, or, not, in, parentheses, lists, numbers, strings and the point's parameters"


TOML_WORDS: Mapping[str, bool] = {"true": True, "false": False}


class WhereError(ValueError):
    """The expression cannot be used: what is wrong, and what is allowed."""


class Where:
    """A compiled condition. `Where(text, names)` raises WhereError; calling it with a point's values says whether it holds.

    `allowed` names the values that a parameter can have: comparing it with any other text is a fault, not just false."""

    def __init__(self, text: str, names: frozenset[str], allowed: Mapping[str, frozenset[str]] | None = None) -> None:
        if len(text) > MAX_LENGTH:
            raise WhereError(f"{len(text)} characters; at most {MAX_LENGTH} are allowed")
        try:
            self._tree = ast.parse(text.replace("\n", " ").strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise WhereError(f"cannot be read: {getattr(error, 'msg', error)}") from None
        self._names = names
        self._allowed = allowed or {}
        self.text = " ".join(text.split())
        self.used = frozenset(node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)) & names  # parameters it looks at
        self._check(self._tree, 0)
        self._sized = {id(node) for node in ast.walk(self._tree) if isinstance(node, ast.Compare) and _sized(node)}

    def __reduce__(self) -> tuple[type["Where"], tuple[str, frozenset[str], Mapping[str, frozenset[str]]]]:
        return Where, (self.text, self._names, self._allowed)

    def _check(self, node: ast.AST, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise WhereError(f"nested deeper than {MAX_DEPTH}")
        match node:
            case ast.Name(id=name):
                if name not in self._names and name not in BINARY_UNITS and name not in TOML_WORDS:
                    raise WhereError(f"unknown name {name!r}; known: {', '.join(sorted(self._names))}, {', '.join(BINARY_UNITS)}")
            case ast.Constant(value=value):
                if not isinstance(value, bool | int | float | str):
                    raise WhereError(f"{value!r} is not allowed; allowed are {_ALLOWED}")
            case ast.BoolOp() | ast.Compare() | ast.List() | ast.Tuple():
                self._check_operators(node)
            case ast.BinOp(op=op) if type(op) in _BINARY:
                pass
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                pass
            case _:
                raise WhereError(f"{type(node).__name__} is not allowed; allowed are {_ALLOWED}")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._check(child, depth + 1)

    def _check_operators(self, node: ast.AST) -> None:
        if not isinstance(node, ast.Compare):
            return
        if any(type(op) not in _COMPARE for op in node.ops):
            raise WhereError(f"this comparison is not allowed; allowed are {_ALLOWED}")
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn) and not isinstance(right, ast.List | ast.Tuple):
                raise WhereError("in needs a list on its right, like backing in ['shmem', 'anonymous']")
        sides = [part for side in (node.left, *node.comparators) for part in getattr(side, "elts", [side])]
        names = [side.id for side in sides if isinstance(side, ast.Name)]
        texts = [side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)]
        for name in names:
            for text in texts:
                self._check_value(name, text)

    def _check_value(self, name: str, text: str) -> None:
        if name in self._allowed and text not in self._allowed[name]:
            raise WhereError(f"{name} is never {text!r}; it is one of {', '.join(sorted(self._allowed[name]))}")
        if name in COUNTS:
            raise WhereError(f"{name} is a number, and never {text!r}")

    def __call__(self, values: Mapping[str, Value]) -> bool:
        """True if the point is kept. Raises WhereError where the types do not fit."""
        try:
            return bool(self._value(self._tree, values))
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            raise WhereError(f"cannot be computed: {error}") from None

    def _value(self, node: ast.expr, values: Mapping[str, Value]) -> Value:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in TOML_WORDS:
                return TOML_WORDS[name]
            case ast.Name(id=name):
                return BINARY_UNITS[name] if name in BINARY_UNITS else _typed(name, values[name])
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._value(part, values) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._value(part, values) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._value(operand, values)
            case ast.UnaryOp(operand=operand):
                return -self._value(operand, values)
            case ast.BinOp(left=left, op=op, right=right):
                return _arithmetic(type(op), self._value(left, values), self._value(right, values))
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [self._value(element, values) for element in elements]
            case ast.Compare():
                return self._comparison(node, values)
        raise WhereError(f"{type(node).__name__} is not allowed")

    def _comparison(self, node: ast.Compare, values: Mapping[str, Value]) -> bool:
        left = self._value(node.left, values)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self._value(right_node, values)
            if not _compare(type(op), *_same_kind(left, right, id(node) in self._sized)):
                return False
            left = right
        return True


def _arithmetic(op: type[ast.operator], left: Value, right: Value) -> Value:
    if not all(isinstance(v, int | float) for v in (left, right)):
        raise WhereError(f"arithmetic needs numbers, not {left!r} and {right!r}")
    return _BINARY[op](left, right)


def _compare(op: type[ast.cmpop], left: Value, right: Value) -> bool:
    return bool(_COMPARE[op](left, right))


def _sized(node: ast.Compare) -> bool:
    """The comparison is about a size: its strings are sizes."""
    return any(isinstance(n, ast.Name) and n.id in SIZE_NAMES for n in ast.walk(node))


def _typed(name: str, value: Value) -> Value:
    return parse_kernel(value) if name == "kernel" else value


def _same_kind(left: Value, right: Value, sized: bool) -> tuple[Value, Value]:
    """A kernel compares as a version, a size as bytes, with text on the other side."""
    return _as(left, right, sized), _as(right, left, sized)


def _as(value: Value, other: Value, sized: bool) -> Value:
    kernels = isinstance(other, Version) or (isinstance(other, list) and any(isinstance(v, Version) for v in other))
    if isinstance(value, list):
        return [_as(v, other, sized) for v in value]
    if isinstance(value, str) and kernels:
        try:
            return parse_kernel(value)
        except UnknownKernelError as error:
            raise WhereError(str(error)) from None
    if isinstance(value, str) and sized:
        try:
            return parse_size(value)
        except ValueError as error:
            raise WhereError(str(error)) from None
    return value
