"""Limits of the house, as failing tests: size of functions and modules, nesting, names, complete tables."""

import ast
from pathlib import Path

import pytest

import kernels.spec
from kernels.cost import DEFAULT_COSTS, Cost
from kernels.spec import Counter, Gauge, Phase
from sweep.configs import config_root, load_costs
from sweep.explain import WORDS
from sweep.schema import POINTS, STEPS

ROOT = Path(kernels.spec.__file__).parent.parent
SOURCES = sorted([*(ROOT / "kernels").rglob("*.py"), *(ROOT / "sweep").rglob("*.py")])
MAX_FUNCTION, MAX_MODULE, MAX_NESTING = 70, 600, 4
FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def depth(node: ast.AST, inside: int = 0) -> int:
    """Nested blocks; an elif does not nest."""
    deepest = inside
    for child in ast.iter_child_nodes(node):
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, depth(child, inside + (isinstance(child, NESTING) and not chained)))
    return deepest


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_MODULE
    assert path.stem not in FORBIDDEN_NAMES
    for function in functions(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= MAX_FUNCTION, f"{function.name} has {length} lines"
        assert depth(function) <= MAX_NESTING, f"{function.name} nests {depth(function)} deep"


@pytest.mark.parametrize(
    "name", ["alone", "blocks", "engine", "fault", "learned", "locks", "mmu", "mmu_notifier", "primary_mmu", "schedule", "state"]
)
def test_compiled_code_compares_no_strings(name: str) -> None:
    tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text())
    compared = [c for node in ast.walk(tree) if isinstance(node, ast.Compare) for c in [node.left, *node.comparators]]
    assert not [c.value for c in compared if isinstance(c, ast.Constant) and isinstance(c.value, str)]


def test_every_public_function_of_the_model_says_what_it_is() -> None:
    for name in ("simulate", "policy", "cost", "workload", "steps", "primary_mmu", "mmu", "mmu_notifier"):
        tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text())
        assert ast.get_docstring(tree), name


def test_costs_of_the_code_are_those_of_the_default_file() -> None:
    file = load_costs("default", config_root())
    assert dict(file.values) == dict(DEFAULT_COSTS)
    assert set(file.ranges) == set(Cost)
    assert file.notes == ()
    for cost, (low, high) in file.ranges.items():
        assert low <= file.values[cost] <= high, cost


def test_every_counter_and_gauge_is_a_column() -> None:
    names = {c.name.lower() for kind in (Counter, Gauge) for c in kind}
    assert names <= {column.name for column in POINTS}
    assert names <= {column.name for column in STEPS}
    assert set(WORDS) == set(Phase)


def test_columns_are_unique_and_carry_their_unit() -> None:
    for columns in (POINTS, STEPS):
        names = [column.name for column in columns]
        assert len(names) == len(set(names))
        assert len({column.doc for column in columns}) == len(columns)  # each says its own
        for column in columns:
            if column.group == "time" and column.name != "pages_per_s_per_vcpu":
                assert column.name.endswith("_ns"), column.name
