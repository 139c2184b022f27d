"""Mutants: one change each to a rule of the policy table, or to a condition or count of the compiled kernels' sources."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernels.policy import PROPOSALS, REGIMES, Behaviour

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
MODULES = ("mmu", "mmu_notifier", "primary_mmu", "fault", "calls", "dirty_log", "daemons", "locks", "memory")
BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
COUNTED = ("counters", "gauges", "vm")  # arrays of the machine whose updates are rules of their own


@dataclass(frozen=True)
class Mutant:
    """`module` of kernels, and its source with one thing changed."""

    module: str
    name: str
    source: str


def _where(module: str, node: ast.AST) -> str:
    return f"{module}.py:{getattr(node, 'lineno', 0)}"


def _conditions(tree: ast.AST) -> Iterator[tuple[ast.AST, str, ast.expr]]:
    """(node, attribute, expression) of every condition in a compiled function."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any(getattr(d, "id", "") == "jit" for d in function.decorator_list):
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


def condition_mutants(module: str) -> Iterator[Mutant]:
    text = (KERNELS / f"{module}.py").read_text()
    tree = ast.parse(text)
    for node, attribute, expression in list(_conditions(tree)):
        for what, changed in _changes(expression):
            setattr(node, attribute, changed)
            source = ast.unparse(ast.fix_missing_locations(tree))
            yield Mutant(module, f"{_where(module, expression)} {what}: {ast.unparse(expression)[:90]}", source)
        setattr(node, attribute, expression)
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign) and _is_count(node):
            value, node.value = node.value, ast.Constant(0)
            yield Mutant(
                module, f"{_where(module, node)} not counted: {ast.unparse(node.target)}", ast.unparse(ast.fix_missing_locations(tree))
            )
            node.value = value


def policy_mutants() -> Iterator[Mutant]:
    """Each entry of the table the other way round: every change of a regime, every proposal."""
    text = (KERNELS / "policy.py").read_text()
    for number, regime in enumerate(REGIMES):
        for behaviour, value in regime.changes.items():
            if number or behaviour in (Behaviour.CHANGE_PTE, Behaviour.HUGETLB_ZAP_TWICE, Behaviour.LAST_SUBPAGE_REUSE):
                flip = f"\nREGIMES[{number}].changes[Behaviour.{behaviour.name}] = {1 - value}\n"
                yield Mutant("policy", f"policy.py: {regime.since} {behaviour.name} = {1 - value}", text + flip)
    for name, proposal in PROPOSALS.items():
        for behaviour in proposal.changes:
            drop = f"\ndel PROPOSALS[{name!r}].changes[Behaviour.{behaviour.name}]\n"
            yield Mutant("policy", f"policy.py: proposal {name} without {behaviour.name}", text + drop)


def all_mutants() -> list[Mutant]:
    return [*policy_mutants(), *(mutant for module in MODULES for mutant in condition_mutants(module))]
