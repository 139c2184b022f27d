"""Mutants: one change each to a rule of the policy table, or to a condition or count of the compiled kernels' sources."""

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

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
        module = importlib.import_module(f"kernels.{self.module}")
        code = compile(self.source, f"kernels.{self.module} (mutant)", "exec")
        if not self.function:
            exec(code, module.__dict__)
            return
        function = getattr(module, self.function)
        function.__code__ = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == self.function)


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


def _source(function: ast.FunctionDef) -> str:
    return ast.unparse(ast.fix_missing_locations(function))


def function_mutants(module: str, function: ast.FunctionDef) -> Iterator[Mutant]:
    """`function` with one condition changed, or one count left out."""
    for node, attribute, expression in list(_conditions(function)):
        for what, changed in _changes(expression):
            setattr(node, attribute, changed)
            where = f"{module}.py:{expression.lineno} {function.name}()"
            yield Mutant(module, function.name, f"{where} {what}: {ast.unparse(expression)[:90]}", _source(function))
        setattr(node, attribute, expression)
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign) and _is_count(node):
            value, node.value = node.value, ast.Constant(0)
            where = f"{module}.py:{node.lineno} {function.name}()"
            yield Mutant(module, function.name, f"{where} not counted: {ast.unparse(node.target)}", _source(function))
            node.value = value


def module_mutants(module: str) -> Iterator[Mutant]:
    for function in _compiled(ast.parse((KERNELS / f"{module}.py").read_text())):
        function.decorator_list = []
        yield from function_mutants(module, function)


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
