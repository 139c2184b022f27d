"""Counts of real kernels (tests/cases/*.json, measured under emulation; TDP, legacy and shadow MMU): every one, exactly."""

import json
from pathlib import Path
from typing import Any

import pytest

from sweep.configs import Workload, load_costs
from sweep.parameters import Point
from sweep.plan import PlannedPoint
from sweep.point import Context, simulate_point
from sweep.steps import STEP, check_steps

FILES = sorted((Path(__file__).parent / "cases").glob("*.json"))
DERIVED = {"pf_taken_less_spurious": lambda c: c["pf_taken"] - c["pf_spurious"]}


def cases() -> list[Any]:
    found = []
    for path in FILES:
        for case in json.loads(path.read_text())["cases"]:
            found.append(pytest.param(case, id=f"{path.stem}:{case['name']}:{case['point']['memory']}"))
    return found


def run_case(case: dict[str, Any]) -> list[dict[str, int]]:
    point = Point.model_validate(case["point"])
    workload = Workload("case", tuple(STEP.validate_python(step) for step in case["steps"]), Path())
    assert not check_steps(workload.specs, Path(), point)
    context = Context("case", {point.workload: workload}, {point.costs: load_costs("default", Path())})
    run = simulate_point(PlannedPoint("", point.model_dump(), 0, 0), context)
    return [step.counters | step.gauges for step in run.steps]


@pytest.mark.parametrize("case", cases())
def test_counts_equal_the_kernels(case: dict[str, Any]) -> None:
    for number, (expected, counted) in enumerate(zip(case["expect"], run_case(case), strict=True)):
        wrong = {}
        for name, value in expected.items():
            have = DERIVED[name](counted) if name in DERIVED else counted[name]
            low, high = value if isinstance(value, list) else (value, value)
            if not low <= have <= high:
                wrong[name] = (have, value)
        assert not wrong, f"step {number} {case['steps'][number]}: (model, kernel) {wrong}"


def test_every_file_contributes() -> None:
    assert {case.id.split(":")[0] for case in cases()} == {path.stem for path in FILES}
    assert len(FILES) >= 23
    assert len(cases()) >= 4400


def test_workload_type_is_what_points_use() -> None:
    assert Workload("x", (), Path()).digest() == Workload("y", (), Path()).digest()
