"""Counts of real kernels' TDP MMU (tests/cases/*.json, measured under emulation): every one that this version covers, exactly."""

import json
from pathlib import Path
from typing import Any

import pytest

from kernels.spec import Backing
from sweep.configs import Workload
from sweep.parameters import PARAMETERS, Point
from sweep.quantity import parse_size
from sweep.steps import STEP, STEP_CLASSES, build_step

FILES = sorted((Path(__file__).parent / "cases").glob("kernel-*-tdp*.json"))
DERIVED = {"pf_taken_less_spurious": lambda c: c["pf_taken"] - c["pf_spurious"]}
NOT_COVERED = {
    "anon4k/dirtylog_after": "dirty_log",
    "anon4k/dontneed_refault": "dontneed",
    "anon4k/fork_mapped": "fork",
    "thp_off4k/seqW": "offset",
    "thp_uzp1/dirtylog_after": "dirty_log",
    "thp_uzp1/dontneed_refault": "dontneed",
    "thp_uzp1/fork_mapped": "fork",
}


def cases() -> list[Any]:
    found = []
    for path in FILES:
        for case in json.loads(path.read_text())["cases"]:
            if covered(case):
                found.append(pytest.param(case, id=f"{path.stem.removeprefix('kernel-')}:{case['name']}"))
    return found


def covered(case: dict[str, Any]) -> bool:
    """Steps and parameters that this version models; decided by what it offers, not by name."""
    point = case["point"]
    known = set(point) <= set(PARAMETERS) and point["backing"].upper() in Backing.__members__
    return known and parse_size(point.get("offset", "0")) == 0 and all(step["op"] in STEP_CLASSES for step in case["steps"])


def run_case(case: dict[str, Any]) -> list[dict[str, int]]:
    from kernels import simulate

    point = Point.model_validate(case["point"])
    steps = [build_step(STEP.validate_python(step), Path()) for step in case["steps"]]
    run = simulate(
        steps=steps,
        kernel=point.kernel,
        backing=point.backing,
        memory=point.memory,
        vcpus=point.vcpus,
        use_zero_page=point.use_zero_page,
    )
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


def test_what_is_not_covered_is_known_by_name() -> None:
    names = {case["name"] for path in FILES for case in json.loads(path.read_text())["cases"] if not covered(case)}
    assert names == set(NOT_COVERED)


def test_every_file_contributes() -> None:
    assert len(FILES) == 5
    assert len(cases()) >= 135


def test_workload_type_is_what_points_use() -> None:
    assert Workload("x", (), Path()).digest() == Workload("y", (), Path()).digest()
