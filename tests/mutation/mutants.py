"""Mutants: one change each to a rule of the policy table, or to a condition or count of the compiled kernels' sources."""

import ast
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from kernels.policy import PROPOSALS, REGIMES, Behaviour

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
MODULES = (
    "mmu",
    "mmu_notifier",
    "primary_mmu",
    "fault",
    "calls",
    "dirty_log",
    "daemons",
    "locks",
    "memory",
    "contention",
    "cores",
)
BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
PURE = frozenset({"len", "min", "max", "abs", "bool", "int", "range", "int64", "uint64", "float64", "uint8"})
NOTE = "note_mutants"
NO_ARGUMENTS = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
COUNTED = ("counters", "gauges", "vm")  # arrays of the machine whose updates are rules of their own


@dataclass(frozen=True)
class Mutant:
    """One thing changed: `source` takes the place of `module`'s `function`, or (no function) runs in the module."""

    module: str
    function: str
    name: str
    source: str

    def apply(self) -> None:
        """Change the model of this process, for good."""
        if self.function:
            replace_code(self.module, self.function, self.source)
        else:
            exec(compile(self.source, "policy (mutant)", "exec"), importlib.import_module(f"kernels.{self.module}").__dict__)


def replace_code(module: str, function: str, source: str) -> None:
    """Give a function of the model, which runs as plain Python, another body."""
    code = compile(source, f"kernels.{module} (changed)", "exec")
    found: Any = getattr(importlib.import_module(f"kernels.{module}"), function)
    found.__code__ = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == function)


def _compiled(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") in ("jit", "shared", "entry") for d in node.decorator_list):
            yield node


def _conditions(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, ast.expr]]:
    """(node, attribute, expression) of every condition."""
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.IfExp):
            yield node, "test", node.test
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.BoolOp | ast.Compare):
            yield node, "value", node.value


def _changes(expression: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The condition turned round; without one of its parts; with a bound moved by one."""
    yield "not", ast.UnaryOp(ast.Not(), expression)
    if isinstance(expression, ast.BoolOp) and len(expression.values) > 1:
        for left_out in range(len(expression.values)):
            rest = [value for i, value in enumerate(expression.values) if i != left_out]
            changed = rest[0] if len(rest) == 1 else ast.BoolOp(expression.op, rest)
            yield f"without part {left_out}", changed
    if isinstance(expression, ast.Compare):
        for i, op in enumerate(expression.ops):
            if type(op) in BOUNDARY:
                ops = [BOUNDARY[type(op)]() if j == i else other for j, other in enumerate(expression.ops)]
                yield f"bound {i}", ast.Compare(expression.left, ops, expression.comparators)


def _is_count(node: ast.AST) -> bool:
    """An update of a counter, a gauge or the VM's state."""
    target = node.target if isinstance(node, ast.AugAssign) else None
    return isinstance(target, ast.Subscript) and isinstance(target.value, ast.Attribute) and target.value.attr in COUNTED


@dataclass(frozen=True)
class Site:
    """A place of a function that mutants change: `node`'s `attribute`, which is `expression`, into each of `changes`."""

    node: ast.AST
    attribute: str
    expression: ast.expr
    changes: tuple[tuple[str, ast.expr], ...]

    def put(self, expression: ast.expr) -> None:
        setattr(self.node, self.attribute, expression)

    def is_pure(self) -> bool:
        """It can be computed once more, changed, without doing anything."""
        return called(self.expression) <= pure_functions()


def called(node: ast.AST) -> frozenset[str]:
    """Names of the functions that are called there ('' for what has no plain name)."""
    calls = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
    names = (call.id if isinstance(call, ast.Name) else call.attr if isinstance(call, ast.Attribute) else "" for call in calls)
    return frozenset(names)


def _stores(function: ast.FunctionDef) -> bool:
    """It writes into an array."""
    targets = (node for node in ast.walk(function) if isinstance(node, ast.Subscript | ast.Attribute))
    return any(isinstance(target.ctx, ast.Store) for target in targets)


@cache
def pure_functions() -> frozenset[str]:
    """Functions of the model that write nowhere and call only such; and Python's and numpy's that they use."""
    calls: dict[str, frozenset[str]] = {}
    for path in KERNELS.glob("*.py"):
        if not path.name.startswith("reference"):
            calls |= {f.name: called(f) for f in _compiled(ast.parse(path.read_text())) if not _stores(f)}
    while impure := {name for name, callees in calls.items() if not callees <= PURE | calls.keys()}:
        calls = {name: callees for name, callees in calls.items() if name not in impure}
    return PURE | calls.keys()


def sites(function: ast.FunctionDef) -> list[Site]:
    found = [Site(node, name, expression, tuple(_changes(expression))) for node, name, expression in _conditions(function)]
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign) and _is_count(node):
            found.append(Site(node, "value", node.value, ((f"not counted: {ast.unparse(node.target)}", ast.Constant(0)),)))
    return found


def _source(function: ast.FunctionDef) -> str:
    return ast.unparse(ast.fix_missing_locations(function))


def functions_of(module: str) -> Iterator[ast.FunctionDef]:
    for function in _compiled(ast.parse((KERNELS / f"{module}.py").read_text())):
        function.decorator_list = []
        yield function


def module_mutants(module: str) -> Iterator[Mutant]:
    """One condition changed, or one count left out."""
    for function in functions_of(module):
        for site in sites(function):
            for what, changed in site.changes:
                site.put(changed)
                where = f"{module}.py:{site.expression.lineno} {function.name}()"
                yield Mutant(module, function.name, f"{where} {what}: {ast.unparse(site.expression)[:90]}", _source(function))
            site.put(site.expression)


class Instrumented:
    """The model, noting which mutants would have gone another way: `met` has their numbers."""

    def __init__(self, first: int) -> None:
        """`first`: number of the first mutant of MODULES."""
        self.met: set[int] = set()
        for module in MODULES:
            setattr(importlib.import_module(f"kernels.{module}"), NOTE, self.note)
            for function in functions_of(module):
                for site in sites(function):
                    first += self._watch(site, first)
                replace_code(module, function.name, _source(function))

    def _watch(self, site: Site, first: int) -> int:
        """Note its value; returns how many mutants it has."""
        count = len(site.changes)
        others = [ast.Lambda(NO_ARGUMENTS, changed) for _, changed in site.changes] if site.is_pure() else []
        arguments = [ast.Constant(first), ast.Constant(count), site.expression, *others]
        site.put(ast.Call(ast.Name(NOTE, ast.Load()), arguments, []))
        return count

    def note(self, first: int, count: int, value: Any, *others: Callable[[], Any]) -> Any:
        """Called in the place of a condition or an amount."""
        if not others:
            self.met.update(range(first, first + count))
        for number, other in enumerate(others, first):
            if number not in self.met and differs(value, other):
                self.met.add(number)
        return value


def differs(value: Any, other: Callable[[], Any]) -> bool:
    try:
        return bool(other() != value) if not isinstance(value, bool) else bool(other()) != value
    except Exception:  # the part that was left out had kept it from this
        return True


def policy_mutants() -> Iterator[Mutant]:
    """Each entry of the table the other way round: every change of a regime, every proposal."""
    for number, regime in enumerate(REGIMES):
        for behaviour, value in regime.changes.items():
            if number or behaviour in (Behaviour.CHANGE_PTE, Behaviour.HUGETLB_ZAP_TWICE, Behaviour.LAST_SUBPAGE_REUSE):
                flip = f"REGIMES[{number}].changes[Behaviour.{behaviour.name}] = {1 - value}\n"
                yield Mutant("policy", "", f"policy.py: {regime.since} {behaviour.name} = {1 - value}", flip)
    for name, proposal in PROPOSALS.items():
        for behaviour in proposal.changes:
            drop = f"del PROPOSALS[{name!r}].changes[Behaviour.{behaviour.name}]\n"
            yield Mutant("policy", "", f"policy.py: proposal {name} without {behaviour.name}", drop)


def all_mutants() -> list[Mutant]:
    return [*policy_mutants(), *(mutant for module in MODULES for mutant in module_mutants(module))]
